"""Made-up photographs with a table of their labels, backgrounds and boxes, as untidy as people's own."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("boat", "house", "tree")
BACKGROUNDS = ("land", "water")
_COLORS = {"boat": (200, 60, 40), "house": (220, 200, 90), "tree": (60, 160, 70)}
_GROUND = {"land": (120, 100, 60), "water": (50, 90, 150)}


def write_photo_table(folder: Path, per_class: int = 8) -> Path:
    """Write photographs of several sizes and photos.csv with their columns, and return the path of the table.

    Every split has `per_class` photographs of each class, a quarter of them (a half on test) on the unusual background.
    Among them are names with a space and an umlaut, a PNG with an alpha channel, a gray image, records without a box,
    and one file that is damaged.
    """
    random = np.random.default_rng(0)
    rows = []
    for split in ("train", "val", "test"):
        for label_index, label in enumerate(SHAPES):
            for number in range(per_class):
                usual = number % (2 if split == "test" else 4) != 0
                background = BACKGROUNDS[(label_index + (not usual)) % 2]
                path = f"{split} fotos/{label}-ü{number}.{'png' if number == 2 else 'jpg'}"
                boxes = _write_photo(folder / path, label, background, random, number)
                rows.append(
                    {
                        "path": path,
                        "label": label,
                        "labels": " ".join(dict.fromkeys(box["label"] for box in boxes)),
                        "split": split,
                        "background": background,
                        "boxes": "" if number == 3 else json.dumps(boxes),
                    }
                )
    rows[0]["path"] = "damaged.jpg"
    (folder / "damaged.jpg").write_bytes(b"\xff\xd8 this is not a photograph")
    table = folder / "photos.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return table


def _write_photo(
    path: Path, label: str, background: str, random: np.random.Generator, number: int
) -> list[dict[str, object]]:
    """Draw the object and, on every third photograph, a second one of the next class; return their boxes."""
    width, height = (int(side) for side in random.integers(90, 160, size=2))
    noise = random.normal(0, 25, size=(height, width, 3))
    pixels = np.clip(np.asarray(_GROUND[background]) + noise, 0, 255).astype(np.uint8)
    image = Image.fromarray(pixels)
    drawn = [label]
    if number % 3 == 0:
        drawn.append(SHAPES[(SHAPES.index(label) + 1) % len(SHAPES)])
    boxes: list[dict[str, object]] = []
    for place, name in enumerate(drawn):
        side = int(random.integers(24, 40))
        x0 = int(random.integers(0, width // 2 - side)) + place * width // 2
        y0 = int(random.integers(0, height - side))
        draw = ImageDraw.Draw(image)
        corners = (x0, y0, x0 + side - 1, y0 + side - 1)
        if name == "tree":
            draw.ellipse(corners, fill=_COLORS[name])
        elif name == "house":
            draw.rectangle(corners, fill=_COLORS[name])
        else:
            bottom = y0 + side - 1
            draw.polygon(
                [(x0, y0), (x0 + side - 1, y0), (x0 + side // 2, bottom)], fill=_COLORS[name]
            )
        boxes.append({"label": name, "x0": x0, "y0": y0, "x1": x0 + side, "y1": y0 + side})
    path.parent.mkdir(parents=True, exist_ok=True)
    if number == 4:
        image = image.convert("L")
    if path.suffix == ".png":
        image.putalpha(255)
    image.save(path)
    return boxes
