"""Files: atomic, durable writes, and paths that no link leads out of.

A file is either whole or absent, even if the process that writes it dies. A commit writes to a unique temporary name
in the same folder, calls fsync, renames the file, and calls fsync on the folder. Every operation goes through this
module's `os`, so that a test can simulate a crash after any of them.

A plain `Path` is the user's own, and links in it are followed. What is inside a store may come from a stranger. Its
paths are `RootedPath`s: each folder below the root is opened from the one above it and never through a link, so that
nothing can change between a check and its use. Every function takes both kinds, and nothing else opens a RootedPath.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import mmap
import os
import secrets
import stat
import tempfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, TypeAlias, TypeGuard

import google_crc32c

from permafrost.core.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Container, Iterator

PARTIAL_SUFFIX = ".partial"
_BUFFER_BYTES = 2**20
_CANONICAL = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
)
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FOLDERS_WITHOUT_FSYNC = (errno.EINVAL, errno.ENOTSUP)
"""Errors of file systems that do not support fsync of a folder, such as some network mounts."""
_FOLDER = os.O_DIRECTORY | getattr(os, "O_PATH", os.O_RDONLY)
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY
"""Flags with which opening a pipe or a terminal has no effect, so that its kind can be looked at."""
_ABSENT = (FileNotFoundError, NotADirectoryError)


class FileError(UserError, OSError):
    """File that cannot be read or written. The message includes the operating system's reason."""


class NoSpaceError(FileError):
    """File that exceeds the disk space, the quota or the file size limit. No part of the file is kept."""


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

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        self.crc32c = google_crc32c.extend(self.crc32c, data)
        self._buffer += data
        self.bytes += len(data)
        if len(self._buffer) >= _BUFFER_BYTES:
            self.flush()
        return len(data)

    def flush(self) -> None:
        """Pass the buffered bytes to the operating system. Raise ValueError once the file is closed."""
        if self._descriptor is None:
            raise ValueError("cannot write to a closed file")
        view = memoryview(bytes(self._buffer))
        while len(view) > 0:
            view = view[os.write(self._descriptor, view) :]
        self._buffer.clear()

    def detach(self) -> None:
        """Forget the descriptor, because its number may be reused for another file."""
        self._descriptor = None

    def tell(self) -> int:
        return self.bytes

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


class LinkError(FileError):
    """Symbolic link where none is allowed."""

    def __init__(self, path: RootedPath) -> None:
        super().__init__(
            f"{path} is a symbolic link, and {path.root} may not contain any, because a link can lead to other files "
            "of this machine. Replace it by what it links to, or allow the links of a store of your own with "
            "store.allow_links=true"
        )


# ---- paths ---------------------------------------------------------------------------------------


