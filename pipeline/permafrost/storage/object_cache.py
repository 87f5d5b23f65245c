"""Copies of objects in a folder of the node, which all its processes share.

A copy is named by the digest of its content or, where that is unknown before it arrives, by its address and ETag, so
that an object that was replaced is another copy. A copy appears by a rename after it arrived whole. One process
downloads an object, and the others wait for it. All of this rests on locks of the kernel (flock), which end with their
process: on the file in the making, so that there is one download, and on each copy in use, so that it is not evicted.

Nothing is counted on disk. The size of the folder is that of its files, and a file in the making has its final size
from the beginning, so downloads that run in parallel do not exceed the limit together.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import logging
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from permafrost.core.errors import FileError
from permafrost.storage.addresses import Bucket, is_address, parse_bucket
from permafrost.storage.buckets import (
    Download,
    FinalError,
    existing_facts,
    read_again,
    wait_seconds,
)
from permafrost.storage.local_files import PARTIAL_SUFFIX, described_errors

logger = logging.getLogger("permafrost.cache")

VARIABLE = "PERMAFROST_CACHE"
"""Environment variable of the cache folder, where no option names one."""
_ROOM = ".room"
"""Name of the file whose lock allows to make room."""
WAIT_SECONDS = 120.0
"""Time without progress after which waiting for another process, or for room, ends with an error."""
_POLL_SECONDS = 0.05


class CacheError(FinalError):
    """Error for a cache folder without room for an object, or where waiting for another process timed out."""


@dataclass(frozen=True)
class ObjectCache:
    """Cache folder with a limit of its size."""

    folder: Path
    limit: int | None = None
    """Largest number of bytes of all its files; None for any."""

    def open(self, address: str, sha256: str | None = None) -> io.FileIO:
        """Open the copy of an object, downloaded first if there is none. It is not evicted before it is closed.

        Args:
            address: Address of the object.
            sha256: Digest of the object, compared when it arrives; None for an object of which it is not known, whose
                copy is the one of its present ETag.

        Raises:
            FileNotFoundError: If there is no such object.
            CacheError: If the cache has no room for it.
            FileError: If it cannot be downloaded, or has another digest.
        """
        path, size = self._copy_of(address, sha256)
        while True:
            while (file := _open_in_use(path)) is None:
                self._download(address, path, sha256)
            if size is None or os.fstat(file.fileno()).st_size == size:
                return file
            file.close()
            path.unlink(missing_ok=True)
            logger.warning("the copy of %s in the cache was cut; it is downloaded again", address)

    def remove_damaged(self, address: str, sha256: str) -> bool:
        """Remove the copy of an object if it no longer matches the object.

        A copy is compared when it arrives, and readers compare what they read of it. They ask here where that differs,
        because the object itself may be sound.

        Args:
            address: Address of the object.
            sha256: Digest of the object.

        Returns:
            True if the copy was removed.
        """
        path, _ = self._copy_of(address, sha256)
        try:
            with path.open("rb") as file:
                is_damaged = hashlib.file_digest(file, "sha256").hexdigest() != sha256
        except OSError:
            return False
        if is_damaged:
            path.unlink(missing_ok=True)
        return is_damaged

    def fetch(self, address: str, sha256: str) -> None:
        """Download an object unless there is a copy. Arguments and errors are those of `open`."""
        self.open(address, sha256).close()

    def _copy_of(self, address: str, sha256: str | None) -> tuple[Path, int | None]:
        """Return the path of an object's copy, and its size where its digest is unknown."""
        size = None
        if sha256 is None:
            facts = existing_facts(address)
            text = f"{address}\0{facts.e_tag}\0{facts.size}"
            sha256, size = hashlib.sha256(text.encode()).hexdigest(), facts.size
        return self.folder / sha256[:2] / sha256, size

    def _download(self, address: str, path: Path, sha256: str | None) -> None:
        """Download an object to its path, or wait until another process has."""
        _make_folder(path.parent)
        _remove_leftovers(self.folder)
        partial = path.with_name(f".{path.name}{PARTIAL_SUFFIX}")
        with _made_alone(partial, address) as descriptor:
            if descriptor is None or path.exists():
                return
            read_again(lambda: self._receive(Download(address), descriptor, sha256))
            partial.rename(path)

    def _receive(self, download: Download, descriptor: int, sha256: str | None) -> None:
        """Write a download to a file that has room for it; raise FileError if it has another digest."""
        address, size = download.address, download.facts.size
        self._reserve(address, descriptor, size)
        digest, offset = hashlib.sha256(), 0
        with described_errors(self._no_room, address):
            for block in download.blocks():
                if sha256 is not None:
                    digest.update(block)
                offset += os.pwrite(descriptor, block, offset)
            os.fsync(descriptor)
        if sha256 is not None and digest.hexdigest() != sha256:
            raise FileError(
                f"{address} is damaged: it has sha256 {digest.hexdigest()[:12]}, but its manifest lists {sha256[:12]}; "
                "run permafrost verify to list every damaged file"
            )

    def _reserve(self, address: str, descriptor: int, size: int) -> None:
        """Give a file its final size once the folder has room for it. Raises CacheError."""
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            with _locked(self.folder / _ROOM):
                os.ftruncate(descriptor, 0)
                if (missing := self._evict(size)) <= 0:
                    with described_errors(self._no_room, address):
                        os.ftruncate(descriptor, size)
                    return
            if time.monotonic() > deadline or size > (self.limit or size):
                raise CacheError(
                    f"the cache {self.folder} has no room for {address}: {missing:,} bytes of store.cache_bytes="
                    f"{self.limit} are missing, and all other files in it are in use. Raise the limit"
                )
            time.sleep(_POLL_SECONDS)

    def _no_room(self, address: str, error: OSError) -> CacheError:
        """Return the error to raise if the disk of the cache does not take an object."""
        return CacheError(
            f"{address} cannot be copied to the cache {self.folder} ({error.strerror}); free some space, or choose "
            f"another folder with store.cache or {VARIABLE}"
        )

    def _evict(self, size: int) -> int:
        """Remove the least recently used copies that are not in use; return the bytes that are then missing."""
        if self.limit is None:
            return 0
        files = _files_with_status(self.folder)
        missing = sum(status.st_size for _, status in files) + size - self.limit
        for path, status in sorted(files, key=lambda file: file[1].st_mtime_ns):
            if missing <= 0:
                break
            if not path.name.startswith(".") and _remove_unused(path):
                missing -= status.st_size
        return missing


