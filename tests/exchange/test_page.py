"""Commands of the page on getting and giving targets, run as they stand."""

import json
import shlex
import shutil

import numpy as np
import pytest

from permafrost.cli import run_typed_command
from permafrost.config.plugins import load_plugins
from permafrost.store.reader import Store
from tests.exchange.test_readers import CLASSES, VIEWS, crops_of, softmax
from tests.support import target_files
from tests.support.commands import lines_of
from tests.support.exchange import PHOTOS, make_photographs, run_precompute, values_by_key
from tests.support.pages import blocks_of
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "howto" / "exchange.md"
SMALL = {
    "precompute": ["store.image_size=32", "store.shard_size=7", "executor=serial"],
    "ingest": ["executor=serial"],
    "distill": ["trainer.epochs=1", "trainer.batch_size=8", "trainer.num_threads=1"],
    "verify": [],
    "share": [],
    "attach": ["executor=serial"],
}
"""Words that make each command small."""


def run(command):
    program, verb, *words = shlex.split(command)
    assert program == "permafrost"
    return run_typed_command(verb, [*words, *SMALL[verb]])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with everything that the page names: photographs, targets of each kind, and a second store."""
    folder = tmp_path_factory.mktemp("page")
    photographs = make_photographs(folder / "made")
    shutil.copytree(photographs.folder / "train", folder / "photos")
    random = np.random.default_rng(3)
    crops = crops_of(photographs, random)
    paths = [path.partition("/")[2] for path in photographs.paths]
    flips = np.zeros((PHOTOS, VIEWS), bool)
    probabilities = softmax(random.normal(size=(PHOTOS, VIEWS, CLASSES)))
    target_files.write_fkd(
        folder / "soft_labels", paths, crops, flips, photographs.sizes, probabilities, 2, False
    )
    maps = random.normal(size=(PHOTOS, CLASSES, 15, 15)).astype("float32")
    target_files.write_relabel(folder / "label_maps", paths, maps, CLASSES)
    lines = [{"image": path, "logits": random.normal(size=CLASSES).tolist()} for path in paths]
    (folder / "targets.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (block,) = blocks_of(PAGE, "python")
    (folder / "my_format.py").write_text(block.code)
    return folder


def teacher_of(folder):
    """Train nothing: save a network, and let it make targets.npz."""
    from safetensors.torch import save_file

    from permafrost.config.models import CifarModelConfig
    from permafrost.models.providers import build_model

    network = build_model(CifarModelConfig(name="resnet20", weights="random"), CLASSES).network
    save_file(network.state_dict(), folder / "resnet20.safetensors")
    words = ["teacher=cifar", "teacher.name=resnet20", "teacher.weights=resnet20.safetensors"]
    words += ["teacher.frame=center_crop", "annotate.name=made"]
    run_precompute("stores/photos", "data=none", *words)
    store = Store("stores/photos")
    name = next(f.name for f in store.pass_folders() if f.name.startswith("made"))
    values = values_by_key(store, name)["logits"]
    np.savez(
        folder / "targets.npz",
        keys=np.array(list(values)),
        logits=np.concatenate(list(values.values())),
    )
    shutil.rmtree(store.path / "teachers" / name)


def test_the_commands_of_the_page_run_in_their_order(prepared, monkeypatch):
    monkeypatch.chdir(prepared)
    commands = [
        line
        for block in blocks_of(PAGE, "bash")
        if block.needs in (None, "a module of your own")
        for line in lines_of(block.code)
    ]
    assert len(commands) == 11
    results = []
    for command in commands:
        if "plugins=" in command:
            load_plugins(["my_format.py"])
        if " attach " in command:
            run_typed_command(
                "precompute",
                [
                    *("data=image_folder", "data.path=photos", "store.path=stores/elsewhere"),
                    *("teacher=none", *SMALL["precompute"]),
                ],
            )
        results.append(run(command))
        if command.startswith("permafrost precompute"):
            teacher_of(prepared)

    assert "largest logit equal for 100.0%" in results[6].agreement
    assert "largest logit equal for 100.0%" in next(iter(results[7].agreement.values()))
    assert results[9].attached_records == PHOTOS
