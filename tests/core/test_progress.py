"""Progress lines: how much is done, and how long the rest takes."""

import logging

from permafrost.core import progress


def test_a_line_says_how_long_the_rest_takes(monkeypatch, caplog):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    lines = progress.ProgressLines("teacher", 100, "shard")

    with caplog.at_level(logging.INFO):
        for now in (5.0, 60.0, 61.0):  # noqa: B007, read by the clock
            lines.update(5)

    assert [record.getMessage().strip() for record in caplog.records] == [
        "teacher: 10/100 shards, about 16 min left"
    ]


def test_the_time_until_the_first_unit_is_not_taken_for_that_of_the_others(monkeypatch, caplog):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    lines = progress.ProgressLines("sweep", 100, "epoch")

    with caplog.at_level(logging.INFO):
        for now in (60.0, 70.0):  # noqa: B007, read by the clock
            lines.update(1)

    assert [record.getMessage().strip() for record in caplog.records] == [
        "sweep: 1/100 epochs",
        "sweep: 2/100 epochs, about 16 min left",
    ]
