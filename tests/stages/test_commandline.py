"""Command line: options, errors and help."""

import errno
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import pytest
import yaml

from docs.options import options_page
from permafrost.__main__ import VERB_GROUPS
from permafrost.__main__ import main as console_main
from permafrost.cli import next_command, stage_main
from permafrost.config import plugins
from permafrost.config.compose import compose
from permafrost.config.methods import E2KDConfig, KDConfig, LabelsConfig
from permafrost.config.models import NoModelConfig
from permafrost.config.sections import option_paths, section_names, sections_of_verb
from permafrost.config.verbs import VERBS
from permafrost.core.errors import ConfigError
from tests.support.composition import NAMED, config_of
from tests.support.items import for_each
from tests.support.papers import HAS_PAPERS, needs_papers
from tests.support.paths import ROOT
from tests.support.processes import run_program
from tests.support.slow import slow

PAPERS_OPTIONS = {"tau": 1.0, "lambda_ce": 0.0, "lambda_kd": 1.0}
READ = {
    "distill": {"method": KDConfig(**PAPERS_OPTIONS)},
    "distill method=e2kd": {"method": E2KDConfig(**PAPERS_OPTIONS, lambda_map=1.0)},
    "precompute teacher=cifar teacher.name=resnet56 teacher.weights=w.pt":
        {"teacher.kind": "cifar", "teacher.name": "resnet56"},
    "distill method=labels method.label_smoothing=0.1": {"method": LabelsConfig(label_smoothing=0.1)},
    "precompute experiment=demo teacher=none": {"teacher": NoModelConfig()},
    "sweep experiment=demo 'variants={one: [\"method=kd\"]}' seeds=[4]":
        {"variants": {"one": ("method=kd",)}},
    "precompute data=image_table data.path=x.csv 'data.split_names={train: train, prüfung: test}' "
    "'data.only_classes=[weiß,rot (2)]'":
        {"data.split_names": {"train": "train", "prüfung": "test"}, "data.only_classes": ("weiß", "rot (2)")},
    "distill optimizer.lr=1e-3": {"optimizer.lr": 0.001},
}  # fmt: skip
"""Commands, and options as they are read: by name, as the papers have them, with any letters, as numbers."""


@for_each("command,options", READ.items())
def test_what_is_typed_is_what_is_read(command, options):
    config = config_of(*shlex.split(command))

    assert {name: attrgetter(name)(config) for name in options} == options


def test_a_method_knows_its_own_options_only():
    with pytest.raises(ConfigError, match=r"unknown option method\.tau.*label_smoothing"):
        config_of("distill", "method=labels", "method.tau=4")


def do_nothing(config):
    pass


def test_a_teacher_is_typed_for_live_students_only(monkeypatch, capsys):
    work = replace(VERBS["distill"], function=f"{__name__}:do_nothing")
    monkeypatch.setitem(VERBS._members, "distill", work)

    def error_message(*words):
        monkeypatch.setattr("sys.argv", ["distill", *words])
        with pytest.raises(SystemExit):
            stage_main("distill")
        return capsys.readouterr().err

    assert "distill reads teacher=cifar with mode=live only" in error_message(
        *NAMED, "teacher.name=resnet56"
    )
    assert "mode=live" not in error_message(*NAMED, "teacher.name=resnet57", "mode=live")


