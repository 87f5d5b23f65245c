"""Files and folders of any kind: what can be asked of one, atomic writes, and bounded reads.

A plain `Path` is the user's own, and links in it are followed. What is inside a store may be untrusted; its
paths are `RootedPath`s (rooted_paths.py), of this machine (local_files.py) or of a bucket (bucket_files.py). Every
function here takes all of these, and nothing else opens a RootedPath.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import os
import tempfile
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, TypeAlias, TypeVar

from permafrost.core.errors import FileError
from permafrost.storage import buckets, local_files
from permafrost.storage.bucket_files import BucketFiles, RangedFile
from permafrost.storage.local_files import PARTIAL_SUFFIX, HashingFile, LocalFiles
from permafrost.storage.rooted_paths import AnyPath, LinkError, RootedPath

T = TypeVar("T")
R = TypeVar("R")

FolderEntry: TypeAlias = os.DirEntry[str] | buckets.Entry
"""File or folder as `scan_folder` lists it."""

_LOCAL = LocalFiles()
_BUCKET = BucketFiles()


def _kind(path: AnyPath) -> LocalFiles | BucketFiles:
    """Return the operations on a path."""
    return _BUCKET if isinstance(path, RootedPath) and path.is_remote else _LOCAL


# ---- questions -----------------------------------------------------------------------------------


def exists(path: AnyPath) -> bool:
    """Return whether there is a file or a folder.

    Raises:
        LinkError: If the path has a link where none is allowed, also one to nothing.
    """
    return _kind(path).exists(path)


def is_folder(path: AnyPath) -> bool:
    """Return whether there is a folder.

    Raises:
        LinkError: If the path has a link where none is allowed.
    """
    return _kind(path).is_folder(path)


def file_size(path: AnyPath) -> int | None:
    """Return the size of a regular file in bytes, None if there is none.

    Raises:
        LinkError: If the path has a link where none is allowed.
    """
    return _kind(path).size(path)


def is_file(path: AnyPath) -> bool:
    """Return whether there is a regular file.

    Raises:
        LinkError: If the path has a link where none is allowed.
    """
    return file_size(path) is not None


def file_stamp(path: AnyPath) -> tuple[int, int | str]:
    """Return the bytes of a file, and when it and its entry were last changed; of an object its ETag, which changes."""
    return _kind(path).stamp(path)


def folder_stamp(folder: AnyPath) -> int:
    """Return a number that changes if a file is added to a folder or removed from it; of a bucket, or changed in it."""
    return _kind(folder).folder_stamp(folder)


def peek(path: AnyPath, size: int) -> bytes:
    """Return the first `size` bytes of a file, as far as they can be read without a request to a bucket."""
    return _kind(path).peek(path, size)


def is_writable(folder: AnyPath) -> bool:
    """Return whether there is a folder in which this process may create files; of a bucket this is taken for granted.

    Raises:
        LinkError: If the path has a link where none is allowed.
    """
    return _kind(folder).is_writable(folder)


def named_file(name: str, folder: Path, *caches: Path) -> Path:
    """Return the path of a file that an untrusted file names, if it and its links stay within a folder of the data.

    Args:
        name: Path, relative to the first folder or absolute.
        folder: Folder of the data.
        *caches: Further folders in which their files may be.

    Raises:
        FileError: If it leads elsewhere, or is not a path.
    """
    try:
        path = (folder / name).resolve()
        is_inside = any(path.is_relative_to(root.resolve()) for root in (folder, *caches))
    except (OSError, ValueError, RuntimeError) as error:  # of a NUL, or links in a circle
        raise FileError(f"{name[:200]!r} cannot be used as a path ({error})") from None
    if not is_inside:
        raise FileError(
            f"{name[:200]!r} leads out of {folder}, and no data set may name files elsewhere on this machine"
        )
    return path


def list_folder(folder: RootedPath, pattern: str = "*") -> list[RootedPath]:
    """Return the sorted paths in a folder whose names match a pattern; [] if there is no folder.

    Args:
        folder: Folder to list.
        pattern: Pattern of `fnmatch`, in which case matters.

    Raises:
        LinkError: If the path of the folder has a link where none is allowed.
    """
    entries = _kind(folder).entries(folder)
    return [folder / name for name, _ in entries if fnmatchcase(name, pattern)]


def list_files(folder: RootedPath) -> frozenset[str]:
    """Return the names of the files in a folder, none if there is no folder.

    Raises:
        LinkError: If the folder has a link, or is reached through one, where none is allowed.
    """
    entries = _kind(folder).entries(folder)
    if not folder.allow_links and (
        link := next((name for name, kind in entries if kind == "link"), "")
    ):
        raise LinkError(folder / link)
    return frozenset(name for name, kind in entries if kind != "folder")


def scan_folder(folder: AnyPath) -> Iterator[FolderEntry]:
    """Iterate over the entries of a folder as the system lists them, following links.

    Raises:
        OSError: If the folder cannot be listed.
    """
    return _kind(folder).scan(folder)


def entry_bytes(entry: FolderEntry) -> int:
    """Return the size in bytes of a file that was listed."""
    return entry.size if isinstance(entry, buckets.Entry) else entry.stat().st_size


def iter_files(folder: AnyPath, ignored: Container[str] = ()) -> Iterator[RootedPath]:
    """Iterate over all files and links below a folder, sorted within each folder. Links to folders are not followed.

    Memory does not grow with their number.

    Args:
        folder: Folder to search.
        ignored: Names of folders in it that are left out.
    """
    top = folder if isinstance(folder, RootedPath) else RootedPath(folder, allow_links=True)
    return _kind(top).iter_files(top, ignored)


def find_links(folder: RootedPath) -> Iterator[RootedPath]:
    """Iterate over the links below a folder; yield none if links are allowed or it is in a bucket."""
    return _kind(folder).links(folder)


def listing(folder: RootedPath) -> AbstractContextManager[None]:
    """Answer questions for the sizes of files below a bucket's folder from one listing, in place of a request for each.

    For a block that asks for many files and writes none of them. A local folder is asked each time.
    """
    return _kind(folder).listing(folder)


# ---- writing -------------------------------------------------------------------------------------


def open_atomically(path: AnyPath) -> AbstractContextManager[HashingFile]:
    """Provide a file that appears at `path`, whole and durable, when the block ends without an error.

    A file of a bucket is uploaded then, or added to the uploads that are collected (`collected_uploads`).

    Raises:
        FileError: If it cannot be written, such as NoSpaceError and LinkError.
    """
    return _kind(path).open_atomically(path)


def write_atomically(path: AnyPath, data: bytes) -> str:
    """Write `data` to `path` in one commit and return its SHA-256.

    Raises:
        FileError: If it cannot be written, such as NoSpaceError and LinkError.
    """
    with open_atomically(path) as file:
        file.write(data)
    return file.sha256


def commit_file(path: AnyPath, data: bytes) -> None:
    """Write a file that makes others valid.

    In a bucket, where no lock is certain, it is written only if it does not exist yet or is still the one that this
    process has read; the same bytes by another writer are a success.

    Raises:
        ReplacedError: If another writer has written an object with other bytes in the meantime.
        FileError: If it cannot be written.
    """
    _kind(path).commit(path, data)


def make_folder(path: AnyPath) -> None:
    """Create a folder and its parents durably. An existing folder is not an error. A bucket has no folders.

    Raises:
        FileError: If it cannot be created, such as LinkError.
    """
    _kind(path).make_folder(path)


def create_file(path: AnyPath) -> IO[bytes]:
    """Open a file for writing in place, empty, where a whole file is not needed.

    A file of a bucket appears when it is closed.

    Raises:
        FileError: If it cannot be opened.
    """
    return _kind(path).create(path)


def move_file(path: AnyPath, destination: AnyPath) -> None:
    """Give a file another name in the same folder, in place of any file of that name.

    Args:
        path: The file.
        destination: Its new path.
    """
    _kind(path).move(path, destination)


def remove_file(path: AnyPath) -> None:
    """Remove a file if it exists; of a link, the link itself."""
    _kind(path).remove(path)


def remove_empty_folder(path: AnyPath) -> None:
    """Remove a folder without files. A bucket has none."""
    _kind(path).remove_folder(path)


def remove_partial_files(
    folder: AnyPath, suffix: str = PARTIAL_SUFFIX, keep: Container[AnyPath] = ()
) -> None:
    """Remove the hidden files that interrupted processes left below `folder`.

    Args:
        folder: Folder to search.
        suffix: Ending of their names.
        keep: Files of this process, which are still in use.
    """
    for path in iter_files(folder):
        if path.name.startswith(".") and path.name.endswith(suffix) and path not in keep:
            remove_file(path)


def scratch_file(folder: RootedPath) -> IO[bytes]:
    """Return a temporary file without a name, on the disk of a root; for a bucket in its cache folder."""
    return _kind(folder).scratch(folder)


@contextmanager
def scratch_folder() -> Iterator[RootedPath]:
    """Provide a temporary folder of this machine."""
    with tempfile.TemporaryDirectory() as folder:
        yield RootedPath(Path(folder))


# ---- reading -------------------------------------------------------------------------------------


def open_regular(path: AnyPath, sha256: str | None = None) -> io.FileIO:
    """Open a regular file for reading, unbuffered.

    Anything else is refused, as opening a pipe would block, and a device has no end.

    Args:
        path: The file.
        sha256: Digest of the file, if it is known. It names the copy of a file in a bucket, and is compared when that
            arrives. A local file is not compared.

    Raises:
        FileNotFoundError: If the file is missing.
        FileError: If it cannot be opened or is not a regular file.
    """
    return _kind(path).open_regular(path, sha256)


def open_ranges(path: AnyPath) -> io.FileIO | RangedFile:
    """Open a regular file to read few bytes of it (`read_at`).

    Of a file in a bucket there is no copy, but a request for each read.

    Raises:
        FileNotFoundError: If the file is missing.
        FileError: If it cannot be opened or is not a regular file.
    """
    return _kind(path).open_ranges(path)


def open_size(file: io.FileIO | RangedFile) -> int:
    """Return the size of an open file in bytes."""
    return file.size if isinstance(file, RangedFile) else os.fstat(file.fileno()).st_size


def read_at(file: io.FileIO | RangedFile, size: int, offset: int) -> bytes:
    """Read `size` bytes from an offset of an open file, fewer only at its end.

    Args:
        file: The file.
        size: Number of bytes, which the caller has compared with a limit.
        offset: Offset of the first one.

    Raises:
        OSError: If they cannot be read.
    """
    if isinstance(file, RangedFile):
        return buckets.read_range(file.address, min(size, file.size - offset), offset)
    return local_files.read_fully(file, size, offset)


def will_read(file: io.FileIO | RangedFile, size: int, offset: int) -> None:
    """Have the system read bytes of an open local file ahead, which `read_at` then finds in memory."""
    if isinstance(file, io.FileIO) and hasattr(os, "posix_fadvise"):  # not on macOS
        with contextlib.suppress(OSError):
            os.posix_fadvise(file.fileno(), offset, size, os.POSIX_FADV_WILLNEED)


def read_regular(path: AnyPath, most: int | None = None, sha256: str | None = None) -> bytes:
    """Return the bytes of a regular file.

    Args:
        path: The file.
        most: Largest number of bytes; None for any. A larger file is not read.
        sha256: As in `open_regular`; a file of a bucket is read from the cache if it is known, and else from the
            bucket.

    Raises:
        FileNotFoundError: If the file is missing.
        FileError: If it cannot be read, is not a regular file, or is larger than `most`.
    """
    return _kind(path).read(path, most, sha256)


def read_committed(path: AnyPath, most: int) -> bytes:
    """Return the bytes of a file that `commit_file` may replace.

    Args:
        path: The file.
        most: Largest number of bytes. A larger file is not read.

    Raises:
        FileNotFoundError: If the file is missing.
        FileError: If it cannot be read, is not a regular file, or is larger than `most`.
    """
    return _kind(path).read_committed(path, most)


def read_each(read: Callable[[T], R], items: Iterable[T], folder: RootedPath) -> Iterator[R]:
    """Iterate over the results of a function that reads files of a folder, in the order of the items.

    In a bucket the next ones are read at the same time, as each request waits for its answer. Errors of the function
    are raised at their items.

    Args:
        read: Function of an item, called from other threads for a bucket.
        items: Items to read.
        folder: Folder of the files.
    """
    return _kind(folder).read_each(read, items, folder)


def fetch_file(path: AnyPath, sha256: str) -> None:
    """Download a file of a bucket to the cache unless it is there.

    Args:
        path: The file. For a local file nothing is done.
        sha256: Digest of the file.

    Raises:
        FileNotFoundError: If the file is missing.
        FileError: If it cannot be downloaded.
    """
    _kind(path).fetch(path, sha256)


def refuse_damaged_copy(path: AnyPath, sha256: str | None) -> None:
    """Tell a damaged file of a bucket from a damaged copy of it in the cache, which is removed.

    Readers call it before they say that a file is damaged.

    Args:
        path: The file.
        sha256: Digest of the file; None checks nothing.

    Raises:
        FileError: If the copy was damaged.
    """
    if sha256 is not None:
        _kind(path).refuse_damaged_copy(path, sha256)


def map_file(file: io.FileIO | IO[bytes]) -> mmap.mmap:
    """Map an open file into memory, read-only. The mapped pages outlive the file's descriptor."""
    return mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)


def sha256_file(path: AnyPath) -> str:
    """Return the SHA-256 of a regular file, computed in constant memory.

    Raises:
        FileNotFoundError: If the file is missing.
        FileError: If it cannot be read or is not a regular file.
    """
    return _kind(path).sha256(path)
