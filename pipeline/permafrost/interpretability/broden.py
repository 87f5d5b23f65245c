"""Reader of a Broden folder (Bau et al. 2017), such as broden1_224.

    index.csv       image, split, ih, iw, sh, sw, and one column per category: label images, or numbers of labels of
                    the whole image, separated by ";"
    category.csv    name, ...
    label.csv       number, name, category, frequency, coverage, ...
    c_<name>.csv    code, number, name, frequency, coverage: one file per category
    images/         pictures and label images, PNG with label = R + 256 G

All splits are read. A label in several categories is assigned to the one in which its coverage is highest.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from permafrost.core.errors import ConfigError, RecordError
from permafrost.interpretability.concepts import ConceptImage, Labels
from permafrost.store.pixels import ImageError, decode_rgb, inspect_image, open_image

INDEX, CATEGORIES, LABELS, IMAGES = "index.csv", "category.csv", "label.csv", "images"
_OPTION = "evaluate.dissection.path"


class BrodenFolder:
    """The concept set in a folder, or the first `most` images of its index."""

    def __init__(self, folder: Path, most: int | None = None) -> None:
        self.folder = folder
        for name in (INDEX, CATEGORIES, LABELS):
            if not (folder / name).is_file():
                raise ConfigError(
                    f"{_OPTION}={folder} has no {name}; name the folder of an unpacked Broden (broden1_224), or set "
                    "it to null for the built-in set"
                )
        categories = tuple(row["name"] for row in _read_table(folder / CATEGORIES))
        self.labels = _read_labels(folder, categories)
        self.rows = _read_table(folder / INDEX)[:most]
        if not self.rows:
            raise ConfigError(f"{_OPTION}={folder} lists no image in {INDEX}; unpack it again")
        missing = [name for name in ("image", "sh", "sw", *categories) if name not in self.rows[0]]
        if missing:
            raise ConfigError(
                f"{folder / INDEX} has no column {', '.join(missing)}; unpack the set again"
            )

    @property
    def tables(self) -> list[Path]:
        """CSV files of the set. The pictures are not included, because they are gigabytes."""
        names = (INDEX, CATEGORIES, LABELS, *(f"c_{name}.csv" for name in self.labels.categories))
        return [self.folder / name for name in names]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, number: int, *, with_labels: bool = True) -> ConceptImage:
        """Read one picture. Raises RecordError if a file is missing or does not match its row."""
        row = self.rows[number]
        size = int(row["sh"]), int(row["sw"])
        layers, whole = [], []
        for category in self.labels.categories if with_labels else ():
            for entry in filter(None, row[category].split(";")):
                if entry.isdecimal():
                    whole.append(int(entry))
                else:
                    layers.append(self._read_layer(entry, size))
        highest = max([*(int(layer.max()) for layer in layers), *whole, 0])
        if highest >= len(self.labels.names):
            raise RecordError(
                f"{self.folder / INDEX}: {row['image']} has label {highest}, which is not in {LABELS}; "
                "unpack the set again"
            )
        path = self.folder / IMAGES / row["image"]
        data = self._bytes(path)
        try:
            inspect_image(data)
        except ImageError as error:
            raise ImageError(f"{path} {error}; unpack the set again") from error
        return ConceptImage(
            image=decode_rgb(data),
            layers=np.stack(layers) if layers else np.zeros((0, *size), np.int32),
            whole=tuple(whole),
        )

    def _read_layer(self, name: str, size: tuple[int, int]) -> NDArray[np.int32]:
        path = self.folder / IMAGES / name
        data = self._bytes(path)
        try:
            with open_image(data) as image:
                labels = decode_labels(np.asarray(image.convert("RGB")))
        except OSError as error:
            raise ImageError(f"{path} cannot be decoded: {error}; unpack the set again") from error
        if labels.shape != size:
            raise RecordError(
                f"{path} has {labels.shape[0]}x{labels.shape[1]} pixels, but {INDEX} lists {size[0]}x{size[1]}; "
                "unpack the set again"
            )
        return labels

    def _bytes(self, path: Path) -> bytes:
        if not path.is_file():
            raise RecordError(f"{path} is missing, but {INDEX} lists it; unpack the set again")
        return path.read_bytes()


def decode_labels(pixels: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Decode labels R + 256 G from pixels u8 [s, t, 3]: i32 [s, t]."""
    wide = pixels.astype(np.int32)
    labels: NDArray[np.int32] = wide[:, :, 0] + 256 * wide[:, :, 1]
    return labels


def encode_labels(labels: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Encode labels [s, t] below 65,536 as pixels u8 [s, t, 3], the inverse of `decode_labels`."""
    return np.stack([labels % 256, labels // 256, np.zeros_like(labels)], axis=2).astype(np.uint8)


def _read_labels(folder: Path, categories: tuple[str, ...]) -> Labels:
    rows = _read_table(folder / LABELS)
    names = [""] * (1 + max((int(row["number"]) for row in rows), default=0))
    for row in rows:
        names[int(row["number"])] = row["name"]
    coverage = np.full((len(names), len(categories)), -1.0)  # below any listed coverage
    for place, category in enumerate(categories):
        path = folder / f"c_{category}.csv"
        if not path.is_file():
            raise ConfigError(
                f"{folder / CATEGORIES} names {category}, but {path} is missing; unpack the set again"
            )
        for row in _read_table(path):
            coverage[int(row["number"]), place] = float(row["coverage"])
    # With equal coverages the last category wins, as in the authors' code.
    place = coverage.shape[1] - 1 - coverage[:, ::-1].argmax(axis=1)
    place[(coverage < 0).all(axis=1)] = 0  # a label that no table lists
    return Labels(tuple(names), categories, tuple(place.tolist()))


def _read_table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))
