"""Passports: the teacher that is said to have made targets is run on a sample of the views."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import adaptive_avg_pool2d

from permafrost.config.compose import compose
from permafrost.config.verbs import build_verb_config
from permafrost.exchange.target_reader import TargetError
from permafrost.store.manifest import MANIFEST_NAME
from permafrost.store.verification import verify_store
from stages import verify
from tests.exchange.test_readers import CLASSES, key_of
from tests.support import target_files
from tests.support.exchange import (
    PHOTOS,
    make_photographs,
    run_ingest,
    run_precompute,
    values_by_key,
)

TEACHER = ("teacher=cifar", "teacher.name=resnet8", "teacher.weights=random")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return make_photographs(tmp_path_factory.mktemp("passport"))


@pytest.fixture(scope="module")
def outputs(photographs):
    """Logits and maps of the teacher by its part of the image, in the order of the paths."""
    made = {}
    for frame in ("full", "center_crop"):
        result = run_precompute(photographs.store, "data=none", *TEACHER, f"teacher.frame={frame}")
        values = values_by_key(photographs.open(), result.passes[0])
        made[frame] = {
            name: np.stack([by_key[key_of(path)] for path in photographs.paths])[:, 0]
            for name, by_key in values.items()
        }
    return made


def write(photographs, path, values, *, transposed=False, order=None):
    logits = values["logits"] if order is None else values["logits"][:, order]
    maps = values["map"].astype("float32")
    target_files.write_npz(
        path,
        [key_of(each) for each in photographs.paths],
        logits=logits,
        map=maps.swapaxes(-1, -2) if transposed else maps,
        explained_class=values["explained_class"],
    )
    return [f"path={path}", "format.explainer=gradcam"]


def test_targets_of_the_named_teacher_get_a_passport(photographs, outputs, tmp_path):
    words = write(photographs, tmp_path / "t.npz", outputs["center_crop"])
    result = run_ingest(photographs.store, *words, "format.frame=center_crop", *TEACHER)

    store = photographs.open()
    passport = store.open_pass(result.ingested_pass.partition(" ")[0]).manifest.passport
    assert passport.teacher == "cifar resnet8, bilinear, 32 pixels"
    assert (passport.agreement.top1, passport.alternatives) == (1.0, {})
    assert passport.agreement.kl_mean < 1e-5
    assert passport.agreement.cosine_lowest["map"] > 0.999
    assert "largest logit equal for 100.0%" in result.agreement
    assert list(verify_store(store.path)) == []


def test_a_wrong_part_of_the_image_stops_with_the_one_that_fits(photographs, outputs, tmp_path):
    words = write(photographs, tmp_path / "t.npz", outputs["center_crop"])

    with pytest.raises(TargetError, match=r"another meaning: format\.frame=center_crop \("):
        run_ingest(photographs.store, *words, "format.frame=full", *TEACHER)


def test_a_wrong_order_of_the_classes_stops(photographs, outputs, tmp_path):
    order = np.roll(np.arange(CLASSES), 1)
    words = write(photographs, tmp_path / "t.npz", outputs["full"], order=order)

    with pytest.raises(TargetError, match="another order of the classes"):
        run_ingest(photographs.store, *words, "format.frame=full", *TEACHER)


def test_transposed_maps_stop(photographs, outputs, tmp_path):
    words = write(photographs, tmp_path / "t.npz", outputs["full"], transposed=True)

    with pytest.raises(TargetError, match="map transposed"):
        run_ingest(photographs.store, *words, "format.frame=full", *TEACHER)


def test_nothing_is_stored_of_targets_without_their_passport(photographs, outputs, tmp_path):
    words = write(photographs, tmp_path / "t.npz", outputs["full"], transposed=True)
    before = {folder.name for folder in photographs.open().pass_folders()}

    with pytest.raises(TargetError):
        run_ingest(photographs.store, *words, "format.frame=full", *TEACHER, "name=odd")

    assert {folder.name for folder in photographs.open().pass_folders()} == before


NETWORK = """
from torch import nn


