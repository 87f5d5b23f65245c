"""Paths that no link leads out of, and what can be asked of one: its kind, its size, the names in its folder.

A plain `Path` is the user's own, and links in it are followed. What is inside a store may come from a stranger. Its
paths are `RootedPath`s: each folder below the root is opened from the one above it and never through a link, so that
nothing can change between a check and its use. The root may also be a folder of a bucket, which has no links;
buckets.py sends the requests for what is below. Every function here and in files.py takes all of these, and nothing
else opens a RootedPath.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TypeAlias, TypeGuard

from permafrost.storage import buckets
from permafrost.storage.addresses import Bucket, is_address, parse_bucket
from permafrost.core.errors import FileError

if TYPE_CHECKING:
    from collections.abc import Container, Iterator

_FOLDER = os.O_DIRECTORY | getattr(os, "O_PATH", os.O_RDONLY)
ABSENT = (FileNotFoundError, NotADirectoryError)
"""Errors of a path that does not exist."""


class LinkError(FileError):
    """Symbolic link where none is allowed."""

    def __init__(self, path: RootedPath) -> None:
        super().__init__(
            f"{path} is a symbolic link, and {path.root} may not contain any, because a link can lead to other files "
            "of this machine. Replace it by what it links to, or allow the links of a store of your own with "
            "store.allow_links=true"
        )


@dataclass(frozen=True, order=True)
class RootedPath:
    """Path of a folder, or of a file below it, that is opened without following any link below the folder.

    It is no `os.PathLike`: only the functions of this module and of files.py open it.
    """

    root: Path | Bucket
    """The folder, whose own path may contain links, or a folder of a bucket."""
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


def rooted(text: str) -> RootedPath:
    """Return a folder of this machine, or of a bucket, as a root. Raises ConfigError for an address that is none."""
    if is_address(text):
        return RootedPath(Bucket(parse_bucket("the path", text)))
    return RootedPath(Path(text))


def is_in_bucket(path: AnyPath) -> TypeGuard[RootedPath]:
    """Return whether a path is in a bucket. Its text is then its address."""
    return isinstance(path, RootedPath) and isinstance(path.root, Bucket)


def bucket_of(path: RootedPath) -> Bucket:
    """Return the bucket of a path in one."""
    assert isinstance(path.root, Bucket)
    return path.root


def refuses_links(path: AnyPath) -> TypeGuard[RootedPath]:
    """Return whether the path is below a root that may not contain links."""
    return isinstance(path, RootedPath) and not path.allow_links and len(path.parts) > 0


@contextmanager
def opened_folder(path: AnyPath) -> Iterator[int]:
    """Provide a descriptor of a folder, for the `dir_fd` of system calls. Raises OSError, or LinkError."""
    assert not is_in_bucket(path), path
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


def local_root(path: RootedPath) -> Path:
    """Return the root of a path that is not in a bucket."""
    assert isinstance(path.root, Path), path
    return path.root


@contextmanager
def open_parent(path: AnyPath) -> Iterator[tuple[int, str]]:
    """Provide a descriptor of the folder of a path, and the name in it.

    An OSError in the block is raised with the whole path; if its reason is a link, as LinkError.
    """
    if isinstance(path, RootedPath) and not path.parts:
        path = local_root(path)
    with opened_folder(path.parent) as folder:
        try:
            yield folder, path.name or "."
        except FileError:
            raise
        except OSError as error:
            raise _error_at(folder, path, error) from error


def _error_at(folder: int, path: AnyPath, error: OSError) -> OSError:
    """Return the error to raise for a path in an open folder: LinkError if it is a link that may not be there."""
    if is_refused_link(path, folder):
        return LinkError(path)
    return type(error)(error.errno, error.strerror, str(path))


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


def exists(path: AnyPath) -> bool:
    """Return whether there is a file or a folder. Raises LinkError, also for a link to nothing."""
    if is_in_bucket(path):
        return _object_size(path) is not None or is_folder(path)
    return _status(path) is not None


def is_folder(path: AnyPath) -> bool:
    """Return whether there is a folder. Raises LinkError."""
    if is_in_bucket(path):
        return next(buckets.iter_objects(str(path)), None) is not None
    status = _status(path)
    return status is not None and stat.S_ISDIR(status.st_mode)


def file_size(path: AnyPath) -> int | None:
    """Return the bytes of a regular file, None if there is none. Raises LinkError."""
    if is_in_bucket(path):
        return _object_size(path)
    status = _status(path)
    return status.st_size if status is not None and stat.S_ISREG(status.st_mode) else None


def is_file(path: AnyPath) -> bool:
    """Return whether there is a regular file. Raises LinkError."""
    return file_size(path) is not None


def is_writable(folder: AnyPath) -> bool:
    """Return whether there is a folder in which this process may create files; of a bucket this is taken for granted.

    Raises LinkError.
    """
    if is_in_bucket(folder):
        return True
    try:
        with opened_folder(folder) as descriptor:
            return os.access(".", os.W_OK, dir_fd=descriptor)
    except ABSENT:
        return False


def list_folder(folder: RootedPath, pattern: str = "*") -> list[RootedPath]:
    """Return the sorted paths in a folder whose names match a pattern; [] if there is no folder. Raises LinkError."""
    return [folder / name for name, _ in _entries(folder) if fnmatchcase(name, pattern)]


_listed: dict[str, dict[str, int]] = {}
"""Sizes of the objects below some folders of buckets, by their names."""


@contextmanager
def listed_once(folder: RootedPath) -> Iterator[None]:
    """Answer questions for the sizes of files below a bucket's folder from one listing, in place of a request for each.

    For a block that asks for many files and writes none of them. A local folder is asked each time.
    """
    address = str(folder)
    if not is_in_bucket(folder) or address in _listed:
        yield
        return
    _listed[address] = dict(buckets.iter_objects(address))
    try:
        yield
    finally:
        del _listed[address]


def _object_size(path: RootedPath) -> int | None:
    address = str(path)
    for folder, sizes in _listed.items():
        if address.startswith(f"{folder}/"):
            return sizes.get(address[len(folder) + 1 :])
    facts = buckets.object_facts(address)
    return None if facts is None else facts.size


def find_links(folder: RootedPath) -> Iterator[RootedPath]:
    """Iterate over the links below a folder, none if they are allowed. A bucket has none."""
    if not folder.allow_links and not is_in_bucket(folder):
        yield from (path for path, kind in _iter_entries(folder, ()) if kind == "link")


def iter_files(folder: AnyPath, ignored: Container[str] = ()) -> Iterator[RootedPath]:
    """Iterate over all files and links below a folder, sorted within each folder. Links to folders are not followed.

    ignored  names of folders in it that are left out
    Memory does not grow with their number.
    """
    top = folder if isinstance(folder, RootedPath) else RootedPath(folder, allow_links=True)
    if is_in_bucket(top):
        names = (name for name, _ in buckets.iter_objects(str(top)))
        return (top / name for name in names if name.partition("/")[0] not in ignored)
    return (path for path, _ in _iter_entries(top, ignored))


def _entries(folder: AnyPath) -> list[tuple[str, str]]:
    """Return the sorted names in a folder with their kinds, "file", "folder" or "link"; [] if there is no folder."""
    if is_in_bucket(folder):
        return [(entry.name, entry.kind) for entry in buckets.list_entries(str(folder))]
    try:
        with opened_folder(folder) as place:
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
        raise read_error(folder, error) from error


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


def read_error(path: AnyPath, error: OSError | ValueError) -> FileError:
    return FileError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})")
