"""Architecture: imports between packages, and agreement of families with their YAML."""

import ast
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from permafrost.config.environment import CONF
from permafrost.config.families import FAMILIES
from permafrost.config.options import options_of, resolve_implementation
from permafrost.config.sections import group_members
from permafrost.config.store import OUTPUTS
from permafrost.config.verbs import VERBS
from tests.support.composition import config_of
from tests.support.items import for_each
from tests.support.papers import needs_papers
from tests.support.paths import ROOT
from tests.tree import whole

MODULES = sorted([*ROOT.glob("pipeline/*/**/*.py"), *ROOT.glob("stages/*.py")])


@dataclass(frozen=True)
class Source:
    """Facts about a file from one walk of its tree, which takes longer than the tests that ask for them.

    imports     modules that the file imports, including imports inside functions
    docstrings  docstrings, including those of fields
    names       (line, name) of functions and parameters
    described   (line, name, docstring) of functions and classes
    top_names   public names that the module defines, without those of types
    definition  line of the first function or class of the module, None without any
    """

    imports: tuple[str, ...]
    docstrings: tuple[str, ...]
    names: tuple[tuple[int, str], ...]
    described: tuple[tuple[int, str, str], ...]
    top_names: tuple[str, ...]
    definition: int | None


@cache
def source_of(path: Path) -> Source:
    imports, docstrings, names, described = [], [], [], []
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            imports.append(node.module)
            imports += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.arg):
            name = node.arg if isinstance(node, ast.arg) else node.name
            names.append((node.lineno, name))
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            described.append((node.lineno, node.name, ast.get_docstring(node) or ""))
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else ():
            value = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                docstrings.append(value.value)
    definitions = (n.lineno for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef))
    return Source(
        tuple(imports),
        tuple(docstrings),
        tuple(names),
        tuple(described),
        tuple(top_names(tree)),
        next(definitions, None),
    )


def top_names(tree):
    """Iterate over the public names that a module defines, without those of types."""
    for node in tree.body:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        names = [node.name] if hasattr(node, "name") else [getattr(t, "id", "") for t in targets]
        is_type = isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("TypeVar(")
        yield from (name for name in names if name[:1] not in ("", "_") and not is_type)


def imports_of(path):
    return source_of(path).imports


PACKAGES = {path.parent.name for path in ROOT.glob("pipeline/permafrost_*/__init__.py")}
"""Packages that enter by the plug-in door."""
PAPERS = {path.parent.name for path in ROOT.glob("pipeline/permafrost_papers/*/__init__.py")}
ORDER = (
    {"core"},
    {"storage"},
    {"config"},
    {"store"},
    {"runs"},
    {"sources", "models", "loading"},
    {"losses"},
    {"annotation", "cluster"},
    {"evaluation"},
    {"training"},
    {"sweeps"},
    {"verbs"},
    {"functions", "library"},
    {"permafrost_sources"},
    {"permafrost_evaluators", "permafrost_explainers"},
    {
        "permafrost_estimate",
        "permafrost_export",
        "permafrost_doctor",
        "permafrost_findings",
        "permafrost_timm",
        "permafrost_trackers",
        "permafrost_transformers",
    },
    {"permafrost_exchange", "permafrost_report"},
    {"probe_set"},  # shared by papers
    PAPERS,
    {"stages"},
)
"""Order of the rooms and packages, each of which imports only earlier ones, and no room a package.

cli and __main__ import core, storage, config and runs only, and __main__ also cli."""


def name_of(path):
    """Return the name under which a module of the package or a stage is imported."""
    path = path.relative_to(
        ROOT / "pipeline" if "pipeline" in path.relative_to(ROOT).parts else ROOT
    )
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def room_of(module):
    """Room of a module: <room> of permafrost.<room> or permafrost_papers.<room>, a package, or None for others."""
    package, _, rest = module.partition(".")
    if package in ("permafrost", "permafrost_papers"):
        return rest.split(".")[0]
    return package if package in (*PACKAGES, "stages") else None


