"""Each paper is a package that can be left out, and so can all: the rest works and does not know their members."""

import re
import shutil

import pytest

from tests.support.environments import make_environment
from tests.support.paths import ROOT
from tests.support.processes import environment, run_program
from tests.support.slow import slow_except
from tests.support.words import TINY_DATA, TINY_TEACHER

MEMBERS = {
    "e2kd": ("method=review_kd", "teaching=guided"),
    "bcos": ("teacher=bcos", "explainer=bcos_weights"),
    "unicam": ("evaluate.unicam", "evaluate.distance_correlation"),
    "ked": (
        "method=ked",
        "teaching=ked",
        "teacher=additive",
        "explainer=superfeatures",
        "superfeature",
        "data=table",
    ),
    "interpretability": ("method=ft", "method=crd", "data=cells", "views=rotations"),
}
ALL = "all"
STORE = ("store.path=store", "run=without")
SERIAL = ("store.shard_size=16", "executor=serial")
PRECOMPUTE = ("precompute", *TINY_DATA, *TINY_TEACHER, *SERIAL)
DISTILL = ("distill", "method=e2kd", "student.name=resnet8", "student.width=4")
DISTILL += ("trainer.epochs=1", "trainer.batch_size=8")
EVALUATE = ("evaluate", "evaluate.splits=[test]")
REPORT = ("report",)


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    return make_environment(tmp_path_factory.mktemp("python"))


@pytest.fixture(scope="module", params=slow_except((ALL,), [*MEMBERS, ALL]))
def without(request, tmp_path_factory):
    """Copy of the tree without the package of a paper, or without all of them, and the paper's name."""
    top = tmp_path_factory.mktemp(f"without_{request.param}")
    papers = MEMBERS if request.param == ALL else (request.param,)
    left_out = "permafrost_papers" if request.param == ALL else request.param
    ignored = shutil.ignore_patterns("__pycache__", left_out)
    shutil.copytree(ROOT / "pipeline", top / "pipeline", ignore=ignored)
    for name in ("stages", "conf"):
        shutil.copytree(ROOT / name, top / name, ignore=shutil.ignore_patterns("__pycache__"))
    project = (ROOT / "pyproject.toml").read_text()
    for paper in papers:
        project = re.sub(rf"^{paper} = .*\n", "", project, flags=re.MULTILINE)
    (top / "pyproject.toml").write_text(project)
    return top, papers


def run(python, top, *words):
    """Run Python in the copy, which comes first on the import path."""
    path = f"{top}:{top / 'pipeline'}"
    return run_program([python, *words], cwd=top, env=environment() | {"PYTHONPATH": path})


@pytest.fixture(scope="module")
def whole(python):
    """Reference of all options, with those of every paper."""
    return run(python, ROOT, ROOT / "docs/options.py").stdout


def test_no_option_and_no_error_names_its_members(python, without, whole):
    top, papers = without
    options = run(python, top, ROOT / "docs/options.py").stdout
    error = run(python, top, "-m", "stages.distill", "--cfg", "job", "method=no_such").stderr

    assert "method=e2kd" in options
    assert "choose one of" in error or "there is" in error
    for member in (member for paper in papers for member in MEMBERS[paper]):
        assert member in whole
        assert member not in options
        if member.startswith("method="):
            assert f" {member.partition('=')[2]}," not in error


@pytest.mark.slow
def test_the_verbs_work_without_it(python, without):
    top, _ = without
    for words in (PRECOMPUTE, DISTILL, EVALUATE, REPORT):
        done = run(python, top, "-m", f"stages.{words[0]}", *words[1:], *STORE)
        assert done.returncode == 0, done.stderr

    assert (top / "runs/without/distill/model.safetensors").is_file()
    assert (top / "runs/without/report.html").is_file()
