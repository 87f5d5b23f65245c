"""Progress: a tqdm bar on a terminal, a log line at most every 10 seconds elsewhere."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

logger = logging.getLogger("permafrost.progress")

SECONDS_PER_LINE = 10.0


class ProgressLines:
    """Stand-in for a tqdm bar on outputs that are not terminals: at most one log line every 10 seconds."""

    def __init__(self, title: str, total: int, unit: str) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done = 0
        self.last_line = time.monotonic()
        self.postfix = ""
        self._first: tuple[float, int] | None = None
        """Time and count of the first update, before which work may have started up."""

    def update(self, count: int) -> None:
        """Add `count` finished units."""
        self.done += count
        now = time.monotonic()
        if now - self.last_line >= SECONDS_PER_LINE:
            self.last_line = now
            logger.info(
                "%s: %d/%d %ss%s%s",
                self.title,
                self.done,
                self.total,
                self.unit,
                self._time_left(now),
                self.postfix and f", {self.postfix}",
            )
        self._first = self._first or (now, self.done)

    def _time_left(self, now: float) -> str:
        """Estimate the time that the remaining units take, as text, from all updates but the first."""
        if self._first is None or self.done <= self._first[1]:
            return ""
        rate = (now - self._first[0]) / (self.done - self._first[1])
        seconds = rate * max(self.total - self.done, 0)
        for unit, length in (("h", 3600), ("min", 60)):
            if seconds >= 2 * length:
                return f", about {seconds / length:.0f} {unit} left"
        return f", about {seconds:.0f} s left"

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """Set the text that is logged after the count."""
        self.postfix = text


@contextmanager
def say_if_slow(logger: logging.Logger, text: str) -> Iterator[None]:
    """Log `text` if the block takes longer than 3 s, so that no verb is silent for long.

    Args:
        logger: Logger of the verb.
        text: Line that names the slow step.
    """
    timer = threading.Timer(3.0, logger.info, (text,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _is_terminal(stream: Any) -> bool:
    """Return whether a stream is a terminal. None, a closed stream, and an object that only writes are not."""
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):
        return False


@contextmanager
def progress(title: str, *, total: int, unit: str) -> Iterator[Any]:
    """Provide a progress display with `update(count)` and `set_postfix_str(text)` for the block.

    Args:
        title: Title of the display.
        total: Number of units of all work.
        unit: Name of one unit, in the singular.
    """
    if not _is_terminal(sys.stderr):
        yield ProgressLines(title, total, unit)
        return
    with tqdm(desc=title, total=total, unit=unit, dynamic_ncols=True) as bar:
        yield bar


@contextmanager
def show_epochs(title: str, epochs: int) -> Iterator[Callable[[int, str], None]]:
    """Provide a callback for the block; call it with the number and a summary line of each finished epoch.

    Args:
        title: Title of the display.
        epochs: Number of epochs of all work.
    """
    with progress(title, total=epochs, unit="epoch") as bar:

        def on_epoch(epoch: int, line: str) -> None:
            bar.set_postfix_str(line, refresh=False)
            bar.update(1)

        yield on_epoch