def test_rooms_import_only_what_stands_to_their_left():
    level = {room: place for place, rooms in enumerate(ORDER) for room in rooms}
    allowed = {room: {o for o in level if level[o] < level[room]} | {room} for room in level}
    allowed = {
        room: names - (PAPERS - {room}) - {"functions", "library"}
        for room, names in allowed.items()
    }
    allowed |= {name: {"core", "storage", "config", "runs"} for name in ("cli", "__main__")}
    allowed["stages"] = {"cli"}
    for name in ("functions", "library", "__main__"):
        allowed[name] |= {"cli"}
    patterns = ("permafrost/*", "permafrost_papers/*", "permafrost_*")
    rooms = {p.parent.name for each in patterns for p in ROOT.glob(f"pipeline/{each}/__init__.py")}

    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in MODULES
        for module in imports_of(path)
        if (room := room_of(module)) in allowed
        and name_of(path) != "permafrost"  # which exports names of both
        and room not in allowed[room_of(name_of(path))]
    ]

    assert rooms - {"permafrost_papers"} | {"functions", "library", "stages", "probe_set"} == set(
        level
    )
    assert {p.name for p in ROOT.glob("pipeline/permafrost/*.py")} == {
        "__init__.py",
        "__main__.py",
        "cli.py",
        "functions.py",
        "library.py",
    }
    assert not wrong


def test_a_loss_knows_no_store_and_a_pass_no_loss():
    known = {
        room: {m for path in MODULES if room_of(name_of(path)) == room for m in imports_of(path)}
        for room in ("losses", "annotation")
    }

    stores = ("permafrost.store.", "permafrost.loading.dataset")
    assert not [module for module in known["losses"] if module.startswith(stores)]
    assert not [module for module in known["annotation"] if room_of(module) == "losses"]


def test_core_holds_what_three_rooms_need():
    """Each module of core is needed by three rooms, themselves or through other modules of core."""
    users = {path.stem: set() for path in ROOT.glob("pipeline/permafrost/core/*.py")}
    inner = {name: set() for name in users}
    for path in MODULES:
        room = room_of(name_of(path))
        for module in imports_of(path):
            name = module.split(".")[2:3]
            if module.startswith("permafrost.core.") and name[0] in users:
                if room == "core":
                    inner[name[0]].add(path.stem)
                else:
                    users[name[0]].add(room)
    for _ in users:  # as far as the longest chain of imports could reach
        for name, modules in inner.items():
            users[name].update(*(users[module] for module in modules))

    assert {name for name, rooms in users.items() if len(rooms) < 3} == {"__init__"}


def test_no_two_modules_import_each_other():
    """Longer import cycles are excluded as well, within and between rooms, including imports inside functions."""
    names = {name_of(path): path for path in MODULES}
    waiting = {n: {m for m in imports_of(p) if m in names} - {n} for n, p in names.items()}
    while free := {name for name, needed in waiting.items() if not needed & set(waiting)}:
        waiting = {name: needed for name, needed in waiting.items() if name not in free}

    assert not waiting


CONVENTIONS = {"EVALUATOR", "PROVIDER", "NAME", "logger"}
"""Names that every member of a family has in its own module."""


def test_a_public_name_is_defined_by_one_module():
    defined = {}
    for path in ROOT.glob("pipeline/**/*.py"):
        for name in set(source_of(path).top_names) - CONVENTIONS:
            defined.setdefault(name, []).append(name_of(path))

    of_papers = {name for name, modules in defined.items() if name == "register"}
    assert len(defined) > 1000  # control
    assert {n: m for n, m in defined.items() if len(m) > 1 and n not in of_papers} == {}


def test_a_logger_stands_at_the_top_and_a_heading_has_content():
    wrong = []
    for path in MODULES:
        text = path.read_text()
        first = source_of(path).definition
        late = re.search(r"^logger = ", text, re.MULTILINE)
        if late and first and text.count("\n", 0, late.start()) >= first:
            wrong.append(f"{path.name}: logger")
        wrong += [
            f"{path.name}: {heading[1]}"
            for heading in re.finditer(r"^# ---- (.+?) -+\n\s*(?=# ----|\Z)", text, re.MULTILINE)
        ]

    assert wrong == []


