"""UniCAM maps of finished students: output files, compared networks, and a teacher that is computed once."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open

import permafrost
from permafrost.core.digests import sha256_keys
from permafrost.core.errors import ConfigError
from permafrost.evaluation.evaluate import evaluate_student
from permafrost.loading.dataset import StoreDataset
from permafrost.models.providers import build_model, freeze
from permafrost.models.saved import SavedNetwork, TrainedModel, save_model
from permafrost.runs.mirrors import RUNS
from permafrost.store.verification import verify_store
from permafrost_papers.bcos.options import BcosModelConfig
from permafrost_papers.ked.options import AdditiveModelConfig
from permafrost_papers.probe_set import activations, layer_features
from permafrost_papers.unicam.estimators import InnerProducts, feature_distances
from permafrost_papers.unicam.options import UnicamOptions
from tests.support.runs import evaluation_of


def unicam_maps(own, run="one", name="evaluate", teacher=True, model="student", **options):
    """Evaluate, and return the metrics with the tensors and the header of the file of maps."""
    options = {"records": 4, "bank_records": 12, **options}
    config = evaluation_of(
        own,
        ("unicam",),
        run=run,
        splits=("train",),
        unicam=UnicamOptions(**options),
        model=model,
        **({"teacher": own.config.teacher} if teacher else {}),
    )
    found = evaluate_student(config, name)
    with safe_open(Path(found.metrics).parent / "unicam-train.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        header = {key: json.loads(value) for key, value in file.metadata().items()}
    return found.splits["train"]["unicam"], tensors, header


def save_student(run, config, **described):
    torch.manual_seed(0)
    folder = RUNS / run / "distill"
    folder.mkdir(parents=True)
    trained = TrainedModel(config=config, num_classes=10, input_size=(16, 16), **described)
    save_model(folder, build_model(config, 10), trained)


def test_maps_lie_on_the_networks_own_grid_with_all_that_reads_them(own):
    numbers, tensors, header = unicam_maps(own, depths=(1, 2))

    assert {key.rpartition("/")[0].split("/")[0] for key in tensors} == {
        "teacher_given_student", "student_given_teacher",
    }  # fmt: skip
    place = "teacher_given_student/depth2"
    assert tensors[f"{place}/objective"].shape == (4,)
    maps = tensors[f"{place}/cam/map"]
    assert (maps.dtype, maps.shape) == (torch.float16, (4, 4, 4))
    assert maps.float().abs().amax(dim=(1, 2)).tolist() == [1.0] * 4
    low, high = (tensors[f"{place}/cam/{name}"] for name in ("min", "max"))
    scale = torch.maximum(low.abs(), high.abs())
    torch.testing.assert_close(maps.float().amax(dim=(1, 2)) * scale, high, rtol=1e-3, atol=0)
    assert torch.equal(tensors[f"{place}/cam/empty"], high <= 0)
    assert (low < 0).any()  # maps are signed
    assert len(header["keys"]) == len(set(header["keys"])) == 4
    assert header["bank_sha256"] == numbers["bank_sha256"]
    assert len(set(numbers["bank_sha256"])) == 2
    assert set(header["networks"]) == {"student", "teacher"}
    assert (numbers["records"], numbers["banks"], numbers["bank_records"]) == (4, 2, 12)
    assert -1 <= numbers["reliability"]["student_given_teacher"]["depth1"]["cam"] <= 1
    assert numbers["objective"]["teacher_given_student"]["depth2"] == pytest.approx(
        float(tensors[f"{place}/objective"].mean())
    )


def test_an_objective_follows_from_the_keys_that_are_stored(own):
    _, tensors, header = unicam_maps(own)
    table = pq.read_table(RUNS / "one" / "evaluate" / "unicam-train.parquet").to_pandas()
    sets = table.groupby("set")["key"].apply(list)
    networks = [
        build_model(own.config.teacher, 10),
        SavedNetwork(RUNS / "one" / "distill").load(own.store.manifest.classes)[0],
    ]
    selected = permafrost.open_store(own.store.path).select("train", keys=set(table["key"]))
    (batch,) = permafrost.RecordLoader(selected, shuffle=False, batch_size=len(selected))
    with torch.no_grad():
        features = [
            layer_features(activations(freeze(network), batch.images))["pooled"]
            for network in networks
        ]
    values = [*features, F.one_hot(batch.labels, 10)]

    objectives = []
    for bank, sha256 in zip(("bank1", "bank2"), header["bank_sha256"], strict=True):
        assert sha256_keys(sets[bank]) == sha256
        keys = [header["keys"][0], *(key for key in sets[bank] if key != header["keys"][0])]
        rows = [batch.keys.index(key) for key in keys]
        named = zip(("x", "given", "labels"), values, strict=True)
        distances = {name: feature_distances(matrix[rows]) for name, matrix in named}
        objectives.append(
            float(InnerProducts.from_distances(distances).semi_partial("x", "given", "labels"))
        )

    assert sets["explained"] == header["keys"]
    stored = float(tensors["teacher_given_student/depth1/objective"][0])
    assert stored == pytest.approx(np.mean(objectives), abs=1e-5)
    assert abs(stored - objectives[0]) > 1e-5  # the control: one bank alone


def test_overlays_are_a_picture_for_each_record_and_pair(own, monkeypatch):
    _, tensors, header = unicam_maps(own, overlays=True, depths=(1, 2))
    folder = RUNS / "one" / "evaluate" / "unicam-train"

    pairs = {"student_given_teacher", "teacher_given_student"}
    expected = {f"{pair}/{key}.png" for pair in pairs for key in header["keys"]}
    assert {str(path.relative_to(folder)) for path in folder.rglob("*.png")} == expected
    written = json.loads((folder.parent / "metrics.json").read_text())["written"]
    assert {f"unicam-train/{name}" for name in expected} <= written.keys()
    maps = tensors["student_given_teacher/mean/cam/map"].float()
    for number, key in enumerate(header["keys"]):
        picture = np.asarray(Image.open(folder / "student_given_teacher" / f"{key}.png")) / 255
        assert picture.shape == (224, 224, 3)
        picture = picture[::14, ::14]
        row, column = divmod(int(maps[number].abs().argmax()), maps.shape[-1])
        side = 16 // maps.shape[-1]
        cell = picture[row * side : (row + 1) * side, column * side : (column + 1) * side]
        redness = float((cell[..., 0] - cell[..., 2]).mean())
        assert (redness > 0) == (maps[number, row, column] > 0)

    hostile = [f"../../{number} \N{SNOWMAN}" for number in range(4)]
    keys_at = StoreDataset.keys_at
    monkeypatch.setattr(
        StoreDataset,
        "keys_at",
        lambda self, at=None: hostile if len(at) == 4 else keys_at(self, at),
    )
    unicam_maps(own, name="hostile", overlays=True)
    names = sorted(path.name for path in (RUNS / "one" / "hostile").rglob("*.png"))
    assert len(names) == 8
    assert names[0] == "%2E%2E%2F%2E%2E%2F0%20%E2%98%83.png"


def test_several_depths_have_a_mean_on_the_finest_grid(own):
    numbers, tensors, _ = unicam_maps(own, depths=(1, 2, 3))

    for pair in ("teacher_given_student", "student_given_teacher"):
        maps = [tensors[f"{pair}/depth{depth}/cam/map"].float() for depth in (1, 2, 3)]
        assert [values.shape[-1] for values in maps] == [4, 4, 8]
        enlarged = [F.interpolate(values[None], size=(8, 8), mode="bilinear")[0] for values in maps]
        mean = torch.stack(enlarged).mean(dim=0)
        highest, lowest = (tensors[f"{pair}/mean/cam/{name}"] for name in ("max", "min"))
        torch.testing.assert_close(mean.amax(dim=(1, 2)), highest, rtol=0, atol=2e-3)
        torch.testing.assert_close(mean.amin(dim=(1, 2)), lowest, rtol=0, atol=2e-3)
        cosine = F.cosine_similarity(
            mean.flatten(1), tensors[f"{pair}/mean/cam/map"].float().flatten(1)
        )
        assert cosine.min() > 0.99999
        assert -1 <= numbers["reliability"][pair]["mean"]["hirescam"] <= 1
        assert "mean" not in numbers["objective"][pair]


def test_embeddings_of_the_classes_take_the_place_of_one_hot_labels(own, tmp_path):
    np.save(tmp_path / "eye.npy", np.eye(10, dtype=np.float32))
    np.save(tmp_path / "random.npy", np.random.default_rng(0).normal(size=(10, 6)))
    all_classes = {"bank_records": 40, "banks": 1}
    _, one_hot, _ = unicam_maps(own, name="a", **all_classes)
    _, same, _ = unicam_maps(own, name="b", embeddings=str(tmp_path / "eye.npy"), **all_classes)
    _, other, _ = unicam_maps(own, name="c", embeddings=str(tmp_path / "random.npy"), **all_classes)

    key = "teacher_given_student/depth1/objective"
    assert torch.equal(same[key], one_hot[key])
    assert not torch.equal(other[key], one_hot[key])
    drawn, _, _ = unicam_maps(own, name="e")
    embedded, _, _ = unicam_maps(own, name="f", embeddings=str(tmp_path / "eye.npy"))
    assert (drawn["classes"], embedded["classes"]) == (6, 10)  # 24 records, 4 of a class if drawn


def test_files_that_are_no_embeddings_are_refused(own, tmp_path):
    np.save(tmp_path / "short.npy", np.eye(9))
    np.save(tmp_path / "gaps.npy", np.full((10, 2), np.nan))
    (tmp_path / "empty.npy").touch()
    with (tmp_path / "several.npy").open("wb") as file:
        np.savez(file, a=np.eye(10), b=np.eye(10))

    for name, message in {
        "short": r"is not a .* for each of the 10 .*: its shape is \(9, 9\)",
        "gaps": "some of its values are not finite",
        "empty": "not an npy file",
        "several": "holds several arrays",
    }.items():
        with pytest.raises(ConfigError, match=rf"unicam\.embeddings=.*{name}\.npy.* {message}"):
            unicam_maps(own, embeddings=str(tmp_path / f"{name}.npy"))


def test_the_same_command_elsewhere_gives_the_same_maps(own):
    one, other = (unicam_maps(own, name=name)[1] for name in ("a", "b"))

    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one if "reliability" not in key)


def test_a_teacher_beyond_itself_shows_nothing(own):
    numbers, tensors, _ = unicam_maps(own, model="teacher")

    for pair in ("teacher_given_student", "student_given_teacher"):
        assert not tensors[f"{pair}/depth1/cam/map"].any()
        assert tensors[f"{pair}/depth1/cam/empty"].all()
        assert numbers["objective"][pair]["depth1"] == 0
        assert numbers["empty_fraction"][pair]["depth1"]["cam"] == 1
    assert "reliability" not in numbers


def test_the_second_student_of_a_teacher_needs_no_teacher(own, monkeypatch):
    with pytest.raises(ConfigError, match="evaluators=unicam needs the teacher network"):
        unicam_maps(own, teacher=False)
    _, first, _ = unicam_maps(own)
    assert list(verify_store(own.store.path)) == []
    monkeypatch.setattr(
        "permafrost.evaluation.other_networks.build_teacher",
        lambda *_: pytest.fail("the teacher was built"),
    )

    _, again, _ = unicam_maps(own, name="again", teacher=False)
    _, other, _ = unicam_maps(own, run="two", teacher=False)

    key = "teacher_given_student/depth1/cam/map"
    assert torch.equal(again[key], first[key])
    assert not torch.equal(other[key], first[key])


def test_a_baseline_is_the_control_of_what_was_distilled(own):
    _, tensors, header = unicam_maps(
        own, baseline="two", pairs=(("student", "baseline"),), teacher=False
    )

    assert {key.split("/")[0] for key in tensors} == {"student_given_baseline"}
    assert set(header["networks"]) == {"student", "baseline"}
    assert tensors["student_given_baseline/depth1/cam/map"].any()


def test_seed_and_reductions_decide_what_is_written(own):
    one, tensors, header = unicam_maps(own, name="a", reductions=("hirescam",))
    two, _, other = unicam_maps(own, name="b", seed=1)

    assert {key.split("/")[2] for key in tensors} == {"objective", "hirescam"}
    assert not set(one["bank_sha256"]) & set(two["bank_sha256"])
    assert header["keys"] != other["keys"]


def test_banks_shrink_before_they_overlap(own):
    numbers, _, _ = unicam_maps(own, bank_records=255, banks=3)

    assert (numbers["banks"], numbers["bank_records"]) == (3, 13)  # 3 * 13 of 40 records


def test_a_bcos_student_is_explained_at_its_last_stage(own):
    passes = (own.store.pass_folders()[0].name,)
    save_student("bcos", BcosModelConfig(name="resnet8", width=4), teachers=passes)

    _, tensors, _ = unicam_maps(own, run="bcos")

    assert tensors["student_given_teacher/depth1/cam/map"].shape == (4, 4, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (9,)}, r"unicam\.depths=\[9\]: the student has 4 depths: pooled, layer3"),
        ({"depths": (0,)}, r"unicam\.depths must be >= 1"),
        ({"depths": (1, 1)}, r"unicam\.depths must list at least one value, each once"),
        ({"reductions": ()}, r"unicam\.reductions must list at least one value"),
        ({"banks": 20}, r"train has 40 labeled records.*at least 80 in 2 classes"),
        ({"bank_records": 2}, r"unicam\.bank_records must be >= 4"),
        ({"embeddings": "gone.npy"}, r"unicam\.embeddings=gone\.npy does not exist"),
        ({"baseline": "gone"}, r"unicam\.baseline=gone: runs/gone/distill holds no finished"),
    ],
)
def test_what_cannot_be_meant_is_refused(own, options, message):
    with pytest.raises(ConfigError, match=message):
        unicam_maps(own, **options)


def test_a_network_without_places_is_refused(own):
    save_student("flat", AdditiveModelConfig(name="mlp", superfeatures=2, input_size=16))

    with pytest.raises(ConfigError, match="the student has none; choose another network"):
        unicam_maps(own, run="flat")
