"""Tables from packing to the report: all stages, a teacher whose superfeatures are columns, and chimeras of rows."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_breast_cancer

from permafrost import RecordLoader, open_store
from permafrost.config.augment import (
    AugmentOptions,
    MixConfig,
    OperationConfig,
    PixelOperationConfig,
    RandomViewsConfig,
)
from permafrost.config.compose import compose
from permafrost.config.evaluation import EvaluateOptions
from permafrost.config.methods import E2KDConfig, KDConfig, LabelsConfig
from permafrost.config.models import CifarModelConfig
from permafrost.config.store import PassOptions, StoreOptions, SubsetOptions
from permafrost.config.teaching import LabelTeachingConfig, TeachConfig
from permafrost.config.verbs import EvaluateConfig, build_verb_config
from permafrost.core.errors import ConfigError
from permafrost.loading.dataset import StoreDataset, iter_batches
from permafrost.loading.geometry import (
    TargetRequest,
    decode_intermediates,
    view_images,
    view_targets,
)
from permafrost.loading.subset import rows_of_split
from permafrost.losses.base import StepInputs
from permafrost.models.providers import build_model, freeze
from permafrost.models.resolve import resolve_distill, resolve_network
from permafrost.models.saved import SavedNetwork
from permafrost.runs.mirrors import RUNS
from permafrost.store.reader import Store
from permafrost.store.verification import verify_store
from permafrost.training.distill import StudentPlan
from permafrost.training.metric_log import read_metrics
from permafrost_evaluators.options import ShiftOptions
from permafrost_papers.e2kd.options import GuidedTeachingConfig
from permafrost_papers.ked.additive_network import network_partition
from permafrost_papers.ked.data_options import SklearnTableDataConfig
from permafrost_papers.ked.options import AdditiveModelConfig, KEDConfig
from permafrost_papers.ked.partition import (
    PARTITION_NAME,
    build_partition,
    class_centered,
    coarsen,
    pass_hierarchy,
)
from permafrost_papers.ked.subnets import LOGITS
from tests.support.index_table import index_table
from tests.support.runs import TRAINER, distill_config
from tests.support.slow import slow
from tests.support.stores import Frozen, precompute_config
from tests.support.verbs import distill, evaluate, precompute, report, sweep, teach

M = 5
DATA = SklearnTableDataConfig(name="breast_cancer")
BOX = AdditiveModelConfig(name="mlp", superfeatures=1, width=16)
PARTS = AdditiveModelConfig(name="mlp", superfeatures=M, width=8, depth=2)
PASS = PassOptions(batch_size=64, outputs=("logits", "superfeature_logits"))
STILL = AugmentOptions()
FLIP = AugmentOptions(operations=(OperationConfig(kind="horizontal_flip"),))
SHORT = replace(TRAINER, epochs=2, batch_size=64)


def table_teach_config(path, teacher, run, **options):
    trainer = replace(SHORT, epochs=12)
    return TeachConfig(
        store=StoreOptions(path=str(path)),
        teacher=teacher,
        teaching=LabelTeachingConfig(trainer=trainer, augment=STILL, **options),
        evaluate=EvaluateOptions(splits=("test",)),
        run=run,
    )


@pytest.fixture(scope="module")
def taught_table(tmp_path_factory):
    """Store of 569 rows with a black box, a teacher of random groups, both trained on it, and the teacher's pass."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("table")
        patch.chdir(folder)
        path = folder / "store"
        precompute.run(precompute_config(path, data=DATA, shard_size=128))
        box = teach.run(table_teach_config(path, BOX, "box"))
        groups = build_partition(replace(PARTS, columns=30, partition_control="random"))
        (folder / "partition").mkdir()
        save_file({"assignments": groups.assignments}, folder / "partition" / PARTITION_NAME)
        teacher = replace(PARTS, partition=str(folder / "partition"))
        parts = teach.run(table_teach_config(path, teacher, "parts"))
        index = index_table(Store(path))
        test_rows = index["split"].to_numpy(zero_copy_only=False) == "test"
        majority = np.bincount(index["label"].to_numpy()[test_rows]).max() / test_rows.sum()
        # Closer to every label than to the more frequent one for all.
        assert min(box.accuracy["test"], parts.accuracy["test"]) > (1 + majority) / 2
        teacher = replace(teacher, weights=str(folder / parts.weights))
        config = precompute_config(path, teacher, data=DATA, shard_size=128, annotate=PASS)
        result = precompute.run(config)
        assert (result.packed_records, result.teacher_records) == (0, 569)
        return Frozen(Store(path), config)


