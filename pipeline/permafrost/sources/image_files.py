"""Image files in folders: their names, keys and masks, and names that occur twice."""

from __future__ import annotations

import logging
import os
import posixpath
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from permafrost.config.data import ImageTableDataConfig
from permafrost.core.errors import ConfigError, FileError, UserError, quote, require
from permafrost.core.json_entries import stays_inside
from permafrost.core.records import Content, ImageSource, Record
from permafrost.sources.classes import composed
from permafrost.sources.tally import Tally
from permafrost.storage.files import FolderEntry, entry_bytes, file_at, is_stray
from permafrost.storage.rooted_paths import AnyPath
from permafrost.store.image_decoding import (
    MAX_IMAGE_BYTES,
    ImageError,
    decodes_heif,
    open_image,
    picture_suffix,
    png_of,
)

if TYPE_CHECKING:
    from permafrost.sources.table_files import ListedRow

logger = logging.getLogger("permafrost.sources")


# ---- files -----------------------------------------------------------------------------------------


IMAGE_SUFFIXES = (
    *("jpg", "jpeg", "jpe", "jfif", "jif", "pjpeg", "pjp", "png", "apng", "webp", "avif"),
    *("bmp", "dib", "gif", "tif", "tiff", "ppm", "pgm", "pbm", "pnm"),
)
"""Suffixes of image files, case-insensitive."""
_IMAGE_SUFFIXES = frozenset(IMAGE_SUFFIXES)
HEIF_SUFFIXES = ("heic", "heif", "hif")
"""Suffixes of image files that the package pillow-heif decodes."""
_VIDEOS = ("mp4", "m4v", "mov", "avi", "mkv", "webm", "wmv", "mpg", "mpeg", "flv", "3gp")
_OTHER_PICTURES = frozenset(
    {
        *("jp2", "j2k", "jpf", "jpx", "jxl", "jxr", "psd", "xcf", "svg", "eps", "ai", "tga", "ico"),
        *("icns", "exr", "hdr", "pfm", "dds", "raw", "dng", "cr2", "cr3", "crw", "nef", "nrw"),
        *("arw", "orf", "rw2", "raf", "pef", "srw", "mpo", "dcm", "dicom", "nii", "fits", "czi"),
        *("lif", "npy", "npz", "nii.gz", "nrrd", "mha", "svs", "ndpi", "ras", "pcx", "sgi", "xbm"),
        *("xpm", "bpg", "flif"),
        *_VIDEOS,
    }
)
"""Suffixes of pictures, volumes and videos in formats that are not read."""
_JPEG_SUFFIXES = frozenset({"jpeg", "jpe", "jfif", "jif", "pjpeg", "pjp"})
LEFTOVER_FOLDERS = frozenset(
    {
        *("system volume information", "__macosx", "@eadir", "#recycle", "@recycle"),
        *("$recycle.bin", "lost+found", "__pycache__", "_gsdata_", "node_modules", "#snapshot"),
        *("@tmp", "recycler"),
    }
)
"""Folders that archives, file servers and programs leave behind, in lower case. They are left out at any depth."""
_COMPANION_WORDS = (
    "masks?|seg|segm|segmentations?|gt|groundtruth|ground_truth|annotations?|annotated|labels?|thumbs?|thumbnails?|"
    "depth|trimaps?|overlays?|contours?|bbox|boxes|heatmaps?|\\d+x\\d+"
)
_COMPANION = re.compile(
    rf"(?P<base>.+)[ _.-](?P<after>{_COMPANION_WORDS})(?:[ _.-]?\d+)?|"
    rf"(?P<before>{_COMPANION_WORDS}|tn)[ _.-](?P<rest>.+)",
    re.IGNORECASE,
)
_ADDRESS = re.compile(r"\s*(~|[A-Za-z][A-Za-z0-9+.-]*://)")
_SNIFFED = 3
"""Number of files of each suffix that is left out whose first bytes are looked at."""

