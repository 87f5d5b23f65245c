"""Downloads of the shards that an epoch will read from a bucket, while the shards before them are read."""

from __future__ import annotations

import logging
import queue
import threading
import weakref
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

from permafrost.core.errors import UserError, require
from permafrost.storage.files import fetch_file
from permafrost.storage.rooted_paths import RootedPath, bucket_of
from permafrost.loading.sampler import WINDOW_SHARDS
from permafrost.store.reader import Store, TeacherPass

logger = logging.getLogger("permafrost.cache")

_AT_ONCE = 16
"""Downloads in parallel. Most files are the small fields of a shard, which take a network's latency and no time."""


class ShardFile(NamedTuple):
    """File of a shard, and its digest in a manifest."""

    path: RootedPath
    sha256: str


class FetchAhead:
    """Threads that download files in the order in which they are asked for. Errors are those of their readers.

    They refer to the queue only, and end with the object.
    """

    def __init__(self) -> None:
        self._files: queue.SimpleQueue[ShardFile | None] = queue.SimpleQueue()
        for number in range(_AT_ONCE):
            name = f"fetch-{number}"
            threading.Thread(target=_fetch, args=(self._files,), name=name, daemon=True).start()
        weakref.finalize(self, _end, self._files)

    def ask(self, files: Iterable[ShardFile]) -> None:
        """Have files downloaded after those that were asked for before."""
        for file in files:
            self._files.put(file)


def _fetch(files: queue.SimpleQueue[ShardFile | None]) -> None:
    """Download the files of a queue until it ends."""
    while (file := files.get()) is not None:
        try:
            fetch_file(file.path, file.sha256)
        except (UserError, FileNotFoundError) as error:
            logger.debug("%s was not fetched ahead: %s", file.path, error)


def _end(files: queue.SimpleQueue[ShardFile | None]) -> None:
    """Forget the files that nobody reads any more, and end the threads."""
    with suppress(queue.Empty):
        while True:
            files.get_nowait()
    for _ in range(_AT_ONCE):
        files.put(None)


def require_room(store: Store, passes: Iterable[TeacherPass]) -> None:
    """Raise ConfigError if the cache is smaller than the shards of the two windows that an epoch needs at once."""
    limit = bucket_of(store.folder).cache_bytes
    if limit is None:
        return
    largest = max(store.shards.table["bytes"].to_pylist(), default=0)
    for teacher in passes:
        largest += max(
            (sum(file.bytes for file in shard.files) for shard in teacher.shards), default=0
        )
    shards = min(2 * WINDOW_SHARDS + 1, len(store.shards))
    index = store.manifest.index.bytes + store.manifest.keys.bytes
    needed = shards * largest + index
    require(
        limit >= needed,
        f"store.cache_bytes={limit} must be >= {needed}: an epoch reads {WINDOW_SHARDS} shards at once and fetches "
        f"the next {WINDOW_SHARDS}, of up to {largest:,} bytes each, beside the index of {index:,} bytes. Raise it, "
        "or pack smaller shards (store.shard_size)",
    )