def student_config(taught_table, **options):
    """Options of a student on the teacher's partition, for the store."""
    student = replace(taught_table.config.teacher, weights=None, width=4)
    recipe = {"student": student, "method": KEDConfig(), "augment": STILL, "trainer": SHORT}
    return distill_config(taught_table, **(recipe | options))


def teacher_model(taught_table):
    return freeze(
        build_model(resolve_network(taught_table.config.teacher, taught_table.store, "teacher"), 2)
    )


def row_batch(taught_table, records=64):
    store = taught_table.store
    rows = rows_of_split(store.index, "train")
    dataset = StoreDataset(store, rows, store.open_passes(), output="superfeature_logits")
    return dataset.__getitems__(list(range(records)))


# ---- the teacher and its pass --------------------------------------------------------------------


def test_a_second_command_asks_the_teacher_nothing_and_all_verifies(taught_table):
    again = precompute.run(taught_table.config)

    assert (again.packed_records, again.teacher_records) == (0, 0)
    assert list(verify_store(taught_table.store.path)) == []
    (teacher,) = taught_table.store.open_passes()
    assert teacher.manifest.teacher["architecture"]["columns"] == 30
    assert teacher.manifest.teacher["preprocessing"] == {}
    assert [spec.name for spec in teacher.manifest.fields] == [
        *("logits", "superfeature_logits", "superfeature_logits_scale")
    ]