# Topics of a tally of files.
LEFT_OUT = "files left out: no picture"
"""Topic of a tally, by suffix."""
HIDDEN_FILES = "files and folders left out: hidden, or copies of conflicts"
"""Topic, by name."""
LEFTOVERS = "folders left out: of archives, file servers and programs"
"""Topic, by name."""
OTHER_PICTURES = "pictures left out: not read"
"""Topic, by suffix."""
EMPTY_FILES = "files without any byte"
"""Topic, by path."""
BROKEN_LINKS = "links to missing files"
"""Topic, by path."""
COMPANIONS = "files named after another image"
"""Topic, by the word that their names have more."""
SAME_STEMS = "files with the name of another image and another suffix"
"""Topic, by suffix."""


class SourceFileError(UserError):
    """File that has changed since its source was listed."""


def is_image_name(name: str) -> bool:
    """Return whether a file is treated as an image; hidden files are not."""
    return not posixpath.basename(name).startswith(".") and is_image_suffix(_suffix(name))


def is_image_suffix(suffix: str) -> bool:
    """Return whether files of a suffix, in lower case without its dot, are read as images."""
    return suffix in _IMAGE_SUFFIXES or (suffix in HEIF_SUFFIXES and decodes_heif())


def image_suffix(name: str) -> str:
    """Return the suffix for a record's content: lower case, jpg for the other suffixes of JPEG."""
    suffix = _suffix(name)
    return "jpg" if suffix in _JPEG_SUFFIXES else suffix


def _suffix(name: str) -> str:
    return posixpath.splitext(name)[1][1:].lower()


def sub_folders(folder: AnyPath) -> list[str]:
    """Return the sorted names of the folders in `folder` that are neither hidden nor leftovers."""
    return sorted(
        entry.name
        for entry in _iter_entries(folder)
        if entry.is_dir() and not _is_passed_over(entry.name)
    )


def path_as_stored(root: AnyPath, path: str, stored: dict[str, dict[str, str]]) -> str:
    """Return a path with its names in the form of Unicode (NFC or NFD) that the files have.

    Args:
        root: Root of the data.
        path: Path below it, with names in any form.
        stored: Names by their composed form, by folder, of the folders that were looked at before.
    """
    place = ""
    for name in () if path.isascii() else path.split("/"):
        if place not in stored:
            entries = _iter_entries(root / place) if file_at(root / place).is_folder() else ()
            stored[place] = {
                composed(entry.name): entry.name for entry in entries if not entry.name.isascii()
            }
        place = join_path(place, stored[place].get(composed(name), name))
    return place or path


def tally_passed_over(root: AnyPath, folder: str, tally: Tally) -> None:
    """Count the folders in `folder` that are left out for their names, and links to what is missing.

    Args:
        root: Root of the data.
        folder: Folder relative to it; empty is the root itself.
        tally: Counts to add to.
    """
    for entry in _sorted_entries(root / folder):
        path = join_path(folder, entry.name)
        if entry.is_dir() and _is_passed_over(entry.name):
            tally.add(HIDDEN_FILES if is_stray(entry.name) else LEFTOVERS, entry.name, path)
        elif entry.is_symlink() and not Path(str(root / path)).exists():
            tally.add(BROKEN_LINKS, path, path)


def _is_passed_over(name: str) -> bool:
    return is_stray(name) or name.lower() in LEFTOVER_FOLDERS


def first_image(folder: AnyPath) -> str | None:
    """Return the name of the first image directly in `folder`, in the order of names, or None."""
    return min(
        (
            entry.name
            for entry in _iter_entries(folder)
            if is_image_name(entry.name) and entry.is_file()
        ),
        default=None,
    )


def has_image(folder: AnyPath) -> bool:
    """Return whether `folder`, or a folder in it, has an image; looks no further than the first one.

    Raises:
        ConfigError: If the folder cannot be read, or if links lead in a circle.
    """
    inner = []
    for entry in _iter_entries(folder):
        if _is_passed_over(entry.name):
            continue
        if entry.is_dir():
            _check_no_loop(folder, entry.name, entry)
            inner.append(entry.name)
        elif is_image_name(entry.name):
            return True
    return any(has_image(folder / name) for name in inner)


def join_path(folder: str, name: str) -> str:
    """Join a folder below the root, which may be the root itself (empty), and a name."""
    return f"{folder}/{name}" if folder else name


