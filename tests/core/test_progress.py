"""Progress lines: how much is done, how long the rest takes, and what the work waits for."""

import logging
import re
import time
from contextlib import ExitStack
from functools import partial

import pytest

from permafrost.core import progress
from permafrost.core.tasks import SerialExecutor, ShardResult, run_shards
from permafrost.core.uploads import put_off


@pytest.mark.parametrize(
    ("unit", "times", "number", "messages"),
    [
        ("shard", (5.0, 60.0, 61.0), 5, ["10/100 shards, about 16 min left"]),
        # The time until the first unit is not taken for that of the others.
        ("epoch", (60.0, 70.0), 1, ["1/100 epochs", "2/100 epochs, about 16 min left"]),
    ],
)
def test_a_line_says_how_long_the_rest_takes(unit, times, number, messages, monkeypatch, caplog):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    lines = progress.ProgressLines("teacher", 100, unit)

    with caplog.at_level(logging.INFO):
        for now in times:  # noqa: B007, read by the clock
            lines.update(number)

    assert [record.getMessage() for record in caplog.records] == [
        f"teacher: {message}" for message in messages
    ]


class WritesLong:
    """Task whose shards are written for longer than their work takes."""

    needs_gpu = False

    def __call__(self, shard):
        put_off(partial(time.sleep, 0.05), ExitStack())
        return ShardResult(name=shard, records=8, seconds=0.001, report=None)


def test_a_line_says_what_the_work_waits_for(monkeypatch, caplog):
    monkeypatch.setattr(progress, "SECONDS_PER_LINE", 0.0)
    results = []

    with caplog.at_level(logging.INFO):
        records, seconds = run_shards(
            "teacher", SerialExecutor(), WritesLong(), ["a", "b", "c"], results.append
        )

    assert [result.name for result in results] == ["a", "b", "c"]
    first, *others = results
    assert not first.waits
    assert all(0 < result.waits["write"] <= result.seconds for result in others)
    assert records == 24
    assert seconds == sum(result.seconds for result in results)
    *_, line = (record.getMessage() for record in caplog.records)
    assert re.fullmatch(r"teacher: 3/3 shards, [\d,]+ records/s, waiting for write \d+%", line)


def test_work_that_waits_for_nothing_is_only_counted(monkeypatch, caplog):
    class Counts:
        needs_gpu = False

        def __call__(self, shard):
            return ShardResult(name=shard, records=8, seconds=0.001, report=None)

    monkeypatch.setattr(progress, "SECONDS_PER_LINE", 0.0)
    with caplog.at_level(logging.INFO):
        run_shards("pack", SerialExecutor(), Counts(), ["a"], lambda result: None)

    (line,) = (record.getMessage() for record in caplog.records)
    assert re.fullmatch(r"pack: 1/1 shards, [\d,]+ records/s", line)
