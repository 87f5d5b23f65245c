"""FSS and RS of finished students: known values, a teacher that is computed once, and errors."""

import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import permafrost
from permafrost.config.builder import flatten_options
from permafrost.config.store import PassOptions
from permafrost.core.digests import sha256_keys
from permafrost.core.errors import ConfigError, UserError
from permafrost.evaluation.evaluate import evaluate_student
from permafrost.evaluation.evaluator import numbers_of
from permafrost.runs.mirrors import RUNS
from permafrost.storage.lock import folder_lock
from permafrost.store.artifacts import Artifact
from permafrost.store.entries import ManifestError, StoreMismatchError
from permafrost.store.verification import verify_store
from permafrost_papers.unicam.options import DistanceCorrelationOptions
from tests.support.composition import config_of
from tests.support.runs import evaluation_of
from tests.support.verbs import precompute, teach

EVALUATOR_NAME = "distance_correlation"


def distance_results(own, run="one", name="evaluate", teacher=True, **options):
    outer = {key: options.pop(key) for key in ("model",) if key in options}
    config = evaluation_of(
        own,
        (EVALUATOR_NAME,),
        run=run,
        splits=options.pop("splits", ("train",)),
        distance_correlation=DistanceCorrelationOptions(**options),
        **({"teacher": own.config.teacher} if teacher else {}),
        **outer,
    )
    splits = evaluate_student(config, name).splits
    return splits[config.evaluate.splits[0]][EVALUATOR_NAME]


@pytest.fixture
def embedded(own):
    """The store with a second pass, of pooled features."""
    options = PassOptions(batch_size=8, outputs=("logits", "pooled"), name="image-embeddings")
    precompute.run(replace(own.config, annotate=options))
    return own


def test_prototypes_are_the_class_means_of_a_pass_without_the_evaluated_records(embedded):
    arrays = permafrost.open_store(embedded.store.path).arrays(
        "train", teacher="image-embeddings", fields=["pooled"]
    )
    means = [arrays["pooled"][arrays["label"] == k].mean(axis=0) for k in range(10)]
    np.save("means.npy", np.array(means, np.float64))
    names = {"splits": ("test",), "layers": {"pooled": "pooled"}}

    found = distance_results(embedded, name="a", prototypes="image-embeddings", **names)
    own_means = distance_results(embedded, name="b", embeddings="means.npy", **names)
    one_hot = distance_results(embedded, name="c", **names)

    for name in ("relevance", "teacher_relevance", "rs"):
        stated, expected, control = (
            list(flatten_options(numbers[name]).values()) for numbers in (found, own_means, one_hot)
        )
        assert stated == pytest.approx(expected, abs=1e-5)
        assert stated != pytest.approx(control, abs=1e-3)
    files = json.loads((RUNS / "one" / "a" / "metrics.json").read_text())["evaluators"]
    ((path, digest),) = files[EVALUATOR_NAME]["files"].items()
    assert Path(path).parent.name.startswith("image-embeddings-")
    assert digest == sha256(Path(path).read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prototypes": "nothing"}, "nothing"),
        ({"prototypes": "resnet8"}, "has no output pooled; make a pass with"),
        (
            {"prototypes": "image-embeddings", "splits": ("train",)},
            "10 of 10 classes, such as 0, 1, 2, have no labeled record of split train",
        ),
        ({"prototypes": "image-embeddings", "prototypes_split": "teacher"}, "4 of 10 classes"),
        ({"prototypes": "a", "embeddings": "b.npy"}, "embeddings=b.npy and .* both say"),
    ],
)
def test_prototypes_that_do_not_fit_are_refused_in_one_line(embedded, options, message):
    with pytest.raises(UserError, match=message) as raised:
        distance_results(embedded, **{"splits": ("test",), **options})
    assert "\n" not in str(raised.value)


def test_a_pass_of_folds_has_no_prototypes(own):
    store, network = f"store.path={own.store.path}", ["teacher.name=resnet8", "teacher.width=4"]
    trained = ["run=folds", "teaching.folds=2", "teaching.trainer.epochs=1", *network]
    teach.run(config_of("teach", store, "teacher=cifar", "executor=serial", *trained))
    words = ["teacher=folds", "teacher.weights=runs/folds/teach", "annotate.name=unseen"]
    outputs = ["annotate.outputs=[logits,pooled]", "data=none", "executor=serial"]
    precompute.run(config_of("precompute", store, *words, *outputs))

    with pytest.raises(ConfigError, match=r"prototypes=unseen: .* of several folds"):
        distance_results(own, splits=("test",), prototypes="unseen")


