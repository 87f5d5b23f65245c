"""One writer a store: a second one is turned away instead of mixing its files with the first one's."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pipeline.errors import UserError
from pipeline.store.files import FileError, make_folder

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
    try:
        descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        if error.errno in _READ_ONLY:
            yield
            return
        raise FileError(
            f"{folder / LOCK_NAME} cannot be opened ({error.strerror}); choose another store.path"
        ) from error
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