MISTAKES = {
    "distill data=demo": "distill takes no data=.*it takes: store, student, method",
    "distill methud=kd": r"distill takes no methud= \(did you mean method=kd\?\)",
    "distill method=e2kdd": r"method=e2kdd does not exist \(did you mean e2kd\?\); choose one of: .*\bkd\b",
    "distill method.tua=4": r"unknown option method\.tua \(did you mean method\.tau=\d\?\); available .*lambda_kd",
    "distill trainer.epochs=many": "trainer.epochs must be a whole number, got 'many'",
    "distill trainer.epochs=0": "trainer.epochs must be >= 1, got 0",
    "distill method.tau=-1": "method.tau must be > 0, got -1",
    "distill method=e2kd method.map_control=shufled": "method.map_control must be one of none, shuffled, unaugmented",
    "distill optimizer=adamx": "choose one of: adam, adamw, sgd",
    "distill student.name=resnet19": "resnet8, resnet14, resnet20",
    "distill mode=livid": "mode must be one of frozen, replay, live",
    "distill 'augment.operations=[{kind: wobble}]'": r"augment.operations\[0\].kind must be one of pad_crop",
    "distill tau": "options are written key=value",
    "distill lr=-1": r"optimizer\.lr must be > 0, got -1",
    "distill epoch=5": r"did you mean trainer\.epochs=5\?",
    "distill tua=5": r"did you mean method\.tau=5\?",
    "distill trainer.lr=0.1": r"option trainer\.lr \(did you mean optimizer\.lr=0\.1\?\)",
    "teach epochs=5": r"did you mean teaching\.trainer\.epochs=5 or ",
    "distill teacher=cifar name=resnet8": r"name is an option of student, teacher; write student\.name= or ",
    "sweep variants={kd: [method=kd]}": "splits arguments at spaces, so quote a list or mapping",
    "sweep grid={method.tau: [1, 4]}": "splits arguments at spaces, so quote a list or mapping",
    "distill method.tau=[1": "method.tau",
    "distill experiment=demoo": r"\(did you mean demo\?\); choose one of \d+, such as: demo, (\w+, ){2}",
    "precompute executor=spark": "executor must be one of auto, ray, serial",
    "precompute store.path=ftp://host/x": "not the address of a bucket",
    "precompute annotate.outputs=[maps]": "must contain logits",
    "precompute data=demo data.test_digits=1790 data.train_digits=100": "1797 digits",
    "distill student.frame=center_crop": "student.frame=center_crop is an option of teachers",
    "distill student.weights=random": "the same initial weights",
    "precompute data=image_folder": "data.path is empty; set it to the folder of the images",
    "precompute data=webdataset 'data.path=pipe:cat x'": "would run a command",
    "precompute store.format=jpeg": "original, jpeg95, raw",
    "sweep": "variants is empty",
    "sweep experiment=demo seeds=[]": "seeds is empty",
    "sweep experiment=demo seeds=1,2": "seeds must be a list, got '1,2'",
    "report 'report.columns={epg: test.epg}' report.compared_column=f1": "one of report.columns: epg",
}
"""Commands, and what their errors say."""


LIVE = ["mode=live", "teacher=cifar", "teacher.name=resnet8", "teacher.weights=w.pt"]
MIXUP = "augment.mix=[{kind: mixup, alpha: 1}]"
RANDAUGMENT = "augment.operations=[{kind: randaugment, magnitude: 10}]"


MIXED = f"'{MIXUP}' {' '.join(LIVE)}"
CHANGED_PIXELS = {
    f"distill method=embedding method.lambda_angle=1 '{MIXUP}' mode=replay":
        r"method\.lambda_angle compares relations of records.*augment\.mix=\[\]",
    f"distill {MIXED} explainer.target_classes=sample_gt":
        r"target_classes=sample_gt reads a record's labels.*target_classes=top1, or augment\.mix=\[\]",
    f"distill {MIXED} method=e2kd method.map_control=shuffled":
        r"map_control=shuffled gives each record the map of its neighbor.*map_control=none, or augment\.mix=\[\]",
    "distill method=labels 'augment.mix=[{kind: mixup, alpha: 0}]'":
        r"augment\.mix\[0\]\.alpha must be.*got 0",
    "distill method=labels 'augment.mix=[{kind: puzzle}]'":
        r"augment\.mix\[0\]\.kind must be one of mixup, cutmix.*got 'puzzle'",
    "distill 'augment.operations=[{kind: randaugment, magnitude: 31}]'":
        r"augment\.operations\[0\]\.magnitude must be in \[0, 30\].*got 31",
    "distill 'augment.operations=[{kind: cutout}]'":
        r"augment\.operations\[0\]\.kind must be one of pad_crop.*randaugment, trivialaugment; got 'cutout'",
}  # fmt: skip
if HAS_PAPERS:
    CHANGED_PIXELS |= {
        f"distill method=ft '{MIXUP}'": r"augment\.mix shows two records, and method=ft has no rule .* set "
        r"augment\.mix=\[\].*mode=live",
        f"teach teaching=guided 'teaching.{MIXUP}'": r"teaching\.augment\.mix \(mixup\): teaching=guided.*"
        r"teaching=labels, or teaching\.augment\.mix=\[\]",
    }


