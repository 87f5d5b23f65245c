"""Time budget of a run: what no longer fits is skipped, and what hangs is cut off."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class SkippedError(Exception):
    """A check or a row that cannot run here, with the reason."""


class Budget:
    """Seconds of a run, from its start."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._started = time.monotonic()

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.seconds - (time.monotonic() - self._started)

    def require(self, seconds: float) -> None:
        """Raise SkippedError unless about that many seconds are left."""
        if self.left < seconds:
            raise SkippedError(
                f"takes about {seconds:.0f} s, and {max(0.0, self.left):.0f} s are left; raise --minutes"
            )

    def cut_off(self, act: Callable[[], None]) -> threading.Timer:
        """Start a timer that calls `act` when the budget is spent, even if a call of the main thread hangs."""
        timer = threading.Timer(max(0.0, self.left), act)
        timer.daemon = True
        timer.start()
        return timer
