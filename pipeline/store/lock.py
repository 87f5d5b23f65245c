"""One writer a store: a second one is turned away instead of mixing its files with the first one's."""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pipeline.errors import UserError
from pipeline.store.files import make_folder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LOCK_NAME = ".lock"
"""An empty file that stays; who holds its lock may write."""


class LockedError(UserError, RuntimeError):
    """A folder that another process is writing to."""


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep every other writer out of `folder` until the block, or the process, ends.

    The kernel releases the lock however the process ends, so none is ever left behind.
    """
    make_folder(folder)
    descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockedError(
                f"another process is writing to {folder}; wait until it has finished, or choose another store.path"
            ) from None
        yield
    finally:
        os.close(descriptor)