def cache_of(bucket: Bucket) -> ObjectCache:
    """Return the cache for the objects of a bucket's folder."""
    return ObjectCache(cache_folder(bucket.cache), bucket.cache_bytes)


def cache_folder(option: str | None = None) -> Path:
    """Return the folder of the cache, which may not exist: the option, the environment's, or one of the user's home."""
    if option is not None:
        return Path(option).expanduser()
    if VARIABLE in os.environ:
        return Path(os.environ[VARIABLE]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "permafrost"
    except RuntimeError:  # neither HOME nor an entry of the user, as in some containers
        return Path(tempfile.gettempdir()) / f"permafrost-{os.getuid()}"


def local_file(text: str, sibling: str = "") -> Path:
    """Return the path of a user's file on this machine; for an address, the path of its copy.

    Args:
        text: Path or address.
        sibling: As in `local_copy`.

    Raises:
        ConfigError: If the address cannot be used.
        FileError: If there is no such object.
    """
    return local_copy(text, sibling) if is_address(text) else Path(text)


@lru_cache(maxsize=64)
def local_copy(address: str, sibling: str = "") -> Path:
    """Return a copy of an object under its own name, which stays until the cache folder is deleted.

    For a file that other packages open by its path. It is looked for once per process.

    Args:
        address: Address of the object.
        sibling: Name of an object in the same folder that is copied, too, if there is one.

    Raises:
        ConfigError: If the address cannot be used.
        FileError: If there is no such object.
    """
    address = parse_bucket("the address", address, writable=False)
    parent, _, name = address.rpartition("/")
    objects = cache_of(Bucket(parent))
    try:
        with objects.open(address) as file:
            folder = objects.folder / "named" / hashlib.file_digest(file, "sha256").hexdigest()
            _copy(file, folder / name)
        if sibling:
            with suppress(FileNotFoundError), objects.open(f"{parent}/{sibling}") as file:
                _copy(file, folder / sibling)
    except FileNotFoundError as error:
        raise FileError(f"{error}; correct the address") from None
    return folder / name


def _copy(file: io.FileIO, path: Path) -> None:
    """Write an open file to a path, whole."""
    _make_folder(path.parent)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}{PARTIAL_SUFFIX}")
    file.seek(0)
    try:
        with partial.open("wb") as copy:
            shutil.copyfileobj(file, copy)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CacheError(f"{path} cannot be written ({error.strerror})") from error


