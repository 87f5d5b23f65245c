"""Every `next:` line is printed by a run and executed as it stands, and every option that a message names exists."""

from __future__ import annotations

import ast
import functools
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from permafrost.cli import next_command
from permafrost.config import plugins
from permafrost.config.compose import compose
from permafrost.config.families import FAMILIES
from permafrost.config.options import Options, options_of
from permafrost.config.plugins import load_plugins
from permafrost.config.sections import top_options
from permafrost.config.verbs import VERBS
from permafrost.core.errors import UserError
from tests.support.commands import resolve
from tests.support.paths import ROOT
from tests.support.slow import slow
from tests.support.target_files import write_npz

QUICK = ("trainer.epochs=1", "trainer.warmup_epochs=0", "trainer.batch_size=8", "trainer.num_threads=1")  # fmt: skip
SMALL = {
    "precompute": ("executor=serial",),
    "teach": tuple(f"teaching.{word}" for word in QUICK),
    "distill": QUICK,
    "attach": ("executor=serial",),
    "ingest": ("executor=serial",),
    "sweep": ("executor=serial",),
}
"""Words with which a command takes seconds. Nothing else of a printed command is changed."""
NETWORK = ("teacher=cifar", "teacher.name=resnet8", "teacher.width=4", "teacher.weights=random")
TO_A_REPORT = ["teach", "precompute", "distill", "evaluate", "report"]
PHOTOS = ("data=image_folder", "data.path=photos", "store.image_size=16")


class Session:
    """Commands of one folder: each next one is the one that was printed."""

    def __init__(self, permafrost):
        self.permafrost = permafrost
        self.printed = ""
        self.printers = set()

    def type(self, verb, *words):
        """Run a command, and return its output."""
        code, output, errors = self.permafrost(verb, *words, *SMALL.get(verb, ()))
        assert code == 0, f"{verb} {shlex.join(words)}\n{errors}"
        last = output.splitlines()[-1]
        self.printed = last.removeprefix("next: ") if last.startswith("next: ") else ""
        if self.printed:
            self.printers.add(verb)
        return output

    def follow(self, **placeholders):
        """Run the printed command, and return its verb and words."""
        program, verb, *words = shlex.split(self.printed)
        assert program == "permafrost"
        for name, value in placeholders.items():
            words = [
                f"{name}.path={value}" if word == f"{name}.path=ANOTHER-STORE" else word
                for word in words
            ]
        self.type(verb, *words)
        return verb, words

    def follow_to_the_end(self):
        """Run printed commands until one would export, or none is printed, and return their verbs and words."""
        followed = []
        while self.printed and not self.printed.startswith("permafrost export"):
            assert len(followed) < 6, followed
            followed.append(self.follow())
        return followed


@pytest.fixture
def session(permafrost, monkeypatch):
    monkeypatch.setattr(plugins, "_PLACES", dict(plugins._PLACES))  # without those of the test
    return Session(permafrost)


@pytest.fixture
def photos(tmp_path):
    """Small images of two classes in splits train and val. There is no split test."""
    for split, count in (("train", 12), ("val", 4)):
        write_photos(tmp_path / "photos" / split, count, seed=count)
    return tmp_path / "photos"


def write_photos(folder, count, seed):
    """Write images of noise of classes a and b, each one another."""
    random = np.random.default_rng(seed)
    for name in "ab":
        (folder / name).mkdir(parents=True, exist_ok=True)
        for _ in range(count):
            pixels = random.integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{random.integers(10**9)}.png")


