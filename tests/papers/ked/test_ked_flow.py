"""KED from an additive teacher to an evaluated student: contents of the pass, values that are read, and errors."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import zarr
from safetensors.torch import load_file, save_file

from permafrost.annotation.pass_identity import describe_pass
from permafrost.config.augment import AugmentOptions, OperationConfig, RandomViewsConfig
from permafrost.config.evaluation import EvaluateOptions
from permafrost.config.methods import KDConfig, LabelsConfig
from permafrost.config.models import CifarModelConfig
from permafrost.config.store import PassOptions, StoreOptions
from permafrost.config.teaching import LabelTeachingConfig, TeachConfig
from permafrost.config.verbs import EvaluateConfig
from permafrost.core.batches import Targets
from permafrost.core.errors import ConfigError
from permafrost.library import open_store
from permafrost.loading.geometry import (
    TargetRequest,
    decode_intermediates,
    decode_maps,
    view_targets,
)
from permafrost.loading.loader import TrainLoader
from permafrost.loading.random_views import ViewSchedule
from permafrost.losses.base import build_loss
from permafrost.models.explanations import gradcam
from permafrost.models.providers import build_model, freeze
from permafrost.models.saved import SavedNetwork
from permafrost.runs.mirrors import RUNS
from permafrost.store.entries import StoreMismatchError
from permafrost.store.verification import verify_store
from permafrost.training.distill import StudentPlan
from permafrost.training.metric_log import read_metrics
from permafrost.training.targets import LiveTeacher
from permafrost_papers.ked.additive_network import describe_levels, network_partition
from permafrost_papers.ked.options import (
    AdditiveModelConfig,
    KEDConfig,
    KEDTeachingConfig,
    SuperfeaturesConfig,
)
from permafrost_papers.ked.partition import (
    PARTITION_NAME,
    build_partition,
    class_centered,
    pass_hierarchy,
)
from permafrost_papers.ked.subnets import HIDDEN, LOGITS
from permafrost_papers.ked.superfeature_agreement import fidelity_sums
from tests.support.index_table import index_table
from tests.support.outputs import student_output
from tests.support.runs import TRAINER, distill_config
from tests.support.stores import frozen_store, precompute_config, train_dataset
from tests.support.verbs import distill, evaluate, precompute, teach

M = 4
NETWORK = AdditiveModelConfig(name="conv", superfeatures=M, grid=(4, 4), width=3)
PASS = PassOptions(batch_size=8, outputs=("logits", "superfeature_logits", HIDDEN))
STILL = AugmentOptions()
FLIP = AugmentOptions(operations=(OperationConfig(kind="horizontal_flip", p=1.0),))
SHORT = replace(TRAINER, epochs=1)


@pytest.fixture(scope="module")
def ked_store(tmp_path_factory):
    """Store with a teacher that is trained on it, its pass of superfeatures, and a pass of two stored views."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("ked")
        patch.chdir(folder)
        path = folder / "store"
        precompute.run(precompute_config(path))
        assignments = build_partition(replace(NETWORK, partition_control="random")).assignments
        artifact = folder / "partition"
        artifact.mkdir()
        save_file({"assignments": assignments}, artifact / PARTITION_NAME)
        teacher = replace(NETWORK, partition=str(artifact))
        result = teach.run(
            TeachConfig(
                store=StoreOptions(path=str(path)),
                teacher=teacher,
                teaching=LabelTeachingConfig(split="teacher", trainer=SHORT, augment=STILL),
                evaluate=EvaluateOptions(splits=("test",)),
                run="teacher",
            )
        )
        return frozen_store(
            path,
            replace(teacher, weights=str(folder / result.weights)),
            annotate=PASS,
            views=RandomViewsConfig(count=2, seed=1),
            augment=FLIP,
        )


def still(ked_store, **options):
    """Options of a student without augmentation, on the teacher's partition."""
    recipe = {"method": KEDConfig(), "augment": STILL, "trainer": SHORT}
    return distill_config(ked_store, **(recipe | options))