def test_a_network_keeps_the_moments_of_its_training_split(taught_table):
    index = index_table(taught_table.store).to_pylist()
    keys = [row["key"] for row in index if row["split"] == "train"]
    rows = load_breast_cancer().data[[int(key.removeprefix("row-")) for key in keys]]
    weights = load_file(taught_table.config.teacher.weights)

    np.testing.assert_allclose(weights["normalize.mean"], rows.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(weights["normalize.std"], rows.std(axis=0), rtol=1e-5)


def test_what_is_read_is_what_the_teacher_said_of_the_row(taught_table):
    batch = row_batch(taught_table)
    model = teacher_model(taught_table).double()

    said = model(batch.inputs.double())

    stored = batch.targets[0]
    fine = class_centered(said.extras[LOGITS])
    assert torch.equal(view_images(batch, (1, 30)), batch.inputs)
    found = decode_intermediates(stored)["superfeature_logits"]
    assert (found - fine).abs().max() < 2e-3 * fine.abs().max()
    assert (stored.logits - said.logits).abs().max() < 2e-3 * said.logits.abs().max()
    assert torch.allclose(said.extras[LOGITS].sum(dim=1), said.logits, atol=1e-12)


def test_a_coarser_level_of_the_pass_is_the_sum_of_its_groups(taught_table):
    (teacher,) = taught_table.store.open_passes()
    partition = network_partition(teacher_model(taught_table))
    batch = row_batch(taught_table)
    fine = decode_intermediates(batch.targets[0])["superfeature_logits"]

    for number in range(1, M + 1):
        coarse = coarsen(fine, pass_hierarchy(teacher)[number - 1].group_of_finest, number)
        for group in range(number):
            members = partition.assignment(M)[partition.assignment(number) == group].unique()
            assert torch.allclose(coarse[:, group], fine[:, members].sum(dim=1), atol=1e-5)
    whole = coarsen(fine, pass_hierarchy(teacher)[0].group_of_finest, 1)[:, 0]
    assert torch.allclose(whole, class_centered(batch.targets[0].logits), atol=2e-2)


def test_a_chimera_of_rows_is_what_its_donors_are_for_the_teacher(taught_table):
    config = student_config(taught_table, method=KEDConfig(chimera_fraction=0.5))
    spec = StudentPlan(resolve_distill(config, taught_table.store), RUNS).spec()
    batch = spec.dataset.__getitems__(list(range(64)))
    model = teacher_model(taught_table).double()
    inputs = StepInputs(images=batch.inputs, labels=batch.labels)

    torch.manual_seed(0)
    for transform in spec.loss.transforms:
        inputs = transform(inputs, batch)
    mixed, (change,) = inputs.images, inputs.on_targets
    (targets,) = spec.loss.convert_targets(
        view_targets(batch, TargetRequest((1, 30), with_maps=False))
    )
    promised = change(targets)
    torch.manual_seed(0)
    donors = torch.randint(64, (32, M))

    assert mixed.shape == (96, 30)
    assert torch.equal(mixed[:64], batch.inputs)
    group = network_partition(model).assignment(M)
    for number, of_parts in enumerate(donors.tolist()):
        for m, donor in enumerate(of_parts):
            own = mixed[64 + number, group == m]
            assert torch.equal(own, batch.inputs[donor, group == m])
    own = model(batch.inputs.double()).extras[LOGITS]
    said = model(mixed.double()).extras[LOGITS][64:]
    assert torch.allclose(said, own[donors, torch.arange(M)], rtol=0, atol=1e-12)
    # The chimera is not a record.
    assert not torch.allclose(said[0], own[int(donors[0, 0])], atol=1e-3)
    scale = said.abs().max()
    stored = promised.intermediates["superfeature_logits"][64:]
    assert (stored - class_centered(said)).abs().max() < 2e-3 * scale
    assert (promised.logits[64:] - class_centered(said.sum(dim=1))).abs().max() < 1e-2 * scale


# ---- students ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        slow("labels", {"method": LabelsConfig()}),
        slow("kd", {"method": KDConfig()}),
        ("ked", {}),
        slow("coarse", {"method": KEDConfig(superfeatures=2)}),
        ("chimeras", {"method": KEDConfig(chimera_fraction=1.0)}),
        ("shots", {"subset": SubsetOptions(shots=40, holdout=5)}),
        ("live", {"mode": "live", "method": KEDConfig(lambda_hint=1.0)}),
    ],
)
def test_students_of_every_kind_train_and_are_evaluated(taught_table, name, options):
    if name == "live":
        options = options | {"teacher": taught_table.config.teacher}
    config = student_config(taught_table, run=name, **options)

    first = distill.run(config)
    splits = ("test", "holdout") if name == "shots" else ("test",)
    result = evaluate.run(
        EvaluateConfig(store=config.store, evaluate=EvaluateOptions(splits=splits), run=name)
    )

    assert first.trained_epochs == 2
    assert distill.run(config).trained_epochs == 0
    *_, last = read_metrics(RUNS / name / "distill")
    assert all(math.isfinite(value) for value in last.values())
    assert ("ked" in last) == (name not in ("labels", "kd"))
    evaluated = result.splits["test"]
    assert {"accuracy", "agreement", "kl_to_teacher", "teacher_accuracy"} <= set(evaluated)
    assert not {"epg", "iou", "map_cosine", "teacher_epg"} & set(evaluated)
    table = pq.read_table(RUNS / name / "evaluate" / "records.parquet")
    assert table.num_rows == sum(s["records"] for s in result.splits.values())
    assert not (RUNS / name / "evaluate" / "pictures.safetensors").exists()
    model, trained = SavedNetwork(RUNS / name / "distill").load()
    assert (trained.config.columns, trained.input_size) == (30, (1, 30))
    taught_by = load_file(taught_table.config.teacher.weights)
    # The moments are those of the whole training split, not of the shots.
    assert torch.equal(model.normalize.mean, taught_by["normalize.mean"])


