"""Files: atomic, durable writes, and bounded reads.

A file is either whole or absent, even if the process that writes it dies. A commit writes to a unique temporary name
in the same folder, calls fsync, renames the file, and calls fsync on the folder. Every operation that changes something
goes through this module's `os`, so that a test can simulate a crash after any of them. Paths are opened by
rooted_paths.py.

A file of a bucket is written to this machine first and is then uploaded whole (buckets.py). It is read from a copy in
the node's cache (object_cache.py), so that its readers seek in it and map it as they do with any file.
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
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import google_crc32c

from permafrost.storage import buckets
from permafrost.storage.bucket_files import (
    RangedFile,
    UploadedFile,
    collecting_uploads,
    scratch_file_of,
)
from permafrost.core.errors import FileError, UserError
from permafrost.storage.object_cache import cache_of
from permafrost.storage.rooted_paths import (
    ABSENT,
    AnyPath,
    LinkError,
    RootedPath,
    bucket_of,
    is_folder,
    is_in_bucket,
    is_refused_link,
    iter_files,
    local_root,
    open_parent,
    opened_folder,
    read_error,
    refuses_links,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator
    from concurrent.futures import Future

T = TypeVar("T")
R = TypeVar("R")

PARTIAL_SUFFIX = ".partial"
_BUFFER_BYTES = 2**20
_CANONICAL = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
)
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FOLDERS_WITHOUT_FSYNC = (errno.EINVAL, errno.ENOTSUP)
"""Errors of file systems that do not support fsync of a folder, such as some network mounts."""
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY
"""Flags with which opening a pipe or a terminal has no effect, so that its kind can be looked at."""


class NoSpaceError(FileError):
    """File that exceeds the disk space, the quota or the file size limit. No part of the file is kept."""


def _open(path: AnyPath, flags: int) -> int:
    """Return a descriptor of a file. Raises OSError, or LinkError."""
    links = os.O_NOFOLLOW if refuses_links(path) else 0
    with open_parent(path) as (folder, name):
        return os.open(name, flags | links, 0o644, dir_fd=folder)


class NamedFile(io.FileIO):
    """Open file whose errors have its path, as those of the functions that open a path do."""

    def __init__(self, descriptor: int, mode: str, path: AnyPath) -> None:
        super().__init__(descriptor, mode)
        self.name = str(path)
        self._path = path

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise write_error(self._path, error) from error

    def read(self, size: int | None = -1) -> Any:
        with _naming(self.name):
            return super().read(-1 if size is None else size)

    def readall(self) -> Any:
        with _naming(self.name):
            return super().readall()

    def readinto(self, buffer: Any) -> Any:
        with _naming(self.name):
            return super().readinto(buffer)


@contextmanager
def _naming(path: object) -> Iterator[None]:
    """Give the errors of a block the path of the open file that it reads."""
    try:
        yield
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from error


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
    def closed(self) -> bool:
        """True once it is closed; pyarrow asks for it."""
        return self._descriptor is None

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


# ---- writing -------------------------------------------------------------------------------------


@contextmanager
def open_atomically(path: AnyPath) -> Iterator[HashingFile]:
    """Provide a file that appears at `path`, whole and durable, when the block ends without an error."""
    if is_in_bucket(path):
        with _uploaded(path) as file:
            yield file
        return
    make_folder(path.parent)
    partial = f".{path.name}.{secrets.token_hex(8)}{PARTIAL_SUFFIX}"
    with opened_folder(path.parent) as folder:
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
            if is_refused_link(file.destination, folder):
                raise LinkError(file.destination)
            os.replace(partial, file.destination.name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException as error:
            with suppress(OSError):  # the original error is more informative
                os.unlink(partial, dir_fd=folder)
            if isinstance(error, OSError) and not isinstance(error, UserError):
                raise write_error(path, error) from error
            raise
        _fsync_folder(folder, path.parent)


@contextmanager
def _uploaded(path: RootedPath) -> Iterator[HashingFile]:
    """Provide a file of this machine that is uploaded when the block ends without an error, or added to `Uploads`."""
    with ExitStack() as opened:
        scratch = opened.enter_context(scratch_file_of(path))
        file = HashingFile(scratch.fileno(), path)
        try:
            yield file
            file.flush()
        except OSError as error:
            if isinstance(error, UserError):
                raise
            raise write_error(path, error) from error
        finally:
            file.detach()
        put = partial(buckets.put_object, str(file.destination), scratch, file.bytes, file.sha256)
        uploads = collecting_uploads()
        if uploads is None:
            put()
        else:
            uploads.add(put, opened.pop_all())


def write_error(path: AnyPath, error: OSError) -> FileError:
    """Return the error to raise if `path` could not be written, which may be one that says so."""
    if isinstance(error, FileError):
        return error
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


_versions: dict[str, str] = {}
"""ETags of the objects that this process has read by `read_committed` or written by `commit_file`."""


def commit_file(path: AnyPath, data: bytes) -> None:
    """Write a file that makes others valid.

    In a bucket, where no lock is certain, it is written only if there is none yet or if it is still the one that this
    process has read; the same bytes by another writer are a success. Raises FileError, such as ReplacedError.
    """
    if not is_in_bucket(path):
        write_atomically(path, data)
        return
    address = str(path)
    try:
        _versions[address] = buckets.create_object(address, data, _versions.get(address))
    except buckets.ReplacedError as error:
        raise buckets.ReplacedError(
            f"{error}, with other content. Finished files are kept; run the same command again, which compares it"
        ) from None


def read_committed(path: AnyPath, most: int) -> bytes:
    """Return the bytes of a file that `commit_file` may replace. Arguments and errors are those of `read_regular`."""
    if not is_in_bucket(path):
        return read_regular(path, most)
    data, facts = buckets.read_object(str(path), most)
    _versions[str(path)] = facts.e_tag
    return data


def make_folder(path: AnyPath) -> None:
    """Create a folder and its parents durably. An existing folder is not an error. A bucket has no folders."""
    if is_in_bucket(path):
        return
    if isinstance(path, RootedPath) and not path.parts:
        path = local_root(path)
    if is_folder(path):
        return
    if path.parent == path:
        raise FileError(f"{path} does not exist")
    make_folder(path.parent)
    try:
        with open_parent(path) as (folder, name):
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
    """Open a file for writing in place, empty, where a whole file is not needed. Raises FileError.

    A file of a bucket appears when it is closed.
    """
    if is_in_bucket(path):
        return UploadedFile(path)
    try:
        descriptor = _open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    except FileError:
        raise
    except OSError as error:
        raise write_error(path, error) from error
    return io.BufferedWriter(NamedFile(descriptor, "wb", path))


def open_lock(path: AnyPath, *, create: bool) -> io.FileIO:
    """Open a file for locking. Raises OSError, such as LinkError.

    create  create it if it is missing, which needs the permission to write
    """
    return io.FileIO(_open(path, os.O_RDWR | os.O_CREAT if create else _READ), "rb")


def move_file(path: AnyPath, destination: AnyPath) -> None:
    """Give a file another name in the same folder, in place of any file of that name."""
    if is_in_bucket(path):
        buckets.move_object(str(path), str(destination))
        return
    with open_parent(path) as (folder, name):
        os.replace(name, destination.name, src_dir_fd=folder, dst_dir_fd=folder)


def remove_file(path: AnyPath) -> None:
    """Remove a file if it exists; of a link, the link itself."""
    if is_in_bucket(path):
        buckets.remove_object(str(path))
        return
    with suppress(*ABSENT), open_parent(path) as (folder, name):
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
    if folder is None:
        return tempfile.TemporaryFile()
    return (
        scratch_file_of(folder)
        if is_in_bucket(folder)
        else tempfile.TemporaryFile(dir=local_root(folder))
    )


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


def open_regular(path: AnyPath, sha256: str | None = None) -> io.FileIO:
    """Open a regular file for reading, unbuffered.

    sha256  digest of the file, if it is known; it names the copy of a file in a bucket, and is compared when that
            arrives. A local file is not compared

    Raises FileNotFoundError if the file is missing, and FileError if it cannot be opened or is not a regular file.
    Opening a pipe would block, and a device has no end.
    """
    if is_in_bucket(path):
        return cache_of(bucket_of(path)).open(str(path), sha256)
    try:
        descriptor = _open(path, _READ)
    except (FileNotFoundError, FileError):
        raise
    except (OSError, ValueError) as error:  # a path with a NUL is a ValueError
        raise read_error(path, error) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileError(f"{path} is not a regular file. Restore it, or correct the path")
    return NamedFile(descriptor, "rb", path)


def open_size(file: io.FileIO | RangedFile) -> int:
    """Return the bytes of an open file."""
    return file.size if isinstance(file, RangedFile) else os.fstat(file.fileno()).st_size


def fetch_file(path: RootedPath, sha256: str) -> None:
    """Download a file of a bucket to the cache unless it is there. Raises FileNotFoundError or FileError."""
    cache_of(bucket_of(path)).fetch(str(path), sha256)


def refuse_damaged_copy(path: AnyPath, sha256: str | None) -> None:
    """Raise FileError if what is damaged is not a file of a bucket but its copy in the cache, which is removed.

    Readers call it before they say that a file is damaged.
    """
    if is_in_bucket(path) and sha256 is not None:
        cache = cache_of(bucket_of(path))
        if cache.remove_damaged(str(path), sha256):
            raise FileError(
                f"the copy of {path} in the cache {cache.folder} was damaged, and is removed; run the same command "
                "again, which downloads it"
            )


_REQUESTS_AT_ONCE = 16


def map_ahead(read: Callable[[T], R], items: Iterable[T], folder: RootedPath) -> Iterator[R]:
    """Iterate over the results of a function that reads files of a folder, in the order of the items.

    In a bucket the next ones are read at the same time, as each request waits for its answer. Raises the errors of the
    function, at their items.
    """
    if not is_in_bucket(folder):
        yield from map(read, items)
        return
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(read, item))
                if len(waiting) > _REQUESTS_AT_ONCE:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def read_at(file: io.FileIO | RangedFile, size: int, offset: int) -> bytes:
    """Read `size` bytes from an offset of an open file, fewer only at its end. Raises OSError.

    The caller has compared the size with a limit. One call of the system returns at most 2 GiB.
    """
    if isinstance(file, RangedFile):
        return buckets.read_range(file.address, min(size, file.size - offset), offset)
    with _naming(file.name):
        data = os.pread(file.fileno(), size, offset)
        while 0 < len(data) < size:
            more = os.pread(file.fileno(), size - len(data), offset + len(data))
            if not more:
                break
            data += more
    return data


def read_regular(path: AnyPath, most: int | None = None, sha256: str | None = None) -> bytes:
    """Return the bytes of a regular file. Raises the errors of `open_regular`.

    most    largest number of bytes; a larger file is a FileError, and is not read
    sha256  as in `open_regular`; a file of a bucket is read from the cache if it is known, and else from the bucket
    """
    if is_in_bucket(path) and sha256 is None:
        return buckets.read_object(str(path), most)[0]
    with open_regular(path, sha256) as file:
        size = open_size(file)
        if most is not None and size > most:
            raise FileError(
                f"{path} has {size:,} bytes, more than the {most:,} that such a file can have. Restore it, or delete it"
            )
        try:
            return file.readall() if most is None else read_at(file, size, 0)
        except OSError as error:
            raise read_error(path, error) from error


def map_file(file: io.FileIO | IO[bytes]) -> mmap.mmap:
    """Map an open file into memory, read-only. The mapped pages outlive the file's descriptor."""
    return mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)


def sha256_file(path: AnyPath) -> str:
    """Return the SHA-256 of a regular file, computed in constant memory. Raises the errors of `open_regular`."""
    if is_in_bucket(path):
        return buckets.object_sha256(str(path))
    with open_regular(path) as file:
        try:
            return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise read_error(path, error) from error


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
