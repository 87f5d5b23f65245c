"""Locks that allow one writer per store, pass or run, and claims by which several processes divide the work of one.

A lock is one of the kernel. A claim is a small file with a heartbeat, for buckets and for processes of several hosts.
"""

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from permafrost.core.errors import FileError, UserError
from permafrost.core.interrupts import check_interrupted
from permafrost.storage.buckets import ReplacedError, refuse_unconditional
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
def folder_lock(
    folder: AnyPath, option: str = "store.path", *, is_shared: bool = False
) -> Iterator[Callable[[], None]]:
    """Keep every other writer out of a folder until the block, or the process, ends.

    The kernel releases the lock however the process ends, so no lock is left behind. A folder that is read-only for
    this process needs no lock, so a command without work to do can still succeed there. In a bucket the lock is a
    claim (`Claims`).

    Args:
        folder: Folder to lock, which is created if it is missing.
        option: Option that chooses the folder, for messages.
        is_shared: Keep out only writers that want the folder for themselves. In a bucket it keeps out none.

    Yields:
        A function that lets other writers in that share the folder.

    Raises:
        LockedError: If another process is writing to the folder.
        FileError: If the lock file cannot be opened.
    """
    if isinstance(folder, RootedPath) and folder.is_remote:
        path = claim_of(folder)
        if not is_shared and not CLAIMS.take_if_dead(path):
            raise LockedError(
                f"{CLAIMS.holder(path)} is writing to {folder}; wait until it has finished, or choose another {option}"
            )
        try:
            yield lambda: CLAIMS.release(path)
        finally:
            CLAIMS.release(path)
        return
    is_new = not file_at(folder).exists()
    file_at(folder).make_folder()
    if (file := _open_lock(folder, option)) is None:
        yield lambda: None
        return
    _files.add(file)
    try:
        _take(file, folder, option, is_shared=is_shared)
        yield lambda: _take(file, folder, option, is_shared=True)
    finally:
        if is_new and file_at(folder).entries() == [(LOCK_NAME, "file")]:  # the block wrote nothing
            file_at(folder / LOCK_NAME).remove()
            file_at(folder).remove_folder()
        _files.discard(file)
        file.close()  # a forked child has closed it


def _take(file: io.FileIO, folder: AnyPath, option: str, *, is_shared: bool) -> None:
    """Take the lock of an open file. Raises LockedError if another process holds it."""
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
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


def _close_inherited() -> None:
    """Close the locks of the parent in a forked child, which would hold them after the parent was killed."""
    while _files:
        _files.pop().close()


os.register_at_fork(after_in_child=_close_inherited)


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


# ---- claims ----------------------------------------------------------------------------------------


CLAIM_SUFFIX = ".claim"
RENEWAL_SECONDS = 15.0
EXPIRY_SECONDS = 60.0
"""Time without a change after which the claim of another process may be taken over."""
EXPIRY_NOTE = f" (at most {EXPIRY_SECONDS:.0f} s, if it is dead)"
_CLAIM_BYTES = 4096
FIRST_PAUSE, _MAX_PAUSE, _MAX_PAUSE_OF_BUCKET = 0.05, 0.2, 1.0
"""Seconds between two looks at a claim: the first ones, and the longest, to which they are doubled."""


def claim_of(folder: RootedPath) -> RootedPath:
    """Return the path of the claim of a whole folder, which in a bucket is its lock."""
    return folder / (LOCK_NAME if folder.is_remote else f"{LOCK_NAME}{CLAIM_SUFFIX}")


def sleep_longer(pause: float, path: RootedPath) -> float:
    """Sleep before the next look at a claim, and return the seconds of the pause that follows."""
    check_interrupted()
    time.sleep(pause)
    return min(2 * pause, _MAX_PAUSE_OF_BUCKET if path.is_remote else _MAX_PAUSE)