@for_each("command,message", (CHANGED_PIXELS | (MISTAKES if HAS_PAPERS else {})).items())
def test_a_mistake_says_what_is_allowed(command, message):
    with pytest.raises(ConfigError, match=message):
        config_of(*shlex.split(command))


@for_each(
    "verb,words,section",
    [
        ("distill", ["method=labels"], ""),
        ("distill", ["method=e2kd"], ""),
        ("distill", ["method=kd", "mode=replay"], ""),
        ("distill", ["method=e2kd", *LIVE], ""),
        *([("distill", ["method=review_kd", *LIVE], "")] if HAS_PAPERS else []),
        ("teach", ["teaching=labels"], "teaching."),
        ("precompute", [], ""),  # precompute without views=random reads no augment option
    ],
)
def test_mixtures_are_an_option_of_every_mode(verb, words, section):
    for augment in ("none", "pad_crop", "pad_crop_flip", "resized_crop_flip"):
        config = config_of(verb, *words, f"{section}augment={augment}", f"{section}{MIXUP}")

        built = (config.teaching if verb == "teach" else config).augment
        assert [(each.kind, each.alpha, each.p) for each in built.mix] == [("mixup", 1.0, 1.0)]


@pytest.mark.parametrize(
    ("verb", "words", "section"),
    [
        ("distill", ["method=e2kd"], ""),
        ("distill", ["method=kd", "mode=replay"], ""),
        ("distill", ["method=e2kd", *LIVE], ""),
        pytest.param("teach", ["teaching=guided"], "teaching.", marks=needs_papers),
        ("precompute", ["views=random"], ""),
    ],
)
def test_randaugment_is_an_option_of_every_mode(verb, words, section):
    config = config_of(verb, *words, f"{section}{RANDAUGMENT}")

    built = (config.teaching if verb == "teach" else config).augment
    assert [operation.kind for operation in built.on_pixels] == ["randaugment"]


@for_each(
    "path",
    [
        *("my photos (2024)", "été/日本", "it's $5, a=b", "a\\'b", "back\\slash (1)", "ends (\\"),
        *("#1", "a,b", "~/x", "C:\\x", "plain/path-1.0"),
    ],
)
def test_a_path_is_taken_as_the_shell_passes_it(path):
    assert config_of("precompute", "data=image_folder", f"data.path={path}").data.path == path


@for_each("verb", VERBS)
def test_help_of_all_shows_the_command_the_groups_and_every_option(verb, permafrost):
    code, output, _ = permafrost(verb, "--help", "all")

    assert code == 0
    assert f"permafrost {verb}" in output
    for section in sections_of_verb(verb, compose(verb, [])):
        assert re.search(rf"\n  {section}[.=]", output)


@for_each("verb", VERBS)
def test_help_shows_the_command_and_at_most_15_options_that_there_are(verb, permafrost):
    code, output, _ = permafrost(verb, "--help")
    _, brief, _ = permafrost(verb, "-h")

    assert code == 0
    assert output == brief
    assert f"permafrost {verb}" in output
    assert "--help all lists every option" in output
    listed = re.findall(r"^  ([a-z_.0-9]+)=(?! )", output, re.MULTILINE)
    assert listed == VERBS[verb].common.split()
    assert len(listed) <= 15
    assert set(listed) <= {*option_paths(verb), *section_names(verb), "teaching.augment"}
    assert VERBS[verb].group in VERB_GROUPS


