"""Curves of accuracy over the epochs: their last point is the evaluation, and the training does not notice them."""

import logging
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from permafrost.config.distillation import CurveOptions
from permafrost.config.evaluation import TopKOptions
from permafrost.config.methods import E2KDConfig, LabelsConfig
from permafrost.config.verbs import DEFAULT_EVALUATORS as DEFAULT
from permafrost.core.errors import ConfigError
from permafrost.losses.base import build_loss
from permafrost.runs.mirrors import RUNS
from permafrost.training import loop
from permafrost.training.epoch_maps import side_by_side
from permafrost.training.epoch_selection import plan_curve, read_curve
from permafrost_papers.interpretability.options import CRDConfig
from tests.support.kills import killed_at
from tests.support.runs import (
    assert_equal_states,
    distill_config,
    evaluate_config,
    logged_lines,
    weights_of,
)
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
        ({"splits": ("test",), "top_k": (10,)}, LabelsConfig(), "10 highest of 10 classes"),
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
    with pytest.raises(ConfigError, match=r"curve\.splits, which is empty"):
        CurveOptions(terms=True)


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
