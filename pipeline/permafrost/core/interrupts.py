"""Signals that end a command: SIGTERM, as sent by schedulers, and SIGINT (Ctrl-C).

Their handler raises Interrupted. Some code swallows every exception: functions of pyarrow that cannot raise, __del__,
callbacks of the garbage collector. Signals are therefore kept, too: `check_interrupted` raises again between two units
of work, which it counts, and the end of a command looks at what has arrived.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_NUMBERS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(KeyboardInterrupt):
    """End of a command by a signal."""


class Signals:
    """Signals that have arrived while `catch_signals` is open, the first one first."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._is_raising = False

    @property
    def exit_code(self) -> int:
        """Exit code of the command: 143 for SIGTERM, 130 for Ctrl-C."""
        return 128 + (self.received[0] if self.received else signal.SIGINT)

    def describe(self, verb: str) -> str:
        """Return the line that states how the command ended."""
        how = "terminated" if self.exit_code == 128 + signal.SIGTERM else "interrupted"
        return f"permafrost {verb}: {how}; the same command resumes where it stopped"

    @contextmanager
    def raising(self, is_raising: bool = True) -> Iterator[None]:
        """Raise Interrupted at every signal in the block and, if its exception was swallowed, at the end of the block.

        Outside, and in a block with False, signals are only kept.

        Args:
            is_raising: Whether signals interrupt the block, or are kept to its end.

        Raises:
            Interrupted: If a signal has arrived.
        """
        before, self._is_raising = self._is_raising, is_raising
        try:
            if is_raising:
                self.check()
            yield
        finally:
            self._is_raising = before
        self.check()

    def check(self) -> None:
        """Interrupt the command if a signal has arrived.

        Raises:
            Interrupted: If one has.
        """
        if self.received:
            raise Interrupted

    def handle(self, number: int, frame: object) -> None:
        """Handle a signal, as signal.signal calls it.

        Raises:
            Interrupted: In a block of `raising`.
        """
        self.received.append(number)
        if self._is_raising:
            raise Interrupted


_current = Signals()
_units = 0


def units_of_work() -> int:
    """Return the number of units of work that this process has begun."""
    return _units


def check_interrupted() -> None:
    """Interrupt the command if a signal has arrived that ends it, and its exception was swallowed.

    Raises:
        Interrupted: If one has.
    """
    global _units
    _units += 1
    _current.check()


@contextmanager
def keep_signals() -> Iterator[None]:
    """Keep the signals that arrive in the block, and not before.

    Raises:
        Interrupted: At the end of the block, if one has arrived.
    """
    with _current.raising(False):
        yield


@contextmanager
def catch_signals() -> Iterator[Signals]:
    """Keep the signals of the block, and restore the handlers after it. For the main thread.

    A signal that the parent process had this one ignore, as a shell does for Ctrl-C in the background, stays ignored.
    """
    global _current
    outer, _current = _current, Signals()
    handlers = {number: signal.getsignal(number) for number in _NUMBERS}
    hook, sys.unraisablehook = sys.unraisablehook, _without_interrupts(sys.unraisablehook)
    for number, handler in handlers.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _current.handle)
    try:
        yield _current
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None is one that Python did not set
        sys.unraisablehook = hook
        _current = outer


def _without_interrupts(hook: Any) -> Any:
    """Return a hook of unraisable exceptions that does not print the ones of signals, which are kept."""

    def show(unraisable: Any) -> None:
        if not isinstance(unraisable.exc_value, Interrupted):
            hook(unraisable)

    return show
