"""Journal of the record that a process is working on, to identify records that kill every process.

A death without an exception (a segmentation fault, the kernel's out-of-memory killer, kill -9) leaves the shard's
journal behind. The next process reads it, tries the suspects first and writes each record's key before working on it.
A record at which processes died twice ends the run. A process that ends by itself, successfully or with an exception,
removes its journal.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from pipeline.core.errors import UserError
from pipeline.core.files import create_file, exists, make_folder, read_regular, remove_file
from pipeline.store.receipts import RECEIPTS_FOLDER

if TYPE_CHECKING:
    from types import TracebackType

    from pipeline.core.files import RootedPath

JOURNAL_SUFFIX = ".journal"
_LINE_BYTES = 256
"""One key and its padding; a key has at most 200 bytes."""
_MAX_DEATHS = 2
_MOST_BYTES = 2**20


class PoisonRecordError(UserError, RuntimeError):
    """Record that kills the process that works on it."""


class ShardJournal:
    """Journal of one shard in the folder of a store or a pass; a context manager."""

    def __init__(self, folder: RootedPath, shard: str) -> None:
        self.path = folder / RECEIPTS_FOLDER / f".{shard}{JOURNAL_SUFFIX}"
        self.shard = shard
        deaths = self._read() if exists(self.path) else []
        self.follows_a_death = bool(deaths)
        """True if the last process at this shard died, so that each record should be named."""
        self.suspects = [key for key in dict.fromkeys(reversed(deaths)) if key]
        """Keys of the records at which processes died, the last one first."""
        self._deaths = deaths

    def __enter__(self) -> ShardJournal:
        for key, count in Counter(self._deaths).items():
            if key and count >= _MAX_DEATHS:
                remove_file(self.path)
                raise PoisonRecordError(
                    f"record {key} (shard {self.shard}) ended {count} processes that worked on it; "
                    "check that image and the memory it needs, or remove it from the data"
                )
        make_folder(self.path.parent)
        lines = [key.encode().ljust(_LINE_BYTES - 1) + b"\n" for key in ["", *self._deaths]]
        self._file = create_file(self.path, buffered=False)
        self._file.write(b"".join(lines))
        return self

    def at(self, key: str) -> None:
        """Note that the process is about to work on this record."""
        self._file.seek(0)
        self._file.write(key.encode().ljust(_LINE_BYTES - 1))

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
