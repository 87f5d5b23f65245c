"""Concept sets of network dissection: Broden, or drawn pictures.

A drawn picture shows two shapes. The categories are object (circle, square, triangle: pixels, one label image per
shape), color (pixels), texture (plain, striped, checkered: pixels) and scene (meadow, night, sand: the whole picture,
by its background color). Pictures depend only on (seed, number). Label images have half the pictures' side, as in
Broden.

A folder of Broden has

    index.csv       image, split, ih, iw, sh, sw, and one column per category: label images, or numbers of labels of
                    the whole image, separated by ";"
    category.csv    name, ...
    label.csv       number, name, category, frequency, coverage, ...
    c_<name>.csv    code, number, name, frequency, coverage: one file per category
    images/         pictures and label images, PNG with label = R + 256 G

All splits are read. A label in several categories is assigned to the one in which its coverage is highest.

Shape letters: L label images of one picture, s t their height and width, C labels of the set (0: no label).
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from permafrost.core.errors import ConfigError, FileError, RecordError, first_line, require
from permafrost.storage.files import file_at, named_file
from permafrost.store.image_decoding import (
    MAX_IMAGE_BYTES,
    ImageError,
    decode_pixels,
    inspect_image,
    open_image,
)

NO_CONCEPT = 0
"""Label of a pixel without a concept."""


@dataclass(frozen=True, kw_only=True)
class ConceptImage:
    """One picture and its labels."""

    image: Tensor
    """Picture u8 [3, H, W]."""
    layers: NDArray[np.int32]
    """Pixel labels [L, s, t]. A category may have several label images, and a pixel several labels."""
    whole: tuple[int, ...] = ()
    """Labels of the whole image, each of which counts for all its s t pixels."""


@dataclass(frozen=True)
class Labels:
    """The concepts of a set."""

    names: tuple[str, ...]
    """Names [C] by label. The first stands for no concept."""
    categories: tuple[str, ...]
    category_of: tuple[int, ...]
    """Index [C] into `categories` of the category in which the label's coverage is highest."""


# ---- drawn concepts --------------------------------------------------------------------------------


_OBJECTS = ("circle", "square", "triangle")
_COLORS = {
    "red": (0.85, 0.15, 0.15),
    "green": (0.15, 0.75, 0.2),
    "blue": (0.2, 0.25, 0.9),
    "yellow": (0.9, 0.85, 0.2),
}
_TEXTURES = ("plain", "striped", "checkered")
_SCENES = {"meadow": (0.35, 0.45, 0.3), "night": (0.1, 0.1, 0.2), "sand": (0.7, 0.65, 0.5)}
_BY_CATEGORY = {
    "color": tuple(_COLORS),
    "object": _OBJECTS,
    "scene": tuple(_SCENES),
    "texture": _TEXTURES,
}
_SHAPES = 2
_DARK = 0.45
"""Factor on the color in the dark parts of a texture."""


