"""Files and folders of any kind, by their path: `file_at(path)` is what can be done with one.

A plain `Path` is the user's own, and links in it are followed. What is inside a store may be untrusted; its
paths are `RootedPath`s (rooted_paths.py), of this machine (local_files.py) or of a bucket (bucket_files.py).
`file_at` takes all of these, and nothing else opens a RootedPath.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import os
import re
import tempfile
import time
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeAlias

from permafrost.core.errors import ConfigError, FileError, quote, require
from permafrost.storage import buckets, local_files
from permafrost.storage.bucket_files import BucketFile, RangedFile
from permafrost.storage.local_files import PARTIAL_SUFFIX, LocalFile
from permafrost.storage.rooted_paths import AnyPath, RootedPath

FolderEntry: TypeAlias = os.DirEntry[str] | buckets.Entry
"""File or folder as `scan` lists it."""
_STRAY = re.compile(r"\.|~\$|.*[ (]conflicted copy\b|.*\.sync-conflict-\d{8}-", re.I)
_ODD = re.compile(r"[\x00-\x08\x0b-\x1f\ufeff]|,\s*$|^(<{7}|={7}|>{7})( |$)")


def file_at(path: AnyPath) -> LocalFile | BucketFile:
    """Return the file or folder of a path, which need not exist.

    Its methods are those of `LocalFile`: `exists`, `is_file`, `is_folder`, `size`, `stamp`, `paths`, `iter_files`,
    `read`, `open`, `open_ranges`, `sha256`, `write`, `open_atomically`, `commit`, `create`, `move`, `remove`.
    """
    return BucketFile(path) if isinstance(path, RootedPath) and path.is_remote else LocalFile(path)


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
    require(
        is_inside,
        f"{name[:200]!r} leads out of {folder}, and no data set may name files elsewhere on this machine",
        FileError,
    )
    return path


def is_stray(name: str) -> bool:
    """Return whether a file is hidden, or the copy of a conflict that a program which synchronizes folders made."""
    return _STRAY.match(name) is not None


def iter_lines(path: AnyPath, option: str = "") -> Iterator[str]:
    """Iterate over the lines of a text with one entry per line, without their ends and a byte-order mark.

    Args:
        path: The file.
        option: Option and value that name it, for messages; empty shows the path.

    Raises:
        ConfigError: If it is not UTF-8, or if a line ends in a comma, or has a control character or the mark of a
            conflict of versions.
    """
    with io.TextIOWrapper(io.BufferedReader(file_at(path).open()), encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, start=1):
                if odd := _ODD.search(line.rstrip("\n")):
                    raise ConfigError(
                        f"{option or path}, line {number} has {quote(odd[0])}, which is of no entry; remove it, and "
                        "save the file as UTF-8 with one entry per line"
                    )
                yield line.rstrip("\n")
        except UnicodeDecodeError as fault:
            raise ConfigError(
                f"{option or path} cannot be read: {fault}; save it as UTF-8"
            ) from fault


def entry_bytes(entry: FolderEntry) -> int:
    """Return the size in bytes of a file that was listed."""
    return entry.size if isinstance(entry, buckets.Entry) else entry.stat().st_size


def remove_partial_files(
    folder: AnyPath,
    suffix: str = PARTIAL_SUFFIX,
    keep: Container[AnyPath] = (),
    ignored: Container[str] = (),
) -> None:
    """Remove the hidden files that interrupted processes left below `folder`.

    Args:
        folder: Folder to search.
        suffix: Ending of their names.
        keep: Files of this process, which are still in use.
        ignored: Names of folders in it, in which other processes may write.
    """
    for path in file_at(folder).iter_files(ignored):
        if path.name.startswith(".") and path.name.endswith(suffix) and path not in keep:
            file_at(path).remove()


def remove_old_partial_files(folder: Path, start: str) -> None:
    """Remove the files of a folder that interrupted processes left, a minute ago or earlier, as others may write there.

    Args:
        folder: Folder on this machine.
        start: Beginning of the names of the files that were to be written.
    """
    for path in folder.glob(f".{start}*{PARTIAL_SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):  # removed by another process
            if time.time() - path.lstat().st_mtime > _OLD_SECONDS:
                path.unlink()


_OLD_SECONDS = 60


@contextmanager
def scratch_folder() -> Iterator[RootedPath]:
    """Provide a temporary folder of this machine."""
    with tempfile.TemporaryDirectory() as folder:
        yield RootedPath(Path(folder))


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


def map_file(file: io.FileIO | IO[bytes]) -> mmap.mmap:
    """Map an open file into memory, read-only. The mapped pages outlive the file's descriptor."""
    return mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
