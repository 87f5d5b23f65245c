"""Selection of an epoch: which one is kept, and that the training itself does not change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from permafrost.config.methods import LabelsConfig
from permafrost.config.models import CifarModelConfig
from permafrost.config.store import SubsetOptions
from permafrost.core.errors import ConfigError
from permafrost.evaluation.evaluate import evaluate_student
from permafrost.models.cifar import CifarResNet
from permafrost.models.classifier import Classifier
from permafrost.runs.mirrors import RUNS
from permafrost.training.epoch_selection import EPOCHS_NAME, EpochSelection
from permafrost.training.metric_log import read_metrics
from tests.support.run_files import read_signed
from tests.support.runs import (
    TRAINER,
    distill_config,
    evaluate_config,
    report_config,
    weights_of,
)
from tests.support.verbs import distill, report

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
