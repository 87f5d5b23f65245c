"""Deaths of processes at a shard: their number, in a file next to the commit markers, and the record that caused them.

A death without an exception (a segmentation fault, the kernel's out-of-memory killer, kill -9) leaves the shard's file
behind. One may come from outside, so the next process at the shard works on it as if there was none. After a second
one, a child process works on the shard's records one after the other. If the child dies, another one is alone with the
record at which it died. If that one dies too, the record ends the run. Otherwise the process was killed, and the
work continues, however often that happens. A process that ends by itself, successfully or with an exception, removes
the file.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from permafrost.core.errors import UserError
from permafrost.storage.files import file_at
from permafrost.storage.rooted_paths import RootedPath
from permafrost.store.commit_markers import COMMITS_FOLDER

DEATHS_SUFFIX = ".deaths"
_MAX_BYTES = 64
_DEATHS_TO_TRY = 2
"""Number of deaths at a shard after which its records are tried alone, as one death may come from outside."""
_START_METHOD = "spawn"
"""Way to start the child: a new interpreter, as a fork has neither this process's threads nor its GPU."""
_FROM_OUTSIDE = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that a process does not receive from its own work."""

logger = logging.getLogger("permafrost.store")


class PoisonRecordError(UserError, RuntimeError):
    """Record that kills the process that works on it."""


class ShardDeaths:
    """Count of the processes that died at one shard of a store or a pass; a context manager around its work."""

    def __init__(self, folder: RootedPath, shard: str) -> None:
        self.path = folder / COMMITS_FOLDER / f".{shard}{DEATHS_SUFFIX}"
        self.shard = shard
        self.count = self._read() if file_at(self.path).is_file() else 0

    def __enter__(self) -> ShardDeaths:
        file_at(self.path.parent).make_folder()
        with file_at(self.path).create() as file:
            file.write(b"%d\n" % (self.count + 1))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            file_at(self.path).remove()
        except OSError as problem:  # the work is done, or raises its own error
            logger.warning("%s could not be removed: %s", self.path, problem)

    def find_cause(self, keys: Sequence[str], work_on: Callable[[str], object]) -> None:
        """Try the records in child processes if several processes died at the shard.

        Args:
            keys: Keys of the shard's records.
            work_on: Picklable function of a key.

        Raises:
            PoisonRecordError: If a record ends the process that works on it, twice.
        """
        if self.count < _DEATHS_TO_TRY:
            return
        logger.warning(
            "%d processes died at shard %s; its records are tried one by one in a separate process",
            self.count,
            self.shard,
        )
        key = find_fatal(keys, work_on)
        if key is not None and find_fatal([key], work_on) is not None:
            raise PoisonRecordError(
                f"record {key} (shard {self.shard}) ended {self.count + 2} processes, the last of which worked on "
                "nothing else; check that image and the memory it needs"
            )

    def _read(self) -> int:
        """Read the number of deaths. A process may die before it writes it."""
        digits = file_at(self.path).read(_MAX_BYTES).strip()
        return int(digits) if digits.isdigit() else 1


def find_fatal(keys: Sequence[str], work_on: Callable[[str], object]) -> str | None:
    """Find the record that kills a process that works on nothing else.

    Args:
        keys: Keys of the records to try, in this order, in one child process.
        work_on: Picklable function of a key. Its exceptions do not count as deaths.

    Returns:
        The key of that record; None if the process comes to its end or is stopped from outside.
    """
    context: Any = multiprocessing.get_context(_START_METHOD)
    announced, announces = context.Pipe(duplex=False)
    process = context.Process(target=_work_on_each, args=(announces, keys, work_on))
    key: str | None = None
    try:
        process.start()
        announces.close()
        while True:
            try:
                key = announced.recv()
            except EOFError:
                break
        process.join()
    finally:
        if process.is_alive():  # this process is interrupted
            process.kill()
            process.join()
    if (code := process.exitcode) == 0 or -code in _FROM_OUTSIDE:
        return None
    if key is None:
        logger.warning("a process that was to try records alone could not be started (%d)", code)
    return key


def _work_on_each(announces: Any, keys: Sequence[str], work_on: Callable[[str], object]) -> None:
    """Announce each record, and work on it."""
    for key in keys:
        announces.send(key)
        try:
            work_on(key)
        except BaseException as error:  # it is raised again where the work is done in its turn
            logger.debug("record %s, tried alone: %r", key, error)