class Claims:
    """Claims of this process, which a thread renews, and what it has seen of the claims of others.

    A claim names its process and has a number that is raised again and again. A process that does not see it change for
    EXPIRY_SECONDS of its own clock takes it over, so clocks are not compared. Correctness does not rest on a claim,
    because files are deterministic and manifests are written once: it keeps a second process from the same work.
    """

    def __init__(self) -> None:
        self._held: dict[RootedPath, bytes] = {}
        self._seen: dict[RootedPath, tuple[bytes, float]] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._is_idle = threading.Event()

    def take(self, path: RootedPath, work: str = "") -> bool:
        """Take a claim if there is none, or if that of another process did not change for EXPIRY_SECONDS.

        Args:
            path: File of the claim.
            work: What the process does, as in "lists the data", for the messages of others.

        Returns:
            Whether this process has it.

        Raises:
            FileError: If it cannot be written, or if the endpoint of a bucket has no conditional puts.
        """
        holder = f"process {os.getpid()} on {socket.gethostname()}{work and f', which {work}'}"
        content = {"beat": 0, "holder": holder, "token": secrets.token_hex(8)}
        data = json.dumps(content, sort_keys=True).encode()
        try:
            file_at(path).exchange(data)
        except ReplacedError:
            try:
                other = file_at(path).read(_CLAIM_BYTES)
            except FileNotFoundError:
                return self.take(path, work)
            before, since = self._seen.get(path, (b"", 0.0))
            if other != before:
                since = time.monotonic()
                self._seen[path] = other, since
            if time.monotonic() - since < EXPIRY_SECONDS:
                return False
            try:
                file_at(path).exchange(data, other)
            except ReplacedError:
                return False
        if path.is_remote and not self._held:
            _require_conditions(path)
        with self._lock:
            self._held[path] = data
            if self._thread is None:
                self._thread = threading.Thread(target=self._renew, name="claims", daemon=True)
                self._thread.start()
        return True

    def take_if_dead(self, path: RootedPath) -> bool:
        """Take a claim, and wait for that of another process to change or expire; return whether this one has it."""
        first, pause = b"", FIRST_PAUSE
        while not self.take(path):
            first = first or self._seen[path][0]
            if first != self._seen[path][0]:
                return False
            pause = sleep_longer(pause, path)
        return True

    def wait(self, path: RootedPath, work: str) -> None:
        """Take a claim once no other process has it, and say for whom this one waits."""
        said, pause = "", FIRST_PAUSE
        while not self.take(path, work):
            if (holder := self.holder(path)) != said:
                logger.info("waiting for %s%s", holder, EXPIRY_NOTE)
                said = holder
            pause = sleep_longer(pause, path)

    def holder(self, path: RootedPath) -> str:
        """Return the process that had a claim when this one tried to take it."""
        try:
            return str(json.loads(self._seen[path][0])["holder"])[:200]
        except (ValueError, KeyError, TypeError):
            return "an unknown process"

    def _renew(self) -> None:
        while True:
            self._is_idle.wait(RENEWAL_SECONDS)
            self._is_idle.clear()
            with self._lock:
                if not self._held:
                    self._thread = None
                    return
                for path, data in list(self._held.items()):
                    self._renew_one(path, data)

    def _renew_one(self, path: RootedPath, data: bytes) -> None:
        content = json.loads(data)
        following = json.dumps(content | {"beat": content["beat"] + 1}, sort_keys=True).encode()
        try:
            file_at(path).exchange(following, data)
            self._held[path] = following
        except ReplacedError:
            del self._held[path]
            logger.warning(
                "%s was taken over by another process, as it was not renewed in time; both may write the same files",
                path,
            )
        except (UserError, OSError) as error:
            logger.warning("%s could not be renewed: %s", path, error)

    def release(self, path: RootedPath) -> None:
        """Remove a claim if it is still this process's. Its failure is logged, as the work is done."""
        with self._lock:
            data = self._held.pop(path, None)
            thread = None if self._held else self._thread
        if thread is not None:
            self._is_idle.set()
            thread.join(RENEWAL_SECONDS)
        try:
            if data is not None and file_at(path).read(_CLAIM_BYTES) == data:
                file_at(path).remove()
        except FileNotFoundError:
            pass
        except (FileError, OSError) as error:
            logger.warning("%s could not be removed: %s", path, error)


CLAIMS = Claims()
"""Claims of this process."""


@contextmanager
def claimed(path: RootedPath, work: str) -> Iterator[None]:
    """Do the work of the block in one process at a time, which has a claim. The others wait.

    Args:
        path: File of the claim.
        work: As in `Claims.take`.
    """
    CLAIMS.wait(path, work)
    try:
        yield
    finally:
        CLAIMS.release(path)


def _require_conditions(path: RootedPath) -> None:
    """Raise FileError unless the endpoint refuses to create an object that exists."""
    try:
        file_at(path).exchange(b"\n")
    except ReplacedError:
        return
    file_at(path).remove()
    raise refuse_unconditional(str(path))
