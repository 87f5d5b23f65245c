"""Sets with many labels per record, from a table to an evaluated student: colored blocks, their classes and boxes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from permafrost.config.augment import AugmentOptions, OperationConfig, RandomViewsConfig
from permafrost.config.compose import compose
from permafrost.config.data import ImageTableDataConfig
from permafrost.config.distillation import DistillConfig
from permafrost.config.evaluation import EvaluateOptions
from permafrost.config.explainers import GradCamConfig
from permafrost.config.methods import E2KDConfig, KDConfig, LabelsConfig
from permafrost.config.models import CifarModelConfig
from permafrost.config.store import PassOptions, PrecomputeConfig, StoreOptions
from permafrost.config.teaching import LabelTeachingConfig, TeachConfig
from permafrost.config.training import OptimizerOptions, TrainerOptions
from permafrost.config.verbs import EvaluateConfig, build_verb_config
from permafrost.core.errors import ConfigError
from permafrost.evaluation.evaluate import evaluate_student
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.geometry import TargetRequest, view_targets
from permafrost.loading.subset import rows_of_split
from permafrost.models.explanations import gradcam
from permafrost.models.providers import build_model, freeze
from permafrost.models.saved import TrainedModel, save_model
from permafrost.runs.mirrors import RUNS
from permafrost.store.reader import Store
from permafrost.store.verification import verify_store
from permafrost.training.targets import LiveTeacher
from permafrost_report.options import ReportConfig, ReportOptions
from tests.support.index_table import index_table
from tests.support.runs import distill_config
from tests.support.slow import slow
from tests.support.stores import precompute_config
from tests.support.verbs import distill, precompute, report, sweep, teach

SIDE, CELL = 24, 12
CLASSES = ("blue", "green", "red", "yellow")
COLORS = {"blue": (40, 60, 230), "green": (30, 200, 40), "red": (230, 40, 40)}
COLORS["yellow"] = (230, 220, 40)
MODEL = CifarModelConfig(name="resnet8", width=4)
VIEWS = AugmentOptions(operations=(OperationConfig(kind="pad_crop", padding=2),))
TRAINER = TrainerOptions(epochs=1, batch_size=8, num_threads=1)
CHOICES = {
    "top1": GradCamConfig(),
    "topk": GradCamConfig(target_classes="topk", max_classes=3),
    "all_gt": GradCamConfig(target_classes="all_gt"),
    "sample_gt": GradCamConfig(target_classes="sample_gt"),
}


def write_blocks(folder: Path) -> Path:
    """Write images of gray noise with one or two colored blocks in separate cells. The last record has no labels."""
    generator = np.random.default_rng(0)
    rows = []
    for number in range(64):
        pixels = generator.integers(90, 160, (SIDE, SIDE, 3), dtype=np.uint8)
        mask = np.zeros((SIDE, SIDE), np.uint8)
        labels = generator.permutation(4)[: generator.integers(1, 3)]
        boxes = []
        for label, cell in zip(labels, generator.permutation(4), strict=False):
            x0, y0 = np.array([cell % 2, cell // 2]) * CELL + generator.integers(0, 4, 2)
            x1, y1 = np.array([x0, y0]) + generator.integers(5, 9, 2)
            pixels[y0:y1, x0:x1] = COLORS[CLASSES[label]]
            mask[y0:y1, x0:x1] = label + 1
            corners = {"x0": int(x0), "y0": int(y0), "x1": int(x1), "y1": int(y1)}
            boxes.append({"label": CLASSES[label], **corners})
        Image.fromarray(pixels).save(folder / f"{number}.png")
        Image.fromarray(mask).save(folder / f"{number}.mask.png")
        unknown = number == 63
        rows.append(
            {
                "path": f"{number}.png",
                "labels": "" if unknown else " ".join(CLASSES[label] for label in labels),
                "split": "test" if number % 4 == 3 else "train",
                "boxes": "[]" if unknown else json.dumps(boxes),
                "mask": f"{number}.mask.png",
            }
        )
    pd.DataFrame(rows).to_csv(folder / "blocks.csv", index=False)
    return folder / "blocks.csv"


class ManyLabelStore(NamedTuple):
    """Store with a pass of one teacher for each choice of target classes."""

    config: PrecomputeConfig
    passes: dict[str, str]
    result: teach.TeachResult

    @property
    def store(self) -> Store:
        return Store(Path(self.config.store.path))

    def store_config(self, choice: str = "") -> StoreOptions:
        names = (self.passes[choice],) if choice else ()
        return StoreOptions(path=self.config.store.path, teacher=names)

    def dataset(self, split: str, choice: str, **options) -> StoreDataset:
        store = self.store
        passes = [store.open_pass(self.passes[choice])]
        return StoreDataset(store, rows_of_split(store.index, split), passes, **options)


@pytest.fixture(scope="module")
def many_label_store(tmp_path_factory) -> ManyLabelStore:
    folder = tmp_path_factory.mktemp("blocks")
    data = ImageTableDataConfig(
        path=str(write_blocks(folder)),
        label=None,
        labels="labels",
        split="split",
        boxes="boxes",
        mask="mask",
    )
    packed = precompute_config(folder / "store", data=data)
    precompute.run(packed)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config = TeachConfig(
            store=packed.store,
            teacher=MODEL,
            teaching=LabelTeachingConfig(
                loss="bce",
                trainer=replace(TRAINER, epochs=16),
                optimizer=OptimizerOptions(lr=0.02),
                augment=VIEWS,
            ),
            evaluate=EvaluateOptions(splits=("test",)),
            run="teacher",
        )
        result = teach.run(config)
    config = replace(packed, teacher=replace(MODEL, weights=str(folder / result.weights)))
    passes: dict[str, str] = {}
    for choice, explainer in CHOICES.items():
        precompute.run(replace(config, explainer=explainer))
        held = {path.name for path in Store(Path(config.store.path)).pass_folders()}
        (passes[choice],) = held - set(passes.values())
    return ManyLabelStore(config, passes, result)


def many_label_config(
    many_label_store: ManyLabelStore, choice: str = "", **options
) -> DistillConfig:
    options = {
        "store": many_label_store.store_config(choice),
        "student": MODEL,
        "method": E2KDConfig(logits="mld", lambda_ce=0.5, lambda_map=2.0),
        "augment": VIEWS,
        "trainer": TRAINER,
        "run": "student",
    } | options
    return distill_config(many_label_store, **options)


def evaluated_on_test(many_label_store: ManyLabelStore, choice: str = "", **options):
    shown = EvaluateOptions(splits=("test",), num_pictures=2, **options)
    config = EvaluateConfig(
        store=many_label_store.store_config(choice), evaluate=shown, run="student"
    )
    return evaluate_student(config, f"evaluate-{'-'.join(map(str, options.values()))}").splits[
        "test"
    ]


def be_a_student(many_label_store: ManyLabelStore) -> torch.nn.Module:
    """Save the teacher as the run `student`, and return it."""
    teacher = build_model(many_label_store.config.teacher, 4)
    trained = TrainedModel(config=MODEL, num_classes=4, input_size=(SIDE, SIDE))
    save_model(RUNS / "student" / "distill", teacher, trained)
    return freeze(teacher)


# ---- teach and precompute ------------------------------------------------------------------------


@pytest.mark.slow
def test_a_teacher_of_many_labels_learns_them(many_label_store):
    every_class = 2 * 0.375 / (1 + 0.375)  # F1 of a network that predicts every class

    assert many_label_store.result.accuracy == {}
    assert many_label_store.result.f1["test"] > every_class + 0.2


def test_a_batch_says_many_labels_and_the_index_says_the_same(many_label_store):
    dataset = many_label_store.dataset("test", "top1")
    batch = dataset.__getitems__([3, 0, 3])
    labels = {row["key"]: row["labels"] for row in index_table(many_label_store.store).to_pylist()}

    assert batch.labels.shape == (3, 4)
    assert batch.labels.dtype == torch.float32
    for key, row in zip(batch.keys, batch.labels, strict=True):
        assert (row > 0).nonzero().flatten().tolist() == labels[key]
    assert (dataset.has_many_labels, dataset.has_labels) == (True, True)


@pytest.mark.parametrize("choice", CHOICES)
def test_a_pass_explains_the_classes_that_it_was_asked_for(many_label_store, choice):
    dataset = many_label_store.dataset("test", choice)
    batch = dataset.__getitems__(list(range(len(dataset))))
    stored, own = batch.targets[0], batch.labels > 0
    explained = stored.target_class

    count = {"top1": 1, "topk": 3, "all_gt": 2, "sample_gt": 1}[choice]
    assert explained.shape[1] == stored.maps.shape[1] == count
    if choice in ("top1", "topk"):
        assert (explained[:, 0] == stored.logits.argmax(dim=1)).all()
    else:
        expected = own.sum(dim=1) if choice == "all_gt" else own.any(dim=1)
        assert torch.equal((explained >= 0).sum(dim=1), expected.long())
        assert own.gather(1, explained.clamp(min=0))[explained >= 0].all()
        assert (explained < 0).any()  # at least for the record without labels
    assert not stored.maps[explained < 0].any()
    assert stored.maps[explained >= 0].flatten(1).any(dim=1).float().mean() > 0.5


def test_the_passes_are_sound_and_a_second_precompute_computes_nothing(many_label_store):
    assert len(set(many_label_store.passes.values())) == 4
    assert list(verify_store(many_label_store.store.path)) == []
    for explainer in CHOICES.values():
        again = precompute.run(replace(many_label_store.config, explainer=explainer))
        assert again.teacher_records == 0
    explainer = many_label_store.store.open_pass(
        many_label_store.passes["all_gt"]
    ).manifest.explainer
    assert explainer == {"kind": "gradcam", "target_classes": "all_gt", "max_classes": 2}


def test_what_is_explained_does_not_depend_on_the_cut_into_batches(many_label_store, tmp_path):
    config = replace(
        many_label_store.config,
        store=replace(many_label_store.config.store, path=str(tmp_path / "other")),
        explainer=CHOICES["sample_gt"],
        annotate=PassOptions(batch_size=5),
    )
    precompute.run(config)
    (other,) = Store(tmp_path / "other").open_passes()
    first = many_label_store.store.open_pass(many_label_store.passes["sample_gt"])

    for shard in many_label_store.store.manifest.shards:
        one, another = first.read_shard(shard), other.read_shard(shard)
        assert np.array_equal(one["target_class"], another["target_class"])
        assert np.allclose(one["map"], another["map"], atol=2e-3)


# ---- distill and evaluate ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "options", "terms"),
    [
        ("", {"method": LabelsConfig(loss="bce")}, {"bce"}),
        slow("", {"method": LabelsConfig(loss="bce_offlabel")}, {"bce"}),
        ("top1", {"method": KDConfig(logits="mld", tau=2.0)}, {"kd"}),
        *(
            pytest.param(
                *(choice, {}, {"kd", "bce", "map"}),
                marks=[] if choice == "topk" else pytest.mark.slow,
            )
            for choice in CHOICES
        ),
        ("", {"mode": "live", "explainer": CHOICES["all_gt"]}, {"kd", "bce", "map"}),
    ],
    ids=["labels", "off_label", "kd", "top1", "topk", "all_gt", "sample_gt", "live"],
)
def test_a_student_learns_from_many_labels_and_is_evaluated(
    many_label_store, choice, options, terms
):
    if "mode" in options:
        options = options | {"teacher": many_label_store.config.teacher}
    config = many_label_config(many_label_store, choice, **options)

    distill.run(config, on_epoch=lambda epoch, line: None)
    metrics = evaluated_on_test(many_label_store, choice or "top1")

    lines = (RUNS / "student" / "distill" / "metrics.jsonl").read_text().splitlines()
    assert terms | {"total"} <= set(json.loads(lines[-1]))
    assert {
        "records", "f1", "epg", "iou", "epg_uniform", "agreement", "kl_to_teacher", "teacher_f1", "teacher_epg",
        "map_cosine", "valid_map_fraction", "labels", "macro_f1", "macro_recall", "macro_auroc",
        "macro_average_precision", "teacher_macro_f1", "teacher_macro_auroc", "micro_auroc",
    } <= set(metrics)  # fmt: skip
    assert set(metrics["labels"]) == set(CLASSES)
    assert metrics["teacher_f1"] == many_label_store.result.f1["test"]


def test_epg_and_iou_are_means_over_every_image_and_class_of_its_own(many_label_store):
    teacher = be_a_student(many_label_store)
    dataset = many_label_store.dataset("test", "top1", with_regions=True)
    epg, iou = [], []
    for position in range(len(dataset)):
        batch = dataset.__getitems__([position])
        with torch.no_grad():
            output = teacher(batch.inputs.float() / 255)
        for label in (batch.labels[0] > 0).nonzero().flatten():
            low = gradcam(teacher, output, label.view(1, 1))[0]
            size = (SIDE, SIDE)
            cam = torch.nn.functional.interpolate(low, size, mode="bilinear")[0, 0]
            region = torch.zeros(size, dtype=torch.bool)
            for _, x0, y0, x1, y1 in batch.boxes[0][batch.boxes[0][:, 0] == label]:
                x0, y0, x1, y1 = (round(float(c + 1) / 2 * SIDE) for c in (x0, y0, x1, y1))
                region[y0:y1, x0:x1] = True
            total = float(cam.sum())
            epg.append(float(cam[region].sum()) / total if total >= 1e-7 else 0.0)
            spread = float(cam.max() - cam.min())
            high = (cam - cam.min()) / spread > 0.05 if spread else cam > 0
            iou.append(float((high & region).sum() / (high | region).sum()))

    metrics = evaluated_on_test(many_label_store, "top1")

    assert len(epg) > len(dataset)  # some images have several classes
    assert metrics["epg"] == pytest.approx(np.mean(epg), abs=1e-5)
    assert metrics["iou"] == pytest.approx(np.mean(iou), abs=1e-5)


def test_the_table_of_an_evaluation_has_every_class_of_a_record(many_label_store):
    be_a_student(many_label_store)

    # The batches differ in their maximum number of labels.
    metrics = evaluated_on_test(many_label_store, "all_gt", batch_size=3)

    table = pd.read_parquet(RUNS / "student" / "evaluate-3" / "records.parquet")
    index = {row["key"]: row["labels"] for row in index_table(many_label_store.store).to_pylist()}
    known = table[table.labels.str.len() > 0]
    hits = sum(len({*row.labels} & {*row.predictions}) for row in known.itertuples())
    named = known.labels.str.len().sum() + known.predictions.str.len().sum()
    assert [row.tolist() for row in table.labels] == [index[key] for key in table.key]
    assert table.correct.isna().tolist() == [not index[key] for key in table.key]
    assert all(
        row.correct == (row.labels.tolist() == row.predictions.tolist())
        for row in known.itertuples()
    )
    assert [sorted(row) for row in known.target_classes] == [sorted(row) for row in known.labels]
    assert [row.tolist() for row in known.classes] == [row.tolist() for row in known.labels]
    logits = np.stack(table.logits)
    predicted = [np.flatnonzero(row >= 0).tolist() for row in logits]
    assert [row.tolist() for row in table.predictions] == predicted
    assert 2 * hits / named == pytest.approx(metrics["f1"], abs=1e-12)
    for name in ("epg", "iou", "teacher_epg", "map_cosine"):
        values = table[name].explode().astype(float)
        assert values.mean() == pytest.approx(metrics[name], abs=1e-12)
    others = evaluated_on_test(many_label_store, "all_gt")
    tables = metrics.pop("labels"), others.pop("labels")
    assert metrics == pytest.approx(others, abs=1e-6)
    for name in CLASSES:
        assert tables[0][name] == pytest.approx(tables[1][name], abs=1e-6)


def test_a_mask_s_values_are_the_classes_and_its_regions_the_boxes(many_label_store):
    be_a_student(many_label_store)

    by_boxes, by_masks = (
        evaluated_on_test(many_label_store, "all_gt", region=region)
        for region in ("boxes", "masks")
    )

    assert by_masks == by_boxes
    assert 0 < by_boxes["epg"] < 1


def test_the_teacher_evaluated_as_its_own_student_agrees_with_itself(many_label_store):
    be_a_student(many_label_store)

    metrics = evaluated_on_test(many_label_store, "all_gt")

    assert metrics["agreement"] == 1
    assert metrics["f1"] == metrics["teacher_f1"]
    assert metrics["kl_to_teacher"] < 1e-4  # the store rounds logits to float16
    assert metrics["map_cosine"] > 0.9999
    # The evaluated maps are the stored maps of all labels.
    assert metrics["teacher_epg"] == pytest.approx(metrics["epg"], abs=2e-3)


def test_on_the_whole_frame_live_targets_are_the_stored_ones(many_label_store):
    teacher = freeze(build_model(many_label_store.config.teacher, 4))
    for choice in ("all_gt", "sample_gt"):
        batch = many_label_store.dataset("test", choice).__getitems__(list(range(16)))
        explainer = replace(CHOICES[choice], max_classes=2 if choice == "all_gt" else None)
        live = LiveTeacher("live", teacher, gradcam, (SIDE, SIDE), explainer=explainer)

        (asked,), (stored,) = (
            live(batch, TargetRequest((6, 6))),
            view_targets(batch, TargetRequest((6, 6))),
        )

        assert torch.equal(asked.target_class, stored.target_class)
        assert torch.equal(asked.map_valid, stored.map_valid)
        both = (maps[asked.map_valid].flatten(1) for maps in (asked.maps, stored.maps))
        assert torch.nn.functional.cosine_similarity(*both).min() > 0.999


def test_stored_views_are_replayed_with_the_maps_of_every_label(many_label_store, tmp_path):
    config = replace(
        many_label_store.config,
        store=replace(many_label_store.config.store, path=str(tmp_path / "store")),
        explainer=CHOICES["all_gt"],
        views=RandomViewsConfig(count=2),
        augment=VIEWS,
    )
    precompute.run(config)
    store = StoreOptions(path=config.store.path)

    distill.run(
        many_label_config(
            many_label_store, mode="replay", views=RandomViewsConfig(count=2), store=store
        ),
        on_epoch=lambda epoch, line: None,
    )

    (name,) = json.loads((RUNS / "student/distill/model.json").read_text())["teachers"]
    assert Store(Path(config.store.path)).open_pass(name).manifest.explainer["max_classes"] == 2


@pytest.mark.slow
def test_a_sweep_chooses_by_f1_of_the_holdout_and_a_report_shows_it(many_label_store):
    base = [
        f"store.path={many_label_store.config.store.path}", f"store.teacher=[{many_label_store.passes['all_gt']}]",
        "run=grid", "student.name=resnet8", "student.width=4", "trainer.epochs=1",
        "trainer.batch_size=8", "evaluate.splits=[test]", "seeds=[0]", "executor=serial",
        "variants={labels: ['method=labels', 'method.loss=bce'], e2kd: ['method=e2kd', 'method.logits=mld']}",
        "grid={method.lambda_map: [1, 5]}", "subset.holdout=2", "select=holdout.f1",
    ]  # fmt: skip

    result = sweep.run(build_verb_config("sweep", compose("sweep", base)), base)
    config = ReportConfig(
        store=many_label_store.store_config("all_gt"),
        augment=VIEWS,
        report=ReportOptions(
            columns={"f1": "test.f1"},
            compared_column="f1",
            baseline="labels",
            contact_records=3,
            contact_views=1,
            cases=4,
        ),
        run="grid",
    )
    result_of_report = report.run(config)
    values = json.loads(Path(result_of_report.json).read_text())

    assert "test.f1" in result.summary
    assert [row["variant"] for row in values["selection"]["candidates"]] == [
        "labels",
        "e2kd",
        "e2kd",
    ]
    assert values["teacher"]["f1"] == many_label_store.result.f1["test"]
    (of_all_gt,) = (p for p in values["passes"] if p["name"] == many_label_store.passes["all_gt"])
    assert (of_all_gt["explainer"], of_all_gt["map"]) == ("gradcam, all_gt", "2x1x6x6 float16")
    html = Path(result_of_report.html).read_text()
    kinds = ("EPG: e2kd above labels", "EPG: labels above e2kd")
    assert all(f"<b>{kind}</b>" in html for kind in kinds)
    assert "classes of images that have both, the first" in html
    own = {row["key"]: row["labels"] for row in index_table(many_label_store.store).to_pylist()}
    assert {case["kind"] for case in values["cases"]} <= set(kinds)
    assert all(CLASSES.index(case["class"]) in own[case["key"]] for case in values["cases"])
    by_default = report.run(replace(config, report=ReportOptions(cases=0, contact_records=0)))
    shown = set(json.loads(Path(by_default.json).read_text())["runs"][0]) - {"method", "seed"}
    assert {"f1", "agreement", "epg", "iou"} <= shown
    with pytest.raises(ConfigError, match=r"no student has test\.accuracy.*report\.columns=\{f1"):
        report.run(replace(config, report=ReportOptions(columns={"a": "test.accuracy"})))


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": LabelsConfig()}, r"this store have many labels; set method\.loss=bce"),
        ({"method": KDConfig()}, r"many labels; set method\.logits=mld"),
        ({"method": E2KDConfig(lambda_ce=1.0)}, r"many labels; set method\.logits=mld"),
        (
            {"student": replace(MODEL, classes=7)},
            r"student\.classes=7, but the logits of .* are of 4",
        ),
    ],
)
def test_a_method_for_one_label_says_what_to_set(many_label_store, options, message):
    with pytest.raises(ConfigError, match=message):
        distill.run(many_label_config(many_label_store, "top1", **options))


def test_labels_of_a_teacher_of_other_classes_cannot_be_explained(many_label_store):
    teacher = replace(MODEL, classes=7, weights="random")
    config = replace(many_label_store.config, teacher=teacher, explainer=CHOICES["all_gt"])

    with pytest.raises(ConfigError, match=r"the teacher's 7 classes are not the 4 of the data"):
        precompute.run(config)
