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
        "teacher: 10/100 shards, about 9 min left"
    ]
