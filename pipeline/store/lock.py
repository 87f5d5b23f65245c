"""Locks that allow one writer per store; a second one is refused, so that their files are not mixed."""

from __future__ import annotations

import errno
import fcntl
import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pipeline.core.errors import UserError
from pipeline.core.files import FileError, make_folder, open_lock

if TYPE_CHECKING:
    import io
    from collections.abc import Iterator

    from pipeline.core.files import RootedPath

logger = logging.getLogger("permafrost.store")

LOCK_NAME = ".lock"
"""Empty file that is never removed; the process that holds its lock may write."""
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


class LockedError(UserError, RuntimeError):
    """Folder that another process is writing to."""


@contextmanager
def lock_folder(folder: RootedPath) -> Iterator[None]:
    """Keep every other writer out of `folder` until the block, or the process, ends.

    The kernel releases the lock however the process ends, so no lock is left behind. A folder that is read-only for
    this process needs no lock, so a command without work to do can still succeed there.
    """
    make_folder(folder)
    file = _open_lock(folder)
    if file is None:
        yield
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
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


def _open_lock(folder: RootedPath) -> io.FileIO | None:
    """Open the lock file; return None if it does not exist and cannot be created in a read-only folder.

    A lock file of another user is opened for reading, which is sufficient for locking.
    """
    path = folder / LOCK_NAME
    try:
        return open_lock(path, create=True)
    except FileError:
        raise
    except OSError as error:
        if error.errno not in _READ_ONLY:
            raise FileError(
                f"{path} cannot be opened ({error.strerror}); choose another store.path"
            ) from error
    try:
        return open_lock(path, create=False)
    except OSError:
        return None