def evaluation_config(ked_store, run, **options):
    store = StoreOptions(path=str(ked_store.store.path))
    return EvaluateConfig(
        store=store, evaluate=EvaluateOptions(splits=("test",), num_pictures=0), run=run, **options
    )


def ask(ked_store, images):
    model = freeze(build_model(ked_store.config.teacher, 10))
    return class_centered(model(images).extras[LOGITS])


# ---- contents of a pass --------------------------------------------------------------------------


def test_a_pass_declares_its_superfeatures_and_verifies(ked_store):
    (teacher,) = ked_store.store.open_passes()
    partition = network_partition(build_model(ked_store.config.teacher, 10))

    specs = {spec.name: spec for spec in teacher.manifest.fields}

    assert list(specs) == ["logits", "superfeature_logits", "superfeature_logits_scale", HIDDEN]
    assert (specs["superfeature_logits"].shape, specs["superfeature_logits"].when_moved) == (
        (M, 10),
        "refuse",
    )
    assert (specs[HIDDEN].shape, specs[HIDDEN].when_moved) == ((M, NETWORK.width), "refuse")
    assert teacher.fields_of("superfeature_logits") == ["superfeature_logits"]
    assert teacher.manifest.added["partition_sha256"] == partition.sha256
    for number in range(1, M + 1):
        assert torch.equal(
            pass_hierarchy(teacher)[number - 1].group_of_finest, partition.coarsening(number)
        )
    assert teacher.manifest.fidelity["superfeature_logits"] > 0.99999
    assert teacher.manifest.fidelity[HIDDEN] > 0.99999
    assert list(verify_store(ked_store.store.path)) == []


def test_a_table_has_the_superfeatures_that_the_arrays_of_the_pass_store(ked_store):
    opened = open_store(ked_store.store.path)
    (teacher,) = ked_store.store.open_passes()
    arrays = zarr.open_group(str(teacher.folder / "fields.zarr"), mode="r")
    table = opened.table("test")
    described = index_table(ked_store.store).to_pandas().set_index("key")
    rows = described.loc[table["key"].to_pylist(), "array_row"].to_list()
    stored = arrays["superfeature_logits"].oindex[rows][:, 0].astype(np.float32)
    scale = arrays["superfeature_logits_scale"].oindex[rows][:, 0]

    assert table.column_names[3:] == ["logits", "superfeature_logits", HIDDEN]
    assert table["superfeature_logits"].type == pa.list_(pa.float32(), M * 10)
    values = opened.arrays("test")["superfeature_logits"]
    assert values.shape == (len(rows), M, 10)
    np.testing.assert_allclose(values, stored * scale[..., None], rtol=1e-6)
    assert np.array_equal(table["superfeature_logits"].to_pylist(), values.reshape(len(rows), -1))


def test_what_is_read_is_what_the_teacher_said_of_its_view(ked_store):
    batch = train_dataset(ked_store, "superfeature_logits").__getitems__([0, 5, 30])
    replayed = train_dataset(ked_store, "superfeature_logits", stored_views=True).__getitems__(
        [(0, 0), (5, 1), (30, 1)]
    )

    found = decode_intermediates(batch.targets[0])["superfeature_logits"]
    centered = class_centered(batch.targets[0].logits)

    asked, flipped = (ask(ked_store, i) for i in (batch.inputs / 255, batch.inputs.flip(3) / 255))
    assert (found - asked).abs().max() < 2e-3 * asked.abs().max()
    assert (found.sum(dim=1) - centered).abs().max() < 1e-2
    assert (
        decode_intermediates(replayed.targets[0])["superfeature_logits"] - flipped
    ).abs().max() < 2e-2 * flipped.abs().max()


def test_a_pass_of_maps_and_superfeatures_moves_the_maps_alone(ked_store, tmp_path):
    outputs = ("logits", "maps", "superfeature_logits")
    both = frozen_store(
        tmp_path / "store",
        ked_store.config.teacher,
        annotate=replace(PASS, outputs=outputs, added={"superfeature_dtype": "int8"}),
        explainer=SuperfeaturesConfig(),
    )
    views = ViewSchedule(FLIP, both.store.size, seed=0)
    dataset = train_dataset(both, "superfeature_logits")
    batch = next(TrainLoader(dataset, views, batch_size=8, seed=0).epoch(0))

    (viewed,) = view_targets(batch, TargetRequest((4, 4)))

    stored = batch.targets[0]
    assert torch.equal(
        viewed.intermediates["superfeature_logits"],
        decode_intermediates(stored)["superfeature_logits"],
    )
    assert torch.allclose(viewed.maps, decode_maps(stored).flip(-1), atol=1e-3)