class DrawnConcepts:
    """A set of `count` pictures of `side` x `side` pixels."""

    def __init__(self, count: int, side: int, seed: int = 0) -> None:
        """Configure the set; `side` must be even."""
        self.count, self.side, self.seed = count, side, seed
        named = [
            (name, place)
            for place, category in enumerate(_BY_CATEGORY)
            for name in _BY_CATEGORY[category]
        ]
        self.labels = Labels(
            names=("", *(name for name, _ in named)),
            categories=tuple(_BY_CATEGORY),
            category_of=(0, *(place for _, place in named)),
        )

    def __len__(self) -> int:
        return self.count

    def read(self, number: int, *, with_labels: bool = True) -> ConceptImage:
        """Draw one picture."""
        generator = np.random.default_rng([self.seed, number])
        scene = str(generator.choice(list(_SCENES)))
        picture = np.broadcast_to(np.array(_SCENES[scene]), (self.side, self.side, 3)).copy()
        centers = [(left + 0.5) / _SHAPES for left in range(_SHAPES)]
        layers = [
            layer for center in centers for layer in self._add_shape(picture, generator, center)
        ]
        picture += generator.normal(scale=0.03, size=picture.shape)
        pixels = np.round(picture.clip(0, 1) * 255).astype(np.uint8)
        return ConceptImage(
            image=torch.from_numpy(pixels).permute(2, 0, 1),
            layers=np.stack(layers),
            whole=(self._label(scene),),
        )

    def _add_shape(
        self, picture: NDArray[np.float64], generator: np.random.Generator, center: float
    ) -> list[NDArray[np.int32]]:
        """Paint one shape, and return its label images for color, object and texture, each [side / 2, side / 2]."""
        shape, texture = (str(generator.choice(names)) for names in (_OBJECTS, _TEXTURES))
        color = str(generator.choice(list(_COLORS)))
        radius = generator.uniform(0.13, 0.22)
        x, y = center + generator.uniform(-0.03, 0.03), generator.uniform(0.25, 0.75)
        at = (np.arange(self.side) + 0.5) / self.side
        across, down = np.meshgrid(at - x, at - y)
        inside = _inside(shape, across, down, radius)
        dark = _dark(texture, self.side)
        paint = np.array(_COLORS[color]) * np.where(dark, _DARK, 1.0)[:, :, None]
        picture[inside] = paint[inside]
        coarse = inside[::2, ::2]
        return [
            np.where(coarse, self._label(name), 0).astype(np.int32)
            for name in (color, shape, texture)
        ]

    def _label(self, name: str) -> int:
        return self.labels.names.index(name)


def _inside(
    shape: str, across: NDArray[np.float64], down: NDArray[np.float64], radius: float
) -> NDArray[np.bool_]:
    if shape == "circle":
        return np.asarray(np.hypot(across, down) <= radius)
    if shape == "square":
        return np.asarray(np.maximum(np.abs(across), np.abs(down)) <= 0.85 * radius)
    return np.asarray((np.abs(down) <= radius) & (np.abs(across) <= (down + radius) / 2))


def _dark(texture: str, side: int) -> NDArray[np.bool_]:
    """Mask of the dark parts of a texture, bool [side, side]."""
    row, column = np.indices((side, side)) // max(1, side // 16) % 2
    if texture == "striped":
        return np.asarray(row == 1)
    return np.asarray(row != column) if texture == "checkered" else np.zeros((side, side), bool)


# ---- broden ----------------------------------------------------------------------------------------


INDEX, CATEGORIES, LABELS, IMAGES = "index.csv", "category.csv", "label.csv", "images"
_OPTION = "evaluate.dissection.path"


