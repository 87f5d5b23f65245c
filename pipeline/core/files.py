"""Atomic, durable file writes: a file is either whole or absent, even if the process that writes it dies.

A commit writes to a unique temporary name in the same folder, calls fsync, renames the file, and calls fsync on the
folder. Every operation goes through this module's `os`, so that a test can simulate a crash after any of them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import stat
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import google_crc32c

from pipeline.core.errors import UserError

if TYPE_CHECKING:
    import io
    from collections.abc import Container, Iterator

PARTIAL_SUFFIX = ".partial"
_BUFFER_BYTES = 2**20
_CANONICAL = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
)
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FOLDERS_WITHOUT_FSYNC = (errno.EINVAL, errno.ENOTSUP)
"""Errors of file systems that do not support fsync of a folder, such as some network mounts."""


class FileError(UserError, OSError):
    """File that cannot be read or written. The message includes the operating system's reason."""


class NoSpaceError(FileError):
    """File that exceeds the disk space, the quota or the file size limit. No part of the file is kept."""


class HashingFile:
    """File opened for writing that keeps its length, SHA-256 and CRC-32C up to date and writes in large blocks."""

    def __init__(self, descriptor: int, destination: Path) -> None:
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


@contextmanager
def open_atomically(path: Path) -> Iterator[HashingFile]:
    """Provide a file that appears at `path`, whole and durable, when the block ends without an error."""
    make_folder(path.parent)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}{PARTIAL_SUFFIX}")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
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
        os.replace(partial, file.destination)
    except BaseException as error:
        with suppress(OSError):  # the original error is more informative
            if os.path.exists(partial):
                os.unlink(partial)
        if isinstance(error, OSError) and not isinstance(error, UserError):
            raise write_error(path, error) from error
        raise
    _fsync_folder(path.parent)


def write_error(path: Path, error: OSError) -> FileError:
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


def write_atomically(path: Path, data: bytes) -> str:
    """Write `data` to `path` in one commit and return its SHA-256."""
    with open_atomically(path) as file:
        file.write(data)
    return file.sha256


def make_folder(path: Path) -> None:
    """Create a folder and its parents durably. An existing folder is not an error."""
    if path.is_dir():
        return
    if path.parent == path:
        raise FileError(f"{path} does not exist")
    make_folder(path.parent)
    try:
        os.mkdir(path, 0o755)
    except FileExistsError:
        if path.is_dir():
            return
        raise FileError(
            f"{path} is not a folder. Choose another path, or move that file away"
        ) from None
    except OSError as error:
        raise write_error(path, error) from error
    _fsync_folder(path.parent)


def iter_files(folder: Path) -> Iterator[Path]:
    """Iterate over all files below a folder, sorted within each folder. Memory does not grow with their number."""
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            yield Path(parent) / name


def remove_partial_files(
    folder: Path, suffix: str = PARTIAL_SUFFIX, keep: Container[Path] = ()
) -> int:
    """Remove the hidden files that interrupted processes left below `folder`, and return their number.

    suffix  ending of their names
    keep    files of this process, which are still in use
    """
    number = 0
    for path in iter_files(folder):
        if path.name.startswith(".") and path.name.endswith(suffix) and path not in keep:
            path.unlink(missing_ok=True)
            number += 1
    return number


def _fsync_folder(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _FOLDERS_WITHOUT_FSYNC:
            raise write_error(folder, error) from error


def open_regular(path: Path) -> io.FileIO:
    """Open a regular file for reading, unbuffered.

    Raises FileNotFoundError if the file is missing, and FileError if it cannot be opened or is not a regular file.
    Opening a pipe would block, and a device has no end.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise FileError(f"{path} is not a regular file. Restore it, or correct the path")
        return path.open("rb", buffering=0)
    except (FileNotFoundError, FileError):
        raise
    except (OSError, ValueError) as error:  # a path with a NUL is a ValueError
        raise FileError(f"{path} cannot be read ({error})") from error


def read_regular(path: Path) -> bytes:
    """Return the bytes of a regular file. Raises the errors of `open_regular`."""
    with open_regular(path) as file:
        try:
            return file.readall()
        except OSError as error:
            raise FileError(f"{path} cannot be read ({error})") from error


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a regular file, computed in constant memory. Raises the errors of `open_regular`."""
    with open_regular(path) as file:
        try:
            return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise FileError(f"{path} cannot be read ({error})") from error


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
