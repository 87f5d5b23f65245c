"""Grids of pictures for the page: every picture is one tile of the same displayed size, with its text in HTML.

Text stays text, so that any class name can be shown, read aloud and searched for. A tile holds no more pixels than its
enlarged form shows.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

DISPLAYED_PIXELS = 176
"""Largest width of a tile on the page (style.css.j2)."""
_MOST_PIXELS = 256
"""Longest side of a tile's picture; larger ones are reduced."""
_LOSSLESS_PIXELS = 48
"""Longest side up to which a picture is small without loss."""
_DOUBLED_PIXELS = 128
"""Longest side up to which pixels are doubled before a lossy encoding, which halves the resolution of colors."""
_QUALITY = 80


class PictureRow(NamedTuple):
    """A row of a grid, whose lists have one entry per record or are empty."""

    title: str
    pictures: Sequence[NDArray[Any]]
    """Pictures [height, width, 3]: u8, or float in [0, 1]."""
    captions: Sequence[str] = ()
    """Captions above the pictures."""
    wrong: Sequence[bool] = ()
    """True for captions in red."""
    aspects: Sequence[float] = ()
    """Displayed aspect ratios width / height, or empty for square pixels."""
    notes: Sequence[str] = ()
    """Notes below the pictures."""


class Tile(NamedTuple):
    """A picture of the grid with its text."""

    source: str
    """Picture as a data URI."""
    width: int
    height: int
    alt: str
    caption: str
    note: str
    is_wrong: bool
    is_enlarged: bool
    """True if the picture has fewer pixels than are displayed, which are then shown as squares."""


class TileRow(NamedTuple):
    """Tiles of a row."""

    title: str
    tiles: list[Tile]
    has_captions: bool


def picture_grid(rows: Sequence[PictureRow]) -> list[TileRow]:
    """Encode the pictures of all rows. Records are columns, named by the captions of the first row."""
    names = rows[0].captions
    return [
        TileRow(
            row.title,
            [_tile(row, column, names) for column in range(len(row.pictures))],
            any(row.captions),
        )
        for row in rows
    ]


def _tile(row: PictureRow, column: int, names: Sequence[str]) -> Tile:
    image = _image(row.pictures[column], row.aspects[column] if row.aspects else None)
    source, (width, height) = encode(image)
    caption = row.captions[column] if row.captions else ""
    is_wrong = bool(row.wrong and row.wrong[column])
    return Tile(
        source=source,
        width=width,
        height=height,
        alt=_alt(row.title, caption, names[column] if names else "", is_wrong, column),
        caption=caption,
        note=row.notes[column] if row.notes else "",
        is_wrong=is_wrong,
        is_enlarged=max(image.size) < DISPLAYED_PIXELS,
    )


def _alt(title: str, caption: str, name: str, is_wrong: bool, column: int) -> str:
    """Describe a tile by its row, the name of its record and, for a network, its prediction."""
    words = [title.strip(), name or f"record {column + 1}"]
    if caption and caption != name:
        words.append(f"predicted {caption}" if is_wrong else caption)
    return ", ".join(" ".join(word.split()) for word in words)


def _image(picture: NDArray[Any], aspect: float | None) -> Image.Image:
    pixels = picture
    if picture.dtype != np.uint8:
        pixels = (picture.clip(0, 1) * 255).round().astype(np.uint8)
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if aspect is not None:
        side = min(max(*image.size, DISPLAYED_PIXELS), _MOST_PIXELS)
        size = (side, max(1, round(side / aspect)))
        if aspect < 1:
            size = (max(1, round(side * aspect)), side)
        shrinks = size[0] <= image.width and size[1] <= image.height
        return image.resize(size, Image.Resampling.LANCZOS if shrinks else Image.Resampling.NEAREST)
    if max(image.size) > _MOST_PIXELS:
        image.thumbnail((_MOST_PIXELS, _MOST_PIXELS), Image.Resampling.LANCZOS)
    return image


def encode(image: Image.Image) -> tuple[str, tuple[int, int]]:
    """Encode a picture as WebP in a data URI, and return its size in pixels (width, height).

    Small pictures keep every pixel; of larger ones the smaller of both encodings is taken.
    """
    lossless = _webp(image, lossless=True, quality=100)
    if max(image.size) <= _LOSSLESS_PIXELS:
        return _uri(lossless), image.size
    doubled = image
    if max(image.size) <= _DOUBLED_PIXELS:
        doubled = image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST)
    lossy = _webp(doubled, quality=_QUALITY)
    if len(lossless) <= len(lossy):
        return _uri(lossless), image.size
    return _uri(lossy), doubled.size


def _webp(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", method=4, **options)
    return buffer.getvalue()


def _uri(data: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(data).decode()}"
