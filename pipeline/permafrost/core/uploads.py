"""Deferred uploads and writes of shards, which are done during the next work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar


class Uploads:
    """Uploads and writes that are still to be done, in their order."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Callable[[], None], ExitStack]] = []

    def __bool__(self) -> bool:
        return bool(self.waiting)

    def send(self) -> None:
        """Do them one after the other, in any thread. What is written meanwhile is not put off again.

        Raises:
            FileError: At the first that fails.
        """
        try:
            for put, opened in self.waiting:
                put()
                opened.close()
        finally:
            self.close()

    def close(self) -> None:
        """Close all files."""
        for _, opened in self.waiting:
            opened.close()


_collected: ContextVar[Uploads | None] = ContextVar("collected", default=None)


@contextmanager
def collected_uploads() -> Iterator[Uploads]:
    """Collect the files that this thread writes atomically into a bucket in the block, instead of uploading them.

    Files that make others valid (`commit`), and removals, are not put off.
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


def put_off(work: Callable[[], None], opened: ExitStack) -> None:
    """Have an upload or the write of a shard done during the next work where they are collected, and at once elsewhere.

    Args:
        work: Uploads a file, or writes a shard with its commit marker last.
        opened: Files that it needs, closed after it.
    """
    if (uploads := _collected.get()) is None:
        with opened:
            work()
    else:
        uploads.waiting.append((work, opened))
