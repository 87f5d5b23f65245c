"""Price of freezing: bytes and hours of stored views, distances to a live teacher, a proposal and the break-even."""

import math
import re
from dataclasses import replace
from math import inf

import numpy as np
import pytest
import torch

from permafrost.config.augment import (
    AugmentOptions,
    OperationConfig,
    PixelOperationConfig,
    PolicyConfig,
    RandomViewsConfig,
)
from permafrost.config.methods import KDConfig
from permafrost.config.store import PassOptions
from permafrost.core.errors import ConfigError
from permafrost_estimate import steps
from permafrost_estimate.freezing import FreezingRow, propose
from permafrost_estimate.measurement import break_even_epochs, format_bytes, measure, printed_lines
from permafrost_estimate.options import EstimateOptions
from permafrost_estimate.sample import Spread, spread_of
from permafrost_evaluators.equivariance import SPREAD_BLOCK, probability_spread, recipes_of
from tests.estimate.test_estimate import DATA, estimate_config
from tests.support.items import for_each
from tests.support.stores import precompute_config

STRONG = AugmentOptions(
    operations=(
        OperationConfig(kind="horizontal_flip"),
        PolicyConfig(kind="randaugment"),
        PixelOperationConfig(kind="random_erasing", p=1.0),
    )
)


@pytest.fixture(scope="module")
def estimate(tmp_path_factory, tiny_teacher):
    folder = tmp_path_factory.mktemp("price")
    precompute = precompute_config(folder / "store", tiny_teacher, data=DATA)
    options = EstimateOptions(shards=4, shard_records=40, rounds=1, views=(0, 1, 16))
    config = estimate_config(precompute, augment=STRONG, estimate=options)
    (folder / "work").mkdir()
    return config, measure(config, folder / "work")


def test_bytes_and_hours_grow_by_the_view(estimate):
    config, found = estimate
    frozen, one, many, live = found.freezing
    trained = one.bytes - frozen.bytes

    # Logits, a map with its scale and class, and 16 + 14 bytes of a view: its window, randaugment 3 values, erasing 4.
    per_view = 2 * 10 + 2 * 16 + 4 + 4 + 16 + 14
    records = trained / per_view
    assert records == int(records) == found.training.records
    assert many.bytes - frozen.bytes == 16 * trained
    assert many.hours - frozen.hours == pytest.approx(16 * (one.hours - frozen.hours))
    assert one.hours > frozen.hours > 0
    assert [row.views for row in found.freezing] == [0, 1, 16, 0]
    assert (live.is_live, live.bytes, live.distance) == (True, 0, 0.0)
    assert frozen.distances.keys() == {"logits", "maps"}
    assert frozen.distance > 100 * one.distance
    sizes = one.bytes_by_output
    assert list(sizes) == ["logits", "maps", "commits", "views"]
    assert sizes["views"] == records * 30
    assert sum(sizes.values()) == one.bytes
    lines = printed_lines(found, config)
    assert "each view 0.125 times in trainer.epochs=2" in lines["price.views.count=16"]
    assert "proposal" not in lines


@pytest.mark.slow
def test_a_pass_of_strong_views_has_the_estimated_bytes(tmp_path, tiny_teacher, estimate):
    _, found = estimate
    precompute = precompute_config(tmp_path / "store", tiny_teacher, data=DATA)
    views = RandomViewsConfig(count=16)
    config = estimate_config(precompute, augment=STRONG, views=views)
    (tmp_path / "work").mkdir()

    parts = measure(config, tmp_path / "work").parts

    stored = sum(part.bytes for part in parts if part.name.startswith("views."))
    stored -= next(part.bytes for part in parts if part.name == "views.commits")
    assert stored == pytest.approx(found.freezing[2].bytes - found.freezing[0].bytes, rel=0.01)


ROWS = (
    FreezingRow(views=0, bytes=100, hours=1, distances={"logits": 0.3, "maps": 0.1}),
    FreezingRow(views=1, bytes=300, hours=2, distances={"logits": 0.0, "maps": 1e-6}),
    FreezingRow(views=16, bytes=900, hours=9, distances={"logits": 0.0, "maps": 1e-6}),
    FreezingRow(views=0, bytes=0, hours=5, is_live=True),
)


@for_each(
    "options,wanted",
    [
        ({"max_distance": 0.3}, "mode=frozen"),
        ({"max_distance": 0.2}, "mode=replay views=random views.count=1"),
        ({"budget_bytes": 899}, "mode=replay views=random views.count=1"),
        ({"budget_bytes": 900}, "mode=replay views=random views.count=16"),
        ({"budget_bytes": 200}, "mode=frozen"),
        ({"budget_bytes": 200, "max_distance": 0.2}, "mode=live, as no stored targets"),
        ({"budget_bytes": 10}, "mode=live, as no stored targets"),
    ],
)
def test_the_cheapest_setting_within_the_limits_is_proposed(options, wanted):
    assert propose(ROWS, EstimateOptions(**options)).startswith(wanted)


