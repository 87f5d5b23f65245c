"""Size and streets of the source tree, counted from its text.

    python -m tests.tree                 this checkout
    python -m tests.tree 6a9defb HEAD    commits, side by side

statements       of pipeline/ and stages/, neither docstrings nor imports; of the core (permafrost and stages), and of
                 each package that enters by the plug-in door
logic lines      of pipeline/ and stages/: neither blank, comment, docstring nor import
reached          modules that the module of a verb's function imports, itself or through others, also inside functions,
                 but not for types alone
buckets          files outside of storage/ that ask whether a path is in a bucket, or act on it
shared names     names of modules that several modules have, except __init__, and without stages/
double classes   public class names that several modules define
climbs, returns  of the way of `config` through a stage: its functions are followed in the order of their calls, as long
                 as they are given `config`, a part of it, or what was made of it, such as a plan. Methods of a plan are
                 followed, too, as functions that are given its options. A climb goes back to a caller that then calls
                 further; a return enters a file that was left before.

size.json has the largest statements, logic lines and lines of tests that the tree may have (test_architecture.py).
"""

from __future__ import annotations

import ast
import io
import itertools
import subprocess
import sys
import tarfile
import tempfile
import tokenize
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.paths import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

WAYS = {"precompute": "config", "distill": "config", "evaluate": "config"}
FUNCTIONS = {
    "precompute": "permafrost.verbs.precompute:precompute_store",
    "distill": "permafrost.training.distill:distill_student",
    "evaluate": "permafrost.evaluation.evaluate:evaluate_student",
}
"""Functions of these verbs, which earlier trees have in stages/."""
PAPERS = {"ked", "unicam", "interpretability"}
"""Papers that earlier trees have in the package itself."""
_OF_BUCKETS = {
    *("is_address", "is_in_bucket", "is_remote", "bucket_of", "cache_of", "fetch_file"),
    *("map_ahead", "listed_once", "collected_uploads"),
}
_OF_PLANS = ("self.options", "self.config", "self.inputs")
"""Attributes by which the methods of a plan read its options."""
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


# ---- lines ---------------------------------------------------------------------------------------


def docstring_lines(tree: ast.AST) -> set[int]:
    """Return the lines of all strings that are statements: docstrings of modules, classes, functions and fields."""
    return {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }


def import_lines(tree: ast.AST) -> set[int]:
    """Return the lines of all import statements."""
    return {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }


def code_lines(text: str) -> set[int]:
    """Return the lines with a token that is neither a comment nor white space."""
    blank = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in blank and token.type != tokenize.ENDMARKER:
            lines.update(range(token.start[0], token.end[0] + 1))
    return lines


# ---- ways ----------------------------------------------------------------------------------------


