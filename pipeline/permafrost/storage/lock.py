"""Locks that allow one writer per store or run; a second one is refused, so that their files are not mixed."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from permafrost.core.errors import FileError, UserError
from permafrost.storage.buckets import (
    ReplacedError,
    create_object,
    read_object,
    refuse_unconditional,
    remove_object,
)
from permafrost.storage.files import file_at
from permafrost.storage.local_files import open_lock
from permafrost.storage.rooted_paths import AnyPath, RootedPath

logger = logging.getLogger("permafrost.lock")

LOCK_NAME = ".lock"
"""Empty file; the process that holds its lock may write."""
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


class LockedError(UserError, RuntimeError):
    """Folder that another process is writing to."""


_files: set[io.FileIO] = set()
"""Open files whose locks this process holds."""


@contextmanager
def folder_lock(folder: AnyPath, option: str = "store.path") -> Iterator[None]:
    """Keep every other writer out of a folder until the block, or the process, ends.

    The kernel releases the lock however the process ends, so no lock is left behind. A folder that is read-only for
    this process needs no lock, so a command without work to do can still succeed there. In a bucket the lock is a lease
    (`Lease`).

    Args:
        folder: Folder to lock, which is created if it is missing.
        option: Option that chooses the folder, for messages.

    Raises:
        LockedError: If another process is writing to the folder.
        FileError: If the lock file cannot be opened.
    """
    if isinstance(folder, RootedPath) and folder.is_remote:
        with _leased(folder, option):
            yield
        return
    _forget_in_children()
    file_at(folder).make_folder()
    if (file := _open_lock(folder, option)) is None:
        yield
        return
    _files.add(file)
    try:
        _take(file, folder, option)
        yield
    finally:
        _files.discard(file)
        file.close()  # a forked child has closed it


def _take(file: io.FileIO, folder: AnyPath, option: str) -> None:
    """Take the lock of an open file. Raises LockedError if another process holds it."""
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


@contextmanager
def _leased(folder: RootedPath, option: str) -> Iterator[None]:
    """Keep other writers out of a bucket's folder by a lease, which is renewed until the block ends."""
    lease = Lease(str(folder / LOCK_NAME))
    if (holder := lease.acquire()) is not None:
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


# ---- lease -----------------------------------------------------------------------------------------


RENEWAL_SECONDS = 15.0
_LEASE_BYTES = 4096
EXPIRY_SECONDS = 60.0
"""Time without a change after which the lease of another writer may be taken over."""


class Lease:
    """Object that shows other writers that this process writes to a folder.

    It is renewed in a thread. Correctness does not rest on it, because objects are deterministic and manifests are
    written conditionally: it turns a second writer away before it has done the work again.
    """

    def __init__(self, address: str) -> None:
        """Prepare a lease, which `acquire` takes.

        Args:
            address: Address of the lease's object.
        """
        self.address = address
        self._token = secrets.token_hex(8)
        self._holder = f"process {os.getpid()} on {socket.gethostname()}"
        self._e_tag = ""
        self._beat = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def _content(self) -> bytes:
        return json.dumps(
            {"holder": self._holder, "token": self._token, "beat": self._beat}, sort_keys=True
        ).encode()

    def acquire(self) -> str | None:
        """Take the lease.

        A lease that does not change is waited for up to EXPIRY_SECONDS, and then taken over.

        Returns:
            None once it is taken; the holder's name if another process has it.

        Raises:
            FileError: If the endpoint has no conditional puts.
        """
        replaces: str | None = None
        while True:
            try:
                self._e_tag = create_object(self.address, self._content(), replaces)
                break
            except ReplacedError:
                if (lease := _read_lease(self.address)) is None:  # it was released
                    replaces = None
                    continue
                if lease[0] != "" and self._wait_for_change(*lease):
                    return lease[0]
                replaces = lease[1]
        self._require_conditions()
        self._thread.start()
        return None

    def _wait_for_change(self, holder: str, e_tag: str) -> bool:
        """Wait until the lease changes, which shows that its holder lives, or is old; return whether it changed."""
        logger.info(
            "%s is held by %s; it is taken over if it does not change for %d seconds",
            self.address,
            holder,
            EXPIRY_SECONDS,
        )
        deadline = time.monotonic() + EXPIRY_SECONDS
        while time.monotonic() < deadline:
            time.sleep(min(1.0, EXPIRY_SECONDS / 10))
            if (lease := _read_lease(self.address)) is None:
                return False
            if lease[1] != e_tag:
                return True
        return False

    def _require_conditions(self) -> None:
        """Raise FileError unless the endpoint refuses to create an object that exists."""
        try:
            create_object(self.address, self._content() + b"\n")
        except ReplacedError:
            return
        remove_object(self.address)
        raise refuse_unconditional(self.address)

    def _renew(self) -> None:
        while not self._end.wait(RENEWAL_SECONDS):
            self._beat += 1
            try:
                self._e_tag = create_object(self.address, self._content(), self._e_tag)
            except ReplacedError:
                logger.warning(
                    "%s was taken over by another process, as it was not renewed in time; both may write files",
                    self.address,
                )
                return
            except UserError as error:
                logger.warning("%s could not be renewed: %s", self.address, error)

    def release(self) -> None:
        """Remove the object if it is still this process's. Its failure is logged, as the work is done."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()
        try:
            if self._token.encode() in read_object(self.address, _LEASE_BYTES)[0]:
                remove_object(self.address)
        except FileNotFoundError:
            pass
        except FileError as error:
            logger.warning("%s could not be removed: %s", self.address, error)


def _read_lease(address: str) -> tuple[str, str] | None:
    """Return the holder of a lease and its ETag, None if there is none; a lock file that was copied has no holder."""
    try:
        text, facts = read_object(address, _LEASE_BYTES)
    except FileNotFoundError:
        return None
    if not text:
        return "", facts.e_tag
    try:
        return str(json.loads(text)["holder"])[:200], facts.e_tag
    except (ValueError, KeyError, TypeError):
        return "an unknown process", facts.e_tag
