"""Deferred uploads and writes of shards, which are done during the next work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar


class Uploads:
    """Uploads and writes that are still to be done, in their order."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Callable[[], None], ExitStack]] = []

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, put: Callable[[], None], opened: ExitStack) -> None:
        """Add the upload of a file.

        Args:
            put: Uploads the file.
            opened: Closes the file afterwards.
        """
        self._waiting.append((put, opened))

    def send(self) -> None:
        """Do them one after the other, in any thread. What is written meanwhile is not put off again.

        Raises:
            FileError: At the first that fails.
        """
        try:
            for put, opened in self._waiting:
                put()
                opened.close()
        finally:
            self.close()

    def close(self) -> None:
        """Close all files."""
        for _, opened in self._waiting:
            opened.close()


_collected: ContextVar[Uploads | None] = ContextVar("collected", default=None)


def collecting_uploads() -> Uploads | None:
    """Return the uploads that a block of this thread collects, None outside of such a block."""
    return _collected.get()


@contextmanager
def collected_uploads() -> Iterator[Uploads]:
    """Collect the files that this thread writes atomically into a bucket in the block, instead of uploading them.

    Files that make others valid (`commit_file`), and removals, are not put off.
    """
    uploads = Uploads()
    token = _collected.set(uploads)
    try:
        yield uploads
    except BaseException:
        uploads.close()
        raise
    finally:
        _collected.reset(token)


def put_off(write: Callable[[], None]) -> None:
    """Have a shard written during the work on the next one where its files are collected, and at once elsewhere.

    Args:
        write: Writes the shard, with its receipt last.
    """
    uploads = _collected.get()
    if uploads is None:
        write()
    else:
        uploads.add(write, ExitStack())