class Tree:
    """Modules of a source tree by the name under which they are imported."""

    def __init__(self, root: Path) -> None:
        sources = root / "pipeline/permafrost"
        top = root / "pipeline" if sources.is_dir() else root
        self.paths = {
            ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__"): path
            for folder, pattern in ((top, "permafrost*/**/*.py"), (root, "stages/*.py"))
            for path in sorted(
                folder.glob(
                    pattern if sources.is_dir() else pattern.replace("permafrost*", "pipeline")
                )
            )
        }
        self.trees = {name: ast.parse(path.read_text()) for name, path in self.paths.items()}
        self.names = {name: dict(self._names_of(name)) for name in self.trees}
        self.classes = {
            node.name: (name, node)
            for name, tree in self.trees.items()
            for node in tree.body
            if isinstance(node, ast.ClassDef)
        }
        self.owners = {
            id(method): place
            for place in self.classes.values()
            for method in place[1].body
            if isinstance(method, _FUNCTIONS)
        }

    def _names_of(self, module: str) -> Iterator[tuple[str, tuple[str, ast.AST]]]:
        """Yield the functions and classes that a module defines, and those that it imports, by their name there."""
        tree = self.trees[module]
        for node in tree.body:
            if isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
                yield node.name, (module, node)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module in self.trees:
                defined = {
                    each.name: each
                    for each in self.trees[node.module].body
                    if isinstance(each, (*_FUNCTIONS, ast.ClassDef))
                }
                for alias in node.names:
                    if alias.name in defined:
                        yield alias.asname or alias.name, (node.module, defined[alias.name])

    def follow(
        self, module: str, function: ast.AST, parameter: str
    ) -> Iterator[tuple[int, str, str]]:
        """Yield (depth, module, function) of each call that is given the parameter or a part of it, in order."""
        visited: set[tuple[str, str]] = set()

        def visit(
            module: str, function: ast.AST, parameter: str, depth: int
        ) -> Iterator[tuple[int, str, str]]:
            key = (module, getattr(function, "name", ""))
            if key in visited:
                return
            visited.add(key)
            yield depth, *key
            carriers = {*_OF_PLANS} if parameter == "self" else {parameter}
            for node in ast.walk(
                function
            ):  # names to which it is assigned, as in config = resolve(config)
                if isinstance(node, ast.Assign) and _carries(node.value, carriers):
                    carriers |= {
                        name.id
                        for target in node.targets
                        for name in ast.walk(target)
                        if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
                    }
            plans = dict(self._plans_in(module, function))
            calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
            for call in sorted(
                calls, key=lambda call: (call.end_lineno or 0, call.end_col_offset or 0)
            ):
                if isinstance(call.func, ast.Attribute):
                    value = call.func.value
                    plan = plans.get(getattr(value, "id", "")) or self._plan_made_by(module, value)
                    method = plan and self._method_of(*plan, call.func.attr)
                    if method:
                        yield from visit(*method, "self", depth + 1)
                name = call.func.id if isinstance(call.func, ast.Name) else None
                if name not in self.names[module]:
                    continue
                place, target = self.names[module][name]
                if isinstance(target, ast.ClassDef):
                    continue
                given = _parameter_given(target, call, carriers)
                if given is not None:
                    yield from visit(place, target, given, depth + 1)

        yield from visit(module, function, parameter, 0)

    def _plans_in(
        self, module: str, function: ast.AST
    ) -> Iterator[tuple[str, tuple[str, ast.ClassDef]]]:
        """Yield the names of plans in a function, by their annotation or that of the function that made them."""
        named = [(argument.arg, argument.annotation) for argument in function.args.args]  # type: ignore[attr-defined]
        for node in ast.walk(function):
            bound: list[tuple[ast.AST, ast.AST | None]] = []
            if isinstance(node, ast.Assign):
                bound = [(target, node.value) for target in node.targets]
            elif isinstance(node, ast.With):  # also as in closing(plan_precompute(config)) as plan
                bound = [(item.optional_vars, item.context_expr) for item in node.items]  # type: ignore[misc]
            for target, value in bound:
                made = [value, *getattr(value, "args", ())]
                plan = next(filter(None, (self._plan_made_by(module, each) for each in made)), None)
                if plan and isinstance(target, ast.Name):
                    yield target.id, plan
        for name, hint in named:
            cls = getattr(hint, "id", None) or str(getattr(hint, "value", ""))
            if cls.endswith(("Plan", "Job")) and (place := self.classes.get(cls)):
                yield name, place
        if cls := self.owners.get(id(function)):
            yield "self", cls

    def _plan_made_by(self, module: str, value: ast.AST | None) -> tuple[str, ast.ClassDef] | None:
        """Return the plan that a call returns by its function's annotation, None for anything else."""
        made_by = self.names[module].get(getattr(getattr(value, "func", None), "id", ""))
        if not made_by or not isinstance(made_by[1], _FUNCTIONS):
            return None
        hint = ast.unparse(made_by[1].returns) if made_by[1].returns else ""
        return self.classes.get(hint) if hint.endswith(("Plan", "Job")) else None

    def _method_of(self, module: str, cls: ast.ClassDef, name: str) -> tuple[str, ast.AST] | None:
        """Return the module and the definition of a method, of the class or of one that it is derived from."""
        for node in cls.body:
            if isinstance(node, _FUNCTIONS) and node.name == name:
                return module, node
        bases = (self.classes.get(getattr(base, "id", "")) for base in cls.bases)
        return next(
            (method for base in bases if base and (method := self._method_of(*base, name))), None
        )

    def function_of(self, verb: str) -> tuple[str, ast.AST]:
        """Return the module and the function of a verb."""
        module, _, name = FUNCTIONS[verb].partition(":")
        if name in self.names.get(module, {}) and "run" not in self.names[f"stages.{verb}"]:
            return self.names[module][name]
        of_stage = self.names[f"stages.{verb}"]
        return of_stage["run" if "run" in of_stage else verb]

    def way(self, stage: str) -> tuple[int, int, int, int]:
        """Return the stops, files, climbs and returns of `config` from the function `run` of a stage."""
        module, function = self.function_of(stage)
        stops = list(self.follow(module, function, WAYS[stage]))
        climbs = sum(later[0] <= earlier[0] for earlier, later in itertools.pairwise(stops))
        returns, left = 0, set()
        for earlier, later in itertools.pairwise(stops):
            if earlier[1] != later[1]:
                left.add(earlier[1])
                returns += later[1] in left
        return len(stops), len({module for _, module, _ in stops}), climbs, returns


def _carries(value: ast.AST, carriers: set[str]) -> bool:
    return any(_is_carrier(node, carriers) for node in ast.walk(value))


def _is_carrier(node: ast.AST, carriers: set[str]) -> bool:
    return isinstance(node, ast.Name | ast.Attribute) and ast.unparse(node) in carriers