WEB_LINK = re.compile(r"\[[^\]]*\]\(https://[^)]*\)")
"""Link to a file of another project."""
OUTSIDE = {"zero_to_fp32.py", "drawn.py"}
"""Python files of other projects. Those of users in examples begin with my_."""


@needs_papers
def test_a_file_that_a_comment_or_a_page_names_exists():
    files = [
        f"/{path.relative_to(ROOT).as_posix()}"
        for pattern in ("*.py", "[a-z]*/**/*.py")
        for path in ROOT.glob(pattern)
    ]
    texts = [*MODULES, *ROOT.glob("docs/**/*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    named = [
        (path.name, match[0])
        for path in texts
        for match in re.finditer(r"\w[\w/]*\.py\b", WEB_LINK.sub("", path.read_text()))
        if match[0] not in OUTSIDE and not match[0].startswith("my_")
    ]

    assert len(named) > 300  # control
    assert [(p, n) for p, n in named if not any(f.endswith(f"/{n}") for f in files)] == []


def test_an_init_holds_the_docstring_of_its_room_alone():
    paths = {*ROOT.glob("pipeline/*/**/__init__.py")} - {ROOT / "pipeline/permafrost/__init__.py"}
    assert len(paths) > 20  # control
    for path in paths:
        tree = ast.parse(path.read_text())
        assert len(tree.body) == 1, path
        assert "Read first: " in ast.get_docstring(tree), path


def test_stages_import_no_stage():
    for path in ROOT.glob("stages/*.py"):
        assert not [m for m in imports_of(path) if m.split(".")[0] == "stages"], path


def test_only_the_cluster_room_knows_ray():
    knowing = [p for p in MODULES if any(m.split(".")[0] == "ray" for m in imports_of(p))]

    assert {p.relative_to(ROOT).parts[:3] for p in knowing} == {
        ("pipeline", "permafrost", "cluster")
    }


def test_every_stage_is_a_verb_and_every_verb_a_stage():
    stages = {path.stem for path in ROOT.glob("stages/*.py")} - {"__init__", "__main__"}

    assert stages == set(VERBS)


def test_every_stage_opens_with_the_help_of_its_verb_and_runs_it():
    for verb in VERBS:
        tree = ast.parse((ROOT / "stages" / f"{verb}.py").read_text())
        doc = ast.get_docstring(tree)
        assert doc == VERBS[verb].help
        assert f"permafrost {verb} " in doc
        assert "Writes" in doc
        assert [ast.unparse(node) for node in tree.body[1:]] == [
            "from permafrost.cli import stage_main",
            f"if __name__ == '__main__':\n    stage_main('{verb}')",
        ]


@for_each("group,kind", [(group, kind) for group, of in FAMILIES.items() for kind in of])
def test_a_member_of_a_family_has_its_kind_and_what_implements_it(group, kind):
    cls = FAMILIES[group][kind]

    assert {option.name: option.default for option in options_of(cls)}["kind"] == kind
    if group not in ("cluster", "views") and kind != "none":
        assert resolve_implementation(cls) is not None
    assert not (CONF / group / f"{kind}.yaml").exists()  # the class contains the defaults


def test_every_output_can_be_asked_for():
    config = config_of("precompute", f"annotate.outputs=[{','.join(OUTPUTS)}]")

    assert set(config.annotate.outputs) == set(OUTPUTS)


def test_arguments_are_listed_in_google_style():
    """Tools render `Args:`, and not lists of names and texts with blanks between them."""
    private = re.compile(r"^ *(?:\w+(?:, \w+)*)  +\S", re.MULTILINE)
    wrong = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path in MODULES
        for line, name, docstring in source_of(path).described
        if private.search(docstring)
    ]

    assert wrong == []


