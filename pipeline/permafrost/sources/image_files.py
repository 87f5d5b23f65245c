"""Image files in folders: their names, keys and masks, and names that occur twice."""

from __future__ import annotations

import hashlib
import io
import os
import posixpath
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
from PIL import Image

from permafrost.core import buckets
from permafrost.core.errors import ConfigError, FileError, UserError
from permafrost.core.files import read_regular
from permafrost.core.records import MAX_KEY_BYTES
from permafrost.core.rooted_paths import is_in_bucket
from permafrost.store.image_decoding import MAX_IMAGE_BYTES, ImageError, open_image

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from permafrost.core.rooted_paths import AnyPath


LONG_KEY_HEAD = 150
"""Number of leading bytes that are kept of a key that is too long."""


def escape_key(path: str) -> str:
    """Escape a relative path to a record's key: ASCII letters, digits, - and _, the rest percent-escaped UTF-8.

    `urllib.parse.unquote` restores the path, except for a key above the limit, which ends in a hash.
    """
    try:
        escaped = quote(path, safe="", errors="strict")
    except UnicodeEncodeError:
        raise ConfigError(f"the file name {path!r} is not UTF-8; rename the file") from None
    # quote() does not escape these two.
    escaped = escaped.replace(".", "%2E").replace("~", "%7E")
    return escaped if len(escaped) <= MAX_KEY_BYTES else _shorten(escaped)


def _shorten(escaped: str) -> str:
    head = escaped[:LONG_KEY_HEAD]
    last_escape = head.rfind("%")
    if last_escape > LONG_KEY_HEAD - len("%2E"):
        head = head[:last_escape]
    return f"{head}-{hashlib.blake2b(escaped.encode(), digest_size=16).hexdigest()}"


# ---- files -----------------------------------------------------------------------------------------


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


def sub_folders(folder: AnyPath) -> list[str]:
    """Return the sorted names of the folders in `folder` that are not hidden."""
    return sorted(e.name for e in _scan(folder) if e.is_dir() and not e.name.startswith("."))


def hidden_folders(folder: AnyPath) -> list[str]:
    """Return the sorted names of the folders in `folder` that begin with a dot and are left out."""
    return sorted(e.name for e in _scan(folder) if e.is_dir() and e.name.startswith("."))


def first_image(folder: AnyPath) -> str | None:
    """Return the name of an image directly in `folder`, or None."""
    images = (e.name for e in _scan(folder) if is_image_name(e.name) and e.is_file())
    return min(images, default=None)


def iter_images(root: AnyPath, folder: str) -> Iterator[tuple[str, int]]:
    """Yield (path relative to root, bytes) of every image in `folder` and below it, sorted by name."""
    for entry in sorted(_scan(root / folder), key=lambda entry: entry.name):
        path = f"{folder}/{entry.name}"
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from iter_images(root, path)
        elif is_image_name(entry.name):
            yield path, _entry_bytes(entry)


def read_file(root: AnyPath, path: str, size: int) -> bytes:
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


def stamp_of(folder: AnyPath) -> int:
    """Return a number that changes if a file is added to a folder or removed from it; of a bucket, or changed in it."""
    if is_in_bucket(folder):
        text = repr(buckets.list_entries(str(folder)))
        return int(hashlib.sha256(text.encode()).hexdigest()[:15], 16)
    return Path(str(folder)).stat().st_mtime_ns


def _scan(folder: AnyPath) -> Sequence[os.DirEntry[str] | buckets.Entry]:
    if is_in_bucket(folder):
        return buckets.list_entries(str(folder))
    try:
        with os.scandir(str(folder)) as entries:
            return list(entries)
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be read: {error.strerror}; correct data.path or data.root"
        ) from error


def _entry_bytes(entry: os.DirEntry[str] | buckets.Entry) -> int:
    if isinstance(entry, buckets.Entry):
        return entry.size
    try:
        return entry.stat().st_size
    except FileNotFoundError:
        raise ConfigError(
            f"{entry.path} is a link to a file that is missing; restore or remove it"
        ) from None


# ---- masks -----------------------------------------------------------------------------------------


def to_mask_png(data: bytes, path: str) -> bytes:
    """Convert a mask file to 8-bit gray PNG with unchanged values; such a file itself is returned as it is.

    A palette's indices become the gray values, as in PASCAL VOC. Black and white become 0 and 255.

    path  for messages
    """
    try:
        with open_image(data) as image:
            image.load()
            if image.format == "PNG" and image.mode == "L":
                return data
            values = _mask_values(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageError(f"mask {path} cannot be used: {error}") from error
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, format="PNG")
    return buffer.getvalue()


def _mask_values(image: Image.Image) -> NDArray[np.uint8]:
    """Return the values [H, W]; raise ValueError if they do not fit into one byte per pixel."""
    pixels: NDArray[Any] = np.asarray(image)
    if pixels.dtype == np.bool_:
        pixels = pixels * np.uint8(255)
    if image.mode in ("LA", "RGB", "RGBA"):
        colors = pixels[:, :, :1] if image.mode == "LA" else pixels[:, :, :3]
        pixels = pixels[:, :, 0]
        if (colors != pixels[:, :, None]).any():
            raise ValueError("it has colors; save it with one channel")
    values = pixels.astype(np.uint8)
    if pixels.ndim != 2 or (values != pixels).any():
        raise ValueError(f"its values ({image.mode}) do not fit into one byte per pixel")
    return values