def test_a_pass_names_its_superfeatures_where_it_stores_them(ked_store, frozen):
    def describe(*outputs, network=None, **options):
        config = PassOptions(outputs=("logits", *outputs), added=options)
        levels = None if network is None else describe_levels(network)
        return describe_pass(
            frozen.store.manifest, {}, frozen.config.explainer, config, "zarr", network=levels
        )

    (older,) = frozen.store.open_passes()
    network = build_model(NETWORK, 10)
    other = build_model(replace(NETWORK, partition_control="random"), 10)

    assert describe("maps") == describe("maps", superfeature_dtype="int8")
    assert not {"partition_sha256", "hierarchy", "superfeature_dtype"} & set(describe("maps"))
    stored = describe("superfeature_logits", network=network)
    assert stored["partition_sha256"] == network.partition.sha256
    assert stored != describe("superfeature_logits", network=network, superfeature_dtype="int8")
    assert stored != describe("superfeature_logits", network=other)
    assert pass_hierarchy(older) is None


def test_a_teacher_without_superfeatures_stores_none(tmp_path, tiny_teacher):
    for output_name in ("superfeature_logits", HIDDEN):
        annotate = replace(PASS, outputs=("logits", output_name))
        with pytest.raises(
            ConfigError, match=r"CifarResNet has no superfeatures.*annotate.outputs"
        ):
            precompute.run(precompute_config(tmp_path / "store", tiny_teacher, annotate=annotate))


# ---- students ------------------------------------------------------------------------------------


def test_a_student_is_taught_saved_without_the_artifact_and_evaluated(ked_store):
    config = still(ked_store)

    distill.run(config)
    result = evaluate.run(evaluation_config(ked_store, "one"))

    terms = list(read_metrics(RUNS / "one" / "distill"))[-1]
    assert {"ce", "kd", "ked"} <= set(terms)
    weights = load_file(RUNS / "one" / "distill" / "model.safetensors")
    artifact = load_file(Path(config.student.partition) / PARTITION_NAME)
    assert torch.equal(weights["assignments"], artifact["assignments"])
    model, trained = SavedNetwork(RUNS / "one" / "distill").load()
    assert trained.config.partition is None
    assert torch.equal(network_partition(model).assignments, artifact["assignments"])
    assert result is not None


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("coarse teacher", {"student": 2}),
        ("coarse level", {"method": KEDConfig(superfeatures=2)}),
        ("whole", {"method": KEDConfig(superfeatures=1)}),
        ("chimeras", {"method": KEDConfig(chimera_fraction=0.5)}),
        ("chimeras alone", {"method": KEDConfig(chimera_fraction=0.5, mu=0.0)}),
        ("shuffled", {"method": KEDConfig(superfeature_control="shuffled")}),
        ("noise", {"method": KEDConfig(superfeature_control="noise")}),
        ("kd", {"method": KDConfig()}),
        ("replay", {"mode": "replay"}),
        ("live", {"mode": "live"}),
        ("live hint", {"mode": "live", "method": KEDConfig(lambda_hint=100.0)}),
        ("frozen hint", {"method": KEDConfig(lambda_hint=100.0)}),
        ("replayed hint", {"mode": "replay", "method": KEDConfig(lambda_hint=100.0)}),
        ("kd with a hint", {"method": KEDConfig(mu=0.0, lambda_hint=100.0)}),
    ],
)
def test_students_of_every_kind_train(ked_store, name, options):
    options = dict(options)
    if (number := options.pop("student", None)) is not None:
        options["student"] = replace(ked_store.config.teacher, weights=None, superfeatures=number)
    if options.get("mode") == "live":
        options["teacher"] = ked_store.config.teacher

    distill.run(still(ked_store, run=name.replace(" ", "-"), **options))

    *_, last = read_metrics(RUNS / name.replace(" ", "-") / "distill")
    assert all(math.isfinite(value) for value in last.values())
    assert ("ked" in last) == (name not in ("kd", "chimeras alone", "kd with a hint"))
    assert ("hint" in last) == ("hint" in name)


