"""Image files below a folder: their enumeration and their bytes."""

from __future__ import annotations

import os
import posixpath
from typing import TYPE_CHECKING

from permafrost.core.errors import ConfigError, UserError
from permafrost.core.files import FileError, read_regular
from permafrost.store.pixels import MAX_IMAGE_BYTES, ImageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm")
"""Suffixes of image files, case-insensitive."""


class SourceFileError(UserError):
    """File that has changed since its source was listed."""


def is_image_name(name: str) -> bool:
    """Return whether a file is treated as an image; hidden files are not."""
    hidden = posixpath.basename(name).startswith(".")
    return not hidden and _suffix(name) in IMAGE_SUFFIXES


def image_suffix(name: str) -> str:
    """Return the suffix for a record's content: lower case, jpg for jpeg."""
    suffix = _suffix(name)
    return "jpg" if suffix == "jpeg" else suffix


def _suffix(name: str) -> str:
    return posixpath.splitext(name)[1][1:].lower()


def sub_folders(folder: Path) -> list[str]:
    """Return the sorted names of the folders in `folder` that are not hidden."""
    return sorted(e.name for e in _scan(folder) if e.is_dir() and not e.name.startswith("."))


def hidden_folders(folder: Path) -> list[str]:
    """Return the sorted names of the folders in `folder` that begin with a dot and are left out."""
    return sorted(e.name for e in _scan(folder) if e.is_dir() and e.name.startswith("."))


def first_image(folder: Path) -> str | None:
    """Return the name of an image directly in `folder`, or None."""
    images = (e.name for e in _scan(folder) if is_image_name(e.name) and e.is_file())
    return min(images, default=None)


def iter_images(root: Path, folder: str) -> Iterator[tuple[str, int]]:
    """Yield (path relative to root, bytes) of every image in `folder` and below it, sorted by name."""
    for entry in sorted(_scan(root / folder), key=lambda entry: entry.name):
        path = f"{folder}/{entry.name}"
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from iter_images(root, path)
        elif is_image_name(entry.name):
            yield path, _entry_bytes(entry)


def read_file(root: Path, path: str, size: int) -> bytes:
    """Read a file that had `size` bytes when it was listed."""
    require_image_bytes(size)
    try:
        data = read_regular(root / path, MAX_IMAGE_BYTES)
    except FileError as error:
        raise SourceFileError(str(error)) from error
    except FileNotFoundError as error:
        raise SourceFileError(f"{root / path} cannot be read: {error.strerror}") from error
    if len(data) != size:
        raise SourceFileError(
            f"{root / path} had {size} bytes when it was listed and has {len(data)} now; "
            "run the command again once the data no longer change"
        )
    return data


def require_image_bytes(size: int) -> None:
    """Raise ImageError if an image's file is larger than any image."""
    if size > MAX_IMAGE_BYTES:
        raise ImageError(
            f"its file has {size:,} bytes, more than the {MAX_IMAGE_BYTES:,} of an image"
        )


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be read: {error.strerror}; correct data.path or data.root"
        ) from error


def _entry_bytes(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except FileNotFoundError:
        raise ConfigError(
            f"{entry.path} is a link to a file that is missing; restore or remove it"
        ) from None
