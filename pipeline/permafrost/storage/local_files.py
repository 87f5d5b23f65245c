"""Files and folders of this machine: atomic, durable writes, and paths that no link leads out of.

A file is either whole or absent, even if the process that writes it dies. A commit writes to a unique temporary name
in the same folder, calls fsync, renames the file, and calls fsync on the folder. Every operation that changes something
goes through this module's `os`, so that a test can simulate a crash after any of them.

Each folder below the root of a RootedPath is opened from the one above it and never through a link, so that nothing
can change between a check and its use.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import secrets
import stat
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeGuard, TypeVar

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from permafrost.core.errors import FileError, UserError, system_remedy, with_remedy
from permafrost.storage.buckets import ReplacedError
from permafrost.storage.rooted_paths import AnyPath, LinkError, RootedPath, refuses_links

T = TypeVar("T")
R = TypeVar("R")

PARTIAL_SUFFIX = ".partial"
ABSENT = (FileNotFoundError, NotADirectoryError)
"""Errors of a path that does not exist."""
_FOLDER = os.O_DIRECTORY | getattr(os, "O_PATH", os.O_RDONLY)
_BUFFER_BYTES = 2**20
MAX_EXCHANGED_BYTES = 2**20
"""Limit of the bytes of a file that `exchange` replaces."""
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FOLDERS_WITHOUT_FSYNC = (errno.EINVAL, errno.ENOTSUP)
"""Errors of file systems that do not support fsync of a folder, such as some network mounts."""
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY
"""Flags with which opening a pipe or a terminal has no effect, so that its kind can be checked."""


class NoSpaceError(FileError):
    """File that exceeds the disk space, the quota or the file size limit. No part of the file is kept."""


def write_error(path: AnyPath, error: OSError) -> FileError:
    """Return the error to raise if `path` could not be written, which may be a FileError already."""
    if isinstance(error, FileError):
        return error
    remedy = system_remedy(error) or (
        "check that the folder exists and is writable, and run the same command again"
    )
    end = f"({error.strerror or error}). Finished files are kept; {remedy}"
    if error.errno in _NO_SPACE:
        return NoSpaceError(f"no room to write {path} {end}")
    return FileError(f"{path} cannot be written {end}")


def read_error(path: AnyPath, error: OSError | ValueError) -> FileError:
    reason = getattr(error, "strerror", None) or error
    return FileError(with_remedy(f"{path} cannot be read ({reason})", error))


def _error_with_path(path: object, error: OSError) -> OSError:
    """Return the same error with a path."""
    return type(error)(error.errno, error.strerror, str(path))


@contextmanager
def described_errors(describe: Callable[[Any, OSError], OSError], path: object) -> Iterator[None]:
    """Raise the errors of the system in a block as others. Errors for the user pass through.

    Args:
        describe: Function of the path and the error that returns the error to raise, such as `write_error`.
        path: Path or address that the block works on.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise describe(path, error) from error


# ---- folders -------------------------------------------------------------------------------------


@contextmanager
def opened_folder(path: AnyPath) -> Iterator[int]:
    """Provide a descriptor of a folder, for the `dir_fd` of system calls.

    Raises:
        LinkError: If the path has a link where none is allowed.
        OSError: If the folder cannot be opened.
    """
    below = path.parts if refuses_links(path) else ()
    descriptor = os.open(str(path.root if refuses_links(path) else path), _FOLDER)
    try:
        for number, name in enumerate(below):
            above = descriptor
            try:
                descriptor = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=above)
            except OSError as error:
                assert isinstance(path, RootedPath)
                raise _error_at(above, replace(path, parts=below[: number + 1]), error) from error
            os.close(above)
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def open_parent(path: AnyPath) -> Iterator[tuple[int, str]]:
    """Provide a descriptor of the folder of a path, and the name in it.

    Raises:
        LinkError: If the path has a link where none is allowed.
        OSError: Any other one of the block, with the whole path.
    """
    if isinstance(path, RootedPath) and not path.parts:
        path = _root_of(path)
    with opened_folder(path.parent) as folder, described_errors(partial(_error_at, folder), path):
        yield folder, path.name or "."