def _parameter_given(function: ast.AST, call: ast.Call, carriers: set[str]) -> str | None:
    """Return the parameter to which a call passes one of the carriers or an attribute of it, None if to none."""

    def is_part(value: ast.AST) -> bool:
        while isinstance(value, ast.Attribute) and not _is_carrier(value, carriers):
            value = value.value
        return _is_carrier(value, carriers)

    arguments = function.args  # type: ignore[attr-defined]
    positional = [each.arg for each in (*arguments.posonlyargs, *arguments.args)]
    for name, value in zip(positional, call.args, strict=False):
        if is_part(value):
            return str(name)
    return next((k.arg for k in call.keywords if k.arg and is_part(k.value)), None)


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imported_modules(tree: ast.AST, known: set[str]) -> Iterator[str]:
    """Yield the modules of a source tree that a module imports when it runs."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
            yield from (name for name in names if name in known)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif not _is_for_types(node):
            yield from imported_modules(node, known)


def reached(tree: Tree, start: str) -> set[str]:
    """Return the modules that a module imports, itself or through others, without packages."""
    known, waiting, met = set(tree.trees), [start], set[str]()
    while waiting:
        name = waiting.pop()
        if name not in met:
            met.add(name)
            waiting += imported_modules(tree.trees[name], known)
    return {name for name in met - {start} if tree.paths[name].stem != "__init__"}


# ---- figures -------------------------------------------------------------------------------------


def statements_of(tree: ast.AST) -> int:
    """Count the statements that are neither docstrings nor imports."""
    return sum(
        isinstance(node, ast.stmt)
        and not isinstance(node, ast.Import | ast.ImportFrom)
        and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        for node in ast.walk(tree)
    )


def asks_for_buckets(tree: ast.AST) -> bool:
    """Return whether a module uses a name that is about buckets."""
    return any(
        getattr(node, "id", getattr(node, "attr", "")) in _OF_BUCKETS for node in ast.walk(tree)
    )


def whole(root: Path) -> dict[str, int]:
    """Count what size.json limits."""
    modules = [path for name in ("pipeline", "stages") for path in (root / name).rglob("*.py")]
    statements, logic = 0, 0
    for path in modules:
        text = path.read_text()
        tree = ast.parse(text)
        statements += statements_of(tree)
        logic += len(code_lines(text) - docstring_lines(tree) - import_lines(tree))
    tests = (path.read_text().count("\n") for path in (root / "tests").rglob("*.py"))
    return {"statements": statements, "logic lines": logic, "lines of tests": sum(tests)}


def figures(root: Path) -> dict[str, int]:
    """Count a source tree."""
    tree = Tree(root)
    packages: dict[str, set[str]] = defaultdict(set)
    for name in tree.trees:
        top, _, rest = name.partition(".")
        is_core = top in ("permafrost", "pipeline", "stages") and rest.split(".")[0] not in PAPERS
        packages["core" if is_core else top].add(name)
    counts = {name: statements_of(module) for name, module in tree.trees.items()}
    imports, longest = 0, 0
    for name, path in tree.paths.items():
        imports += len(import_lines(tree.trees[name]))
        longest = max(longest, path.read_text().count("\n"))
    stems = Counter(
        path.stem
        for name, path in tree.paths.items()
        if path.stem != "__init__" and not name.startswith("stages.")
    )
    classes: dict[str, set[str]] = defaultdict(set)
    for name, module in tree.trees.items():
        for node in module.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                classes[node.name].add(name)
    totals = whole(root)
    values = {
        "files in pipeline/ and stages/": len(tree.paths),
        "files of the core": len(packages["core"]),
        "statements": totals["statements"],
        "statements of the core": sum(counts[name] for name in packages["core"]),
        "logic lines": totals["logic lines"],
        "import lines": imports,
        "lines of the longest file": longest,
        "shared names": sum(count > 1 for count in stems.values()),
        "double classes": sum(len(modules) > 1 for modules in classes.values()),
        "lines of tests": totals["lines of tests"],
    }
    values["files that ask for buckets"] = sum(
        asks_for_buckets(module)
        for name, module in tree.trees.items()
        if not name.startswith(("permafrost.storage", "permafrost.core"))
    )
    for package, modules in packages.items():
        values[f"{package}: statements"] = sum(counts[name] for name in modules)
        values[f"{package}: files"] = len(modules)
        texts = [tree.paths[name].read_text() for name in modules]
        values[f"{package}: lines"] = sum(text.count("\n") for text in texts)
    for stage in WAYS:
        values[f"{stage}: reached"] = len(reached(tree, tree.function_of(stage)[0]))
        for kind, count in zip(
            ("stops", "files", "climbs", "returns"), tree.way(stage), strict=True
        ):
            values[f"{stage}: {kind}"] = count
    return values


def extract(commit: str, folder: Path) -> Path:
    """Write the files of a commit to a folder."""
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")
    return folder


def main() -> None:
    commits = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        columns = {each: figures(extract(each, Path(folder) / each)) for each in commits}
    columns = columns or {"here": figures(ROOT)}
    print("| | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for name in dict.fromkeys(name for values in columns.values() for name in values):
        print(
            f"| {name} | "
            + " | ".join(f"{values.get(name, 0):,}" for values in columns.values())
            + " |"
        )


if __name__ == "__main__":
    main()
