"""Points of a grid: enumeration, command-line words, labels and the choice of the best."""

import pytest

from permafrost.config.compose import compose
from permafrost.config.points import iter_points, knows_option, point_arguments, point_label
from permafrost.evaluation.evaluator import METRICS, best_position


def test_points_are_all_combinations_with_the_last_option_fastest():
    points = list(iter_points({"method.tau": [1, 5], "optimizer.lr": [0.1]}))

    assert points == [
        {"method.tau": 1, "optimizer.lr": 0.1},
        {"method.tau": 5, "optimizer.lr": 0.1},
    ]
    assert list(iter_points({})) == [{}]


def test_every_kind_of_value_comes_through_a_word_as_it_was():
    point = {
        "student.weights": 'a b/"c"=d,{e}.pt',
        "optimizer.lr": 1e-05,
        "optimizer": "sgd",
        "trainer.clip_norm": None,
        "store.teacher": ["a", "b"],
        "augment.operations": [{"kind": "pad_crop", "padding": 3}],
    }

    composed = compose("distill", point_arguments(point))

    assert composed["student"]["weights"] == 'a b/"c"=d,{e}.pt'
    assert composed["optimizer"]["kind"] == "sgd"
    assert composed["optimizer"]["lr"] == 1e-05
    assert composed["trainer"]["clip_norm"] is None
    assert composed["store"]["teacher"] == ["a", "b"]
    assert composed["augment"]["operations"] == [{"kind": "pad_crop", "padding": 3}]


def test_an_option_is_known_where_every_part_of_its_name_is():
    composed = {"method": {"tau": None}, "split": "train"}

    assert knows_option(composed, "method.tau")
    assert knows_option(composed, "split")
    assert not knows_option(composed, "method.lambda_map")
    assert not knows_option(composed, "split.tau")


def test_a_label_takes_an_options_last_name_unless_it_is_anothers_too():
    assert point_label({"method.tau": 1, "optimizer.lr": 0.1}) == "tau=1 lr=0.1"
    assert point_label({"a.lr": 1, "b.lr": 2}) == "a.lr=1 b.lr=2"
    assert point_label({}) == ""


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [("accuracy", [0.1, 0.7, 0.7], 1), ("kl_to_teacher", [3.0, 0.5, 0.5], 1)],
)
def test_the_best_is_the_first_of_equals_in_the_metrics_direction(metric, values, best):
    assert best_position(values, METRICS[metric]) == best