def test_a_student_that_goes_on_is_the_student_that_never_stopped(taught_table):
    whole = student_config(taught_table, run="whole", method=KEDConfig(chimera_fraction=0.5))
    half = replace(whole, run="half", trainer=replace(SHORT, epochs=1, schedule="constant"))
    distill.run(replace(whole, trainer=replace(SHORT, schedule="constant")))
    distill.run(half)
    for path in ("model.json", "config.yaml", "metrics.jsonl"):  # of a run of other options
        (RUNS / "half" / "distill" / path).unlink()

    distill.run(replace(half, trainer=replace(SHORT, schedule="constant")))

    one, other = (
        SavedNetwork(RUNS / run / "distill").load()[0].state_dict() for run in ("whole", "half")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_scaled_rows_are_what_the_networks_learn_from(taught_table):
    """Negative control: on unscaled rows the same network is inaccurate."""
    store = taught_table.store
    dataset = StoreDataset(store, rows_of_split(store.index, "train"))
    batches = list(iter_batches(dataset, 256))
    rows, labels = (torch.cat([getattr(b, n) for b in batches]) for n in ("inputs", "labels"))
    model = teacher_model(taught_table)

    scaled = model.normalize(rows)

    assert rows.abs().max() > 1000
    assert scaled.mean(dim=0).abs().max() < 1e-3
    assert torch.allclose(scaled.std(dim=0, correction=0), torch.ones(30), atol=1e-3)
    model.normalize.set_moments(torch.zeros(30), torch.ones(30))
    right = (model(rows).logits.argmax(dim=1) == labels).float().mean()
    assert right < 0.9


@pytest.mark.slow
def test_a_sweep_and_its_report_show_what_a_table_has(taught_table):
    words = [
        *(f"store.path={taught_table.store.path}", "run=variants", "executor=serial", "seeds=[0]"),
        *("student=additive", "student.name=mlp", f"student.superfeatures={M}", "augment=none"),
        *(f"student.partition={taught_table.config.teacher.partition}", "student.width=4"),
        *("trainer.epochs=1", "variants={kd: ['method=kd'], ked: ['method=ked']}"),
    ]
    result = sweep.run(build_verb_config("sweep", compose("sweep", words)), words)
    shown = ["run=variants", f"store.path={taught_table.store.path}", "report.candidate=ked"]

    written = report.run(build_verb_config("report", compose("report", shown)))

    assert result.students == 2
    page = (RUNS / "variants" / "report.html").read_text()
    assert "Rows of a table with 30 columns, so there are no pictures, maps or cases" in page
    assert "<code>mean radius</code>" in page
    assert "Bytes of rows" in page
    assert not any(
        words in page for words in ("Explanation maps", "Case by case", "original aspect ratio")
    )
    values = json.loads((RUNS / "variants" / "report.json").read_text())
    assert {row["method"] for row in values["runs"]} == {"kd", "ked"}
    assert "cases" not in values
    assert written.candidate_minus_baseline.startswith("ked - kd in accuracy")


# ---- errors --------------------------------------------------------------------------------------

CROP = OperationConfig(kind="pad_crop")
ROWS = r"holds rows of a table with 30 columns"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method": E2KDConfig()},
            rf"method=e2kd .*{ROWS}; choose one of method=labels, kd, .*ked",
        ),
        ({"mode": "replay", "method": KDConfig()}, rf"mode=replay .*{ROWS}; set mode=frozen"),
        (
            {"augment": AugmentOptions(operations=(CROP,)), "method": KDConfig()},
            rf"augment.operations=\['pad_crop'\] changes images, but .*{ROWS}.*set augment=none",
        ),
        ({"augment": AugmentOptions(size=8)}, r"augment.size=8 changes images.*set augment=none"),
        (
            {"augment": AugmentOptions(mix=(MixConfig(kind="mixup"),)), "method": LabelsConfig()},
            r"augment.mix=\['mixup'\] changes images.*set augment=none",
        ),
        (
            {"augment": AugmentOptions(operations=(PixelOperationConfig(kind="grayscale"),))},
            rf"augment.operations=\['grayscale'\] changes images, but .*{ROWS}.*set augment=none",
        ),
        (
            {"student": CifarModelConfig(name="resnet8"), "method": KDConfig()},
            rf"student=cifar student.name=resnet8 .*{ROWS}; set student=additive student.name=mlp",
        ),
        (
            {"student": replace(PARTS, name="conv"), "method": KDConfig()},
            r"student=additive student.name=conv takes images",
        ),
        (
            {"student": replace(PARTS, columns=7)},
            rf"student.columns=7, but .*{ROWS}; set it to null",
        ),
        ({"student": replace(PARTS, input_size=8)}, r"student.input_size=8 .* are for images"),
        (
            {"student": replace(PARTS, superfeatures=31)},
            r"superfeatures=31 with 30 features.*lower it$",
        ),
        (
            {"trainer": replace(SHORT, channels_last=True)},
            r"trainer.channels_last=true is a layout",
        ),
    ],
)
def test_options_of_images_are_refused_with_the_way_out(taught_table, options, message):
    config = replace(student_config(taught_table), **options)

    with pytest.raises(ConfigError, match=message):
        distill.run(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"annotate": PassOptions()},
            rf"annotate.outputs names maps, .*{ROWS}; set annotate.outputs=\[logits,superfeature_logits\]",
        ),
        (
            {"annotate": PassOptions(outputs=("logits", "attention", "class_maps"))},
            r"names attention, class_maps, which need",
        ),
        (
            {"annotate": PassOptions(outputs=("logits",), channels_last=True)},
            r"annotate.channels_last=true is a layout",
        ),
        (
            {"views": RandomViewsConfig(), "augment": FLIP},
            r"views=random transforms images.*canonical",
        ),
        (
            {"teacher": CifarModelConfig(name="resnet8", weights="random")},
            r"teacher=cifar teacher.name=resnet8 takes images",
        ),
    ],
)
def test_passes_over_images_are_refused(taught_table, options, message):
    with pytest.raises(ConfigError, match=message):
        precompute.run(replace(taught_table.config, **options))