def scratch_folder_of(bucket: Bucket) -> Path:
    """Return the folder of the node for files that are written before they are uploaded.

    Raises:
        CacheError: If it cannot be created.
    """
    folder = cache_folder(bucket.cache)
    _make_folder(folder)
    return folder


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CacheError(
            f"the cache {folder} cannot be created ({error.strerror}); choose another folder with store.cache or "
            f"{VARIABLE}"
        ) from error


def _files(folder: Path) -> Iterator[Path]:
    for below in sorted(folder.iterdir()):
        if below.is_dir() and len(below.name) == 2:
            yield from below.iterdir()


def _files_with_status(folder: Path) -> list[tuple[Path, os.stat_result]]:
    """List the files of a cache, again whenever a download ends meanwhile and gets its final name."""
    while True:
        with contextlib.suppress(FileNotFoundError):
            return [(path, path.stat()) for path in _files(folder)]


# ---- locks ---------------------------------------------------------------------------------------


def _open_in_use(path: Path) -> io.FileIO | None:
    """Open a copy and mark it as in use, until it and every map of it are closed; return None if there is none."""
    try:
        file = io.FileIO(path, "rb")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CacheError(f"{path} cannot be read ({error.strerror})") from error
    fcntl.flock(file, fcntl.LOCK_SH)
    if not _is_same(file.fileno(), path):  # it was evicted in between
        file.close()
        return None
    with suppress(OSError):  # of another user
        os.utime(file.fileno())
    return file


def _is_same(descriptor: int, path: Path) -> bool:
    """Return whether a path still has the file that was opened."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _remove_unused(path: Path) -> bool:
    """Remove a file unless a process has a lock on it."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_same(descriptor, path):
            path.unlink()
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


@contextmanager
def _made_alone(partial: Path, address: str) -> Iterator[int | None]:
    """Provide the descriptor of a file in the making, None if another process finished it. It is removed if it stays.

    Raises:
        CacheError: If the other process makes no progress.
    """
    descriptor = os.open(partial, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not _wait_for_lock(descriptor, partial, address) or not _is_same(descriptor, partial):
            yield None
            return
        try:
            yield descriptor
        finally:
            if _is_same(descriptor, partial):
                partial.unlink()
    finally:
        os.close(descriptor)


def _wait_for_lock(descriptor: int, partial: Path, address: str) -> bool:
    """Lock a file in the making; return False if another process finished or gave up meanwhile."""
    patience = WAIT_SECONDS + wait_seconds()  # the other process may wait for the server
    progress, deadline = os.fstat(descriptor).st_mtime_ns, time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            pass
        if (status := os.fstat(descriptor)).st_mtime_ns != progress:
            progress, deadline = status.st_mtime_ns, time.monotonic() + patience
        if not _is_same(descriptor, partial):
            return False
        if time.monotonic() > deadline:
            raise CacheError(
                f"{address}: waited {patience:g} s for {_holder(status.st_ino)}, which downloads it to {partial} "
                "and makes no progress. End it, and run the same command again"
            )
        time.sleep(_POLL_SECONDS)


def _holder(inode: int) -> str:
    """Return the process that holds a lock, as the kernel lists it."""
    with suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if len(words) > 5 and words[1] == "FLOCK" and words[5].endswith(f":{inode}"):
                return f"process {words[4]}"
    return "another process"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that others hold for moments only."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno != errno.ENOLCK:
                raise
        yield
    finally:
        os.close(descriptor)


@cache
def _remove_leftovers(folder: Path) -> None:
    """Remove the files in the making of processes that have died, once per process."""
    for path in _files(folder):
        if path.name.startswith(".") and path.name.endswith(PARTIAL_SUFFIX):
            _remove_unused(path)
