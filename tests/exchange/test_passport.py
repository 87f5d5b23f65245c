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
from permafrost.store.manifest import MANIFEST_NAME
from permafrost.store.verification import verify_store
from permafrost_exchange.diagnosis import CLOSE_NATS, StoredOutputs, find_cause_of_outputs
from permafrost_exchange.target_reader import TargetError
from tests.exchange.situations import COUNTS, Bench, judge, situations
from tests.exchange.test_readers import CLASSES, key_of
from tests.support import target_files
from tests.support.exchange import (
    PHOTOS,
    loaded_plugin,
    make_photographs,
    run_ingest,
    run_precompute,
    values_by_key,
)
from tests.support.slow import slow
from tests.support.verbs import verify

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
        target_class=values["target_class"],
    )
    return [f"path={path}", "format.explainer=gradcam"]


def test_targets_of_the_named_teacher_get_a_passport(photographs, outputs, tmp_path):
    words = write(photographs, tmp_path / "t.npz", outputs["center_crop"])
    result = run_ingest(photographs.store, *words, "format.frame=center_crop", *TEACHER)

    store = photographs.open()
    passport = store.open_pass(result.ingested_pass.partition(" ")[0]).manifest.passport
    assert passport.teacher == "cifar resnet8, bilinear, 32 pixels"
    assert (passport.agreement.top1, passport.accepted) == (1.0, {})
    assert passport.agreement.kl_mean < 1e-5
    assert passport.agreement.cosine_lowest["map"] > 0.999
    assert "largest logit equal for 100.0%" in result.agreement
    assert list(verify_store(store.path)) == []


def test_a_wrong_part_of_the_image_stops_with_the_one_that_fits(photographs, outputs, tmp_path):
    words = write(photographs, tmp_path / "t.npz", outputs["center_crop"])

    with pytest.raises(
        TargetError,
        match=r"another part of the image, format\.frame=center_crop format\.crop_fraction=0\.875;",
    ):
        run_ingest(photographs.store, *words, "format.frame=full", *TEACHER)


def test_nothing_is_stored_of_targets_without_their_passport(photographs, outputs, tmp_path):
    words = write(photographs, tmp_path / "t.npz", outputs["full"], transposed=True)
    before = {folder.name for folder in photographs.open().pass_folders()}

    with pytest.raises(TargetError, match="map is transposed"):
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


@pytest.mark.parametrize("transposed", [slow(False), slow(True)])
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
    with pytest.raises(TargetError, match=f"they are closer with {right};"):
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
    assert json.loads(before)["passport"] is None

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
    with pytest.raises(
        TargetError, match=r"another order of the classes: class 0 .* is the teacher's 3"
    ):
        verify.run(build_verb_config("verify", compose("verify", options)))

    assert manifest.read_bytes() == before


def test_targets_of_another_network_are_refused(photographs, tmp_path):
    random = np.random.default_rng(5)
    values = {
        "logits": 9 * random.normal(size=(PHOTOS, CLASSES)).astype("float32"),
        "map": random.random((PHOTOS, 1, 1, 8, 8)),
        "target_class": np.full((PHOTOS, 1), 2),
    }
    words = write(photographs, tmp_path / "t.npz", values)

    with pytest.raises(TargetError, match="not those of teacher="):
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


# ---- maps ------------------------------------------------------------------------------------------


@pytest.fixture
def plugin(tmp_path):
    with loaded_plugin(tmp_path / "signed_maps.py"):
        yield


CHANGES = {
    "8 bits": lambda maps: np.round(255 * maps / maps.max()).astype("uint8"),
    "cut to 0 and 1": lambda maps: (maps / maps.max()).astype("uint8"),
    "negative": lambda maps: -maps,
    "signed pixels": lambda maps: np.kron(maps - maps.mean(), np.ones((4, 4))),
    "enlarged": lambda maps: np.kron(maps, np.ones((4, 4))),
    "mirrored": lambda maps: maps[..., ::-1],
    "transposed": lambda maps: maps.swapaxes(-1, -2),
    "of the record before": lambda maps: np.roll(maps, 1, 0),
    "constant": np.ones_like,
    "zeros": np.zeros_like,
    "of another network": lambda maps: np.random.default_rng(0).random(maps.shape),
    "not finite": lambda maps: np.where(maps > 0, np.nan, maps),
    "of another contrast": lambda maps: maps**1.5,
}