def test_other_verbs_refuse_what_is_about_images(taught_table):
    store = StoreOptions(path=str(taught_table.store.path))
    flipped = LabelTeachingConfig(trainer=SHORT, augment=FLIP)
    for teaching, message in (
        (GuidedTeachingConfig(trainer=SHORT, augment=STILL), r"teaching=guided .* teaching=labels"),
        (flipped, r"teaching.augment.operations=.*set teaching.augment=none"),
    ):
        with pytest.raises(ConfigError, match=message):
            teach.run(replace(table_teach_config(store.path, PARTS, "no"), teaching=teaching))
    options = EvaluateConfig(
        store=store,
        evaluate=EvaluateOptions(),
        evaluators=("equivariance",),
        model="teacher",
        teacher=taught_table.config.teacher,
    )
    with pytest.raises(ConfigError, match=r"evaluators=equivariance needs images.*remove it from"):
        evaluate.run(options)
    distill.run(student_config(taught_table))
    evaluated = EvaluateConfig(
        store=store, evaluate=EvaluateOptions(added={"shift": ShiftOptions(pixels=2)}), run="one"
    )
    with pytest.raises(ConfigError, match=r"evaluate.shift.pixels=2 needs images.*set it to null"):
        evaluate.run(evaluated)


def test_a_perceptron_on_images_needs_their_size(frozen):
    config = replace(
        student_config(frozen, student=BOX, method=LabelsConfig()),
        store=StoreOptions(path=str(frozen.store.path)),
    )

    for columns, message in (
        (None, r"student.name=mlp needs the size of its images.*input_size"),
        (30, r"student.columns=30 is for rows of a table.*store holds images; set it to null"),
    ):
        with pytest.raises(ConfigError, match=message):
            distill.run(replace(config, student=replace(BOX, columns=columns)))


def test_a_student_of_rows_is_not_evaluated_on_images(taught_table, frozen):
    distill.run(student_config(taught_table, method=LabelsConfig()))
    elsewhere = StoreOptions(path=str(frozen.store.path))

    with pytest.raises(ConfigError, match=r"student.columns=30 is for rows.*choose another store"):
        evaluate.run(EvaluateConfig(store=elsewhere, evaluate=EvaluateOptions(), run="one"))


def test_a_loader_of_rows_changes_and_mixes_none(taught_table):
    records = open_store(taught_table.store.path).select("train")

    for augment in (
        AugmentOptions(mix=(MixConfig(kind="mixup"),)),
        AugmentOptions(operations=(CROP,)),
    ):
        with pytest.raises(ConfigError, match="rows of a table; leave it out"):
            RecordLoader(records, augment=augment)