@pytest.mark.parametrize("number", [slow(12), 48, slow(200)])
def test_printed_commands_lead_from_a_small_folder_to_its_report(
    session, tmp_path, monkeypatch, number
):
    random = np.random.default_rng(number)
    for name in ("ant", "bee", "cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for place in range(number // 4):
            pixels = random.integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{place}.png")
    quick = tuple(word for word in QUICK if "batch_size" not in word)
    monkeypatch.setitem(SMALL, "distill", quick)
    monkeypatch.setitem(SMALL, "teach", tuple(f"teaching.{word}" for word in quick))

    session.type("preview", "data=image_folder", "data.path=photos")
    followed = session.follow_to_the_end()

    assert [verb for verb, _ in followed] == ["precompute", *TO_A_REPORT]
    assert "data.test_fraction=0.2" in followed[0][1]
    assert list(tmp_path.glob("runs/**/*.html"))


# ---- what is printed, and by which run -----------------------------------------------------------


def a_store_a_teacher_and_a_student(session, photos):
    session.type("precompute", *PHOTOS, "store.path=stores/p", "teacher=none", "run=mine")
    followed = session.follow_to_the_end()
    assert [verb for verb, _ in followed] == TO_A_REPORT
    assert all("run=mine" in words for _, words in followed)
    assert "evaluate.splits=[val]" in dict(followed)["evaluate"]

    for verb in ("verify", "show"):
        session.type(verb, "store.path=stores/p")
        assert session.printed.startswith("permafrost distill")
    words = dict(followed)["distill"]
    assert session.type("distill", *words).count("trained_epochs: 0") == 1  # a finished student
    assert session.follow()[0] == "evaluate"


def a_preview(session, photos):
    session.type("preview", "data=image_folder", "data.path=photos")
    verb, words = session.follow()
    assert verb == "precompute"
    assert "store.path=stores/photos" in words
    assert session.printed.startswith("permafrost teach store.path=stores/photos")

    (photos / "train" / "animal").mkdir()
    for name in "ab":
        (photos / "train" / name).rename(photos / "train" / "animal" / name)
    assert "next:" not in session.type("preview", "data=image_folder", "data.path=photos")


NETWORK_OF_ONES_OWN = """
from torch import nn


def build(classes):
    layers = nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes)
    return nn.Sequential(*layers)
"""


def a_network_of_a_module(session, photos):
    (photos.parent / "printed_nets.py").write_text(NETWORK_OF_ONES_OWN)
    session.type("precompute", *PHOTOS, "store.path=stores/p", "teacher=none")
    network = "teacher=module", "teacher.factory=printed_nets:build"
    session.type("teach", "store.path=stores/p", "run=own", *network, "evaluate.splits=[val]")
    followed = session.follow_to_the_end()
    assert [verb for verb, _ in followed] == ["precompute", "distill", "evaluate", "report"]
    assert all("plugins=[printed_nets]" in words and "run=own" in words for _, words in followed)


def records_without_a_second_split(session, photos):
    shutil.rmtree(photos / "val")
    words = *PHOTOS, "store.path=stores/p", "preview.all=true"
    session.type("precompute", *words, "teacher=none")
    assert "evaluate.splits=[train]" in session.printed  # which a warning precedes
    session.follow()
    session.type("precompute", "store.path=stores/p", *NETWORK)
    followed = session.follow_to_the_end()
    assert "subset.holdout=2" in dict(followed)["distill"]
    assert not any("evaluate.splits=[train]" in words for _, words in followed)


def records_that_come_later(session, photos):
    append = *PHOTOS, "store.path=stores/p", "store.append=true", "teacher=none"
    session.type("precompute", *PHOTOS, "store.path=stores/p", *NETWORK)
    write_photos(photos / "train", 2, seed=5)
    assert "next:" not in session.type("precompute", *append)  # the command above makes its pass

    session.type("teach", "store.path=stores/p", "run=t", *NETWORK[:-1], "evaluate.splits=[val]")
    session.follow()
    assert "next:" not in session.type("preview", *PHOTOS[:2], "against=stores/p")
    write_photos(photos / "train", 2, seed=6)
    session.type("preview", *PHOTOS[:2], "against=stores/p")
    assert set(session.follow()[1]) == {*append[:2], *append[3:]}
    verb, words = session.follow()
    assert verb == "precompute"
    assert words[:3] == ["store.path=stores/p", "teacher=saved", "teacher.weights=runs/t/teach"]
    assert session.follow()[0] == "distill"

    shutil.copytree(photos / "train/a", photos / "train/Essen & Trinken")
    session.type("precompute", *append)
    followed = session.follow_to_the_end()
    assert [verb for verb, _ in followed] == TO_A_REPORT
    assert "run=my-teacher" in followed[0][1]
    assert "teaching.start=runs/t/teach" in followed[0][1]
    session.type("precompute", *append)
    assert session.printed.startswith("permafrost distill")  # on the pass of all classes


def a_sweep(session, photos):
    session.type("precompute", *PHOTOS, "store.path=stores/p", *NETWORK)
    session.type(
        "sweep", "store.path=stores/p", "run=s", "variants={kd: [method=kd], e2kd: []}", "seeds=[0,1]", *QUICK,
        "evaluate.splits=[val]", "student.name=resnet8", "student.width=4",
    )  # fmt: skip
    assert [verb for verb, _ in session.follow_to_the_end()] == ["report"]


def a_report_of_students_that_were_not_evaluated(session, photos):
    session.type("precompute", *PHOTOS, "store.path=stores/p", *NETWORK, "run=r")
    session.follow()
    session.type("report", "store.path=stores/p", "run=r")
    assert [verb for verb, _ in session.follow_to_the_end()] == ["evaluate", "report"]


def a_report_whose_experiment_names_what_follows(session, photos):
    session.type("precompute", *PHOTOS, "store.path=stores/p", *NETWORK, "run=r")
    session.follow()
    session.follow()
    command = "permafrost evaluate store.path=stores/p run=r evaluate.splits=[val] evaluators=[knn]"
    session.type("report", "store.path=stores/p", "run=r", f"report.next_command={command}")
    assert session.follow()[0] == "evaluate"


def a_student_without_a_classifier(session, photos):
    words = *PHOTOS, "store.path=stores/p", *NETWORK, "annotate.outputs=[pooled]"
    session.type("precompute", *words)
    session.follow()
    session.type("evaluate", "store.path=stores/p", "run=my-student", "evaluate.splits=[val]")
    verb, words = session.follow()
    assert verb == "evaluate"
    assert "evaluators=[knn,linear_probe]" in words


def a_share(session, photos):
    session.type("precompute", *PHOTOS, "store.path=stores/p", *NETWORK)
    session.type(
        "share", "store.path=stores/p", f"pass={next((photos.parent / 'stores/p/teachers').iterdir()).name}",
        "to=shared", "licenses={images: CC0-1.0, weights: MIT, targets: CC0-1.0}",
    )  # fmt: skip
    attach = session.printed
    session.type("precompute", *PHOTOS, "store.path=stores/q", "teacher=none")
    session.printed = attach
    assert session.follow(store="stores/q")[0] == "attach"
    assert [verb for verb, _ in session.follow_to_the_end()] == ["distill", "evaluate", "report"]


def an_ingestion(session, photos):
    session.type("precompute", *PHOTOS, "store.path=stores/p", "teacher=none")
    names = [str(path.relative_to(photos)) for path in photos.rglob("*.png")]
    logits = np.random.default_rng(0).normal(size=(len(names), 2)).astype("float32")
    write_npz(photos.parent / "targets.npz", names, logits=logits)
    session.type(
        "ingest", "store.path=stores/p", "path=targets.npz", "format.frame=full", "format.join=path"
    )
    assert [verb for verb, _ in session.follow_to_the_end()] == ["distill", "evaluate", "report"]


def an_export(session, photos):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    session.type("precompute", *PHOTOS, "store.path=stores/p", *NETWORK)
    session.follow()
    session.type("export", "store.path=stores/p", "run=my-student")
    program, *words = shlex.split(session.printed)
    assert (program, words[-1]) == ("python", "FILE...")
    images = [str(path) for path in sorted(photos.rglob("val/*/*.png"))]
    run = subprocess.run(
        [sys.executable, *words[:-1], *images], capture_output=True, text=True, check=True
    )
    assert all(run.stdout.count(path) == 1 for path in images)


RUNS = {
    a_preview: ("preview", "precompute"),
    a_store_a_teacher_and_a_student: (
        *("precompute", "teach", "distill", "evaluate", "verify", "show"),
    ),
    a_network_of_a_module: ("precompute", "teach", "distill", "evaluate"),
    records_without_a_second_split: ("precompute", "distill"),
    records_that_come_later: ("preview", "precompute", "teach"),
    a_sweep: ("sweep",),
    a_report_of_students_that_were_not_evaluated: ("report",),
    a_report_whose_experiment_names_what_follows: ("report",),
    a_student_without_a_classifier: ("evaluate",),
    a_share: ("share", "attach"),
    an_ingestion: ("ingest",),
    an_export: ("export",),
}
"""Verbs that print a next command in each run."""


_SLOW = (
    *(an_export, a_report_of_students_that_were_not_evaluated, a_share),
    *(records_without_a_second_split, a_report_whose_experiment_names_what_follows),
)


@pytest.mark.parametrize(
    "run", [slow(run) if run in _SLOW else run for run in RUNS], ids=lambda run: run.__name__
)
def test_what_a_command_prints_next_runs_as_it_stands(run, session, photos):
    run(session, photos)

    assert session.printers >= set(RUNS[run])


def test_every_next_command_in_the_source_has_a_run_that_prints_it():
    modules = {
        ".".join(path.relative_to(ROOT / "pipeline").with_suffix("").parts)
        for path in (ROOT / "pipeline").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.keyword) and node.arg == "next" and ast.unparse(node.value) != "''"
    }
    verbs = {verb for printed in RUNS.values() for verb in printed}

    modules.discard("permafrost.training.teacher_training")  # of which teach returns the result
    assert modules == {VERBS[verb].function.partition(":")[0] for verb in verbs}