def iter_images(
    root: AnyPath, folder: str, tally: Tally | None = None
) -> Iterator[tuple[str, int]]:
    """Iterate over every image in `folder` and below it, sorted by name.

    Args:
        root: Root of the data.
        folder: Folder relative to it; empty is the root itself.
        tally: Counts of the files that are left out, to which those met here are added; None counts none.

    Yields:
        The path relative to `root`, and its bytes.

    Raises:
        ConfigError: If a folder cannot be read, links lead in a circle, or (without a tally) a link to a missing file.
    """
    stems: dict[str, str] = {}
    others: dict[str, str] = {}
    for entry in _sorted_entries(root / folder):
        path, name = join_path(folder, entry.name), entry.name
        if _is_passed_over(name):
            if tally is not None:
                is_leftover = not is_stray(name) and entry.is_dir()
                tally.add(LEFTOVERS if is_leftover else HIDDEN_FILES, name, path)
            continue
        stem, _, suffix = name.rpartition(".")
        if entry.is_dir():
            _check_no_loop(root, path, entry)
            yield from iter_images(root, path, tally)
        elif entry.is_symlink() and not Path(str(root / path)).exists():
            if tally is None:
                raise ConfigError(
                    f"{root / path} is a link to a file that is missing; restore or remove it"
                )
            tally.add(BROKEN_LINKS, path, path)
        elif not entry.is_file():
            if tally is not None:
                tally.add(LEFT_OUT, "no regular file", path)
        elif stem and is_image_suffix(suffix.lower()):
            size = entry_bytes(entry)
            if tally is not None:
                if size == 0:
                    tally.add(EMPTY_FILES, path, path)
                if stem in stems:
                    tally.add(SAME_STEMS, f".{suffix}", f"{join_path(folder, stems[stem])}, {path}")
                stems[stem] = name
            yield path, size
        elif tally is not None:
            others[name] = path
    if tally is not None:
        for name, path in others.items():
            stem, _, suffix = name.rpartition(".")
            if stem in stems and suffix.lower() in _VIDEOS:
                tally.add(LEFT_OUT, f".{suffix.lower()} next to its photograph", path)
            else:
                _tally_other_file(root, path, tally)
        _tally_companions(folder, stems, tally)


def _check_no_loop(root: AnyPath, path: str, entry: FolderEntry) -> None:
    """Raise ConfigError for a link to a folder that leads to the link, which would never end."""
    if not entry.is_symlink():
        return
    link = Path(str(root / path))
    target, above = link.resolve(), link.parent
    leads_back = any(folder.resolve() == target for folder in (above, *above.parents))
    require(
        not leads_back and not above.resolve().is_relative_to(target),
        f"{root / path} is a link to a folder that leads back to it; remove the link",
    )


def _tally_other_file(root: AnyPath, path: str, tally: Tally) -> None:
    """Count a file whose suffix is not that of an image that is read, by what it is."""
    suffix = "nii.gz" if path.lower().endswith(".nii.gz") else _suffix(path)
    item = f".{suffix}" if suffix else "no suffix"
    is_picture = suffix in _OTHER_PICTURES or suffix in HEIF_SUFFIXES
    if not is_picture:
        looked_at = sum(tally[topic].get(item, (0, ""))[0] for topic in (OTHER_PICTURES, LEFT_OUT))
        is_picture = (
            picture_suffix(file_at(root / path).peek(16)) is not None
            if not suffix or looked_at < _SNIFFED
            else item in tally[OTHER_PICTURES]
        )
    tally.add(OTHER_PICTURES if is_picture else LEFT_OUT, item, path)


def _tally_companions(folder: str, stems: Mapping[str, str], tally: Tally) -> None:
    """Count the images of a folder that are named after another one in it, as masks and thumbnails are."""
    for stem, name in stems.items():
        if stem.isdecimal():
            continue
        match = _COMPANION.fullmatch(stem)
        if match is None:
            continue
        base = match["base"] if match["base"] is not None else match["rest"]
        if base in stems:
            word = (match["after"] or match["before"]).lower()
            example = f"{join_path(folder, stems[base])}, {join_path(folder, name)}"
            tally.add(COMPANIONS, word, example)


