"""Files that are either whole or absent, whatever happens to the process that writes them.

The commit of a file: a unique temporary name beside it, write, fsync, rename, fsync of the folder.
Every operation goes through this module's `os`, so that a test can stop the world after any of them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

PARTIAL_SUFFIX = ".partial"
_BUFFER_BYTES = 2**20
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class NoSpaceError(UserError, OSError):
    """A file that the disk, or a limit on files, has no room for; nothing of it stays."""


class HashingFile:
    """A file being written: knows its length and its SHA-256, and writes in large pieces."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._hash = hashlib.sha256()
        self._buffer = bytearray()
        self.bytes = 0

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        self._buffer += data
        self.bytes += len(data)
        if len(self._buffer) >= _BUFFER_BYTES:
            self.flush()
        return len(data)

    def flush(self) -> None:
        """Hand what was written so far to the operating system."""
        view = memoryview(bytes(self._buffer))
        while len(view) > 0:
            view = view[os.write(self._descriptor, view) :]
        self._buffer.clear()

    def tell(self) -> int:
        return self.bytes

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


@contextmanager
def open_atomically(path: Path) -> Iterator[HashingFile]:
    """A file that appears under `path`, whole and durable, when the block ends without an error."""
    make_folder(path.parent)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}{PARTIAL_SUFFIX}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        try:
            file = HashingFile(descriptor)
            yield file
            file.flush()
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(partial, path)
    except BaseException as error:
        if os.path.exists(partial):
            os.unlink(partial)
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            raise NoSpaceError(
                f"no room to write {path} ({error.strerror}); what is finished stays: make room and run "
                "the same command again"
            ) from error
        raise
    _fsync_folder(path.parent)


def write_atomically(path: Path, data: bytes) -> str:
    """Write `data` to `path` in one commit; its SHA-256."""
    with open_atomically(path) as file:
        file.write(data)
    return file.sha256


def make_folder(path: Path) -> None:
    """Create a folder and its parents, durably; no error where it exists."""
    if path.is_dir():
        return
    make_folder(path.parent)
    try:
        os.mkdir(path, 0o755)
    except FileExistsError:
        return
    _fsync_folder(path.parent)


def remove_partial_files(folder: Path) -> int:
    """Remove what interrupted commits left below `folder`; how many there were."""
    leftovers = list(folder.rglob(f".*{PARTIAL_SUFFIX}"))
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in constant memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(value: Any) -> bytes:
    """A JSON value's one text: sorted keys, no white space."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def sha256_json(value: Any) -> str:
    """SHA-256 of a JSON value's canonical text."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def sha256_keys(keys: Iterator[str] | list[str]) -> str:
    """SHA-256 of record keys in their order: equal digests mean equal rows."""
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()
