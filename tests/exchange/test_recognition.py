"""An ingest without a format says which one the files have, and what is missing."""

import re
import shutil
from functools import partial

import numpy as np
import pytest

from permafrost.core.errors import ConfigError, UserError
from permafrost_exchange.recognition import recognize, require_arrays
from tests.exchange.conformance.make_files import CLASSES, unpack
from tests.support.exchange import make_photographs, run_ingest, run_precompute

KINDS = {
    **dict.fromkeys(("fkd_k5", "fkd_fp16", "fkd_hard"), "fkd"),
    **dict.fromkeys(("imagenet_plus", "imagenet_plus_mappings"), "imagenet_plus"),
    **dict.fromkeys(("datacompdr", "datacompdr_bfloat16"), "datacompdr"),
    "tinyvit": "tinyvit",
    "relabel": "relabel",
    "theia": "theia",
    **dict.fromkeys(("e2kd_gradcam", "e2kd_bcos"), "e2kd"),
}


@pytest.fixture
def unpacked(tmp_path):
    return partial(unpack, target=tmp_path)


@pytest.mark.parametrize("name", KINDS)
def test_files_of_the_tools_are_recognized(unpacked, name):
    recognized = recognize(unpacked(name))

    assert (recognized.kind, recognized.lacks) == (KINDS[name], ())


def test_what_is_missing_is_said(unpacked, tmp_path):
    (unpacked("imagenet_plus") / "config.pth.tar").unlink()
    (unpacked("tinyvit") / "rank0-values.bin").unlink()
    epochs = tmp_path / "epochs"
    shutil.copytree(unpacked("tinyvit"), epochs / "logits_top5_epoch0")
    (tmp_path / "clip/img_emb").mkdir(parents=True)
    np.save(tmp_path / "pooled.npy", np.zeros((2, 3)))

    for name, said in {
        "imagenet_plus": "it lacks config.pth.tar",
        "epochs": "set path=.*logits_top5_epoch0",
        "clip": "it lacks the folder metadata",
    }.items():
        with pytest.raises(ConfigError, match=said):
            require_arrays(str(tmp_path / name))
    assert recognize(tmp_path / "pooled.npy").lacks == (
        "format.names=FILE with the name of each row",
    )


def test_other_things_are_no_targets(unpacked, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "share").mkdir()
    (tmp_path / "share/share.json").write_text("{}")

    for path, said in {
        unpacked(
            "photographs"
        ): "files of another format than those that ingest reads (photo_1.jpg",
        tmp_path / "empty": "(none)",
        tmp_path / "share": "permafrost attach from=",
        tmp_path / "nothing": "does not exist",
    }.items():
        with pytest.raises(ConfigError, match=re.escape(said)):
            require_arrays(str(path))


def test_all_that_an_npz_lacks_is_said_at_once(tmp_path):
    made = make_photographs(tmp_path / "made")
    maps = {"map": np.ones((24, 7, 2, 2, 5, 5)), "logits": np.ones((20, 4)), "notes": np.ones(2)}
    np.savez(tmp_path / "t.npz", **maps)

    with pytest.raises(UserError) as error:
        run_ingest(made.store, f"path={tmp_path / 't.npz'}")

    for said in (
        "is format=npz, logits [20, 4], map [24, 7, 2, 2, 5, 5], notes. 4 things are missing or wrong: (1) ",
        "format.explainer=None must say what made the maps, among (",
        "; other: Maps that only the teacher can make, such as people's",
        "or an explainer of yours with 'plugins=[<its file>.py]'",
        "map has shape [7, 2, 2, 5, 5] per record, in place of [target, channel, y, x]",
        "has no array keys; name a text file",
        "format.frame is not set",
    ):
        assert said in str(error.value)


def test_the_options_that_are_said_ingest_the_files(unpacked, tmp_path):
    """The options of the message are typed, word for word."""
    photographs = unpacked("photographs")
    made = make_photographs(tmp_path / "made")
    shutil.rmtree(made.folder / "train")
    shutil.copytree(photographs / "train", made.folder / "train")
    shutil.rmtree(made.store)
    words = (f"data.path={made.folder}", "store.image_size=32", "teacher=none")
    run_precompute(made.store, "data=image_folder", *words)
    for name in ("fkd_k5", "tinyvit", "theia", "e2kd_gradcam"):
        path = unpacked(name)
        with pytest.raises(ConfigError) as error:
            run_ingest(made.store, f"path={path}")
        said = dict(re.findall(r"(format[.\w]*)=(\w*)", str(error.value)))
        chosen = {"format.classes": str(CLASSES), "format.frame": "full"}
        typed = [f"{option}={value or chosen[option]}" for option, value in said.items()]
        assert run_ingest(made.store, f"path={path}", *typed).records == 8