def _error_at(folder: int, path: AnyPath, error: OSError) -> OSError:
    """Return the error to raise for a path in an open folder: LinkError if it is a link that may not be there."""
    return LinkError(path) if is_refused_link(path, folder) else _error_with_path(path, error)


def is_refused_link(path: AnyPath, folder: int) -> TypeGuard[RootedPath]:
    if not refuses_links(path):
        return False
    try:
        status = os.stat(path.name, dir_fd=folder, follow_symlinks=False)
    except OSError:
        return False
    return stat.S_ISLNK(status.st_mode)


def _status(path: AnyPath) -> os.stat_result | None:
    """Return the status of a file or folder, None if there is none. Raises FileError, such as LinkError."""
    try:
        with open_parent(path) as (folder, name):
            status = os.stat(name, dir_fd=folder, follow_symlinks=not refuses_links(path))
    except (*ABSENT, ValueError):  # a path with a NUL is a ValueError
        return None
    except FileError:
        raise
    except OSError as error:
        if error.errno == errno.ELOOP:
            return None
        raise read_error(path, error) from error
    if isinstance(path, RootedPath) and stat.S_ISLNK(status.st_mode):
        raise LinkError(path)
    return status


def _kind(entry: os.DirEntry[str]) -> str:
    if entry.is_symlink():
        return "link"
    return "folder" if entry.is_dir(follow_symlinks=False) else "file"


def _root_of(path: RootedPath) -> Path:
    """Return the root of a path that is not in a bucket."""
    assert isinstance(path.root, Path), path
    return path.root


def _fsync_folder(folder: int, path: AnyPath) -> None:
    try:
        descriptor = os.open(".", os.O_RDONLY, dir_fd=folder)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _FOLDERS_WITHOUT_FSYNC:
            raise write_error(path, error) from error


def _open(path: AnyPath, flags: int) -> int:
    """Return a descriptor of a file. Raises OSError, or LinkError."""
    links = os.O_NOFOLLOW if refuses_links(path) else 0
    with open_parent(path) as (folder, name):
        return os.open(name, flags | links, 0o666, dir_fd=folder)


# ---- open files ----------------------------------------------------------------------------------


class NamedFile(io.FileIO):
    """Open file whose errors have its path, as those of the functions that open a path do."""

    def __init__(self, descriptor: int, mode: str, path: AnyPath) -> None:
        super().__init__(descriptor, mode)
        self.name = str(path)
        self.path = path

    def describe(self, error: OSError) -> FileError:
        """Return the error to raise if it cannot be written."""
        return write_error(self.path, error)

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise self.describe(error) from error

    def read(self, size: int | None = -1) -> Any:
        if size is None or size < 0:
            return self.readall()
        with described_errors(_error_with_path, self.path):
            data = super().read(size)
            while 0 < len(data) < size and (more := super().read(size - len(data))):
                data += more  # a network mount may give less at once
        return data

    def readall(self) -> Any:
        with described_errors(_error_with_path, self.path):
            return super().readall()

    def readinto(self, buffer: Any) -> Any:
        with described_errors(_error_with_path, self.path):
            return super().readinto(buffer)


class HashingFile:
    """File opened for writing that keeps its length, SHA-256 and CRC-32C up to date and writes in large blocks."""

    def __init__(self, descriptor: int, destination: AnyPath) -> None:
        self._descriptor: int | None = descriptor
        self.destination = destination
        """Path at which the file will appear; a name may depend on the content and be set after it is written."""
        self._hash = hashlib.sha256()
        self._buffer = bytearray()
        self.bytes = 0
        self.crc32c = 0

    def write(self, data: bytes | NDArray[np.uint8]) -> int:
        self._hash.update(data)  # type: ignore[arg-type]  # an array is a buffer
        self.crc32c = google_crc32c.extend(self.crc32c, data)
        self._buffer.extend(data)
        self.bytes += len(data)
        if len(self._buffer) >= _BUFFER_BYTES:
            self.flush()
        return len(data)

    def flush(self) -> None:
        """Pass the buffered bytes to the operating system.

        Raises:
            ValueError: If the file is closed.
        """
        if self._descriptor is None:
            raise ValueError("cannot write to a closed file")
        written = 0
        while written < len(self._buffer):
            with memoryview(self._buffer) as view, view[written:] as rest:
                written += os.write(self._descriptor, rest)
        self._buffer.clear()

    def detach(self) -> None:
        """Forget the descriptor, because its number may be reused for another file."""
        self._descriptor = None

    def tell(self) -> int:
        return self.bytes

    @property
    def closed(self) -> bool:
        """True once it is closed; pyarrow asks for it."""
        return self._descriptor is None

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


