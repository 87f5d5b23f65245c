"""A second reader of every format, which follows the tools' own readers and knows nothing of this project.

It says what a student of that code receives: the box of a view and whether it is mirrored, the operations on its
pixels, the erased box, the probabilities of all classes, and the pixels. Photographs are opened as Pillow opens them,
not turned by their EXIF orientation, as all of these tools do. The files are written by make_files.py.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import struct
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps


@dataclass
class View:
    """A view of a photograph."""

    box: tuple[float, float, float, float]
    """top, left, height and width as fractions of the sides of the stored image, before it is turned."""
    is_mirrored: bool = False
    operations: list[tuple[str, float]] = field(default_factory=list)
    erased: tuple[int, int, int, int] | None = None
    """Rows and columns of the view: top, left, height, width."""
    probabilities: np.ndarray | None = None
    pixels: np.ndarray | None = None
    """u8 [side, side, 3]."""


def photograph(path: Path) -> Image.Image:
    """Open a photograph as torchvision's loader of folders does."""
    return Image.open(io.BytesIO(path.read_bytes())).convert("RGB")


def load(data: bytes | Path):
    """Read a torch file that was made here."""
    file = io.BytesIO(data if isinstance(data, bytes) else data.read_bytes())
    return torch.load(file, map_location="cpu", weights_only=False)


def cut(image: Image.Image, box, side: int, resample=Image.Resampling.BILINEAR) -> Image.Image:
    """Cut a box of pixels, whose edges are rounded, and resize it."""
    top, left, height, width = box
    edges = (round(left), round(top), round(left + width), round(top + height))
    return image.crop(edges).resize((side, side), resample)


# ---- FKD -----------------------------------------------------------------------------------------


def fkd(
    labels: Path, photographs: list[Path], kind: str, classes: int, side: int
) -> list[list[View]]:
    """Read soft labels. `kind` is what FKD's Recover_soft_label calls them."""
    records = []
    for path in photographs:
        boxes, mirrored, stored = load(labels / f"train/{path.parent.name}/{path.stem}.tar")
        image = photograph(path)
        views = []
        for box, is_mirrored, label in zip(boxes, mirrored, stored, strict=True):
            top, left, height, width = (float(each) for each in box)
            rows = (
                top * image.height,
                left * image.width,
                height * image.height,
                width * image.width,
            )
            shown = cut(image, rows, side)
            if is_mirrored:
                shown = ImageOps.mirror(shown)
            views.append(
                View(
                    (top, left, height, width),
                    bool(is_mirrored),
                    probabilities=_fkd_label(np.asarray(label), kind, classes),
                    pixels=np.asarray(shown),
                )
            )
        records.append(views)
    return records


def _fkd_label(label: np.ndarray, kind: str, classes: int) -> np.ndarray:
    if kind == "hard":
        return np.eye(classes)[int(label)]
    numbers, values = (np.atleast_1d(each) for each in label.astype(np.float32))
    if kind == "marginal_renorm":
        probabilities = np.zeros(classes)
        probabilities[numbers.astype(int)] = values
        return probabilities / probabilities.sum()
    probabilities = np.full(classes, (1 - values.sum(dtype=np.float64)) / (classes - len(values)))
    probabilities[numbers.astype(int)] = values
    return probabilities


# ---- reinforced data sets of ml-dr, DataCompDR ---------------------------------------------------

NAMES = (
    *("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color"),
    *("Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize"),
)
RANDOM = (
    "resize",
    "random_crop",
    "random_resized_crop",
    "random_horizontal_flip",
    "rand_augment",
    "random_erase",
)
"""Operations whose values a recipe lists, in their order; random_erase comes last of them."""


def imagenet_plus(folder: Path, photographs: list[Path], classes: int) -> list[list[View]]:
    """Read recipes and probabilities, the rest of which is spread evenly."""
    augmentation = load(folder / "config.pth.tar")["reinforce"]["image_augmentation"]
    augmentation = {n: dict(o) for n, o in augmentation.items() if dict(o).get("enable", True)}
    records = []
    for number, path in enumerate(photographs):
        index, samples = load(folder / f"{number}.pth.tar")
        assert index == number
        image = photograph(path)
        views = []
        for sample in samples:
            recipe = _recipe(sample["params"], augmentation)
            view = replay(image, recipe, augmentation)
            values, numbers = (np.asarray(each) for each in sample["prob"])
            view.probabilities = np.full(classes, (1 - values.sum()) / (classes - len(values)))
            view.probabilities[numbers] = values
            views.append(view)
        records.append(views)
    return records