class Mean(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.layer = nn.Conv2d(3, classes, 1)

    def forward(self, images):
        return self.layer(images).mean(dim=(2, 3))


def build(classes):
    return Mean(classes)
"""


@pytest.mark.parametrize("transposed", [False, True])
def test_label_maps_are_compared_in_both_directions(photographs, tmp_path, monkeypatch, transposed):
    """A network that is the mean of its cells has label maps whose pooled cells are its logits of every crop."""
    monkeypatch.chdir(tmp_path)
    factory = photographs.folder / "mean_network.py"
    factory.write_text(NETWORK)
    weight = 40 * torch.randn(CLASSES, 3, generator=torch.Generator().manual_seed(0))
    state = {"layer.weight": weight[:, :, None, None], "layer.bias": torch.zeros(CLASSES)}
    torch.save(state, tmp_path / "mean.pt")
    maps = []
    for path in photographs.paths:
        pixels = torch.tensor(np.asarray(Image.open(photographs.folder / path))) / 255
        cells = adaptive_avg_pool2d((pixels @ weight.T).permute(2, 0, 1), 15)
        maps.append(cells.swapaxes(1, 2) if transposed else cells)
    names = [path.partition("/")[2] for path in photographs.paths]
    target_files.write_relabel(tmp_path / "m", names, torch.stack(maps).numpy(), CLASSES)
    words = [
        *("format=relabel", f"path={tmp_path / 'm'}", f"format.classes={CLASSES}"),
        *("views=random", "views.count=2"),
        "augment.operations=[{kind: resized_crop, scale: [0.05, 0.1]}]",
        *("teacher=module", f"teacher.factory={factory}:build", "teacher.layer=layer"),
        *("teacher.weights=mean.pt", "teacher.mean=[0,0,0]", "teacher.std=[1,1,1]"),
    ]

    right = f"format.transposed={str(transposed).lower()}"
    wrong = f"format.transposed={str(not transposed).lower()}"
    with pytest.raises(TargetError, match=f"another meaning: {right}"):
        run_ingest(photographs.store, *words, wrong)
    result = run_ingest(photographs.store, *words, right)

    name = result.ingested_pass.partition(" ")[0]
    manifest = photographs.open().open_pass(name, stored_views=True).manifest
    assert manifest.passport.agreement.top1 > 0.9
    assert manifest.passport.agreement.kl_mean < 0.01


def test_verify_writes_the_passport_of_a_pass_that_has_none(photographs, outputs, tmp_path):
    words = write(photographs, tmp_path / "t.npz", outputs["full"])
    result = run_ingest(photographs.store, *words, "format.frame=full", "name=later")
    name = result.ingested_pass.partition(" ")[0]
    before = (photographs.store / "teachers" / name / MANIFEST_NAME).read_bytes()
    assert "passport" not in json.loads(before)

    options = [f"store.path={photographs.store}", f"store.teacher=[{name}]", *TEACHER]
    done = verify.run(build_verb_config("verify", compose("verify", options)))

    assert list(done.agreement) == [name]
    manifest = photographs.open().open_pass(name).manifest
    assert manifest.passport.agreement.top1 == 1.0
    assert dataclasses.replace(manifest, passport=None).fingerprint == manifest.fingerprint
    assert list(verify_store(photographs.store)) == []


def test_verify_leaves_a_manifest_of_another_teacher_as_it_was(photographs, outputs, tmp_path):
    order = np.roll(np.arange(CLASSES), 1)
    words = write(photographs, tmp_path / "t.npz", outputs["full"], order=order)
    result = run_ingest(photographs.store, *words, "format.frame=full", "name=rolled")
    name = result.ingested_pass.partition(" ")[0]
    manifest = photographs.store / "teachers" / name / MANIFEST_NAME
    before = manifest.read_bytes()

    options = [f"store.path={photographs.store}", f"store.teacher=[{name}]", *TEACHER]
    with pytest.raises(TargetError, match="another order of the classes"):
        verify.run(build_verb_config("verify", compose("verify", options)))

    assert manifest.read_bytes() == before


def test_targets_of_another_network_are_refused(photographs, tmp_path):
    random = np.random.default_rng(5)
    values = {
        "logits": 9 * random.normal(size=(PHOTOS, CLASSES)).astype("float32"),
        "map": random.random((PHOTOS, 1, 1, 4, 4)),
        "explained_class": np.full((PHOTOS, 1), 2),
    }
    words = write(photographs, tmp_path / "t.npz", values)

    with pytest.raises(TargetError, match=r"not those of teacher=|another meaning"):
        run_ingest(photographs.store, *words, "format.frame=full", *TEACHER)


def test_targets_that_the_teacher_does_not_have_are_compared_with_nothing(photographs, tmp_path):
    pooled = np.random.default_rng(6).normal(size=(PHOTOS, 7)).astype("float32")
    target_files.write_npz(
        tmp_path / "t.npz", [key_of(each) for each in photographs.paths], pooled=pooled
    )

    with pytest.raises(TargetError, match="nothing was compared"):
        run_ingest(photographs.store, f"path={tmp_path / 't.npz'}", "format.frame=full", *TEACHER)


def test_an_experiment_names_no_teacher_for_verify():
    config = build_verb_config("verify", compose("verify", ["experiment=demo"]))

    assert config.teacher.kind == "none"