def test_an_option_of_a_student_speaks_of_no_teacher(permafrost):
    _, output, _ = permafrost("distill", "--help", "all")

    entries = re.findall(r"^  (student\.\w+)=.*\n((?: {8}.*\n)*)", output, re.MULTILINE)
    assert len(entries) > 8
    assert [name for name, text in entries if "a teacher" in text or "teacher's" in text] == []


@needs_papers
def test_help_says_what_an_option_means_and_shows_the_options_of_a_member(permafrost):
    _, output, _ = permafrost("distill", "--help", "method=ked")

    assert "\n  method.tau=4.0  (> 0)\n        Temperature of the predictions.\n" in output
    assert "\n  method.superfeatures=null  (>= 1 or null)\n" in output


def test_help_names_the_experiments_last_and_how_to_see_the_options_of_a_member(permafrost):
    _, output, _ = permafrost("precompute", "--help", "all")

    assert output.index("data.kind=none") < output.index("cifar10_50shots")
    assert "the options of a chosen member: --help data=image_folder" in output


def test_a_reader_that_closes_the_output_early_ends_the_command_quietly(tmp_path):
    command = [sys.executable, "-m", "stages.distill", "--cfg", "job"]
    reader, writer = os.pipe()
    os.close(reader)  # as `| head` does when it has its lines
    with os.fdopen(writer, "w") as closed:
        ended = subprocess.run(command, cwd=ROOT, stdout=closed, stderr=subprocess.PIPE, text=True)

    assert ended.returncode == 128 + signal.SIGPIPE
    assert ended.stderr == ""


def test_the_next_command_is_of_the_same_experiment():
    command = "permafrost teach store.path=s run=my-teacher evaluate.splits=[val]"
    demo, named = ["experiment=demo", "teacher=none"], ["run=mine", "store.path=stores/demo"]

    assert next_command(command, demo) == "permafrost teach experiment=demo"
    own = f"permafrost teach experiment=demo {' '.join(named)}"
    assert next_command(command, demo + named) == own
    assert next_command(command, ["store.path=s"]) == command


def test_the_next_command_of_an_experiment_uses_the_teacher_that_was_trained():
    network = "teacher=cifar teacher.weights=runs/other/w teacher.width=8 teacher.input_size=64"

    after = next_command(
        f"permafrost precompute store.path=s run=other {network}",
        ["experiment=demo", "run=other", "teacher.width=8", "teaching.augment.size=64"],
    )

    assert after == f"permafrost precompute experiment=demo run=other {network}"


@needs_papers
def test_the_page_of_options_is_that_of_the_dataclasses():
    page = (ROOT / "docs" / "reference" / "options.md").read_text()
    # In a process of its own, as tests that import a package first change the order of members.
    words = [sys.executable, "-m", "docs.options"]

    made = subprocess.run(words, capture_output=True, text=True, check=True).stdout

    assert page == made, "python -m docs.options > docs/reference/options.md"


def test_the_page_has_the_options_of_a_section_that_are_named_like_a_group():
    assert "| `store.teacher` |" in options_page()


@pytest.mark.parametrize("place", [0, 1, 2])
def test_cfg_prints_the_resolved_config_and_does_nothing(tmp_path, permafrost, place):
    words = ["method=kd", "method.tau=4"]

    _, output, _ = permafrost("distill", *words[:place], "--cfg", "job", *words[place:])

    assert yaml.safe_load(output)["method"]["tau"] == 4
    assert list(tmp_path.iterdir()) == []


@for_each(
    "command,status,message",
    [
        ("distill --cfg method.tau=4", 2, "write --cfg job"),
        (
            "distill experiment=nets.py",
            2,
            "experiment=nets.py is not a .yaml file; a Python file is named with plugins=[nets.py]",
        ),
        (
            "verify store.path=nowhere",
            1,
            "nowhere/manifest.json does not exist; run permafrost precompute",
        ),
    ],
)
def test_an_error_names_the_mistake_and_has_its_exit_code(permafrost, command, status, message):
    Path("nets.py").write_text("")

    code, _, error = permafrost(*command.split())

    assert code == status
    assert message in error
    assert "Traceback" not in error