def _recipe(params, augmentation: dict) -> dict:
    """Return the values of each random operation by its name; of a mapping, the first of two images'."""
    names = [name for name in RANDOM if name in augmentation]
    if isinstance(params, dict):
        recipe = {name: params[name][0] for name in names if params.get(name) is not None}
        if recipe.get("rand_augment"):
            recipe["rand_augment"] = [(str(n), float(m)) for n, m in recipe["rand_augment"]]
        return recipe
    recipe = dict(zip(names, params, strict=True))
    if recipe.get("rand_augment"):
        recipe["rand_augment"] = [(NAMES[n], m) for n, m in recipe["rand_augment"]]
    return recipe


def replay(image: Image.Image, recipe: dict, augmentation: dict) -> View:
    """Apply the operations of a recipe to an image, in the order of that code."""
    shown, height, width = image, image.height, image.width
    box = (0.0, 0.0, 1.0, 1.0)
    if recipe.get("resize") is not None:
        size = recipe["resize"]
        rows, columns = size if isinstance(size, (list, tuple)) else _shorter_side(image, size)
        shown = image.resize((columns, rows), Image.Resampling.BILINEAR)
        height, width = rows, columns
    if "random_crop" in augmentation:
        side, padding = augmentation["random_crop"]["size"], augmentation["random_crop"]["padding"]
        top, left = recipe["random_crop"][:2]
        shown = ImageOps.expand(shown, padding).crop((left, top, left + side, top + side))
        box = ((top - padding) / height, (left - padding) / width, side / height, side / width)
    if "random_resized_crop" in augmentation:
        options = augmentation["random_resized_crop"]
        resample = (
            Image.Resampling.BICUBIC
            if options.get("interpolation") == "bicubic"
            else Image.Resampling.BILINEAR
        )
        rows = recipe["random_resized_crop"]
        shown = cut(shown, rows, options["size"], resample)
        box = (rows[0] / height, rows[1] / width, rows[2] / height, rows[3] / width)
    is_mirrored = bool(recipe.get("random_horizontal_flip"))
    if is_mirrored:
        shown = ImageOps.mirror(shown)
    drawn = recipe.get("rand_augment") or []
    for name, magnitude in drawn:
        shown = operate(shown, name, magnitude)
    pixels, erased = np.asarray(shown).copy(), recipe.get("random_erase")
    if erased is not None and erased[0] != -1:
        top, left, rows, columns = erased[:4]
        pixels[top : top + rows, left : left + columns] = 0
    else:
        erased = None
    return View(box, is_mirrored, list(drawn), erased, pixels=pixels)


def _shorter_side(image: Image.Image, size: int) -> tuple[int, int]:
    if image.width <= image.height:
        return int(size * image.height / image.width), size
    return size, int(size * image.width / image.height)


def operate(image: Image.Image, name: str, magnitude: float) -> Image.Image:
    """Apply an operation of torchvision's RandAugment to a Pillow image; what comes from outside is black."""
    affine = {
        "ShearX": (1, magnitude, 0, 0, 1, 0),
        "ShearY": (1, 0, 0, magnitude, 1, 0),
        "TranslateX": (1, 0, -int(magnitude), 0, 1, 0),
        "TranslateY": (1, 0, 0, 0, 1, -int(magnitude)),
    }
    if name in affine:
        data = affine[name]
        return image.transform(image.size, Image.Transform.AFFINE, data, Image.Resampling.NEAREST)
    if name == "Rotate":
        return image.rotate(magnitude, Image.Resampling.NEAREST)
    enhancers = {
        "Brightness": ImageEnhance.Brightness,
        "Color": ImageEnhance.Color,
        "Contrast": ImageEnhance.Contrast,
        "Sharpness": ImageEnhance.Sharpness,
    }
    if name in enhancers:
        return enhancers[name](image).enhance(1 + magnitude)
    if name == "Posterize":
        return ImageOps.posterize(image, int(magnitude))
    if name == "Solarize":
        return ImageOps.solarize(image, magnitude)
    if name == "AutoContrast":
        return ImageOps.autocontrast(image)
    return ImageOps.equalize(image) if name == "Equalize" else image


def datacompdr(
    tar: Path, photographs: list[Path], augmentation: dict
) -> tuple[list[list[View]], list[np.ndarray]]:
    """Read recipes and embeddings [V, d] of each photograph."""
    members: dict[str, dict[str, bytes]] = {}
    with tarfile.open(tar) as file:
        for member in file:
            name, _, kind = member.name.partition(".")
            members.setdefault(name, {})[kind] = file.extractfile(member).read()
    records, embeddings = [], []
    for (_, sample), path in zip(sorted(members.items()), photographs, strict=True):
        recipes = json.loads(sample["paug.json"])["param_aug"]
        image = photograph(path)
        records.append(
            [replay(image, _recipe(each, augmentation), augmentation) for each in recipes]
        )
        if "npz" in sample:
            embeddings.append(np.load(io.BytesIO(sample["npz"]))["image_emb"])
        else:
            embeddings.append(load(gzip.decompress(sample["pth.gz"]))["image_emb"].float().numpy())
    return records, embeddings


