"""Locks that allow one writer per store or run; a second one is refused, so that their files are not mixed."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

from permafrost.core.buckets import Lease
from permafrost.core.errors import FileError, UserError
from permafrost.core.files import make_folder, open_lock
from permafrost.core.rooted_paths import is_in_bucket

if TYPE_CHECKING:
    import io
    from collections.abc import Iterator

    from permafrost.core.rooted_paths import AnyPath, RootedPath

logger = logging.getLogger("permafrost.lock")

LOCK_NAME = ".lock"
"""Empty file that is never removed; the process that holds its lock may write."""
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


class LockedError(UserError, RuntimeError):
    """Folder that another process is writing to."""


_files: set[io.FileIO] = set()
"""Open files whose locks this process holds."""


@contextmanager
def lock_folder(folder: AnyPath, option: str = "store.path") -> Iterator[None]:
    """Keep every other writer out of `folder` until the block, or the process, ends.

    option  option that chooses the folder, for messages

    The kernel releases the lock however the process ends, so no lock is left behind. A folder that is read-only for
    this process needs no lock, so a command without work to do can still succeed there. In a bucket the lock is a lease
    (buckets.py).
    """
    if is_in_bucket(folder):
        with _leased(folder, option):
            yield
        return
    make_folder(folder)
    file = _open_lock(folder, option)
    if file is None:
        yield
        return
    _forget_in_children()
    _files.add(file)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockedError(
                f"another process is writing to {folder}; wait until it has finished, or choose another {option}"
            ) from None
        except OSError as error:  # a network mount without a lock service
            logger.warning(
                "%s cannot be locked (%s): make sure that no other process writes to it",
                folder,
                error.strerror,
            )
        yield
    finally:
        _files.discard(file)
        file.close()  # a forked child has closed it


@contextmanager
def _leased(folder: RootedPath, option: str) -> Iterator[None]:
    """Keep other writers out of a bucket's folder by a lease, which is renewed until the block ends."""
    lease = Lease(str(folder / LOCK_NAME))
    holder = lease.acquire()
    if holder is not None:
        raise LockedError(
            f"{holder} is writing to {folder}; wait until it has finished, or choose another {option}"
        )
    try:
        yield
    finally:
        lease.release()


@cache
def _forget_in_children() -> None:
    """Have forked children close the locks of their parent, or they would hold them after it was killed."""
    os.register_at_fork(after_in_child=_close_inherited)


def _close_inherited() -> None:
    while _files:
        _files.pop().close()


def _open_lock(folder: AnyPath, option: str) -> io.FileIO | None:
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
                f"{path} cannot be opened ({error.strerror}); choose another {option}"
            ) from error
    try:
        return open_lock(path, create=False)
    except OSError:
        return None
