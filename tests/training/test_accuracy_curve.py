"""Curves of accuracy over the epochs: their last point is the evaluation, and the training does not notice them."""

from dataclasses import replace

import pytest

from permafrost.config.distillation import CurveOptions
from permafrost.config.methods import LabelsConfig
from permafrost.runs.mirrors import RUNS
from permafrost.training import loop
from permafrost.training.epoch_selection import read_curve
from tests.support.kills import killed_at
from tests.support.runs import assert_equal_states, distill_config, evaluate_config, weights_of
from tests.support.verbs import distill, evaluate

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
    distill.run(distill_config(frozen, run="curve", curve=CurveOptions(splits=SPLITS)))

    assert_equal_states(weights_of("one"), weights_of("curve"))
    assert distill.run(replace(plain, curve=CurveOptions(splits=SPLITS))).trained_epochs == 0
    assert curve_of() == {}


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
