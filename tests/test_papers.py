"""Each paper is a folder that can be left out: the rest works and does not know its members."""

import shutil
import subprocess
import sys

import pytest

from tests.support.paths import ROOT
from tests.support.processes import environment
from tests.support.slow import slow_except

MEMBERS = {
    "unicam": ("evaluate.unicam", "evaluate.distance_correlation"),
    "ked": (
        "method=ked",
        "teaching=ked",
        "teacher=additive",
        "explainer=superfeatures",
        "superfeature",
    ),
    "interpretability": ("method=ft", "method=crd", "data=cells", "evaluate.diffroar"),
}
DATA = ("image_size=16", "min_digit_size=8", "max_digit_size=12", "test_digits=10")
DATA += ("train_digits=40", "teacher_digits=12", "teacher_placements=1", "test_placements=1")
PRECOMPUTE = (
    *("precompute", "data=demo", *(f"data.{option}" for option in DATA), "store.shard_size=16"),
    *("teacher.name=resnet8", "teacher.width=4", "teacher.weights=random", "executor=serial"),
)
DISTILL = ("distill", "method=e2kd", "student.name=resnet8", "student.width=4")
DISTILL += ("trainer.epochs=1", "trainer.batch_size=8")


@pytest.fixture(scope="module", params=slow_except(("unicam",), MEMBERS))
def without(request, tmp_path_factory):
    """Copy of the tree without the folder of a paper, and the paper's name."""
    top = tmp_path_factory.mktemp(f"without_{request.param}")
    left_out = shutil.ignore_patterns("__pycache__", request.param)
    shutil.copytree(ROOT / "pipeline", top / "pipeline", ignore=left_out)
    for name in ("stages", "conf"):
        shutil.copytree(ROOT / name, top / name, ignore=shutil.ignore_patterns("__pycache__"))
    assert not (top / "pipeline" / "permafrost" / request.param).exists()
    return top, request.param


def run(top, *words):
    """Run Python in the copy, which comes first on the import path."""
    path = f"{top}:{top / 'pipeline'}"
    return subprocess.run(
        [sys.executable, *words],
        cwd=top,
        env=environment() | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def whole():
    """Reference of all options, with those of every paper."""
    return run(ROOT, "-m", "permafrost.config.reference").stdout


def test_no_option_and_no_error_names_its_members(without, whole):
    top, paper = without
    options = run(top, "-m", "permafrost.config.reference").stdout
    error = run(top, "-m", "stages.distill", "--cfg", "job", "method=no_such").stderr

    assert "method=e2kd" in options
    assert "choose one of" in error or "there is" in error
    for member in MEMBERS[paper]:
        assert member in whole
        assert member not in options
        if member.startswith("method="):
            assert f" {member.partition('=')[2]}," not in error


@pytest.mark.slow
def test_precompute_and_distill_work_without_it(without):
    top, _ = without
    for words in (PRECOMPUTE, DISTILL):
        done = run(top, "-m", f"stages.{words[0]}", *words[1:], "store.path=store", "run=without")
        assert done.returncode == 0, done.stderr

    assert (top / "runs/without/distill/model.safetensors").is_file()