def artifacts(own):
    return sorted(path.name for path in (own.store.path / "artifacts").glob("*"))


def test_every_layer_has_its_numbers_both_ways(own):
    found = distance_results(own)

    layers = ["layer1", "layer2", "layer3", "pooled"]
    assert found["layers"] == {name: {"student": name, "teacher": name} for name in layers}
    assert (found["records"], found["blocks"]) == (40, 1)
    assert set(found["rs"]) == {"teacher_given_student", "student_given_teacher"}
    for values in (
        found["fss"],
        found["relevance"],
        found["teacher_progression"],
        *found["pdcor"].values(),
    ):
        assert list(values) == layers
        assert all(-1 <= value <= 1 for value in values.values())
    assert found["progression"]["pooled"] == pytest.approx(1, abs=1e-12)
    assert all(0 <= p <= 1 for p in found["fss_p"].values())
    assert "fss_biased" not in found
    assert (
        numbers_of({EVALUATOR_NAME: found})[f"{EVALUATOR_NAME}.rs.teacher_given_student.layer3"]
        == (found["rs"]["teacher_given_student"]["layer3"])
    )


def test_a_teacher_compared_with_itself_is_shared_and_leaves_nothing(own):
    found = distance_results(own, model="teacher")

    for layer, value in found["fss"].items():
        assert value == pytest.approx(1, abs=1e-9)
        assert found["rs"]["teacher_given_student"][layer] == 0
        assert found["rs"]["student_given_teacher"][layer] == 0
    assert found["relevance"] == pytest.approx(found["teacher_relevance"], abs=1e-9)


def test_the_second_student_of_a_teacher_needs_no_teacher(own, monkeypatch):
    with pytest.raises(
        ConfigError, match=r"evaluators=distance_correlation needs the teacher network"
    ):
        distance_results(own, teacher=False)
    with_network = distance_results(own)
    assert len(artifacts(own)) == 1
    assert list(verify_store(own.store.path)) == []
    monkeypatch.setattr(
        "permafrost.evaluation.other_networks.build_teacher",
        lambda *_: pytest.fail("the teacher was built"),
    )

    assert distance_results(own, name="again", teacher=False) == with_network
    other = distance_results(own, run="two", teacher=False)

    assert other["teacher_relevance"] == with_network["teacher_relevance"]
    assert other["fss"] != with_network["fss"]
    another = replace(own.config.teacher, weights="random")
    config = evaluation_of(own, (EVALUATOR_NAME,), run="two", splits=("train",), teacher=another)
    typed = replace(config, command=("evaluate", "teacher.weights=random"))
    with pytest.raises(StoreMismatchError, match="is not the network that made"):
        evaluate_student(typed, "another")


def test_a_damaged_or_unfinished_artifact_is_found(own):
    distance_results(own)
    (folder,) = (own.store.path / "artifacts").iterdir()
    path = folder / "distances.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)

    assert any(str(path) in problem for problem in verify_store(own.store.path))
    with pytest.raises(ManifestError, match=r"is damaged.*delete its folder"):
        distance_results(own, run="two")
    (folder / "manifest.json").unlink()
    assert any("has no manifest" in problem for problem in verify_store(own.store.path))
    assert distance_results(own, run="two")["records"] == 40
    assert list(verify_store(own.store.path)) == []


def test_a_baseline_shows_what_was_distilled(own):
    found = distance_results(own, baseline="two")

    assert set(found["rs"]) == {
        "teacher_given_student", "student_given_teacher",
        "student_given_baseline", "baseline_given_student",
    }  # fmt: skip
    metrics = json.loads((RUNS / "one" / "evaluate" / "metrics.json").read_text())
    weights = Path("runs/two/distill/model.safetensors")
    assert list(metrics["evaluators"][EVALUATOR_NAME]["files"]) == [str(weights)]
    weights.write_bytes(weights.read_bytes() + b" ")
    with pytest.raises(ConfigError, match=r"two/distill/model\.safetensors has changed since"):
        distance_results(own, baseline="two")