@dataclass(frozen=True, order=True)
class RootedPath:
    """Path of a folder, or of a file below it, that is opened without following any link below the folder.

    It is no `os.PathLike`: only the functions of this module open it.
    """

    root: Path
    """The folder, whose own path may contain links."""
    parts: tuple[str, ...] = ()
    """Names below the root."""
    allow_links: bool = False
    """True follows links below the root as well."""

    @classmethod
    def of(cls, path: AnyPath) -> RootedPath:
        """Return a path as it is if it is rooted, otherwise as a root."""
        return path if isinstance(path, RootedPath) else cls(path)

    def __truediv__(self, name: str) -> RootedPath:
        """Append a relative path. Raises FileError if it leaves the root."""
        below = PurePosixPath(name)
        if below.is_absolute() or ".." in below.parts or "\0" in name:
            raise FileError(f"the path {name!r} leaves {self}")
        return replace(self, parts=(*self.parts, *below.parts))

    def __str__(self) -> str:
        return str(self.root.joinpath(*self.parts))

    @property
    def name(self) -> str:
        """Last part."""
        return self.parts[-1] if self.parts else self.root.name

    @property
    def stem(self) -> str:
        """Last part without its suffix."""
        return PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        """Suffix of the last part, with its dot."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> RootedPath:
        """The folder that contains it. Raises FileError for the root."""
        if not self.parts:
            raise FileError(f"the folder of {self} is not below it")
        return replace(self, parts=self.parts[:-1])

    def with_name(self, name: str) -> RootedPath:
        """Return the path of another name in the same folder."""
        return self.parent / name

    def absolute(self) -> RootedPath:
        """Return the same path with an absolute root, for processes with other working folders."""
        return replace(self, root=self.root.absolute())

    def below(self, folder: RootedPath) -> str:
        """Return the path relative to a folder of the same root, which contains it."""
        return "/".join(self.parts[len(folder.parts) :])


AnyPath: TypeAlias = Path | RootedPath


def _refuses_links(path: AnyPath) -> TypeGuard[RootedPath]:
    """Return whether the path is below a root that may not contain links."""
    return isinstance(path, RootedPath) and not path.allow_links and len(path.parts) > 0


@contextmanager
def _opened_folder(path: AnyPath) -> Iterator[int]:
    """Provide a descriptor of a folder, for the `dir_fd` of system calls. Raises OSError, or LinkError."""
    below = path.parts if _refuses_links(path) else ()
    descriptor = os.open(str(path.root if _refuses_links(path) else path), _FOLDER)
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
def _open_parent(path: AnyPath) -> Iterator[tuple[int, str]]:
    """Provide a descriptor of the folder of a path, and the name in it.

    An OSError in the block is raised with the whole path; if its reason is a link, as LinkError.
    """
    if isinstance(path, RootedPath) and not path.parts:
        path = path.root
    with _opened_folder(path.parent) as folder:
        try:
            yield folder, path.name or "."
        except FileError:
            raise
        except OSError as error:
            raise _error_at(folder, path, error) from error


def _error_at(folder: int, path: AnyPath, error: OSError) -> OSError:
    """Return the error to raise for a path in an open folder: LinkError if it is a link that may not be there."""
    if _is_refused_link(path, folder):
        return LinkError(path)
    return type(error)(error.errno, error.strerror, str(path))


def _is_refused_link(path: AnyPath, folder: int) -> TypeGuard[RootedPath]:
    if not _refuses_links(path):
        return False
    try:
        status = os.stat(path.name, dir_fd=folder, follow_symlinks=False)
    except OSError:
        return False
    return stat.S_ISLNK(status.st_mode)


def _open(path: AnyPath, flags: int) -> int:
    """Return a descriptor of a file. Raises OSError, or LinkError."""
    links = os.O_NOFOLLOW if _refuses_links(path) else 0
    with _open_parent(path) as (folder, name):
        return os.open(name, flags | links, 0o644, dir_fd=folder)


def _status(path: AnyPath) -> os.stat_result | None:
    """Return the status of a file or folder, None if there is none. Raises FileError, such as LinkError."""
    try:
        with _open_parent(path) as (folder, name):
            status = os.stat(name, dir_fd=folder, follow_symlinks=not _refuses_links(path))
    except (*_ABSENT, ValueError):  # a path with a NUL is a ValueError
        return None
    except FileError:
        raise
    except OSError as error:
        if error.errno == errno.ELOOP:
            return None
        raise _read_error(path, error) from error
    if isinstance(path, RootedPath) and stat.S_ISLNK(status.st_mode):
        raise LinkError(path)
    return status


def exists(path: AnyPath) -> bool:
    """Return whether there is a file or a folder. Raises LinkError, also for a link to nothing."""
    return _status(path) is not None


def is_folder(path: AnyPath) -> bool:
    """Return whether there is a folder. Raises LinkError."""
    status = _status(path)
    return status is not None and stat.S_ISDIR(status.st_mode)


def file_size(path: AnyPath) -> int | None:
    """Return the bytes of a regular file, None if there is none. Raises LinkError."""
    status = _status(path)
    return status.st_size if status is not None and stat.S_ISREG(status.st_mode) else None


def is_file(path: AnyPath) -> bool:
    """Return whether there is a regular file. Raises LinkError."""
    return file_size(path) is not None


def is_writable(folder: AnyPath) -> bool:
    """Return whether there is a folder in which this process may create files. Raises LinkError."""
    try:
        with _opened_folder(folder) as descriptor:
            return os.access(".", os.W_OK, dir_fd=descriptor)
    except _ABSENT:
        return False


def list_folder(folder: RootedPath, pattern: str = "*") -> list[RootedPath]:
    """Return the sorted paths in a folder whose names match a pattern; [] if there is no folder. Raises LinkError."""
    return [folder / name for name, _ in _entries(folder) if fnmatchcase(name, pattern)]


def find_links(folder: RootedPath) -> Iterator[RootedPath]:
    """Iterate over the links below a folder, none if they are allowed."""
    if not folder.allow_links:
        yield from (path for path, kind in _iter_entries(folder, ()) if kind == "link")


def iter_files(folder: AnyPath, ignored: Container[str] = ()) -> Iterator[RootedPath]:
    """Iterate over all files and links below a folder, sorted within each folder. Links to folders are not followed.

    ignored  names of folders in it that are left out
    Memory does not grow with their number.
    """
    top = folder if isinstance(folder, RootedPath) else RootedPath(folder, allow_links=True)
    return (path for path, _ in _iter_entries(top, ignored))


def _entries(folder: AnyPath) -> list[tuple[str, str]]:
    """Return the sorted names in a folder with their kinds, "file", "folder" or "link"; [] if there is no folder."""
    try:
        with _opened_folder(folder) as place:
            descriptor = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=place)
            try:
                with os.scandir(descriptor) as entries:
                    return sorted((entry.name, _kind(entry)) for entry in entries)
            finally:
                os.close(descriptor)
    except _ABSENT:
        return []
    except FileError:
        raise
    except OSError as error:
        raise _read_error(folder, error) from error


def _kind(entry: os.DirEntry[str]) -> str:
    if entry.is_symlink():
        return "link"
    return "folder" if entry.is_dir(follow_symlinks=False) else "file"


def _iter_entries(folder: RootedPath, ignored: Container[str]) -> Iterator[tuple[RootedPath, str]]:
    entries = _entries(folder)
    yield from ((folder / name, kind) for name, kind in entries if kind != "folder")
    for name, kind in entries:
        if kind == "folder" and name not in ignored:
            yield from _iter_entries(folder / name, ())


# ---- writing -------------------------------------------------------------------------------------


@contextmanager
def open_atomically(path: AnyPath) -> Iterator[HashingFile]:
    """Provide a file that appears at `path`, whole and durable, when the block ends without an error."""
    make_folder(path.parent)
    partial = f".{path.name}.{secrets.token_hex(8)}{PARTIAL_SUFFIX}"
    with _opened_folder(path.parent) as folder:
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            descriptor = os.open(partial, flags, 0o644, dir_fd=folder)
        except OSError as error:
            raise write_error(path, error) from error
        try:
            file = HashingFile(descriptor, path)
            try:
                yield file
                file.flush()
                os.fsync(descriptor)
            finally:
                file.detach()
                os.close(descriptor)
            if _is_refused_link(file.destination, folder):
                raise LinkError(file.destination)
            os.replace(partial, file.destination.name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException as error:
            with suppress(OSError):  # the original error is more informative
                os.unlink(partial, dir_fd=folder)
            if isinstance(error, OSError) and not isinstance(error, UserError):
                raise write_error(path, error) from error
            raise
        _fsync_folder(folder, path.parent)


def write_error(path: AnyPath, error: OSError) -> FileError:
    """Return the error to raise if `path` could not be written."""
    if error.errno in _NO_SPACE:
        return NoSpaceError(
            f"no room to write {path} ({error.strerror}). Finished files are kept. Free some space and run "
            "the same command again"
        )
    return FileError(
        f"{path} cannot be written ({error.strerror or error}). Finished files are kept. Check that the folder "
        "exists and is writable, and run the same command again"
    )


def write_atomically(path: AnyPath, data: bytes) -> str:
    """Write `data` to `path` in one commit and return its SHA-256."""
    with open_atomically(path) as file:
        file.write(data)
    return file.sha256


def make_folder(path: AnyPath) -> None:
    """Create a folder and its parents durably. An existing folder is not an error."""
    if isinstance(path, RootedPath) and not path.parts:
        path = path.root
    if is_folder(path):
        return
    if path.parent == path:
        raise FileError(f"{path} does not exist")
    make_folder(path.parent)
    try:
        with _open_parent(path) as (folder, name):
            os.mkdir(name, 0o755, dir_fd=folder)
            _fsync_folder(folder, path.parent)
    except FileExistsError:
        if is_folder(path):
            return
        raise FileError(
            f"{path} is not a folder. Choose another path, or move that file away"
        ) from None
    except FileError:
        raise
    except OSError as error:
        raise write_error(path, error) from error


def create_file(path: AnyPath) -> IO[bytes]:
    """Open a file for writing in place, empty, where a whole file is not needed. Raises FileError."""
    try:
        descriptor = _open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    except FileError:
        raise
    except OSError as error:
        raise write_error(path, error) from error
    return os.fdopen(descriptor, "wb")


def open_lock(path: AnyPath, *, create: bool) -> io.FileIO:
    """Open a file for locking. Raises OSError, such as LinkError.

    create  create it if it is missing, which needs the permission to write
    """
    return io.FileIO(_open(path, os.O_RDWR | os.O_CREAT if create else _READ), "rb")


def move_file(path: AnyPath, destination: AnyPath) -> None:
    """Give a file another name in the same folder, in place of any file of that name."""
    with _open_parent(path) as (folder, name):
        os.replace(name, destination.name, src_dir_fd=folder, dst_dir_fd=folder)


def remove_file(path: AnyPath) -> None:
    """Remove a file if it exists; of a link, the link itself."""
    with suppress(*_ABSENT), _open_parent(path) as (folder, name):
        os.unlink(name, dir_fd=folder)


def remove_partial_files(
    folder: AnyPath, suffix: str = PARTIAL_SUFFIX, keep: Container[AnyPath] = ()
) -> int:
    """Remove the hidden files that interrupted processes left below `folder`, and return their number.

    suffix  ending of their names
    keep    files of this process, which are still in use
    """
    number = 0
    for path in iter_files(folder):
        if path.name.startswith(".") and path.name.endswith(suffix) and path not in keep:
            remove_file(path)
            number += 1
    return number


def scratch_file(folder: RootedPath | None = None) -> IO[bytes]:
    """Return a temporary file without a name, in a root or in the machine's temporary folder."""
    return tempfile.TemporaryFile(dir=None if folder is None else folder.root)


