"""Paths below a folder of this machine or of a bucket, which no link leads out of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias, TypeGuard

from permafrost.core.errors import FileError
from permafrost.core.json_entries import stays_inside
from permafrost.storage.addresses import Bucket, is_address, parse_bucket


class LinkError(FileError):
    """Symbolic link where none is allowed."""

    def __init__(self, path: RootedPath) -> None:
        super().__init__(
            f"{path} is a symbolic link, and {path.root} may not contain any, because a link can lead to other files "
            "of this machine; replace it by its target, or set store.allow_links=true for your own store"
        )


@dataclass(frozen=True, order=True)
class RootedPath:
    """Path of a folder, or of a file below it, that is opened without following any link below the folder.

    It is not an `os.PathLike`: only `file_at` (files.py) opens it.
    """

    root: Path | Bucket
    """The folder, whose own path may contain links, or a folder of a bucket."""
    parts: tuple[str, ...] = ()
    """Names below the root."""
    allow_links: bool = False
    """True follows links below the root as well."""

    @classmethod
    def of(cls, path: AnyPath, *, allow_links: bool = False) -> RootedPath:
        """Return a path as it is if it is rooted, otherwise as a root, below which links may be allowed."""
        return path if isinstance(path, RootedPath) else cls(path, allow_links=allow_links)

    def __truediv__(self, name: str) -> RootedPath:
        """Append a relative path. Raises FileError if it leaves the root."""
        if name and not stays_inside(name):
            raise FileError(f"the path {name[:80]!r} leaves {self}")
        return replace(self, parts=(*self.parts, *PurePosixPath(name).parts))

    def __str__(self) -> str:
        return str(self.root.joinpath(*self.parts))

    @property
    def is_remote(self) -> bool:
        """True in a bucket, whose files are downloaded before they are read; its text is then its address."""
        return isinstance(self.root, Bucket)

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
        """The folder that contains it.

        Raises:
            FileError: For the root.
        """
        if not self.parts:
            raise FileError(f"the folder of {self} is not below it")
        return replace(self, parts=self.parts[:-1])

    def with_name(self, name: str) -> RootedPath:
        """Return the path of another name in the same folder.

        Raises:
            FileError: For the root, or if the name leaves it.
        """
        return self.parent / name

    def absolute(self) -> RootedPath:
        """Return the same path with an absolute root, for processes with other working folders."""
        return replace(self, root=self.root.absolute())

    def below(self, folder: RootedPath) -> str:
        """Return the path relative to a folder of the same root, which contains it."""
        return "/".join(self.parts[len(folder.parts) :])


AnyPath: TypeAlias = Path | RootedPath
"""Path of a file of this machine, or of an object in a bucket."""


def user_path(text: str, cached_with: RootedPath | None = None) -> AnyPath:
    """Return a path of the user's, or the root that an address names.

    Args:
        text: Path or address.
        cached_with: Folder whose cache has the copies, if it is in a bucket.

    Raises:
        ConfigError: If the address cannot be used.
    """
    if not is_address(text):
        return Path(text)
    cache = (
        bucket_of(cached_with) if cached_with is not None and cached_with.is_remote else Bucket("")
    )
    return RootedPath(replace(cache, address=parse_bucket("the path", text)))


def is_absolute(text: str) -> bool:
    """Return whether a path has the same meaning in every folder: from the root of a machine, or an address."""
    return is_address(text) or PurePosixPath(text).is_absolute()


def name_of_path(text: str, parts: int = 1) -> str:
    """Return a path as it may leave the machine: as it was typed below the current folder, else its last parts.

    Args:
        text: Path, or address of a bucket.
        parts: Number of last parts that are kept of a path from elsewhere.
    """
    path = PurePosixPath(text)
    if is_absolute(text) or ".." in path.parts or text.startswith("~"):
        return "/".join([part for part in path.parts if part not in ("/", "..")][-parts:])
    return str(path) if text else text


def names_in(value: Any) -> Any:
    """Return a value of JSON whose texts are `name_of_path` wherever they are paths from elsewhere."""
    if isinstance(value, dict):
        return {name: names_in(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [names_in(entry) for entry in value]
    return name_of_path(value) if isinstance(value, str) else value


def rooted(text: str) -> RootedPath:
    """Return a folder of this machine, or of a bucket, as a root.

    Raises:
        ConfigError: If the address cannot be used.
    """
    return RootedPath.of(user_path(text))


def bucket_of(path: AnyPath) -> Bucket:
    """Return the bucket of a path in one."""
    assert isinstance(path, RootedPath), path
    assert isinstance(path.root, Bucket), path
    return path.root


def refuses_links(path: AnyPath) -> TypeGuard[RootedPath]:
    """Return whether the path is below a root that may not contain links."""
    return isinstance(path, RootedPath) and not path.allow_links and len(path.parts) > 0


def cache_limit(path: RootedPath) -> int | None:
    """Return the limit of the cache of copies in bytes; None if it is unlimited or there is no cache."""
    return path.root.cache_bytes if isinstance(path.root, Bucket) else None