# ---- operations ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class AnyFile(ABC):
    """File or folder of any kind: what can be asked of it, atomic writes, and bounded reads."""

    path: AnyPath

    @property
    def folder(self) -> RootedPath:
        """The path as a root of the paths below it."""
        return RootedPath.of(self.path, allow_links=True)

    @abstractmethod
    def size(self) -> int | None:
        """Return the size of a regular file in bytes, None if there is none.

        Raises:
            LinkError: If the path has a link where none is allowed.
        """

    @abstractmethod
    def entries(self) -> list[tuple[str, str]]:
        """Return what is in a folder as sorted pairs of a name and file, folder or link; [] if there is no folder.

        Raises:
            LinkError: If the path of the folder has a link where none is allowed.
        """

    @abstractmethod
    def iter_files(self, ignored: Container[str] = ()) -> Iterator[RootedPath]:
        """Iterate over all files and links below a folder, in each folder sorted. Links to folders are not followed.

        Memory does not grow with their number.

        Args:
            ignored: Names of folders in it that are left out.
        """

    @abstractmethod
    def open_atomically(self) -> AbstractContextManager[HashingFile]:
        """Provide a file that appears at the path, whole and durable, when the block ends without an error.

        A file of a bucket is uploaded then, or added to the uploads that are collected (`collected_uploads`).

        Raises:
            FileError: If it cannot be written, such as NoSpaceError and LinkError.
        """

    def is_file(self) -> bool:
        """Return whether there is a regular file.

        Raises:
            LinkError: If the path has a link where none is allowed.
        """
        return self.size() is not None

    def paths(self, pattern: str = "*") -> list[RootedPath]:
        """Return the sorted paths in a folder whose names match a pattern; [] if there is no folder.

        Args:
            pattern: Pattern of `fnmatch`, in which case matters.

        Raises:
            LinkError: If the path of the folder has a link where none is allowed.
        """
        return [self.folder / name for name, _ in self.entries() if fnmatchcase(name, pattern)]

    def file_names(self) -> frozenset[str]:
        """Return the names of the files in a folder, none if there is no folder.

        Raises:
            LinkError: If the folder has a link, or is reached through one, where none is allowed.
        """
        entries = self.entries()
        if not self.folder.allow_links and (
            link := next((name for name, kind in entries if kind == "link"), "")
        ):
            raise LinkError(self.folder / link)
        return frozenset(name for name, kind in entries if kind != "folder")

    def write(self, data: bytes) -> str:
        """Write a file in one commit and return its SHA-256.

        Raises:
            FileError: If it cannot be written, such as NoSpaceError and LinkError.
        """
        with self.open_atomically() as file:
            file.write(data)
        return file.sha256


