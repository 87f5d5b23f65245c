"""Journal of the record that a process is working on, to identify records that kill every process.

A death without an exception (a segmentation fault, the kernel's out-of-memory killer, kill -9) leaves the shard's
journal behind. The next process reads it, and has a child process work on each suspect alone. If the child dies too,
the record ends the run. Otherwise somebody killed the process while it was at a sound record, and the work goes on,
however often that happens. A process that ends by itself, successfully or with an exception, removes its journal.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
from typing import TYPE_CHECKING, Any

from permafrost.core.errors import UserError
from permafrost.core.files import create_file, exists, make_folder, read_regular, remove_file
from permafrost.store.receipts import RECEIPTS_FOLDER

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from permafrost.core.files import RootedPath

JOURNAL_SUFFIX = ".journal"
_LINE_BYTES = 256
"""One key and its padding; a key has at most 200 bytes."""
_MOST_BYTES = 2**20
_START_METHOD = "spawn"
"""Way to start the child: a new interpreter, as a fork has neither this process's threads nor its GPU."""
_FROM_OUTSIDE = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that no work of its own sends to a process."""

logger = logging.getLogger("permafrost.store")


class PoisonRecordError(UserError, RuntimeError):
    """Record that kills the process that works on it."""


class ShardJournal:
    """Journal of one shard in the folder of a store or a pass; a context manager."""

    def __init__(self, folder: RootedPath, shard: str) -> None:
        self.path = folder / RECEIPTS_FOLDER / f".{shard}{JOURNAL_SUFFIX}"
        self.shard = shard
        deaths = self._read() if exists(self.path) else []
        self.follows_a_death = bool(deaths)
        """True if the last process at this shard died."""
        self.follows_an_unknown_death = "" in deaths
        """True if a process died that had not named its record, so that each record should be named."""
        self.suspects = [key for key in dict.fromkeys(reversed(deaths)) if key]
        """Keys of the records at which processes died, the last one first."""
        self._deaths = deaths

    def __enter__(self) -> ShardJournal:
        make_folder(self.path.parent)
        lines = [key.encode().ljust(_LINE_BYTES - 1) + b"\n" for key in ["", *self._deaths]]
        self._file = create_file(self.path, buffered=False)
        self._file.write(b"".join(lines))
        return self

    def at(self, key: str) -> None:
        """Note that the process is about to work on this record."""
        self._file.seek(0)
        self._file.write(key.encode().ljust(_LINE_BYTES - 1))

    def try_suspects(self, work_on: Callable[[str], Callable[[], object] | None]) -> None:
        """Have a child process work on each suspect alone. Raises PoisonRecordError for one at which it dies.

        work_on  function from a key to its work, which is picklable, or to None if the record is no longer there
        """
        for key in self.suspects:
            work = work_on(key)
            if work is not None and ends_process(work):
                raise PoisonRecordError(
                    f"record {key} (shard {self.shard}) ended {self._deaths.count(key) + 1} processes that worked on "
                    "it, the last of which had nothing else to do; check that image and the memory it needs, or "
                    "remove it from the data"
                )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        remove_file(self.path)

    def _read(self) -> list[str]:
        """Read the key at which each process died, the first death first; empty text if unknown."""
        raw = read_regular(self.path, _MOST_BYTES).splitlines()
        lines = [line.strip().decode(errors="replace") for line in raw]
        current, *earlier = lines or [""]  # a process may die before it writes the first line
        return [*earlier, current]


def ends_process(work: Callable[[], object]) -> bool:
    """Return whether a process dies that does nothing but this work. An exception of the work is no death.

    work  picklable function
    """
    context: Any = multiprocessing.get_context(_START_METHOD)
    started, at_work = context.Pipe(duplex=False)
    process = context.Process(target=_work_alone, args=(at_work, work))
    try:
        process.start()
        at_work.close()
        process.join()
    finally:
        if process.is_alive():  # this process is interrupted
            process.kill()
            process.join()
    code = process.exitcode
    if code == 0 or -code in _FROM_OUTSIDE:
        return False
    try:
        started.recv()
    except EOFError:
        logger.warning("a process that was to try a record alone could not be started (%d)", code)
        return False
    return True


def _work_alone(at_work: Any, work: Callable[[], object]) -> None:
    """Note that the work begins, and do it."""
    at_work.send(True)
    try:
        work()
    except BaseException as error:  # it is raised again where the work is done in its turn
        logger.debug("a record that is tried alone: %r", error)