def test_the_next_command_of_an_experiment_keeps_the_run_and_the_store():
    typed = ["experiment=demo", "run=mine", "store.path=stores/mine", "report.cases=0"]
    command = "permafrost sweep experiment=demo 'seeds=[3,4]'"
    assert next_command(command, typed) == f"{command} run=mine store.path=stores/mine"
    assert next_command(command, typed[:1]) == command


def test_the_next_command_of_each_experiment_is_composed():
    texts = {
        path.stem: text
        for path in (ROOT / "conf/experiment").rglob("*.yaml")
        for text in re.findall(r"next_command: (.*)", path.read_text())
    }
    assert set(texts) == {"demo"}
    for text in texts.values():
        program, verb, *words = shlex.split(text)
        assert program == "permafrost"
        assert resolve(verb, words)
        assert next_command(text, ["experiment=demo"]) == text


# ---- options and commands that messages name -----------------------------------------------------


@functools.cache
def messages():
    """Return (place, text) of each literal that is not a docstring, with {} for what a formatted one inserts."""
    texts = []
    for path in sorted((ROOT / "pipeline").rglob("*.py")):
        place = path.relative_to(ROOT / "pipeline")
        waiting = [ast.parse(path.read_text())]
        for node in waiting:
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "{}" for v in node.values]
                texts.append((f"{place}:{node.lineno}", "".join(parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append((f"{place}:{node.lineno}", node.value))
            waiting += [
                child
                for child in ast.iter_child_nodes(node)
                if not isinstance(child, ast.Constant)
                or not isinstance(node, ast.Expr | ast.JoinedStr)
            ]
    return texts


def options_below(prefix, cls):
    """Yield the paths of the options of a class and of the sections in it."""
    for option in options_of(cls):
        yield f"{prefix}{option.name}"
        if isinstance(option.hint, type) and issubclass(option.hint, Options):
            yield from options_below(f"{prefix}{option.name}.", option.hint)


def test_other_code_of_a_trained_network_is_noticed(session, photos, caplog):
    code = photos.parent / "edited_nets.py"
    code.write_text(NETWORK_OF_ONES_OWN)
    session.type("precompute", *PHOTOS, "store.path=stores/p", *NETWORK)
    network = "student=module", "student.factory=edited_nets:build", "plugins=[edited_nets]"
    words = "store.path=stores/p", "run=own", *network
    session.type("distill", *words, "method=kd")
    evaluation = [word for word in words if not word.startswith("student")]
    evaluation.append("evaluate.splits=[val]")
    session.type("evaluate", *evaluation)
    assert "trained with another state" not in caplog.text

    code.write_text(NETWORK_OF_ONES_OWN.replace("nn.ReLU()", "nn.GELU()"))
    status, _, errors = session.permafrost("evaluate", *evaluation)
    assert status == 2
    assert "code of edited_nets" in errors

    shutil.rmtree("runs/own/evaluate")
    session.type("evaluate", *evaluation)
    assert "runs/own/distill was trained with another state of edited_nets" in caplog.text


@pytest.fixture(scope="module")
def options():
    """Paths of the options of all verbs and of all members of families."""
    load_plugins()
    paths = {path for verb in VERBS.values() for path in options_below("", verb.options)}
    for family, members in FAMILIES.items():
        paths |= {path for cls in members.values() for path in options_below(f"{family}.", cls)}
    for name, option in top_options().items():
        paths.add(name)
        if isinstance(option.hint, type) and issubclass(option.hint, Options):
            paths |= set(options_below(f"{name}.", option.hint))
    return paths


OPTION = re.compile(r"(?<![\w.{}\]/-])([a-z_]+(?:\.[a-z_]+)+)=(?=[\w\[{<.'\"]|$|[\s,;)])")
COMMAND = re.compile(r"permafrost (\w+)((?: (?:'[^']*'|[a-z_.]+=\S+))+)")


def test_every_option_that_a_message_names_with_its_section_exists(options):
    named = [(place, name) for place, text in messages() for name in OPTION.findall(text)]

    assert len(named) > 500
    assert [(place, name) for place, name in named if name not in options] == []


def test_every_member_that_a_message_names_exists(options):
    families = "|".join(FAMILIES)
    pattern = re.compile(rf"(?<![\w.])({families})=([a-z_0-9]+)\b")
    named = [(place, *found) for place, text in messages() for found in pattern.findall(text)]

    assert len(named) > 50
    assert [name for name in named if name[2] not in FAMILIES[name[1]]] == []


def test_every_command_that_a_message_names_is_composed():
    commands = [(place, *found) for place, text in messages() for found in COMMAND.findall(text)]
    wrong = []
    for place, verb, text in commands:
        words = [
            word.rstrip(".,:;`)")
            for word in shlex.split(text)
            if not set("{<>}") & set(word) and not word.startswith("path")
        ]
        try:
            compose(verb, words)
        except (UserError, KeyError) as error:
            wrong.append((place, text, str(error)))

    assert len(commands) > 5
    assert wrong == []