def test_a_stored_hint_is_that_of_a_live_teacher(ked_store):
    config = still(ked_store, method=KEDConfig(lambda_hint=1.0))
    spec = StudentPlan(config, Path()).spec()
    batch = spec.dataset.__getitems__(range(8))
    images = batch.inputs / 255
    teacher = freeze(build_model(ked_store.config.teacher, 10))
    live = LiveTeacher("live", teacher, gradcam, images.shape[-2:], needs=spec.loss.needs)
    torch.manual_seed(0)
    output = build_model(config.student, 10)(images)
    student = student_output(logits=output.logits, extras=output.extras)
    values = []

    for targets in (view_targets, live):
        asked = spec.loss.convert_targets(targets(batch, TargetRequest((4, 4), with_maps=False)))[0]
        if not values:
            spec.loss.build(student, asked)
        values.append(spec.loss(student, asked, torch.arange(8)).terms["hint"].item())

    assert values[0] == pytest.approx(values[1], rel=1e-3)
    assert values[0] > 0


def test_a_hint_of_several_teachers_is_refused(ked_store):
    method = KEDConfig(lambda_hint=1.0)
    (teacher,) = ked_store.store.open_passes()
    config = still(ked_store, method=method)

    with pytest.raises(ConfigError, match=r"one teacher, but store.teacher names 2"):
        build_loss(method).plan(config, [teacher, teacher], 10)


def test_levels_are_those_of_the_teachers_own_partition(ked_store):
    job = StudentPlan(still(ked_store, method=KEDConfig(superfeatures=2)), Path())
    spec = job.spec()
    batch = spec.dataset.__getitems__([0, 1])

    (targets,) = spec.loss.convert_targets(
        view_targets(batch, TargetRequest((4, 4), with_maps=False))
    )

    assert isinstance(targets, Targets)
    fine = ask(ked_store, batch.inputs / 255)
    coarsening = network_partition(build_model(ked_store.config.teacher, 10)).coarsening(2)
    expected = torch.stack([fine[:, coarsening == m].sum(dim=1) for m in range(2)], dim=1)
    assert torch.allclose(targets.intermediates["superfeature_logits"], expected, atol=2e-3)
    assert torch.equal(spec.loss.student_coarsening, coarsening)


def test_what_a_partition_says_is_an_input_of_a_run_and_where_it_lies_is_not(ked_store, tmp_path):
    config = still(ked_store)
    copy = tmp_path / "copy"
    copy.mkdir()
    assignments = load_file(Path(config.student.partition) / PARTITION_NAME)["assignments"]
    save_file({"assignments": assignments}, copy / PARTITION_NAME)
    moved = replace(config, student=replace(config.student, partition=str(copy)))
    changed = replace(
        config, student=replace(config.student, partition_control="random", partition_seed=5)
    )

    inputs = [
        StudentPlan(each, tmp_path, ked_store.store).inputs() for each in (config, moved, changed)
    ]

    assert inputs[0] == inputs[1] != inputs[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"superfeatures": 8}, r"has 4 superfeatures.*method.superfeatures=4"),
        ({"partition": None}, r"divide their features differently into 4.*student.partition"),
    ],
)
def test_students_of_other_superfeatures_are_refused(ked_store, options, message):
    student = replace(ked_store.config.teacher, weights=None, **options)
    if student.superfeatures == 8:
        student = replace(student, partition=None)

    with pytest.raises(ConfigError, match=message):
        distill.run(still(ked_store, student=student))


def test_a_pass_without_superfeatures_says_how_to_get_them(frozen):
    with pytest.raises(
        StoreMismatchError,
        match=r"only additive teachers have.* teacher=additive .*outputs=\[logits,superfeature_logits\]",
    ):
        distill.run(still(frozen, student=NETWORK))


