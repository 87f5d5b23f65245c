"""One writer a store: a second one is turned away instead of mixing its files with the first one's."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pipeline.core.errors import UserError
from pipeline.core.files import FileError, make_folder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

logger = logging.getLogger("permafrost.store")

LOCK_NAME = ".lock"
"""An empty file that stays; who holds its lock may write."""
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


class LockedError(UserError, RuntimeError):
    """A folder that another process is writing to."""


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep every other writer out of `folder` until the block, or the process, ends.

    The kernel releases the lock however the process ends, so none is ever left behind. A folder that this
    process may only read needs no lock: a command that finds nothing to do can still end well there.
    """
    make_folder(folder)
    descriptor = _open_lock(folder)
    if descriptor is None:
        yield
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockedError(
                f"another process is writing to {folder}; wait until it has finished, or choose another store.path"
            ) from None
        except OSError as error:  # a network mount without a lock service
            logger.warning(
                "%s cannot be locked (%s): make sure that no other process writes to it",
                folder,
                error.strerror,
            )
        yield
    finally:
        os.close(descriptor)


def _open_lock(folder: Path) -> int | None:
    """A descriptor of the lock's file, of one that belongs to somebody else for reading, which locks as well; None
    where there is none and none can be made, as nothing else can.
    """
    path = folder / LOCK_NAME
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        if error.errno not in _READ_ONLY:
            raise FileError(
                f"{path} cannot be opened ({error.strerror}); choose another store.path"
            ) from error
    try:
        return os.open(path, os.O_RDONLY)
    except OSError:
        return None