def test_an_output_that_was_not_measured_is_not_within_a_distance(tmp_path, tiny_teacher):
    pooled = PassOptions(batch_size=8, outputs=("logits", "pooled"))
    precompute = precompute_config(tmp_path / "store", tiny_teacher, data=DATA, annotate=pooled)
    options = EstimateOptions(shards=2, shard_records=40, rounds=1, views=(0, 1))
    (tmp_path / "work").mkdir()
    config = estimate_config(precompute, augment=STRONG, estimate=options, method=KDConfig())

    found = measure(config, tmp_path / "work")

    frozen, one = found.freezing[:2]
    assert frozen.distances["pooled"] == math.inf
    assert frozen.distances["logits"] < 10
    assert one.distance < 1e-6
    line = printed_lines(found, config)["price.frozen"]
    assert re.search(r"pooled [\d.]+ kB \(distance not measured\)", line)
    largest = EstimateOptions(max_distance=100.0)
    assert propose((frozen, one), largest) == "mode=replay views=random views.count=1"


def test_without_a_live_teacher_there_may_be_no_setting():
    assert propose(ROWS[:3], EstimateOptions(budget_bytes=1)) == "no setting is within the limits"


def test_wrong_limits_are_one_line():
    with pytest.raises(ConfigError, match=r"estimate\.views=\[-1\] must list"):
        EstimateOptions(views=(-1,))
    with pytest.raises(ConfigError, match=r"estimate\.max_distance must be >= 0"):
        EstimateOptions(max_distance=-0.1)


def test_the_spread_of_the_mean_probability_by_hand():
    order = torch.from_numpy(np.random.default_rng(0).permutation(70))
    probabilities = torch.zeros(70, 2, dtype=torch.float64)
    first, second = order[:SPREAD_BLOCK], order[SPREAD_BLOCK : 2 * SPREAD_BLOCK]
    probabilities[first] = torch.tensor([0.8, 0.2]).double()
    probabilities[second] = torch.tensor([0.5, 0.5]).double()

    # Means 0.8 and 0.5, whose standard deviation is 0.3 / sqrt(2), for both classes.
    assert probability_spread(probabilities) == pytest.approx(0.3 / 2**0.5)
    assert probability_spread(probabilities[: 2 * SPREAD_BLOCK - 1]) is None


def test_each_operation_is_measured_as_if_always_drawn_and_the_recipe_as_it_is():
    twice = (*STRONG.operations, PolicyConfig(kind="randaugment", p=0.5))

    recipes = recipes_of(twice)

    assert list(recipes) == [
        *("none", "horizontal_flip", "randaugment", "random_erasing", "randaugment_#2", "recipe")
    ]
    assert recipes["horizontal_flip"] == (replace(twice[0], p=1.0),)
    assert recipes["randaugment_#2"] == (replace(twice[3], p=1.0),)
    assert recipes["recipe"] == twice
    assert list(recipes_of(twice[:1])) == ["none", "horizontal_flip"]


def test_the_break_even_is_the_cost_over_what_an_epoch_saves():
    """600 s to annotate, epochs of 1000 records: live 0.05 s per record, stored 0.02 s."""
    annotation = Spread(median=600.0, lowest=540.0, highest=660.0)
    saved = spread_of([0.03, 0.02, 0.04]).times(1000)  # 30 s, from 20 s to 40 s

    epochs = break_even_epochs(annotation, saved)

    assert epochs == Spread(median=20.0, lowest=13.5, highest=33.0)


@pytest.mark.parametrize(
    ("saved", "expected"),
    [
        ([-3.0, -2.0, -1.0], (inf, inf, inf)),
        ([0.0, 0.0, 0.0], (inf, inf, inf)),
        ([-1.0, 2.0, 4.0], (5.0, 2.5, inf)),
        ([-2.0, -1.0, 5.0], (inf, 2.0, inf)),
    ],
)
def test_a_teacher_that_costs_nothing_is_never_dearer(saved, expected):
    epochs = break_even_epochs(spread_of([10.0]), spread_of(saved))

    assert (epochs.median, epochs.lowest, epochs.highest) == expected


@pytest.mark.parametrize(("device", "expected"), [("cpu", 1 / 4), ("cuda", 2 / 4)])
def test_on_a_gpu_the_first_step_is_not_counted_as_its_batch_was_ready(
    monkeypatch, device, expected
):
    """The first step takes 1 s for 4 records, the others take 2 s."""
    seconds, taken = [0.0], []
    monkeypatch.setattr(steps, "perf_counter", lambda: seconds[0])

    def step():
        seconds[0] += 2.0 if taken else 1.0
        taken.append(4)
        return 4

    found = steps.seconds_per_record(step, lambda: taken.append(0), device)

    assert found == expected
    assert taken == ([4, 0] if device == "cpu" else [4, 0, 4, 4, 4, 4, 0])


def test_two_passes_cost_their_sum():
    both = spread_of([1.0, 2.0, 4.0]).plus(spread_of([10.0, 30.0, 20.0]))

    assert both == Spread(median=22.0, lowest=11.0, highest=34.0)


@for_each(
    "count,text",
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1_000, "1 kB"),
        (147_600_000_000, "148 GB"),
        (3.2e15, "3.2 PB"),
        (4e18, "4,000 PB"),
    ],
)
def test_bytes_have_a_decimal_unit(count, text):
    assert format_bytes(count) == text