def test_chimeras_of_a_trunk_teacher_are_refused(ked_store, tmp_path):
    trunk = AdditiveModelConfig(
        superfeatures=M, grid=(4, 4), trunk="resnet8", trunk_width=4, weights="random"
    )
    of_trunk = frozen_store(tmp_path / "store", trunk, annotate=PASS)
    method = KEDConfig(chimera_fraction=0.5)

    with pytest.raises(ConfigError, match=r"chimera_fraction=0.5.*teacher of name=mlp or conv"):
        distill.run(still(of_trunk, student=NETWORK, method=method))


def test_students_of_a_channel_teacher_have_other_channels_and_as_many_groups(tmp_path):
    wide = AdditiveModelConfig(
        superfeatures=M, trunk="resnet8", trunk_width=4, trunk_features="channels", width=3
    )
    store = frozen_store(tmp_path / "store", replace(wide, weights="random"), annotate=PASS)
    narrow = replace(wide, trunk_width=2, superfeatures=2)

    distill.run(still(store, student=narrow))

    assert list(read_metrics(RUNS / "one" / "distill"))[-1]["ked"] > 0
    with pytest.raises(ConfigError, match=r"differently into 2 superfeatures.*trunk_features"):
        distill.run(still(store, student=replace(NETWORK, superfeatures=2), run="cells"))


def test_superfeatures_of_channels_are_not_searched(ked_store):
    channels = AdditiveModelConfig(trunk_features="channels")
    with pytest.raises(ConfigError, match=r"groups channels; set teaching=labels"):
        TeachConfig(
            store=StoreOptions(path=str(ked_store.store.path)),
            teacher=channels,
            teaching=KEDTeachingConfig(),
            black_box=CifarModelConfig(weights="random"),
            evaluate=EvaluateOptions(),
        )


# ---- the evaluator of superfeatures ------------------------------------------------------------------


def test_fidelity_is_zero_of_equal_answers_and_counts_what_differs():
    teacher = torch.randn(6, 3, 4, dtype=torch.float64)
    shifted = teacher + torch.randn(6, 3, 1, dtype=torch.float64)
    other = teacher.clone()
    other[:, 1] = teacher[:, 1].flip(-1)

    (same, agreeing), (kl, _) = fidelity_sums(teacher, shifted), fidelity_sums(teacher, other)

    assert same.tolist() == pytest.approx([0, 0, 0], abs=1e-13)
    assert agreeing.tolist() == [6, 6, 6]
    p, q = teacher[:, 1].softmax(-1), other[:, 1].softmax(-1)
    expected = float((p * (p / q).log()).sum(-1).mean())
    assert (kl / 6).tolist() == pytest.approx([0, expected, 0], rel=1e-12, abs=1e-14)


def test_the_teacher_itself_says_what_its_pass_holds_and_a_stranger_does_not(ked_store):
    named = {"model": "teacher", "teacher": ked_store.config.teacher}
    evaluated = evaluation_config(ked_store, "itself", evaluators=("superfeatures",), **named)
    itself = evaluate.run(evaluated).splits["test"]["superfeatures"]
    distill.run(still(ked_store, method=LabelsConfig(), run="stranger"))
    stranger = replace(evaluated, model="student", run="stranger")
    strangers = evaluate.run(stranger).splits["test"]["superfeatures"]

    assert itself["number"] == strangers["number"] == M
    assert itself["kl"] < 1e-4  # the pass stores float16
    assert itself["agreement"] > 0.99
    assert strangers["kl"] > 100 * itself["kl"]


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (
            CifarModelConfig(name="resnet8", width=4),
            "it evaluates students of student=additive",
        ),
        (
            replace(NETWORK, partition_control="random", partition_seed=5),
            "divide their features differently",
        ),
    ],
)
def test_the_evaluator_of_superfeatures_says_what_it_lacks(ked_store, student, message):
    distill.run(still(ked_store, method=LabelsConfig(), student=student))

    with pytest.raises(ConfigError, match=message):
        evaluate.run(evaluation_config(ked_store, "one", evaluators=("superfeatures",)))
