"""Progress: a tqdm bar on a terminal, around which log lines are written, and elsewhere a log line every 10 seconds."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

from tqdm import tqdm

logger = logging.getLogger("permafrost.progress")

SECONDS_PER_LINE = 10.0
_MIN_SHARE = 100
"""A hundredth of the work must be done before the rest is estimated, as its first records take longer."""
_BAR = "{l_bar}{bar}| {n:,}/{total:,} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"


class TerminalHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Handler whose lines are above the bars of this process, and not in them."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


class ProgressLines:
    """Stand-in for a tqdm bar on outputs that are not terminals: at most one log line every 10 seconds."""

    def __init__(self, title: str, total: int, unit: str) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.n = 0
        self.last_line = time.monotonic()
        self.postfix = ""
        self._first: tuple[float, int] | None = None
        """Time and count of the first update, before which work may have started up."""

    def update(self, count: int) -> None:
        """Add `count` finished units."""
        self.n += count
        if (now := time.monotonic()) - self.last_line >= SECONDS_PER_LINE:
            self.last_line = now
            logger.info(
                "%s: %s/%s %ss%s%s",
                self.title,
                f"{self.n:,}",
                f"{self.total:,}",
                self.unit,
                self._time_left(now),
                self.postfix and f", {self.postfix}",
            )
        self._first = self._first or (now, self.n)

    def _time_left(self, now: float) -> str:
        """Estimate the time that the remaining units take, as text, from all updates but the first."""
        if (
            self._first is None
            or not self._first[1] < self.n < self.total
            or (self.n - self._first[1]) * _MIN_SHARE < self.total  # the first records take longer
        ):
            return ""
        rate = (now - self._first[0]) / (self.n - self._first[1])
        seconds = rate * (self.total - self.n)
        units = (("h", 3600), ("min", 60), ("s", 1))
        unit, length = next((each for each in units if seconds >= 2 * each[1]), units[-1])
        return f", about {seconds / length:.0f} {unit} left"

    def set_description(self, title: str, refresh: bool = True) -> None:
        """Set the title."""
        self.title = title

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """Set the text that is logged after the count."""
        self.postfix = text


@cache
def log_once(logger: logging.Logger, level: int, text: str) -> None:
    """Log a line about a file or a network once, as a process may read or build it several times.

    Args:
        logger: Logger of the line.
        level: Level of the logging module.
        text: The line.
    """
    logger.log(level, "%s", text)


@contextmanager
def say_if_slow(
    logger: logging.Logger, text: str, *, after: float = 3.0, level: int = logging.INFO
) -> Iterator[None]:
    """Log `text` if the block takes long, so that no verb is silent for long.

    Args:
        logger: Logger of the verb.
        text: Line that names the slow step.
        after: Seconds after which it is logged.
        level: Level of the line.
    """
    timer = threading.Timer(after, logger.log, (level, text))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _is_terminal(stream: Any) -> bool:
    """Return whether a stream is a terminal with columns. A closed stream, None and one that only writes are not."""
    try:
        return bool(stream.isatty()) and os.get_terminal_size(stream.fileno()).columns > 0
    except (AttributeError, ValueError, OSError):
        return False


_displays: list[Any] = []
"""Displays of this process that count records, the innermost one last."""


@contextmanager
def progress(title: str, *, total: int, unit: str) -> Iterator[Any]:
    """Provide a progress display with `n`, `update(count)` and `set_postfix_str(text)` for the block.

    Args:
        title: Title of the display.
        total: Number of units of all work.
        unit: Name of one unit, in the singular. `count_records` adds to a display of records.
    """
    with (
        tqdm(desc=title, total=total, unit=f" {unit}", bar_format=_BAR, dynamic_ncols=True)
        if _is_terminal(sys.stderr)
        else nullcontext(ProgressLines(title, total, unit))
    ) as bar:
        _displays.append(bar if unit == "record" else None)
        try:
            yield bar
        finally:
            _displays.pop()


def count_records(count: int, text: str | None = None) -> None:
    """Add records to the display of this process, if it has one, during work that reports its end to the display.

    Args:
        count: Number of records.
        text: Text after the count; None keeps the last one.
    """
    if _displays and _displays[-1] is not None:
        if text is not None:
            _displays[-1].set_postfix_str(text, refresh=False)
        _displays[-1].update(count)


@contextmanager
def show_epochs(title: str, epochs: int, records: int) -> Iterator[Callable[[int, str], None]]:
    """Provide a callback for the block; call it with the number and a summary line of each finished epoch.

    Args:
        title: Title of the display.
        epochs: Number of epochs of all work.
        records: Number of records of an epoch.
    """
    with progress(title, total=epochs * records, unit="record") as bar:

        def on_epoch(epoch: int, line: str) -> None:
            bar.set_postfix_str(line, refresh=False)
            bar.update(epoch * records - bar.n)  # other processes may have counted some of them

        yield on_epoch