def test_a_student_is_its_own_baseline_and_has_nothing_beyond_it(own):
    pairs = (("student", "baseline"),)
    # No pair names the teacher, so that none is given.
    found = distance_results(own, baseline="one", pairs=pairs, teacher=False)

    assert set(found["rs"]["student_given_baseline"].values()) == {0.0}
    assert "fss" not in found


def test_embeddings_of_the_classes_take_the_place_of_one_hot_labels(own, tmp_path):
    one_hot = distance_results(own, name="a")
    for name, values in (
        ("eye", np.eye(10)),
        ("random", np.random.default_rng(0).normal(size=(10, 6))),
    ):
        np.save(tmp_path / f"{name}.npy", values)

    same = distance_results(own, name="b", embeddings=str(tmp_path / "eye.npy"))
    other = distance_results(own, name="c", embeddings=str(tmp_path / "random.npy"))

    assert numbers_of(same["rs"]) == pytest.approx(numbers_of(one_hot["rs"]), abs=1e-12)
    assert other["rs"] != one_hot["rs"]
    assert other["fss"] == one_hot["fss"]


def test_parity_numbers_are_named_biased_and_are_high_where_the_others_are_not(own):
    found = distance_results(own, biased=True)

    assert len(artifacts(own)) == 2  # one for plain features, one for features of unit length
    unit = distance_results(own, name="unit", biased=True, l2norm=True, teacher=False)
    assert unit["fss_biased"] == pytest.approx(found["fss_biased"], abs=1e-12)
    assert all(unit["fss_biased"][layer] > unit["fss"][layer] for layer in unit["fss"])


def test_layers_can_be_paired_by_name(own):
    found = distance_results(own, layers={"layer1": "layer3"})

    assert list(found["fss"]) == ["layer1"]
    assert found["layers"]["layer1"]["teacher"] == "layer3"
    with pytest.raises(
        ConfigError,
        match=r"layers names layer9, which the teacher does not have; its layers are: layer1",
    ):
        distance_results(own, run="two", layers={"layer1": "layer9"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baseline": "gone"}, r"baseline=gone: runs/gone/distill holds no finished student"),
        ({"embeddings": "gone.npy"}, r"embeddings=gone\.npy does not exist"),
        ({"pairs": (("student", "baseline"),)}, r"pairs names baseline.*\.baseline=kd-student"),
        ({"pairs": (("student", "student"),)}, r"compares student with itself"),
        ({"probe_records": 3}, r"probe_records must be >= 4"),
        ({"block_records": 32}, r"block_records must be >= 64"),
    ],
)
def test_what_cannot_be_meant_is_refused(own, options, message):
    with pytest.raises(ConfigError, match=message):
        distance_results(own, **options)


def test_other_options_of_an_evaluator_that_is_done_are_refused_with_the_option(own):
    distance_results(own)

    with pytest.raises(ConfigError, match=r"distance_correlation\.seed=0, but this one has 1"):
        distance_results(own, seed=1)


def test_another_seed_and_another_number_are_other_records(own):
    found = [
        distance_results(own, name=name, **options)
        for name, options in (
            ("a", {"probe_records": 20}),
            ("b", {"probe_records": 20, "seed": 1}),
            ("c", {"probe_records": 30}),
        )
    ]

    assert [numbers["records"] for numbers in found] == [20, 20, 30]
    assert len({numbers["probe_sha256"] for numbers in found}) == 3
    for name, numbers in zip("abc", found, strict=True):
        keys = pq.read_table(RUNS / "one" / name / "distance_correlation-train.parquet")["key"]
        assert sha256_keys(keys.to_pylist()) == numbers["probe_sha256"]
    assert found[0]["fss"] != found[1]["fss"]
    assert len(artifacts(own)) == 3


def test_an_artifact_that_another_process_writes_is_left_to_it(tmp_path):
    artifact = Artifact(tmp_path, "distances", {"a": 1}, "a test")
    with folder_lock(artifact.folder):
        artifact.save({"layer1/0": torch.ones(3)}, {"layers": ["layer1"]})
        assert not artifact.exists

    artifact.save({"layer1/0": torch.ones(3)}, {"layers": ["layer1"]})

    manifest, tensors = artifact.load()
    assert manifest.description == {"layers": ["layer1"]}
    assert tensors["layer1/0"].tolist() == [1, 1, 1]
    assert artifact.folder != Artifact(tmp_path, "distances", {"a": 2}, "a test").folder