def read_file(root: AnyPath, path: str, size: int) -> bytes:
    """Read a file of the data.

    Args:
        root: Root of the data.
        path: Path below it.
        size: Number of bytes when the file was listed.

    Raises:
        ImageError: If it is larger than any image.
        SourceFileError: If it cannot be read, or has another size now.
    """
    require(
        size <= MAX_IMAGE_BYTES,
        f"its file has {size:,} bytes, more than the {MAX_IMAGE_BYTES:,} of an image",
        ImageError,
    )
    try:
        data = file_at(root / path).read(MAX_IMAGE_BYTES)
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


class FilesBelowRoot(ImageSource):
    """Reading of records whose content is a file below a root: its path and its size."""

    _root: AnyPath

    def read(self, record: Record) -> Content:
        """Return the file unchanged."""
        path, size = record.content
        return Content(image=read_file(self._root, path, size), suffix=image_suffix(path))

    def where(self, record: Record) -> str:
        """Return the image's file."""
        return str(self._root / record.content[0])


def _iter_entries(folder: AnyPath) -> Iterator[FolderEntry]:
    """Yield the entries of a folder as the system lists them, for a reader that may stop early."""
    try:
        yield from file_at(folder).scan()
    except UserError:
        raise
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be read: {error.strerror}; correct data.path or data.root"
        ) from error


def _sorted_entries(folder: AnyPath) -> list[FolderEntry]:
    return sorted(_iter_entries(folder), key=lambda entry: entry.name)


# ---- masks -----------------------------------------------------------------------------------------


def to_mask_png(data: bytes, path: str) -> bytes:
    """Convert a mask file to 8-bit gray PNG with unchanged values; such a file itself is returned as it is.

    A palette's indices become the gray values, as in PASCAL VOC. Black and white become 0 and 255.

    Args:
        data: Bytes of the file.
        path: The file, for messages.

    Raises:
        ImageError: If it cannot be decoded, has colors or values above a byte, or is a JPEG with values other than 0
            and 255.
    """
    try:
        with open_image(data) as image:
            image.load()
            if image.format == "PNG" and image.mode == "L":
                return data
            values = _mask_values(image)
            require(
                image.format != "JPEG" or bool(np.isin(values, (0, 255)).all()),
                "it is a JPEG, whose compression has changed its values; save it as PNG",
                ValueError,
            )
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageError(f"mask {path} cannot be used: {error}") from error
    return png_of(Image.fromarray(values))


def _mask_values(image: Image.Image) -> NDArray[np.uint8]:
    """Return the values [H, W]; raise ValueError if they do not fit into one byte per pixel."""
    pixels: NDArray[Any] = np.asarray(image)
    if pixels.dtype == np.bool_:
        pixels = pixels * np.uint8(255)
    if image.mode in ("LA", "RGB", "RGBA"):
        colors = pixels[:, :, :1] if image.mode == "LA" else pixels[:, :, :3]
        pixels = pixels[:, :, 0]
        require(
            bool((colors == pixels[:, :, None]).all()),
            "it has colors; save it with one channel",
            ValueError,
        )
    values = pixels.astype(np.uint8)
    require(
        pixels.ndim == 2 and bool((values == pixels).all()),
        f"its values ({image.mode}) do not fit into one byte per pixel",
        ValueError,
    )
    return values


NAMED_MISSING_FILES = 5
"""Number of missing files that an error names; the others are only counted."""


