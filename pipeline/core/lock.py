"""Locks that allow one writer per store or run; a second one is refused, so that their files are not mixed."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

from pipeline.core.errors import UserError
from pipeline.core.files import FileError, make_folder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

logger = logging.getLogger("permafrost.lock")

LOCK_NAME = ".lock"
"""Empty file that is never removed; the process that holds its lock may write."""
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


class LockedError(UserError, RuntimeError):
    """Folder that another process is writing to."""


_descriptors: set[int] = set()
"""Descriptors of the locks that this process holds."""


@contextmanager
def lock_folder(folder: Path, option: str = "store.path") -> Iterator[None]:
    """Keep every other writer out of `folder` until the block, or the process, ends.

    option  option that chooses the folder, for messages

    The kernel releases the lock however the process ends, so no lock is left behind. A folder that is read-only for
    this process needs no lock, so a command without work to do can still succeed there.
    """
    make_folder(folder)
    descriptor = _open_lock(folder, option)
    if descriptor is None:
        yield
        return
    _forget_in_children()
    _descriptors.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
        if descriptor in _descriptors:  # not in a forked child, which has closed it
            _descriptors.remove(descriptor)
            os.close(descriptor)


@cache
def _forget_in_children() -> None:
    """Have forked children close the locks of their parent, or they would hold them after it was killed."""
    os.register_at_fork(after_in_child=_close_inherited)


def _close_inherited() -> None:
    while _descriptors:
        os.close(_descriptors.pop())


def _open_lock(folder: Path, option: str) -> int | None:
    """Return a descriptor of the lock file, or None if it does not exist and cannot be created in a read-only folder.

    A lock file of another user is opened for reading, which is sufficient for locking.
    """
    path = folder / LOCK_NAME
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        if error.errno not in _READ_ONLY:
            raise FileError(
                f"{path} cannot be opened ({error.strerror}); choose another {option}"
            ) from error
    try:
        return os.open(path, os.O_RDONLY)
    except OSError:
        return None