def test_an_error_names_paths_below_the_current_folder_alike(permafrost, tmp_path):
    relative, absolute = (
        permafrost("distill", "run=one", f"store.path={path}")[2]
        for path in ("stores/none", tmp_path / "stores/none")
    )

    assert relative == absolute
    assert "stores/none" in relative
    assert str(tmp_path) not in relative


def test_a_bad_option_is_one_line_and_exit_code_2(tmp_path, permafrost):
    code, output, errors = permafrost("distill", *NAMED[:2], "method.tau=0")

    assert code == 2
    assert errors == "permafrost distill: error: method.tau must be > 0, got 0\n"
    assert output == ""
    assert list(tmp_path.iterdir()) == []


# ---- the console command -------------------------------------------------------------------------


@pytest.fixture
def console(monkeypatch, capsys):
    """The console command, run in this process: exit status, standard output and standard error."""

    def run(*words):
        monkeypatch.setattr("sys.argv", ["permafrost", *words])
        code = 0
        try:
            console_main()
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return run


def test_the_console_command_lists_every_verb_and_runs_it(console):
    _, overview, _ = console()
    code, shown, _ = console("distill", "--cfg", "job", "method.tau=3")

    verbs = re.findall(r"^  (?!permafrost )(\w+) ", overview, re.MULTILINE)
    assert verbs == sorted(VERBS, key=lambda verb: [*VERB_GROUPS].index(VERBS[verb].group))
    assert [line.split()[1] for line in overview.splitlines()[-3:]] == [
        *("preview", "precompute", "distill")
    ]
    assert code == 0
    assert yaml.safe_load(shown)["method"]["tau"] == 3


MY_VERB = """'''Count the records of a store.

    permafrost count plugins=[my_verbs.py]
'''
from dataclasses import dataclass

from permafrost.config.options import Options
from permafrost.config.verbs import VERBS, Verb


@dataclass(frozen=True, kw_only=True)
class CountConfig(Options):
    '''Sections that `count` reads.'''

    number: int = 1


@dataclass(frozen=True)
class CountResult:
    counted: int


def count(config):
    return CountResult(config.number + 1)


VERBS["count"] = Verb(options=CountConfig, function="FUNCTION")
"""