# ---- TinyViT, ReLabel, Theia, e2KD ---------------------------------------------------------------


def tinyvit(folder: Path, count: int, k: int, classes: int) -> np.ndarray:
    """Read the probabilities [n, classes] of positions; of one that several ranks have, those of the first rank."""
    rows: dict[int, np.ndarray] = {}
    for keys in sorted(folder.glob("rank*-keys.txt")):
        values = keys.with_name(keys.name.replace("keys.txt", "values.bin")).read_bytes()
        for line, name in enumerate(keys.read_text().split()):
            data = values[line * (4 + 4 * k) :]
            numbers = struct.unpack(f"<{k}h", data[4 : 4 + 2 * k])
            stored = np.frombuffer(data[4 + 2 * k : 4 + 4 * k], "<f2").astype(np.float64)
            row = np.full(classes, (1 - stored.sum()) / (classes - k))
            row[list(numbers)] = stored
            rows.setdefault(int(name), row)
    return np.stack([rows[number] for number in range(count)])


def relabel(path: Path, boxes: np.ndarray, classes: int) -> np.ndarray:
    """Pool the label map of a file in boxes [V, 4] (top, left, height, width of the image), as [V, classes].

    Their batch function passes (top, left, bottom, right) to roi_align as (x0, y0, x1, y1): the last axis of a map runs
    along the height of the image. Of a box of h x w cells, ceil(h) x ceil(w) points are averaged.
    """
    scores, numbers = load(path).double().numpy()
    side = scores.shape[-1]
    maps = np.zeros((classes, side, side))
    for rank in range(len(scores)):
        for y in range(side):
            for x in range(side):
                maps[int(numbers[rank, y, x]), y, x] = scores[rank, y, x]
    labels = []
    for top, left, height, width in boxes:
        x0, x1 = top * side - 0.5, (top + height) * side - 0.5
        y0, y1 = left * side - 0.5, (left + width) * side - 0.5
        wide, high = max(x1 - x0, 1.0), max(y1 - y0, 1.0)
        xs = x0 + (np.arange(math.ceil(wide)) + 0.5) * wide / math.ceil(wide)
        ys = y0 + (np.arange(math.ceil(high)) + 0.5) * high / math.ceil(high)
        pooled = np.zeros(classes)
        for y in ys:
            for x in xs:
                pooled += _bilinear(maps, y, x)
        pooled /= len(xs) * len(ys)
        exponentials = np.exp(pooled - pooled.max())
        labels.append(exponentials / exponentials.sum())
    return np.stack(labels)


def _bilinear(maps: np.ndarray, y: float, x: float) -> np.ndarray:
    side = maps.shape[-1]
    y, x = min(max(y, 0.0), side - 1.0), min(max(x, 0.0), side - 1.0)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, side - 1), min(left + 1, side - 1)
    dy, dx = y - top, x - left
    above = (1 - dx) * maps[:, top, left] + dx * maps[:, top, right]
    below = (1 - dx) * maps[:, bottom, left] + dx * maps[:, bottom, right]
    return (1 - dy) * above + dy * below


def theia(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Read the features [C, h, w] and the class token [C] of each name."""
    records = {}
    for tar in sorted(folder.rglob("*.tar")):
        with tarfile.open(tar) as file:
            for member in file:
                data = file.extractfile(member).read()
                size = int.from_bytes(data[:8], "little")
                header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
                tensors = {}
                for name, facts in header.items():
                    if name == "__metadata__":
                        continue
                    first, last = facts["data_offsets"]
                    halves = np.frombuffer(body[first:last], "<u2").astype(np.uint32) << 16
                    tensors[name] = halves.view(np.float32).reshape(facts["shape"])
                records[member.name.partition(".")[0]] = (
                    tensors["embedding"],
                    tensors["cls_token"],
                )
    return records


def e2kd(folder: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Read the logits [n, K] and the maps [n, channels, h, w] of numbers."""
    logits, maps = [], []
    for number in range(count):
        content = load(folder / f"{number}.pt")
        one = content["ouptut"] if "ouptut" in content else content["output"][0]
        explained = content["weight"] if "weight" in content else content["grad_cam"][0]
        logits.append(one.float().numpy())
        maps.append(explained.float().numpy())
    return np.stack(logits), np.stack(maps)
