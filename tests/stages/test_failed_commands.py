"""Commands that fail before they have computed anything: they leave no result, and a run as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from permafrost.runs.mirrors import RUNS
from permafrost.storage.lock import LOCK_NAME

NETWORK = ("student.name=resnet8", "student.width=4", "trainer.epochs=1", "trainer.batch_size=8")


def contents(folder):
    """Bytes of all files below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


FAILURES = {
    "another output": ("distill", ["method=at"]),
    "no such network": ("distill", ["student=torchvision", "student.name=resnet19"]),
    "a grid of one cell": ("distill", ["student.stem_stride=2", "augment.size=4"]),
    "a device that is not there": ("distill", ["trainer.device=cuda:7"]),
    "no student": ("evaluate", []),
    "no such weights": ("precompute", ["teacher=cifar", "teacher.weights=none.pth"]),
    "no such split": ("teach", ["teacher=cifar", "teacher.name=resnet8", "teaching.split=none"]),
    "no such pass": ("distill", ["store.teacher=none"]),
    "no such variant": ("sweep", ["variants={kd: ['method=none']}"]),
    "no such run": ("report", []),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_command_that_fails_before_it_has_computed_anything_leaves_no_result(
    permafrost, frozen, name
):
    verb, words = FAILURES[name]
    store = f"store.path={frozen.store.path}"
    network = NETWORK if verb == "distill" else ()

    code, _, error = permafrost(verb, store, "run=new/one", *network, *words)

    assert code in (1, 2), error
    assert {Path(path).name for path in contents(RUNS)} <= {LOCK_NAME, "config.yaml"}
    assert permafrost("distill", store, "run=new/one", *NETWORK)[0] == 0


@pytest.mark.parametrize("name", ["another output", "no such weights", "no such pass"])
def test_a_run_that_was_there_stays_as_it_was(permafrost, frozen, name):
    store = f"store.path={frozen.store.path}"
    assert permafrost("distill", store, "run=one", *NETWORK)[0] == 0
    before = contents(RUNS)
    verb, words = FAILURES[name]

    code, _, _ = permafrost(verb, store, "run=one", *words)

    assert code in (1, 2)
    assert contents(RUNS) == before


def test_a_training_that_fails_after_it_has_begun_keeps_its_folder(permafrost, frozen):
    code, _, error = permafrost(
        "distill", f"store.path={frozen.store.path}", "run=one", *NETWORK, "optimizer.lr=1e30"
    )

    assert code == 1, error
    assert (RUNS / "one/distill/config.yaml").exists()


ENDING = """
from torch import nn

class Ending(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.features = nn.Conv2d(3, num_classes, 1)

    def forward(self, images):
        raise SystemExit

def build(num_classes):
    return Ending(num_classes)
"""


@pytest.mark.parametrize("verb", ["distill", "sweep"])
def test_a_network_that_ends_the_program_is_a_failure_in_one_line(
    permafrost, frozen, tmp_path, verb
):
    """The status of SystemExit is 0, by which a scheduler would start what comes next."""
    (tmp_path / f"ending_{verb}.py").write_text(ENDING)
    network = [
        "student=module",
        f"student.factory=ending_{verb}.py:build",
        "student.layer=features",
    ]
    words = [f"store.path={frozen.store.path}", "run=ended", "method=kd", *network, *NETWORK[2:]]
    more = {"sweep": ["variants={a: [], b: []}", "seeds=[0]", "executor=serial"]}
    code, output, errors = permafrost(verb, *words, *more.get(verb, []))

    assert code == 1, output
    assert errors.splitlines()[-1].startswith(f"permafrost {verb}: error: ")
    assert "SystemExit" in errors
    assert not list((RUNS / "ended").rglob("model.json"))