class LocalFile(AnyFile):
    """File or folder of this machine."""

    def write(self, data: bytes) -> str:
        """Write a file, once more if another process took the new file for one of a dead process, and removed it."""
        try:
            return super().write(data)
        except FileError as error:
            is_removed = isinstance(error.__cause__, FileNotFoundError)
            if not is_removed or not LocalFile(self.path.parent).is_folder():
                raise
        return super().write(data)

    def exists(self) -> bool:
        """Return whether there is a file or a folder.

        Raises:
            LinkError: If the path has a link where none is allowed, also one to nothing.
        """
        return _status(self.path) is not None

    def is_folder(self) -> bool:
        """Return whether there is a folder.

        Raises:
            LinkError: If the path has a link where none is allowed.
        """
        status = _status(self.path)
        return status is not None and stat.S_ISDIR(status.st_mode)

    def size(self) -> int | None:
        status = _status(self.path)
        return status.st_size if status is not None and stat.S_ISREG(status.st_mode) else None

    def stamp(self) -> tuple[int, int | str]:
        """Return the bytes of a file, and when it and its entry were last changed; of an object its ETag."""
        status = Path(str(self.path)).stat()
        # the second time cannot be set, as that of unpacked archives is
        return status.st_size, f"{status.st_mtime_ns}-{status.st_ctime_ns}"

    def folder_stamp(self) -> int:
        """Return a number that changes if a file is added to a folder or removed; of a bucket, or changed in it."""
        return Path(str(self.path)).stat().st_mtime_ns

    def scan(self) -> Iterator[os.DirEntry[str]]:
        """Iterate over the entries of a folder as the system lists them, following links.

        Raises:
            OSError: If the folder cannot be listed.
        """
        with os.scandir(str(self.path)) as entries:
            yield from entries

    def peek(self, size: int) -> bytes:
        """Return the first `size` bytes of a file, as far as they can be read without a request to a bucket."""
        try:
            with Path(str(self.path)).open("rb") as file:
                return file.read(size)
        except OSError:
            return b""

    def is_writable(self) -> bool:
        """Return whether this is a folder in which this process may create files; a bucket is taken to be one.

        Raises:
            LinkError: If the path has a link where none is allowed.
        """
        try:
            with opened_folder(self.path) as descriptor:
                return os.access(".", os.W_OK, dir_fd=descriptor)
        except ABSENT:
            return False

    @contextmanager
    def listing(self) -> Iterator[None]:
        """Answer questions for the sizes of files below a bucket's folder from one listing, not a request for each.

        For a block that asks for many files and writes none of them. A local folder is asked each time.
        """
        yield

    def entries(self) -> list[tuple[str, str]]:
        try:
            with opened_folder(self.path) as place:
                descriptor = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=place)
                try:
                    with os.scandir(descriptor) as entries:
                        return sorted((entry.name, _kind(entry)) for entry in entries)
                finally:
                    os.close(descriptor)
        except ABSENT:
            return []
        except FileError:
            raise
        except OSError as error:
            raise read_error(self.path, error) from error

    def iter_files(self, ignored: Container[str] = ()) -> Iterator[RootedPath]:
        return (path for path, _ in self._iter_entries(ignored))

    def links(self) -> Iterator[RootedPath]:
        """Iterate over the links below a folder; yield none if links are allowed or it is in a bucket."""
        if not self.folder.allow_links:
            yield from (path for path, kind in self._iter_entries(()) if kind == "link")

    def _iter_entries(self, ignored: Container[str]) -> Iterator[tuple[RootedPath, str]]:
        entries = self.entries()
        yield from ((self.folder / name, kind) for name, kind in entries if kind != "folder")
        for name, kind in entries:
            if kind == "folder" and name not in ignored:
                yield from LocalFile(self.folder / name)._iter_entries(())

    def read_each(self, read: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Iterate over the results of a function that reads files of this folder, in the order of the items.

        In a bucket the next ones are read at the same time, as each request waits for its answer. Errors of the
        function are raised at their items.

        Args:
            read: Function of an item, called from other threads for a bucket.
            items: Items to read.
        """
        return map(read, items)

    @contextmanager
    def open_atomically(self) -> Iterator[HashingFile]:
        path = self.path
        LocalFile(path.parent).make_folder()
        partial_name = f".{path.name}.{secrets.token_hex(8)}{PARTIAL_SUFFIX}"
        with opened_folder(path.parent) as folder:
            with described_errors(write_error, path):
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
                descriptor = os.open(partial_name, flags, 0o666, dir_fd=folder)
            try:
                file = HashingFile(descriptor, path)
                try:
                    yield file
                    file.flush()
                    os.fsync(descriptor)
                    identity = os.fstat(descriptor).st_ino
                finally:
                    file.detach()
                    os.close(descriptor)
                if is_refused_link(file.destination, folder):
                    raise LinkError(file.destination)
                name = file.destination.name
                try:
                    os.replace(partial_name, name, src_dir_fd=folder, dst_dir_fd=folder)
                except FileNotFoundError:
                    # A file server has renamed it, and the answer to its client was lost.
                    if os.stat(name, dir_fd=folder, follow_symlinks=False).st_ino != identity:
                        raise
            except BaseException as error:
                with suppress(OSError):  # the original error is more informative
                    os.unlink(partial_name, dir_fd=folder)
                if isinstance(error, OSError) and not isinstance(error, UserError):
                    raise write_error(path, error) from error
                raise
            _fsync_folder(folder, path.parent)

    def commit(self, data: bytes) -> None:
        """Write a file that makes others valid.

        In a bucket, where no lock is certain, it is written only if it does not exist yet or is still the one that
        this process has read; the same bytes by another writer are a success.

        Raises:
            ReplacedError: If another writer has written an object with other bytes in the meantime.
            FileError: If it cannot be written.
        """
        self.write(data)

    def exchange(self, data: bytes, replaces: bytes | None = None) -> None:
        """Write a small file if there is none, or only in place of one with certain bytes.

        Of a file of this machine, the second is not atomic: of two processes that replace it at once, both may succeed.

        Args:
            data: Content of the file.
            replaces: Bytes of the file that may be replaced; None replaces none.

        Raises:
            ReplacedError: If there is another file, or none that may be replaced.
            FileError: If it cannot be written.
        """
        if replaces is not None:
            with suppress(FileNotFoundError):
                if self.read(MAX_EXCHANGED_BYTES) == replaces:
                    self.write(data)
                    return
            raise ReplacedError(f"{self.path} was written by another process in the meantime")
        LocalFile(self.path.parent).make_folder()
        try:
            descriptor = _open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        except FileExistsError:
            raise ReplacedError(f"{self.path} was written by another process") from None
        except OSError as error:
            raise write_error(self.path, error) from error
        try:
            with io.BufferedWriter(NamedFile(descriptor, "wb", self.path)) as file:
                file.write(data)  # all of it, however little the system takes at once
        except FileError:
            self.remove()
            raise

    def make_folder(self) -> None:
        """Create a folder and its parents durably. An existing folder is not an error. A bucket has no folders.

        Raises:
            FileError: If it cannot be created, such as LinkError.
        """
        path = self.path
        if isinstance(path, RootedPath) and not path.parts:
            path = _root_of(path)
        if self.is_folder():
            return
        if path.parent == path:
            raise FileError(f"{path} does not exist")
        LocalFile(path.parent).make_folder()
        try:
            with open_parent(path) as (folder, name):
                os.mkdir(name, dir_fd=folder)
                _fsync_folder(folder, path.parent)
        except FileExistsError:
            if self.is_folder():
                return
            raise FileError(
                f"{path} is not a folder. Choose another path, or move that file away"
            ) from None
        except FileError:
            raise
        except OSError as error:
            raise write_error(path, error) from error

    def create(self) -> IO[bytes]:
        """Open a file for writing in place, empty, where a whole file is not needed.

        A file of a bucket appears when it is closed.

        Raises:
            FileError: If it cannot be opened.
        """
        with described_errors(write_error, self.path):
            descriptor = _open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        return io.BufferedWriter(NamedFile(descriptor, "wb", self.path))

    def move(self, destination: AnyPath) -> None:
        """Give a file another name in the same folder, in place of any file of that name.

        Args:
            destination: Its new path.
        """
        with open_parent(self.path) as (folder, name):
            os.replace(name, destination.name, src_dir_fd=folder, dst_dir_fd=folder)

    def remove(self) -> None:
        """Remove a file if it exists; of a link, the link itself."""
        with suppress(*ABSENT), open_parent(self.path) as (folder, name):
            os.unlink(name, dir_fd=folder)

    def remove_folder(self) -> None:
        """Remove a folder without files. A bucket has none."""
        with suppress(OSError), open_parent(self.path) as (folder, name):
            os.rmdir(name, dir_fd=folder)

    def scratch(self) -> IO[bytes]:
        """Return a temporary file without a name, on the disk of a root; for a bucket in its cache folder."""
        return tempfile.TemporaryFile(dir=_root_of(self.folder))

    def open(self, sha256: str | None = None) -> io.FileIO:
        """Open a regular file for reading, unbuffered.

        Anything else is refused, as opening a pipe would block, and a device has no end.

        Args:
            sha256: Digest of the file, if it is known. It names the copy of a file in a bucket, and is compared when
                that arrives. A local file is not compared.

        Raises:
            FileNotFoundError: If the file is missing.
            FileError: If it cannot be opened or is not a regular file.
        """
        try:
            descriptor = _open(self.path, _READ)
        except (FileNotFoundError, FileError):
            raise
        except (OSError, ValueError) as error:  # a path with a NUL is a ValueError
            raise read_error(self.path, error) from error
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise FileError(f"{self.path} is not a regular file. Restore it, or correct the path")
        return NamedFile(descriptor, "rb", self.path)

    def open_ranges(self) -> io.FileIO:
        """Open a regular file to read few bytes of it (`read_at`).

        Of a file in a bucket there is no copy, but a request for each read.

        Raises:
            FileNotFoundError: If the file is missing.
            FileError: If it cannot be opened or is not a regular file.
        """
        return self.open()

    def read(self, most: int | None = None, sha256: str | None = None) -> bytes:
        """Return the bytes of a regular file.

        Args:
            most: Largest number of bytes; None for any. A larger file is not read.
            sha256: As in `open`; a file of a bucket is read from the cache if it is known, and else from the bucket.

        Raises:
            FileNotFoundError: If the file is missing.
            FileError: If it cannot be read, is not a regular file, or is larger than `most`.
        """
        with self.open(sha256) as file:
            return read_whole(file, self.path, most)

    def read_committed(self, most: int) -> bytes:
        """Return the bytes of a file that `commit` may replace.

        Args:
            most: Largest number of bytes. A larger file is not read.

        Raises:
            FileNotFoundError: If the file is missing.
            FileError: If it cannot be read, is not a regular file, or is larger than `most`.
        """
        return self.read(most)

    def fetch(self, sha256: str) -> None:
        """Download a file of a bucket to the cache unless it is there; do nothing for a local file.

        Args:
            sha256: Digest of the file.

        Raises:
            FileNotFoundError: If the file is missing.
            FileError: If it cannot be downloaded.
        """

    def refuse_damaged_copy(self, sha256: str | None) -> None:
        """Tell a damaged file of a bucket from a damaged copy of it in the cache, which is removed.

        Readers call it before they say that a file is damaged.

        Args:
            sha256: Digest of the file; None checks nothing.

        Raises:
            FileError: If the copy was damaged.
        """

    def sha256(self) -> str:
        """Return the SHA-256 of a regular file, computed in constant memory.

        Raises:
            FileNotFoundError: If the file is missing.
            FileError: If it cannot be read or is not a regular file.
        """
        with self.open() as file, described_errors(read_error, self.path):
            return hashlib.file_digest(file, "sha256").hexdigest()


def read_whole(file: io.FileIO, path: AnyPath, most: int | None) -> bytes:
    """Return the bytes of an open file.

    Args:
        file: File open for reading.
        path: Its path, for messages.
        most: Largest number of bytes; None for any. A larger file is not read.

    Raises:
        FileError: If it cannot be read, or is larger than `most`.
    """
    size = os.fstat(file.fileno()).st_size
    if most is not None and size > most:
        raise FileError(
            f"{path} has {size:,} bytes, more than the {most:,} that such a file can have. Restore it, or delete it"
        )
    with described_errors(read_error, path):
        data: bytes = file.readall() if most is None else read_fully(file, size, 0)
    return data


def read_fully(file: io.FileIO, size: int, offset: int) -> bytes:
    """Read `size` bytes from an offset of an open file, fewer only at its end.

    The caller has compared the size with a limit. One call of the system returns at most 2 GiB.

    Raises:
        OSError: If they cannot be read.
    """
    with described_errors(_error_with_path, file.name):
        data = os.pread(file.fileno(), size, offset)
        while 0 < len(data) < size:
            if not (more := os.pread(file.fileno(), size - len(data), offset + len(data))):
                break
            data += more
    return data


def open_lock(path: AnyPath, *, create: bool) -> io.FileIO:
    """Open a file for locking.

    Args:
        path: The file.
        create: Create it if it is missing, which needs the permission to write.

    Raises:
        OSError: If it cannot be opened, such as LinkError.
    """
    return io.FileIO(_open(path, os.O_RDWR | os.O_CREAT if create else _READ), "rb")


def folders_with(parent: Path, name: str) -> list[str]:
    """Return the folders of a folder of this machine that contain a file of a name, sorted; [] if it does not exist."""
    return sorted(str(path.parent) for path in parent.glob(f"*/{name}"))