@pytest.mark.parametrize(
    ("change", "explainer", "said"),
    [
        ("", "gradcam", "maps: cosine 1.000 (median), lowest 1.000 over 24"),
        ("8 bits", "gradcam", "maps: cosine 1.000"),
        ("of another contrast", "gradcam", "they differ, cause unknown"),
        ("negative", "other", "maps: not compared (explainer=other)"),
        (
            "",
            "broken_maps",
            "maps: not compared (explainer=broken_maps fails: RuntimeError: no gradient)",
        ),
        ("negative", "gradcam", r"8x8 and \d+% of their values are negative, but .* 8x8 and none"),
        (
            "signed pixels",
            "gradcam",
            r"32x32 and \d+% .* but gradcam of resnet8 gives 8x8 and none below 0; name",
        ),
        ("enlarged", "gradcam", "32x32 and none .* but .* 8x8 and none"),
        (
            "",
            "signed_maps",
            r"8x8 and none of their values are negative, but .* 8x8 and \d\d% below",
        ),
        ("mirrored", "gradcam", "map is mirrored"),
        ("transposed", "gradcam", "map is transposed"),
        ("of the record before", "gradcam", "24 of 24 rows are not those of their records"),
        ("of another class", "gradcam", "not those of teacher="),
        ("constant", "gradcam", "not those of teacher="),
        ("zeros", "gradcam", "not those of teacher="),
        ("cut to 0 and 1", "gradcam", "not those of teacher="),
        ("of another network", "gradcam", "not those of teacher="),
        ("not finite", "gradcam", "has values that are not finite"),
    ],
)
def test_maps_of_another_explainer_are_refused_or_told(
    photographs, outputs, plugin, tmp_path, caplog, change, explainer, said
):
    values = dict(outputs["full"])
    if change == "of another class":
        values["target_class"] = (values["target_class"] + 1) % CLASSES
    elif change:
        values["map"] = CHANGES[change](values["map"].astype("float32"))
    path, names = tmp_path / "t.npz", [key_of(each) for each in photographs.paths]
    del values["map_scale"]
    target_files.write_npz(path, names, **values)
    words = [f"path={path}", "format.frame=full", f"format.explainer={explainer}", "name=doctored"]
    before = {folder.name for folder in photographs.open().pass_folders()}

    if said.startswith(("maps:", "they differ")):
        result = run_ingest(photographs.store, *words, *TEACHER)
        assert said in result.agreement + caplog.text
    else:
        with pytest.raises(TargetError, match=said):
            run_ingest(photographs.store, *words, *TEACHER)
        assert {folder.name for folder in photographs.open().pass_folders()} == before


def test_negative_gradcam_is_refused_without_a_network(photographs, outputs, tmp_path):
    words = write(
        photographs, tmp_path / "t.npz", outputs["full"] | {"map": -outputs["full"]["map"]}
    )

    with pytest.raises(TargetError, match="but GradCAM gives none below 0; name what made them"):
        run_ingest(photographs.store, *words, "format.frame=full", "name=negative")

    assert not list((photographs.store / "teachers").glob("negative-*"))


# ---- what is accepted ------------------------------------------------------------------------------


