"""The core without the packages next to it: a wheel of it alone runs seven verbs, and each package adds its own."""

import re
import shutil

import pytest

from tests.papers.test_package import run
from tests.support.environments import make_environment
from tests.support.paths import ROOT

CORE = ["preview", "precompute", "verify", "teach", "distill", "evaluate", "sweep"]
ADDED = {
    "evaluators": set(),
    "estimate": {"estimate"},
    "export": {"export"},
    "exchange": {"ingest", "share", "attach"},
    "report": {"report", "show"},
    "findings": set(),
    "sources": set(),
    "trackers": set(),
}
"""Verbs of the packages, in an order in which they can be installed."""
DATA = ("data=image_folder", "data.path=photos")
PHOTOS = """
from pathlib import Path
import numpy as np
from PIL import Image
generator = np.random.default_rng(0)
for number in range(72):
    path = Path("photos", "train" if number < 56 else "test", "ab"[number % 2], f"{number}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
"""
TEACHER = ("teacher=cifar", "teacher.name=resnet8", "teacher.width=4")
STUDENT = ("student.name=resnet8", "student.width=4", "trainer.epochs=1", "trainer.batch_size=8")
PROJECT = """
[build-system]
requires = ["hatchling>=1.27"]
build-backend = "hatchling.build"

[project]
name = "permafrost-{name}"
version = "0"

[project.entry-points.permafrost]
{name} = "permafrost_{name}.options"

[tool.hatch.build.targets.wheel]
packages = ["permafrost_{name}"]
"""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def copied(folder):
    """Copy the project without the packages and what pyproject.toml says of them."""
    left = shutil.ignore_patterns("permafrost_*", "__pycache__", "*.results.json")
    for name in ("pipeline", "conf", "stages"):
        shutil.copytree(ROOT / name, folder / name, ignore=left)
    for name in ("README.md", "LICENSE", "NOTICE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, folder / name)
    text = (ROOT / "pyproject.toml").read_text()
    text = re.sub(r'^([\w-]+ = )?\s*"(pipeline/)?permafrost_.*\n', "", text, flags=re.MULTILINE)
    (folder / "pyproject.toml").write_text(text)
    return folder


def installed(pip, *places):
    try:
        run(ROOT, *pip, *places)
    except AssertionError as error:
        if "No matching distribution" in str(error):
            pytest.skip("pip cannot download what packages are built with")
        raise


def install_core(top):
    """Make an environment that has the core alone, and return its folder, its programs, and how it installs."""
    tools = make_environment(top / "env", with_pip=True).parent
    pip = (tools / "python", "-m", "pip", "install", "-q", "--no-deps")
    installed(pip, copied(top / "project"))
    run(top, tools / "python", "-c", PHOTOS)
    return top, tools, pip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return install_core(tmp_path_factory.mktemp("core"))


def verbs_of(top, tools):
    lines = run(top, tools / "permafrost", "--help").splitlines()
    return [line.split()[0] for line in lines if re.match("  (?!permafrost )", line)]


@pytest.mark.parametrize("backend", ["zarr", "webdataset"])
def test_seven_verbs_run_without_the_packages(world, backend):
    top, tools, _ = world
    (site,) = (top / "env/lib").glob("python*/site-packages")
    store = (
        f"store.path=stores/{backend}",
        "store.shard_size=16",
        *([] if backend == "zarr" else ["store=webdataset"]),
    )
    path, weights = f"runs/{backend}", f"teacher.weights=runs/{backend}/teach/model.safetensors"

    def verb(name, *words):
        return run(top, tools / "permafrost", name, *words)

    assert [each.name for each in site.glob("permafrost*") if each.is_dir()] == [
        "permafrost",
        *(each.name for each in site.glob("permafrost_kd-*")),
    ]
    assert verbs_of(top, tools) == CORE
    assert "records" in verb("preview", *DATA)
    packing = (*DATA, "store.image_size=16")
    verb("precompute", *packing, *store, "teacher=none", "executor=serial")
    run_typed_command = (store[0], f"run={backend}")
    training = ("teaching.trainer.epochs=1", "teaching.trainer.batch_size=8")
    verb("teach", *run_typed_command, *TEACHER, *training)
    verb("precompute", *packing, *store, *TEACHER, weights, "executor=serial")
    assert "verified_passes: 1" in verb("verify", store[0])
    verb("distill", *run_typed_command, "method=e2kd", *STUDENT)
    assert "accuracy" in verb("evaluate", *run_typed_command, "evaluate.splits=[test]")
    variants = ("variants={kd: [method=kd], e2kd: [method=e2kd]}", "seeds=[0]", "executor=serial")
    swept = verb("sweep", store[0], f"run={backend}-variants", *variants, *STUDENT)

    assert "trained_now: 2" in swept
    assert (top / path / "distill/model.safetensors").is_file()


def test_each_package_adds_its_verbs_once_it_is_installed(tmp_path):
    top, tools, pip = install_core(tmp_path)
    present = set(CORE)
    for name, verbs in ADDED.items():
        folder = top / f"permafrost-{name}"
        shutil.copytree(ROOT / f"pipeline/permafrost_{name}", folder / f"permafrost_{name}")
        (folder / "pyproject.toml").write_text(PROJECT.format(name=name))
        installed(pip, folder)
        present |= verbs
        assert set(verbs_of(top, tools)) == present
    assert "passport.records=256" in run(top, tools / "permafrost", "verify", "--help")
    assert "data=huggingface" in run(top, tools / "python", ROOT / "docs/options.py")
