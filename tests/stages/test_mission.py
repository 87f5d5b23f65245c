"""The packages that the project is built on, each at its work while the commands of `make demo` run on small data."""

import importlib
import re
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from permafrost.cli import run_typed_command
from tests.support.paths import ROOT
from tests.support.words import TINY_DATA

PACKAGE = str(ROOT / "pipeline" / "permafrost")
SMALL = {
    "data": [*TINY_DATA, "store.shard_size=16"],
    "precompute": ["executor=serial", "annotate.batch_size=8"],
    "teach": ["teaching.trainer.epochs=1", "teaching.trainer.batch_size=8"],
    "sweep": [
        *("executor=serial", "trainer.epochs=1", "trainer.batch_size=8", "seeds=[0,1]"),
        *("curve.splits=[]", "evaluators=[accuracy,localization]"),
        *("augment=pad_crop_flip", "variants={labels: [method=labels], e2kd: [method=e2kd]}"),
    ],
    "report": ["report.columns={accuracy: test.accuracy}", "report.compared_column=accuracy"],
}
"""Words that make each verb of the demo small."""
WORK = {
    "torch": ("torch.nn.modules.conv", "Conv2d.forward", "annotation/annotator.py"),
    "torch, training": ("torch.nn.modules.conv", "Conv2d.forward", "training/step.py"),
    "torchvision": ("torchvision.models.resnet", "BasicBlock.forward", "annotation/annotator.py"),
    "webdataset": ("webdataset.writer", "TarWriter.write", "store/tars.py"),
    "zarr": ("zarr.codecs", "Crc32cCodec._encode_sync", "store/zarr_fields.py"),
    "kornia": (
        "kornia.augmentation",
        "RandomHorizontalFlip.forward_parameters",
        "loading/random_views.py",
    ),
    "pyarrow": ("pyarrow.parquet", "write_table", "store/arrow_files.py"),
    "ray.train": ("ray.train.torch", "TorchTrainer.fit", "cluster/ray_training.py"),
    "ray.data": ("ray.data", "Dataset.map_batches", "annotation/"),
}
"""Function of each package, and the module that has it do its work."""


def demo_commands():
    """Verbs and words of the recipe of `make demo`."""
    recipe = re.search(r"^demo: .*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    found = re.findall(r"-m stages\.(\w+) (.*)", recipe[1])
    return [(verb, words.replace("$(ARGS)", "").split()) for verb, words in found]


def run_verb(verb, words):
    words = [*words, *SMALL.get(verb, []), *(SMALL["data"] if verb == "precompute" else [])]
    return run_typed_command(verb, words)


@contextmanager
def watched(patch, calls):
    """Note which modules of the project have each function of WORK do its work."""
    for package, (module, path, _) in WORK.items():
        try:
            owner = importlib.import_module(module)
        except ImportError:
            continue
        *outer, name = path.split(".")
        for each in outer:
            owner = getattr(owner, each, None)
        if owner is None or not hasattr(owner, name):
            continue
        patch.setattr(owner, name, noting(getattr(owner, name), calls.setdefault(package, set())))
    yield


def noting(function, modules):
    def call(*arguments, **options):
        frame = sys._getframe(1)
        while frame is not None:
            file = frame.f_code.co_filename
            if file.startswith(f"{PACKAGE}/"):
                modules.add(Path(file).relative_to(PACKAGE).as_posix())
            frame = frame.f_back
        return function(*arguments, **options)

    return call


def test_the_recipe_of_the_demo_is_read():
    assert [verb for verb, _ in demo_commands()] == [
        *("precompute", "teach", "precompute", "verify", "sweep", "report")
    ]


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """Modules of the project that each package works for, by package."""
    calls = {}
    with pytest.MonkeyPatch.context() as patch, watched(patch, calls):
        patch.chdir(tmp_path_factory.mktemp("demo"))
        for verb, words in demo_commands():
            run_verb(verb, words)
        network = ["teacher=torchvision", "teacher.name=resnet18", "teacher.weights=random"]
        network += ["annotate.outputs=[logits]"]
        store = ["data=none", "store.path=stores/demo", "run=demo", "executor=serial"]
        run_typed_command("precompute", store + network)
    return calls


DEMO = [name for name in WORK if not name.startswith("ray.")]


@pytest.mark.parametrize("package", DEMO)
def test_a_package_does_its_work_in_the_demo(calls, package):
    assert WORK[package][2] in calls[package]


def test_ray_data_feeds_the_teacher():
    """The mission gives the stage of the teachers to Ray Data."""
    sources = [path.read_text() for path in Path(PACKAGE).rglob("*.py")]

    assert any("ray.data" in text for text in sources)


@pytest.mark.slow
def test_ray_train_trains_on_two_ranks(tmp_path, monkeypatch):
    calls = {}
    monkeypatch.chdir(tmp_path)
    with watched(monkeypatch, calls):
        for verb, words in demo_commands()[:3]:
            run_verb(verb, words)
        words = ["experiment=demo", "method.tau=4", "trainer.epochs=1", "trainer.batch_size=8"]
        ranks = ["trainer.ranks=2", "cluster.cpus_per_rank=1"]
        run_typed_command("distill", [*words, *ranks])

    assert WORK["ray.train"][2] in calls["ray.train"]
