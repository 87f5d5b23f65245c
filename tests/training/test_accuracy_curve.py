"""Curves of accuracy and the epoch that is kept: the last point is the evaluation, the training does not change."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from permafrost.config.distillation import CurveOptions
from permafrost.config.evaluation import TopKOptions, check_top_k
from permafrost.config.methods import E2KDConfig, LabelsConfig
from permafrost.config.models import CifarModelConfig
from permafrost.config.store import SubsetOptions
from permafrost.config.verbs import DEFAULT_EVALUATORS as DEFAULT
from permafrost.core.errors import ConfigError
from permafrost.evaluation.evaluate import evaluate_student
from permafrost.losses.base import build_loss
from permafrost.models.cifar import CifarResNet
from permafrost.models.classifier import Classifier
from permafrost.runs.mirrors import RUNS
from permafrost.training import loop
from permafrost.training.epoch_maps import side_by_side
from permafrost.training.epoch_selection import EPOCHS_NAME, EpochSelection, plan_curve, read_curve
from permafrost.training.metric_log import read_metrics
from permafrost_papers.interpretability.options import CRDConfig
from tests.support.kills import killed_at
from tests.support.run_files import read_signed
from tests.support.runs import (
    TRAINER,
    assert_equal_states,
    distill_config,
    evaluate_config,
    logged_lines,
    report_config,
    weights_of,
)
from tests.support.verbs import distill, evaluate, report

SPLITS = ("test", "test_swapped")


def curve_of(run="one"):
    return read_curve(RUNS / run / "distill")


def test_the_last_point_is_the_evaluation(frozen):
    distill.run(distill_config(frozen, curve=CurveOptions(splits=SPLITS)))
    evaluated = evaluate.run(evaluate_config(frozen)).splits

    assert {name: list(values) for name, values in curve_of().items()} == {
        f"{split}.{metric}": [1, 2, 3] for split in SPLITS for metric in ("accuracy", "agreement")
    }
    for name, values in curve_of().items():
        split, _, metric = name.partition(".")
        assert values[3] == evaluated[split][metric]


def test_a_curve_changes_neither_the_student_nor_its_identity(frozen):
    plain = distill_config(frozen)
    distill.run(plain)
    curve = CurveOptions(splits=SPLITS, terms=True, top_k=(1, 2))
    distill.run(distill_config(frozen, run="curve", curve=curve))

    assert_equal_states(weights_of("one"), weights_of("curve"))
    assert distill.run(replace(plain, curve=CurveOptions(splits=SPLITS))).trained_epochs == 0
    assert curve_of() == {}


def test_terms_of_a_split_are_what_the_evaluation_measures_of_it(frozen):
    method = E2KDConfig(tau=1.0, lambda_map=2.0)
    curve = CurveOptions(splits=("test",), every_epochs=3, terms=True, top_k=(1, 3))
    distill.run(distill_config(frozen, method=method, curve=curve))
    config = replace(evaluate_config(frozen, splits=("test",)), evaluators=(*DEFAULT, "top_k"))
    config = replace(
        config, evaluate=replace(config.evaluate, added={"top_k": TopKOptions(k=(3,))})
    )

    measured = evaluate.run(config).splits["test"]

    values = {name.removeprefix("test."): each[3] for name, each in curve_of().items()}
    assert values["kd"] == pytest.approx(measured["kl_to_teacher"], rel=1e-5)
    expected = measured["valid_map_fraction"] * (1 - measured["map_cosine"])
    assert values["map"] == pytest.approx(expected, rel=1e-4)
    assert values["total"] == pytest.approx(values["kd"] + 2 * values["map"], rel=1e-5)
    assert values["top_k.accuracy.1"] == values["accuracy"]
    assert values["top_k.accuracy.3"] == measured["top_k"]["accuracy"]["3"] > values["accuracy"]


@pytest.mark.parametrize(
    ("curve", "method", "message"),
    [
        ({"splits": ("test",), "terms": True}, CRDConfig(), "terms of method=crd with mode=frozen"),
        ({"splits": ("test",), "top_k": (10,)}, LabelsConfig(), "numbers from 1 to 9, one below"),
    ],
)
def test_what_has_no_value_on_a_split_is_refused_before_the_training(
    frozen, curve, method, message
):
    with pytest.raises(ConfigError, match=message):
        plan_curve(
            distill_config(frozen, method=method, curve=CurveOptions(**curve)),
            frozen.store, frozen.store.open_passes(), 10, build_loss(method),
        )  # fmt: skip
    with pytest.raises(ConfigError, match=r"curve\.terms=true is .* curve\.splits, which is empty"):
        CurveOptions(terms=True)
    with pytest.raises(ConfigError, match=r"top_k=\[2\] needs one label per record"):
        check_top_k("curve.top_k", (2,), 10, many=True)
    with pytest.raises(ConfigError, match=r"top_k=\[0\] must have numbers from 1 to 9"):
        check_top_k("curve.top_k", (0,), 10, many=False)


def test_the_last_epoch_is_always_a_point(frozen):
    distill.run(distill_config(frozen, curve=CurveOptions(splits=("test",), every_epochs=2)))

    assert list(curve_of()["test.accuracy"]) == [2, 3]


def test_an_interrupted_training_has_the_curve_of_an_undisturbed_one(frozen):
    curve = CurveOptions(splits=("test",))
    distill.run(distill_config(frozen, run="undisturbed", curve=curve))
    with killed_at(loop, "save_checkpoint", 2):  # the second epoch is a point, and is trained again
        distill.run(distill_config(frozen, curve=curve))
    assert list(curve_of()["test.accuracy"]) == [1, 2]

    distill.run(distill_config(frozen, curve=curve))

    assert curve_of() == curve_of("undisturbed")


def test_a_student_of_labels_is_compared_with_the_only_pass(frozen):
    distill.run(distill_config(frozen, method=LabelsConfig(), curve=CurveOptions(splits=("test",))))

    assert set(curve_of()) == {"test.accuracy", "test.agreement"}


def test_a_split_that_the_store_lacks_is_named(frozen):
    with pytest.raises(Exception, match="no split 'nowhere'"):
        distill.run(distill_config(frozen, curve=CurveOptions(splits=("nowhere",))))


# ---- pictures of maps ------------------------------------------------------------------------------


def pictures_of(run):
    paths = sorted((RUNS / run / "distill/maps").glob("*"))
    return {path.name: np.asarray(Image.open(path)) for path in paths}


def test_maps_are_drawn_every_nth_epoch_and_at_the_last_and_change_no_bit(frozen):
    distill.run(distill_config(frozen))
    distill.run(distill_config(frozen, run="maps", curve=CurveOptions(maps=4, maps_every=2)))

    drawn = pictures_of("maps")
    assert list(drawn) == ["epoch-0002.png", "epoch-0003.png"]
    (height, width, _), side = drawn["epoch-0002.png"].shape, 112
    assert (height, width) == (4 * side, 3 * side)
    columns = [np.split(picture, 3, axis=1) for picture in drawn.values()]
    same = [np.array_equal(first, last) for first, last in zip(*columns, strict=True)]
    assert same == [True, True, False]  # image, the teacher's map, the student's map
    assert_equal_states(weights_of("one"), weights_of("maps"))
    assert logged_lines("one") == logged_lines("maps")
    assert pictures_of("one") == {}
    events = EventAccumulator(str(RUNS / "maps/distill/tensorboard")).Reload()
    ends = {line["epoch"] + 1: line["step"] for line in logged_lines("maps")}
    assert [event.step for event in events.Images("maps")] == [ends[2], ends[3]]


@pytest.mark.parametrize(("passes", "columns"), [(True, 3), (False, 2)])
def test_a_student_of_labels_is_drawn_next_to_the_only_pass_if_there_is_one(
    frozen, passes, columns, monkeypatch
):
    if not passes:
        monkeypatch.setattr("permafrost.training.epoch_selection.compared_passes", lambda *_: [])
    curve = CurveOptions(maps=1, maps_every=5)
    distill.run(distill_config(frozen, method=LabelsConfig(), curve=curve))

    assert [picture.shape[1] for picture in pictures_of("one").values()] == [columns * 112]


def test_signed_maps_have_two_colors():
    arrays = {
        "frames": np.full((1, 3, 2, 2), 255, np.uint8),
        "maps": np.array([[[1.0, -1.0], [1.0, -1.0]]], np.float32),
    }
    row = side_by_side(arrays)[0]
    red, blue = row[112].astype(int), row[-1].astype(int)
    assert red[0] > 2 * red[2]
    assert blue[2] > 2 * blue[0]
    unsigned = side_by_side(arrays | {"maps": abs(arrays["maps"])})[0]
    assert row[112:].tolist() != unsigned[112:].tolist()


BUILD, EVALUATION = (
    f"permafrost.{module}.explainer_named" for module in ("training.build", "evaluation.forward")
)


@pytest.mark.parametrize(("refusing", "count"), [([BUILD], 1), ([BUILD, EVALUATION], 0)])
def test_a_network_without_these_maps_shows_its_own_or_is_one_warning(
    frozen, refusing, count, monkeypatch, caplog
):
    def refuse(*_):
        raise ConfigError("no grid")

    for name in refusing:
        monkeypatch.setattr(name, lambda kind: refuse)
    curve = CurveOptions(maps=1, maps_every=1)
    with caplog.at_level(logging.WARNING, "permafrost.training"):
        distill.run(distill_config(frozen, method=LabelsConfig(), curve=curve))

    assert len(pictures_of("one")) == 3 * count
    assert caplog.messages == ["curve.maps draws nothing: no grid"] * (1 - count)


def test_maps_of_a_table_are_refused_before_the_training(frozen):
    config = distill_config(frozen, curve=CurveOptions(maps=1))
    table = SimpleNamespace(form=SimpleNamespace(has_places=False), path="table")
    with pytest.raises(ConfigError, match=r"curve\.maps=1 draws images, but table holds a table"):
        plan_curve(config, table, (), 10, build_loss(config.method))


HELD_OUT = SubsetOptions(holdout=1)


def numbered_model(number: int) -> Classifier:
    """Network whose parameters all have one value, so that it can be recognized."""
    model = CifarResNet(CifarModelConfig(name="resnet8", width=4), 2)
    torch.nn.init.constant_(model.network.conv1.weight, float(number))
    return model


def kept_after(folder, values, select="holdout.accuracy"):
    """Number of the epoch whose weights are kept after epochs with these values."""
    metric = select.partition(".")[2]
    for epoch, value in enumerate(values, start=1):
        selection = EpochSelection(folder, select, lambda _, value=value: {metric: value})
        selection(numbered_model(epoch), epoch)
    model = numbered_model(0)
    selection.restore(model)
    return int(model.network.conv1.weight[0, 0, 0, 0])


@pytest.mark.parametrize(
    ("values", "select", "kept"),
    [
        ((0.3, 0.5, 0.4), "holdout.accuracy", 2),
        ((0.3, 0.5, 0.5), "holdout.accuracy", 2),  # the first of equal epochs
        ((0.1, 0.2, 0.3), "val.agreement", 3),
        ((0.3, 0.1, 0.2), "holdout.kl_to_teacher", 2),  # lower is better
    ],
)
def test_the_best_epoch_is_kept(tmp_path, values, select, kept):
    assert kept_after(tmp_path, values, select) == kept


def test_an_epoch_that_is_repeated_after_an_interruption_counts_once(tmp_path):
    kept_after(tmp_path, (0.3, 0.5, 0.4))

    # The last checkpoint is of the first epoch, so the second and third are trained again.
    for epoch, value in ((2, 0.5), (3, 0.4)):
        selection = EpochSelection(
            tmp_path, "holdout.accuracy", lambda _, value=value: {"accuracy": value}
        )
        selection(numbered_model(epoch), epoch)

    assert [one["value"] for one in selection.epochs()] == [0.3, 0.5, 0.4]
    model = numbered_model(0)
    selection.restore(model)
    assert model.network.conv1.weight[0, 0, 0, 0] == 2


def test_an_abandoned_epoch_is_not_restored_if_its_repetition_is_worse(tmp_path):
    kept_after(tmp_path, (0.3, 0.5, 0.7))

    # The third epoch is repeated, as on another machine, with another result.
    selection = EpochSelection(tmp_path, "holdout.accuracy", lambda _: {"accuracy": 0.4})
    wants_checkpoint = selection(numbered_model(33), 3)

    model = numbered_model(0)
    selection.restore(model)
    assert model.network.conv1.weight[0, 0, 0, 0] == 2
    assert not wants_checkpoint
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_a_metric_that_the_split_does_not_have_is_refused_with_those_it_has(tmp_path):
    def selection_of(**metrics):
        return EpochSelection(tmp_path, "holdout.epg", lambda _: metrics)

    with pytest.raises(ConfigError, match=r"epg is not a number after epoch 1, .* of accuracy or"):
        selection_of(accuracy=0.5, epg=float("nan"))(numbered_model(1), 1)
    with pytest.raises(ConfigError, match=r"the split has no epg; choose one of accuracy, or null"):
        selection_of(accuracy=0.5)(numbered_model(1), 1)
    with pytest.raises(ConfigError, match=r"unknown metric; choose one of accuracy, mean_class"):
        EpochSelection(tmp_path, "holdout.acc", dict)


def config_of(frozen, epochs=4, **options):
    return replace(
        distill_config(frozen),
        subset=HELD_OUT,
        trainer=replace(TRAINER, epochs=epochs, schedule="constant"),
        **options,
    )


def test_the_student_is_that_of_its_best_epoch_and_the_others_train_as_before(frozen):
    distill.run(config_of(frozen, select_epoch="holdout.kl_to_teacher", run="selected"))

    epochs = read_signed(RUNS / "selected" / "distill" / EPOCHS_NAME)["epochs"]
    best = min(epochs, key=lambda one: one["value"])
    # With a constant learning rate, a training of fewer epochs ends at the same weights.
    distill.run(config_of(frozen, epochs=best["epoch"], run="shorter"))
    distill.run(config_of(frozen, run="last"))
    selected, shorter, last = (weights_of(run) for run in ("selected", "shorter", "last"))
    assert all(torch.equal(selected[name], shorter[name]) for name in selected)
    assert (best["epoch"] == 4) == all(torch.equal(selected[n], last[n]) for n in selected)
    assert losses_of("selected") == losses_of("last")
    evaluated = evaluate_student(
        replace(
            evaluate_config(frozen),
            run="selected",
            evaluate=replace(evaluate_config(frozen).evaluate, splits=("holdout",)),
        )
    )
    assert evaluated.splits["holdout"]["kl_to_teacher"] == pytest.approx(best["value"])


def losses_of(run):
    """Logged lines of a run, without its speed."""
    lines = read_metrics(RUNS / run / "distill")
    return [{k: v for k, v in line.items() if k != "records_per_second"} for line in lines]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"select_epoch": "accuracy"}, r"must be <split>\.<metric>"),
        ({"select_epoch": "train.accuracy"}, r"trained on train; hold out"),
        ({"select_epoch": "holdout.accuracy", "subset": SubsetOptions()}, r"holdout=0 holds out"),
        ({"select_frame": "full"}, r"select_frame=full is an option of select_epoch, which is nul"),
    ],
)
def test_a_split_that_cannot_select_is_refused_before_training(frozen, options, message):
    with pytest.raises(ConfigError, match=message):
        replace(config_of(frozen), **options)


def test_a_student_of_labels_is_selected_by_its_agreement_with_the_only_pass(frozen):
    config = config_of(
        frozen, method=LabelsConfig(), select_epoch="holdout.agreement", epochs=1, run="labels"
    )

    distill.run(config)

    assert (RUNS / "labels" / "distill" / EPOCHS_NAME).exists()


@pytest.mark.parametrize("frame", ["full", "center_crop"])
def test_an_epoch_is_judged_on_the_frame_of_the_evaluation(frozen, frame):
    config = config_of(frozen, select_epoch="holdout.kl_to_teacher", epochs=1, run=frame)
    small = replace(
        config.augment, size=24
    )  # smaller than the stored frames, so that the two differ

    distill.run(replace(config, augment=small, select_frame=frame))

    ((judged,),) = [read_signed(RUNS / frame / "distill" / EPOCHS_NAME)["epochs"]]
    options = evaluate_config(frozen).evaluate
    values = {}
    for shown in ("full", "center_crop"):
        again = replace(options, splits=("holdout",), frame=shown)
        found = evaluate_student(replace(evaluate_config(frozen), run=frame, evaluate=again), shown)
        values[shown] = found.splits["holdout"]["kl_to_teacher"]
    assert values["full"] != pytest.approx(values["center_crop"], rel=1e-3)
    assert judged["value"] == pytest.approx(values[frame])


def test_results_on_the_split_that_chose_the_epoch_are_named_as_optimistic(frozen, caplog):
    config = config_of(frozen, select_epoch="test.accuracy", epochs=1, run="optimistic")
    distill.run(config, on_epoch=lambda epoch, line: None)

    with caplog.at_level("WARNING"):
        evaluate_student(evaluate_config(frozen, run="optimistic", splits=("test", "test_swapped")))
    html = report_page(frozen, "optimistic")

    (warning,) = [
        record.getMessage() for record in caplog.records if "epoch" in record.getMessage()
    ]
    assert warning.startswith(
        "the epoch of this student was chosen by test.accuracy (select_epoch), so its results on test look better"
    )
    assert (
        "The epoch of optimistic was chosen by test.accuracy, so its values on test look better"
        in html
    )


def test_results_on_other_splits_than_the_one_that_chose_the_epoch_need_no_warning(frozen, caplog):
    config = config_of(frozen, select_epoch="test.accuracy", epochs=1, run="sound")
    distill.run(config, on_epoch=lambda epoch, line: None)

    with caplog.at_level("WARNING"):
        evaluate_student(evaluate_config(frozen, run="sound", splits=("test_swapped",)))

    assert "chosen by" not in caplog.text
    assert "chosen by" not in report_page(frozen, "sound")


def report_page(frozen, run):
    return Path(report.run(report_config(frozen, run)).html).read_text()