@pytest.fixture
def my_verbs(tmp_path, monkeypatch):
    """Function that writes a plug-in with a verb of this function."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def write(function):
        (tmp_path / "my_verbs.py").write_text(MY_VERB.replace("FUNCTION", function))

    yield write
    VERBS.pop("count", None)
    sys.modules.pop("my_verbs", None)
    plugins._PLACES.pop("my_verbs", None)


def test_a_plug_in_in_one_file_adds_a_verb(console, my_verbs):
    my_verbs("my_verbs:count")
    word = "plugins=[my_verbs.py]"
    code, printed, errors = console("count", word, "number=4")
    _, helped, _ = console("count", word, "--help")
    _, listed, _ = console("--help", word)
    wrong, _, message = console("count", word, "numbr=4")

    assert (code, errors) == (0, "")
    assert printed.startswith("counted: 5\n")
    assert helped.startswith("Count the records of a store.")
    assert "  count       Count the records of a store." in listed.splitlines()
    assert wrong == 2
    assert "count takes no numbr= (did you mean number=4?)" in message


@pytest.mark.parametrize(
    "function", ["my_verbs:cuont", "my_verbz:count", "my_verbs", "os.path:sep"]
)
def test_a_verb_without_its_function_is_one_line_and_hides_no_other(console, my_verbs, function):
    my_verbs(function)
    word = "plugins=[my_verbs.py]"
    code, _, errors = console("count", word)
    _, listed, _ = console("--help", word)

    assert code == 2
    assert errors == (
        f"permafrost count: error: Verb(function={function!r}): there is no such function; write "
        "<module>:<function>\n"
    )
    assert "  distill " in listed
    assert "  count " in listed


def test_a_name_of_another_package_is_not_taken(console, my_verbs, tmp_path):
    my_verbs("my_verbs:count")
    path = tmp_path / "my_verbs.py"
    path.write_text(path.read_text().replace('VERBS["count"]', 'VERBS["distill"]'))
    code, _, errors = console("distill", "plugins=[my_verbs.py]", "--help")

    assert code == 2
    assert "distill is a name of two packages, my_verbs and permafrost, so one would hide" in errors
    assert VERBS["distill"].function.startswith("permafrost.")


def test_a_verb_that_is_not_there_is_one_line_and_exit_code_2(console):
    code, _, errors = console("distil")

    assert code == 2
    assert errors.startswith(
        "permafrost: error: there is no verb distil (did you mean distill?); choose"
    )


# ---- experiments outside the project -------------------------------------------------------------


def write_experiment(path, text):
    path.write_text(text)
    return f"experiment={path}"


def test_an_experiment_may_be_any_file(tmp_path):
    word = write_experiment(
        tmp_path / "mine.yaml", "method: {kind: kd, tau: 7}\nstudent: {name: resnet14}\n"
    )

    config = config_of("distill", word, "method.lambda_ce=0.5")

    assert (config.method.kind, config.method.tau, config.method.lambda_ce) == ("kd", 7, 0.5)
    assert config.student.name == "resnet14"


def test_an_experiment_file_that_changed_is_read_again(tmp_path):
    path = tmp_path / "mine.yaml"

    taus = [
        config_of("distill", write_experiment(path, f"method: {{tau: {tau}}}")).method.tau
        for tau in (2, 3)
    ]

    assert taus == [2, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, f"mine.yaml cannot be read: {os.strerror(errno.ENOENT)}"),
        ("method: {tau: ", "mine.yaml: .*line 2"),
        ("- a\n", "must be a mapping of sections"),
        ("method: {tua: 3}", "unknown option method.tua"),
        ("method: kdd", "kdd"),
    ],
)
def test_an_experiment_file_that_is_wrong_is_named(tmp_path, text, message):
    if text is not None:
        (tmp_path / "mine.yaml").write_text(text)

    with pytest.raises(ConfigError, match=message):
        config_of("distill", f"experiment={tmp_path / 'mine.yaml'}")


def test_an_interpreter_without_the_packages_is_named_in_one_line():
    """Such as the `python` of a job on a head that was started without its environment."""
    ended = run_program(
        [sys.executable, "-S", "-m", "stages.precompute", "--help"],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )

    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"permafrost: error: {sys.executable} (Python 3.")
    assert "lacks what the package needs: No module named 'annotated_types'" in line
    assert "PATH=$PWD/.venv/bin:$PATH ray start --head" in line


MADE = "precompute", "executor=serial"


@pytest.mark.parametrize(
    ("module", "package", "words"),
    [
        ("jinja2", "jinja2", ("report", "run=one")),
        ("sklearn", "scikit-learn", (*MADE, "data=demo", "teacher=none")),
        slow("timm", "timm", (*MADE, "data=digits", "teacher=timm", "teacher.weights=random")),
        (
            "transformers",
            "transformers",
            (*MADE, "data=digits", "teacher=transformers", "teacher.weights=random"),
        ),
    ],
)
def test_a_package_of_an_extra_that_is_missing_is_named_with_its_command(
    module, package, words, tmp_path
):
    code = (
        f"import sys; sys.modules[{module!r}] = None; from permafrost.cli import stage_main; "
        f"stage_main({words[0]!r})"
    )
    done = run_program(
        [sys.executable, "-c", code, *words[1:], f"store.path={tmp_path}/store"], cwd=tmp_path
    )

    needs = f"needs the package {package} for this; install it with: pip install {package}"
    assert done.stderr.splitlines()[-1] == f"permafrost {words[0]}: error: {words[0]} {needs}"
    assert done.returncode == 2