class BrodenFolder:
    """The concept set in a folder, or the first `most` images of its index."""

    def __init__(self, folder: Path, most: int | None = None) -> None:
        self.folder = folder
        for name in (INDEX, CATEGORIES, LABELS):
            require(
                (folder / name).is_file(),
                f"{_OPTION}={folder} has no {name}; name the folder of an unpacked Broden (broden1_224), or set "
                "it to null for the built-in set",
            )
        categories = tuple(
            dict.fromkeys(row["name"] for row in _read_table(folder / CATEGORIES, name=str))
        )
        self.labels = _read_labels(folder, categories)
        self.rows = _read_table(folder / INDEX, image=str, sh=int, sw=int)[:most]
        require(
            bool(self.rows),
            f"{_OPTION}={folder} lists no image in {INDEX}; unpack it again",
        )
        missing = [name for name in categories if name not in self.rows[0]]
        require(
            not missing,
            f"{folder / INDEX} has no column {', '.join(missing)}; unpack the set again",
        )

    @property
    def tables(self) -> list[Path]:
        """CSV files of the set. The pictures are not included, because they are gigabytes."""
        names = (INDEX, CATEGORIES, LABELS, *(f"c_{name}.csv" for name in self.labels.categories))
        return [self.folder / name for name in names]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, number: int, *, with_labels: bool = True) -> ConceptImage:
        """Read one picture.

        Args:
            number: Number of the picture.
            with_labels: False does not read separate label files.

        Raises:
            RecordError: If a file is missing or does not match its row.
        """
        row = self.rows[number]
        size = row["sh"], row["sw"]
        layers, whole = [], []
        for category in self.labels.categories if with_labels else ():
            for entry in filter(None, row[category].split(";")):
                if entry.isdecimal():
                    whole.append(int(entry))
                else:
                    layers.append(self._read_layer(entry, size))
        highest = max([*(int(layer.max()) for layer in layers), *whole, 0])
        require(
            highest < len(self.labels.names),
            f"{self.folder / INDEX}: {row['image']} has label {highest}, which is not in {LABELS}; "
            "unpack the set again",
            RecordError,
        )
        path, data = self._read_file(row["image"])
        try:
            inspect_image(data)
        except ImageError as error:
            raise ImageError(f"{path} {error}; unpack the set again") from error
        return ConceptImage(
            image=torch.from_numpy(decode_pixels(data)).permute(2, 0, 1),
            layers=np.stack(layers) if layers else np.zeros((0, *size), np.int32),
            whole=tuple(whole),
        )

    def _read_layer(self, name: str, size: tuple[int, int]) -> NDArray[np.int32]:
        path, data = self._read_file(name)
        try:
            with open_image(data) as image:
                labels = decode_labels(np.asarray(image.convert("RGB")))
        except OSError as error:
            raise ImageError(f"{path} cannot be decoded: {error}; unpack the set again") from error
        require(
            labels.shape == size,
            f"{path} has {labels.shape[0]}x{labels.shape[1]} pixels, but {INDEX} lists {size[0]}x{size[1]}; "
            "unpack the set again",
            RecordError,
        )
        return labels

    def _read_file(self, name: str) -> tuple[Path, bytes]:
        """Return the path and the bytes of a file that the index names."""
        folder = self.folder / IMAGES
        try:
            return folder / name, file_at(named_file(name, folder)).read(MAX_IMAGE_BYTES)
        except FileNotFoundError:
            raise RecordError(
                f"{folder / name} is missing, but {INDEX} lists it; unpack the set again"
            ) from None
        except FileError as error:
            raise RecordError(f"{self.folder / INDEX}: {error}") from error


ConceptSet: TypeAlias = DrawnConcepts | BrodenFolder
"""Pictures by their number. A picture depends only on its number."""


def decode_labels(pixels: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Decode labels R + 256 G from pixels u8 [s, t, 3]: i32 [s, t]."""
    wide = pixels.astype(np.int32)
    return wide[:, :, 0] + 256 * wide[:, :, 1]


def _read_labels(folder: Path, categories: tuple[str, ...]) -> Labels:
    listed = {
        row["number"]: row["name"] for row in _read_table(folder / LABELS, number=int, name=str)
    }
    names = [listed.get(number, "") for number in range(1 + max(listed, default=0))]
    coverage = np.full((len(names), len(categories)), -1.0)  # below any listed coverage
    for place, category in enumerate(categories):
        path = folder / f"c_{category}.csv"
        require(
            path.is_file(),
            f"{folder / CATEGORIES} names {category}, but {path} is missing; unpack the set again",
        )
        for row in _read_table(
            path, number=lambda text: range(len(names))[int(text)], coverage=float
        ):
            coverage[row["number"], place] = row["coverage"]
    # With equal coverages the last category wins, as in the authors' code.
    place = coverage.shape[1] - 1 - coverage[:, ::-1].argmax(axis=1)
    place[(coverage < 0).all(axis=1)] = 0  # a label that no table lists
    return Labels(tuple(names), categories, tuple(place.tolist()))


def _read_table(path: Path, **columns: Callable[[str], Any]) -> list[dict[str, Any]]:
    """Read a table, and convert the columns that it must have. Raises ConfigError if it cannot be read."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as lines:
            return [
                row | {name: convert(row[name]) for name, convert in columns.items()}
                for row in csv.DictReader(lines, restval="", strict=True)
            ]
    except (ValueError, LookupError, csv.Error) as error:
        raise ConfigError(
            f"{path} cannot be read as a table with {', '.join(columns)} ({first_line(error)}); unpack the set again"
        ) from error