def test_a_docstring_begins_with_a_noun_phrase_or_an_imperative():
    begun = [
        f"{path.relative_to(ROOT)}: {text[:60]}"
        for path in [*MODULES, *ROOT.glob("tests/**/*.py")]
        for text in source_of(path).docstrings
        if re.match(r"(Of|What|How|Where|Which)\b", text)
    ]

    assert begun == []


WORDS = re.compile(
    "found|held|asked|taught|seen|said|told|known|kept|wanted|chosen|shown|drawn|moved|named|own|others|each|whole|"
    "places?|there|here|waiting|begun|(of|by)_.*"
)
"""Names that say nothing outside their file: bare participles, and words without a noun."""


def test_no_function_and_no_parameter_has_a_name_that_says_nothing():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path in MODULES
        for line, name in source_of(path).names
        if WORDS.fullmatch(name.strip("_"))
    ]

    assert not wrong


@for_each("group", [*FAMILIES, "augment", "optimizer", "store", "trainer"])
def test_every_member_of_every_group_composes_and_builds(group):
    for member in group_members(group):
        for verb in VERBS:
            if group in VERBS[verb].options.__dataclass_fields__:
                if (group, member, verb) == ("teacher", "none", "teach"):
                    continue
                words = ["variants={a: []}"] if verb == "sweep" else []
                cls = FAMILIES.get(group, {}).get(member)
                words += [] if cls is None else cls.minimal
                config_of(verb, f"{group}={member}", *words)


def test_a_submitted_job_joins_its_cluster_where_its_stage_uses_one():
    makefile = (ROOT / "Makefile").read_text()
    named = re.search(r"^CLUSTER_STAGES := (.*)$", makefile, re.MULTILINE)[1].split()

    using = {verb for verb, v in VERBS.items() if "cluster" in v.options.__dataclass_fields__}
    assert set(named) == using


def modules_loaded_by(code):
    script = (
        f"{code}\nimport sys; print(' '.join(sorted({{m.split('.')[0] for m in sys.modules}})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(done.stdout.splitlines()[-1].split())


def test_help_and_a_repeated_command_do_not_wait_for_torch_or_ray():
    """One process prints the help of all verbs."""
    loaded = modules_loaded_by(
        f"from permafrost.cli import _help\nfor verb in {list(VERBS)!r}: _help(verb)"
    )

    assert not loaded & {"torch", "ray", "kornia", "zarr", "matplotlib", "sklearn"}


@pytest.mark.slow
def test_importing_any_module_does_nothing_and_the_serial_executor_imports_no_ray():
    """Imports start no Ray, configure no logging, initialize no CUDA and write no files."""
    others = ("predict.py", "store_dataset.py")  # a script, and a data source of Ray Data
    names = [name_of(path) for path in MODULES if path.name not in others]
    code = (
        "import importlib, logging, os\n"
        "before = set(os.listdir('.')), list(logging.getLogger().handlers)\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "import sys, torch\n"
        "assert 'ray' not in sys.modules\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert (set(os.listdir('.')), list(logging.getLogger().handlers)) == before\n"
        "from permafrost.cluster.executors import ExecutorChoice\n"
        "from permafrost.config.cluster import LocalClusterConfig\n"
        "executor = ExecutorChoice('serial', LocalClusterConfig()).for_records(10**6)\n"
        "list(executor.run_tasks([], print))"
    )

    loaded = modules_loaded_by(code)

    assert "torch" in loaded
    assert "ray" not in loaded


def test_the_tree_is_within_its_size():
    """Whoever needs more removes something first; whoever removes more than 100 lowers the numbers of size.json.

    A change of a contributor may raise them, and says why: the maintainers then remove something.
    """
    limits = json.loads((ROOT / "tests/size.json").read_text())
    actual = whole(ROOT)

    exceeded = {name: size for name, size in actual.items() if size > limits[name]}
    assert not exceeded, (
        f"larger than tests/size.json allows (python -m tests.tree counts): {exceeded}; remove something, or raise "
        "the numbers and say why (CONTRIBUTING.md)"
    )
    lower = {name: size for name, size in actual.items() if size < limits[name] - 100}
    assert not lower, f"write these numbers into tests/size.json: {lower}"