class TableFiles:
    """Files named by rows: their paths below the root and their sizes."""

    def __init__(self, root: Path) -> None:
        self._root = str(root)
        self._prefix = f"{posixpath.normpath(root)}/"
        self.num_missing = 0
        """Number of missing files so far."""
        self._missing_rows = 0
        self._last_missing_row = ""
        self._named_missing: list[str] = []
        self._first_missing = ""
        self._stored_names: dict[str, dict[str, str]] = {}

    def add(self, row: ListedRow, column: str) -> tuple[str, int]:
        """Look up the file that a row names; a missing one is counted for `check_missing`.

        Args:
            row: Row of the table.
            column: Column of the path.

        Returns:
            The path below the root, and its bytes; 0 for a missing file.

        Raises:
            ConfigError: If the cell is empty, or the path is not below the root.
        """
        path = self._relative(row, column)
        for spelled in (str, str.strip, self._as_stored):
            each = spelled(path)
            try:
                return each, os.stat(f"{self._root}/{each}").st_size  # noqa: PTH116, once per image
            except (OSError, ValueError):  # a path with a NUL is a ValueError
                continue
        self._count_missing(row.row_name, path)
        return path, 0

    def _as_stored(self, path: str) -> str:
        return path_as_stored(Path(self._root), path.strip(), self._stored_names)

    def with_suffix(self, path: str) -> str | None:
        """Return the file that a path without its suffix names, in the root or in a folder directly in it."""
        folders = ["", *(name + "/" for name in sub_folders(Path(self._root)))]
        names = (
            f"{folder}{path}.{suffix}"
            for folder in folders
            for each in IMAGE_SUFFIXES
            for suffix in (each, each.upper())
        )
        return next((name for name in names if self._is_file(name)), None)

    def _hint_at(self, path: str) -> str:
        """Return where a missing file is: in a folder of the root, above it or under another suffix; else empty."""
        folders = sub_folders(Path(self._root))
        inside = next((name for name in folders if self._is_file(f"{name}/{path}")), None)
        if inside is not None:
            return f"; the first is in its folder {inside} (data.root={self._root}/{inside})"
        _, _, rest = path.partition("/")
        if rest and self._is_file(rest):
            return f"; there is {quote(rest)}, so the table names it from another folder"
        stem, _, suffix = path.rpartition(".")
        if is_image_suffix(suffix.lower()):
            other = stem if self._is_file(stem) else self.with_suffix(stem)
            if other is not None:
                return f"; there is {quote(other)}, so the table has another suffix"
        return ""

    def _is_file(self, path: str) -> bool:
        """Return whether there is a file below the root; False also for a name that no file can have."""
        return os.path.isfile(f"{self._root}/{self._as_stored(path)}")  # noqa: PTH113, Path.is_file raises for long names

    def _count_missing(self, row: str, path: str) -> None:
        self._first_missing = self._first_missing or path
        self.num_missing += 1
        self._missing_rows += row != self._last_missing_row
        self._last_missing_row = row
        if len(self._named_missing) < NAMED_MISSING_FILES:
            self._named_missing.append(f"{row}: {path}")

    def check_missing(self, config: ImageTableDataConfig) -> None:
        """Log a warning about missing files, whose rows data.on_error=skip leaves out.

        Raises:
            ConfigError: If files are missing without data.on_error=skip, or if they are more than data.max_skipped.
        """
        if not self.num_missing:
            return
        named = "; ".join(self._named_missing)
        more = self.num_missing - NAMED_MISSING_FILES
        named += f"; and {more} more" if more > 0 else ""
        summary = f"{self.num_missing} files in the table are not in {self._root}: {named}"
        summary += self._hint_at(self._first_missing)
        require(
            config.on_error != "stop",
            f"{summary}; correct data.root or the table, or leave such rows out with data.on_error=skip",
        )
        require(
            self._missing_rows <= config.max_skipped,
            f"{summary}; these are more rows than data.max_skipped={config.max_skipped}, so correct data.root or the "
            "table",
        )
        logger.warning("%s; their rows are left out", summary)

    def _relative(self, row: ListedRow, column: str) -> str:
        text = row.path(column)
        if _ADDRESS.match(text):
            raise row.error(
                column,
                f"{quote(text, 200)[1:-1]} is an address or begins with ~, which are not read; download the files, and "
                "write their paths below data.root",
            )
        path = posixpath.normpath(text)
        if posixpath.isabs(path):
            path = path.removeprefix(self._prefix)
        if not (stays_inside(path) and stays_inside(path.strip())):
            raise row.error(
                column,
                f"{quote(text, 200)[1:-1]} is not in data.root={self._root}; set data.root to the folder of all images",
            )
        return path
