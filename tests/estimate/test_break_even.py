"""Break-even of a store and a live teacher, by hand."""

from math import inf

import pytest

from permafrost_estimate import steps
from permafrost_estimate.measurement import break_even_epochs, format_bytes
from permafrost_estimate.sample import Spread, spread_of
from tests.support.items import for_each


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