@contextmanager
def scratch_folder() -> Iterator[RootedPath]:
    """Provide a temporary folder of this machine."""
    with tempfile.TemporaryDirectory() as folder:
        yield RootedPath(Path(folder))


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


# ---- reading -------------------------------------------------------------------------------------


def open_regular(path: AnyPath) -> io.FileIO:
    """Open a regular file for reading, unbuffered.

    Raises FileNotFoundError if the file is missing, and FileError if it cannot be opened or is not a regular file.
    Opening a pipe would block, and a device has no end.
    """
    try:
        descriptor = _open(path, _READ)
    except (FileNotFoundError, FileError):
        raise
    except (OSError, ValueError) as error:  # a path with a NUL is a ValueError
        raise _read_error(path, error) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileError(f"{path} is not a regular file. Restore it, or correct the path")
    return io.FileIO(descriptor, "rb")


def open_size(file: io.FileIO) -> int:
    """Return the bytes of an open file."""
    return os.fstat(file.fileno()).st_size


def read_at(file: io.FileIO, size: int, offset: int) -> bytes:
    """Read `size` bytes from an offset of an open file, fewer only at its end. Raises OSError.

    The caller has compared the size with a limit. One call of the system returns at most 2 GiB.
    """
    data = os.pread(file.fileno(), size, offset)
    while 0 < len(data) < size:
        more = os.pread(file.fileno(), size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def read_regular(path: AnyPath, most: int | None = None) -> bytes:
    """Return the bytes of a regular file. Raises the errors of `open_regular`.

    most  largest number of bytes; a larger file is a FileError, and is not read
    """
    with open_regular(path) as file:
        size = open_size(file)
        if most is not None and size > most:
            raise FileError(
                f"{path} has {size:,} bytes, more than the {most:,} that such a file can have. Restore it, or delete it"
            )
        try:
            return file.readall() if most is None else read_at(file, size, 0)
        except OSError as error:
            raise _read_error(path, error) from error


def map_file(file: io.FileIO | IO[bytes]) -> mmap.mmap:
    """Map an open file into memory, read-only. The mapped pages outlive the file's descriptor."""
    return mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)


def sha256_file(path: AnyPath) -> str:
    """Return the SHA-256 of a regular file, computed in constant memory. Raises the errors of `open_regular`."""
    with open_regular(path) as file:
        try:
            return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise _read_error(path, error) from error


def _read_error(path: AnyPath, error: OSError | ValueError) -> FileError:
    return FileError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})")


# ---- digests -------------------------------------------------------------------------------------


def canonical_json(value: Any) -> bytes:
    """Return the canonical text of a JSON value: sorted keys, no white space."""
    return _CANONICAL.encode(value).encode()


def sha256_json(value: Any) -> str:
    """Return the SHA-256 of the canonical text of a JSON value."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def sha256_keys(keys: Iterator[str] | list[str]) -> str:
    """Return the SHA-256 of record keys in their order. Equal digests mean equal rows."""
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()


SHORT = 8
"""Number of hexadecimal digits of a fingerprint in the name of a folder."""
