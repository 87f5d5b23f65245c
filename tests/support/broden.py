"""Drawn concepts in the file layout of Broden."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from permafrost.storage.files import file_at
from permafrost_papers.interpretability.concepts import (
    CATEGORIES,
    IMAGES,
    INDEX,
    LABELS,
    ConceptImage,
    DrawnConcepts,
    Labels,
)
from permafrost_sources.demo import encode_png


def write_broden(concepts: DrawnConcepts, folder: Path) -> None:
    """Write the concepts in Broden's layout, as `broden.BrodenFolder` reads it."""
    file_at(folder / IMAGES).make_folder()
    covered = np.zeros(len(concepts.labels.names))
    rows = []
    for number in range(len(concepts)):
        picture = concepts.read(number)
        rows.append(_write_picture(picture, f"{number:05d}", concepts.labels, folder))
        for layer in picture.layers:
            covered += np.bincount(layer.ravel(), minlength=len(covered)) / layer.size
        covered[list(picture.whole)] += 1
    _write_table(folder / INDEX, rows)
    _write_labels(concepts.labels, covered, folder)


def _write_picture(
    picture: ConceptImage, name: str, labels: Labels, folder: Path
) -> dict[str, Any]:
    """Write one image with its labels, and return its row of the index."""
    entries: dict[str, list[str]] = {category: [] for category in labels.categories}
    for place, layer in enumerate(picture.layers):
        file = f"{name}_{place}.png"
        (folder / IMAGES / file).write_bytes(encode_png(encode_labels(layer)))
        entries[_category(labels, int(layer.max()))].append(file)
    for label in picture.whole:
        entries[_category(labels, label)].append(str(label))
    (folder / IMAGES / f"{name}.png").write_bytes(
        encode_png(picture.image.permute(1, 2, 0).numpy())
    )
    sizes = dict(zip(("ih", "iw"), picture.image.shape[1:], strict=True))
    sizes |= dict(zip(("sh", "sw"), picture.layers.shape[1:], strict=True))
    listed = {category: ";".join(found) for category, found in entries.items()}
    return {"image": f"{name}.png", "split": "train", **sizes, **listed}


def _write_labels(labels: Labels, covered: NDArray[np.float64], folder: Path) -> None:
    known = [
        {"number": number, "name": name, "category": _category(labels, number)}
        for number, name in enumerate(labels.names)
        if number
    ]
    _write_table(folder / CATEGORIES, [{"name": name} for name in labels.categories])
    _write_table(folder / LABELS, known)
    for category in labels.categories:
        own = [row for row in known if row["category"] == category]
        coded = [
            {
                "code": code,
                "number": row["number"],
                "name": row["name"],
                "coverage": covered[labels.names.index(str(row["name"]))],
            }
            for code, row in enumerate(own, start=1)
        ]
        _write_table(folder / f"c_{category}.csv", coded)


def _category(labels: Labels, label: int) -> str:
    return labels.categories[labels.category_of[label]]


def encode_labels(labels):
    """Encode labels [s, t] below 65,536 as pixels u8 [s, t, 3], the inverse of `decode_labels`."""
    return np.stack([labels % 256, labels // 256, np.zeros_like(labels)], axis=2).astype(np.uint8)


def _write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
