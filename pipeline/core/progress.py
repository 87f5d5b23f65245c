"""How far it is: a bar on a terminal, now and then a line in a log."""

from __future__ import annotations

import logging
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

logger = logging.getLogger("permafrost.progress")

SECONDS_BETWEEN_LINES = 30.0


class ProgressLines:
    """For outputs that are no terminal: one line at most every 30 seconds."""

    def __init__(self, title: str, total: int, unit: str) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done = 0
        self.last_line = time.monotonic()
        self.postfix = ""

    def update(self, count: int) -> None:
        """Count units as done."""
        self.done += count
        if time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            logger.info(
                "%s: %d/%d %ss %s", self.title, self.done, self.total, self.unit, self.postfix
            )

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """What to say beside the count."""
        self.postfix = text


@contextmanager
def progress(title: str, *, total: int, unit: str) -> Iterator[Any]:
    """Something with `update(count)` and `set_postfix_str(text)` for the block."""
    if not sys.stderr.isatty():
        yield ProgressLines(title, total, unit)
        return
    with tqdm(desc=title, total=total, unit=unit, dynamic_ncols=True) as bar:
        yield bar


@contextmanager
def show_epochs(title: str, epochs: int) -> Iterator[Callable[[int, str], None]]:
    """Something to call with each finished epoch's number and a line on how it went, for the block."""
    with progress(title, total=epochs, unit="epoch") as bar:

        def on_epoch(epoch: int, line: str) -> None:
            bar.update(1)
            bar.set_postfix_str(line)

        yield on_epoch