def test_an_accepted_difference_is_noted_and_others_still_stop(photographs, outputs, tmp_path):
    values = outputs["full"] | {"logits": outputs["full"]["logits"] / 4}
    words = write(photographs, tmp_path / "t.npz", values)
    accept = "passport.accept=[temperature]"
    with pytest.raises(TargetError, match=r"at temperature 4, and not 1.*multiplied by 4.*accept"):
        run_ingest(photographs.store, *words, "format.frame=full", *TEACHER)

    result = run_ingest(photographs.store, *words, "format.frame=full", *TEACHER, accept)
    name = result.ingested_pass.partition(" ")[0]
    accepted = photographs.open().open_pass(name).manifest.passport.accepted
    assert accepted == {"temperature": "they are at temperature 4, and not 1"}

    words = write(photographs, tmp_path / "t.npz", values, transposed=True)
    with pytest.raises(TargetError, match="map is transposed"):
        run_ingest(photographs.store, *words, "format.frame=full", *TEACHER, accept, "name=both")


@pytest.mark.slow
def test_targets_of_another_network_are_accepted_by_name_only(photographs, tmp_path):
    random = np.random.default_rng(5)
    logits = 9 * random.normal(size=(PHOTOS, CLASSES)).astype("float32")
    keys = [key_of(each) for each in photographs.paths]
    target_files.write_npz(tmp_path / "t.npz", keys, logits=logits)
    words = [f"path={tmp_path / 't.npz'}", "format.frame=full", *TEACHER]
    with pytest.raises(TargetError, match="not those of teacher="):
        run_ingest(photographs.store, *words, "passport.accept=[maps,rows]")

    result = run_ingest(photographs.store, *words, "passport.accept=[unknown]")
    manifest = photographs.open().open_pass(result.ingested_pass.partition(" ")[0]).manifest
    assert manifest.passport.accepted == {"unknown": "they differ, and the cause is unknown"}


def test_rows_that_rounding_explains_have_no_other_cause():
    """Two logits of a hundred are off by .2 each: a divergence, in rows that are exact as a whole."""
    teacher = np.random.default_rng(0).normal(0, 0.3, (40, 100))
    teacher[:, :2] = 10
    wrong = teacher.copy()
    wrong[:, 0] += 0.2
    wrong[:, 1] -= 0.2
    stored = StoredOutputs.of({"logits": wrong[:, None]}, ())

    assert stored.divergence(teacher).mean() > CLOSE_NATS
    assert stored.errors(teacher).max() < 0.015
    assert find_cause_of_outputs(teacher, stored, [str(n) for n in range(40)], ()) is None


def test_photographs_that_exif_turns_are_not_compared(tmp_path):
    """Targets of whole images are of the stored pixels there, and the teacher would be shown upright ones."""
    folder = tmp_path / "images/train/a"
    folder.mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (24, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png", exif=exif)
    words = (f"data.path={tmp_path / 'images'}", "store.image_size=32", "teacher=none")
    run_precompute(tmp_path / "store", "data=image_folder", *words)
    keys = [f"train%2Fa%2F{number}%2Epng" for number in range(4)]
    target_files.write_npz(tmp_path / "t.npz", keys, logits=np.eye(4, dtype="float32") * 9)

    with pytest.raises(TargetError, match="EXIF turns all photographs of the sample"):
        run_ingest(tmp_path / "store", f"path={tmp_path / 't.npz'}", "format.frame=full", *TEACHER)


# ---- generated situations --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("situations"))


@pytest.mark.slow
def test_causes_are_named_only_where_they_are_right(bench):
    """No sound targets are doubted, and no cause is named that is not the one."""
    verdicts = {}
    for situation in situations(bench):
        kind, text = bench.verdict(situation)
        verdicts[situation.name] = (judge(situation, kind, text), kind, text)

    wrong = {name: v for name, v in verdicts.items() if v[0] in ("false alarm", "wrong")}
    assert wrong == {}
    misses = sum(verdict[0] == "miss" for verdict in verdicts.values())
    assert misses <= 0.03 * len(verdicts)


def test_the_counts_of_the_page_are_of_enough_situations():
    counts = json.loads(COUNTS.read_text())

    assert sum(sum(each.values()) for each in counts.values()) >= 200
    assert sum(counts["None"].values()) >= 60
    assert not any({"wrong", "false alarm"} & each.keys() for each in counts.values())
