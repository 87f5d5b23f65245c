"""Downloads of files of a bucket that will be read soon, while those before them are read."""

from __future__ import annotations

import logging
import queue
import threading
import weakref
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple, Self

from permafrost.core.errors import UserError
from permafrost.storage.files import file_at
from permafrost.storage.rooted_paths import AnyPath, RootedPath

logger = logging.getLogger("permafrost.cache")

_AT_ONCE = 16
"""Downloads in parallel. Most files are small, and take a network's latency and no time."""


class KnownFile(NamedTuple):
    """File whose digest is known from a manifest."""

    path: AnyPath
    sha256: str


class FetchAhead:
    """Threads that download files in the order of the requests. Errors are raised to the files' readers.

    They refer to the queue only, and end with the object.
    """

    def __init__(self) -> None:
        self._files: queue.SimpleQueue[KnownFile | None] = queue.SimpleQueue()
        self._has_begun = False

    @classmethod
    def of(cls, folder: RootedPath) -> Self | None:
        """Return the threads for the files of a folder, which begin when they are asked; None for a local folder."""
        return cls() if folder.is_remote else None

    def ask(self, files: Iterable[KnownFile]) -> None:
        """Have files downloaded after those that were asked for before."""
        if not self._has_begun:
            self._has_begun = True
            for number in range(_AT_ONCE):
                name = f"fetch-{number}"
                threading.Thread(target=_fetch, args=(self._files,), name=name, daemon=True).start()
            weakref.finalize(self, _end, self._files)
        for file in files:
            self._files.put(file)


def _fetch(files: queue.SimpleQueue[KnownFile | None]) -> None:
    """Download the files of a queue until it ends."""
    while (file := files.get()) is not None:
        try:
            file_at(file.path).fetch(file.sha256)
        except (UserError, FileNotFoundError) as error:
            logger.debug("%s was not fetched ahead: %s", file.path, error)


def _end(files: queue.SimpleQueue[KnownFile | None]) -> None:
    """Forget the files that are no longer read, and end the threads."""
    with suppress(queue.Empty):
        while True:
            files.get_nowait()
    for _ in range(_AT_ONCE):
        files.put(None)
