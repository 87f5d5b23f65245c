"""Pictures of images and maps, and their rows in a grid with records in columns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from permafrost.report.tiles import PictureRow, TileRow, picture_grid

_STRONG_QUANTILE = 0.995
"""Quantile of the absolute contributions at and above which a position is fully red or blue."""


MAX_CHARACTERS = 300
"""Largest number of characters of a class or of a column of a table on the page."""
_WORDNET = re.compile(r"n\d{8}")
_EDGE = np.array([0.0, 0.65, 0.2])


def map_grid(pictures: Mapping[str, Mapping[str, Any]], classes: Sequence[str]) -> list[TileRow]:
    """Show images, the teacher's maps and those of one student per arm, with predictions above.

    pictures  arm -> tensors written by evaluate: frames, labels, predictions, maps, optionally colors, and those of the
              teacher under names that start with teacher_
    """
    first = {name: tensor.numpy() for name, tensor in next(iter(pictures.values())).items()}
    labels = first["labels"]
    frames = first["frames"].transpose(0, 2, 3, 1)
    rows = [PictureRow("image", list(frames), class_names(labels, classes))]
    if "teacher_maps" in first:
        teacher = {n.removeprefix("teacher_"): a for n, a in first.items() if "teacher_" in n}
        rows += explained_rows("teacher", frames, teacher, labels, classes)
    for arm, tensors in pictures.items():
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        rows += explained_rows(arm, frames, arrays, labels, classes)
    return picture_grid(rows)


def explained_rows(
    title: str,
    frames: NDArray[np.uint8],
    arrays: Mapping[str, NDArray[Any]],
    labels: NDArray[Any],
    classes: Sequence[str],
) -> list[PictureRow]:
    """Build the rows of a network's maps, for a B-cos network its contributions and the colors of its weights.

    frames  u8 [n, H, W, 3]
    arrays  maps, predictions and optionally colors, as returned by pictures.explained_pictures
    """
    predictions = arrays["predictions"]
    captions = class_names(predictions, classes)
    wrong = (predictions != labels).reshape(len(labels), -1).any(axis=1).tolist()
    if "colors" not in arrays:
        return [PictureRow(title, overlays(frames, arrays["maps"]), captions, wrong)]
    return [
        PictureRow(title, contributions(arrays["maps"]), captions, wrong),
        PictureRow("colors", composite_on_white(arrays["colors"])),
    ]


def class_names(labels: NDArray[Any], classes: Sequence[str]) -> list[str]:
    """Names of the records' classes: empty if unknown, a number if a teacher's classes are not those of the data.

    labels  i64 [n], or f32 [n, K] for many labels per record, whose names are joined by line breaks
    """
    if labels.ndim == 2:
        return [
            "\n".join(classes[label] for label in np.flatnonzero(row).tolist()) for row in labels
        ]
    named = labels.max(initial=0) < len(classes)
    names = [classes[label] if named else str(label) for label in labels]
    return [name if label >= 0 else "" for name, label in zip(names, labels, strict=True)]


def shown_name(name: str) -> str:
    """Return a name as the page shows it: what no encoder takes is escaped, and a long one is cut in its middle."""
    if len(name) > MAX_CHARACTERS:
        cut = f" ... ({len(name):,} characters) ... "
        name = f"{name[: MAX_CHARACTERS // 2]}{cut}{name[-MAX_CHARACTERS // 4 :]}"
    return name.encode(errors="backslashreplace").decode()


def readable_classes(classes: Sequence[str]) -> list[str]:
    """Return the names of the classes on the page.

    Before a WordNet id, such as n01443537, is the name of its noun.
    """
    classes = [shown_name(name) for name in classes]
    if not any(_WORDNET.fullmatch(name) for name in classes):
        return classes
    from timm.data.imagenet_info import ImageNetInfo

    info = ImageNetInfo("imagenet-22k")  # a table of timm's package
    known = set(classes) & set(info.label_names())  # type: ignore[no-untyped-call]
    nouns = {name: info.label_name_to_description(name, detailed=False) for name in known}
    return [
        f"{nouns[name].partition(',')[0]} ({name})" if name in nouns else name for name in classes
    ]


def overlays(images: NDArray[np.uint8], maps: NDArray[np.float32]) -> list[NDArray[np.float64]]:
    """Draw maps [n, h, w], each scaled to its highest value and upsampled, in red over a pale gray image."""
    import torch

    from permafrost.evaluation.localization import upsample

    size = (images.shape[1], images.shape[2])
    heat = upsample(torch.from_numpy(maps), size).clamp(min=0).numpy()
    heat = heat / np.maximum(heat.max(axis=(1, 2), keepdims=True), np.finfo(np.float32).tiny)
    gray = 0.5 + 0.5 * images.mean(axis=3, keepdims=True) / 255
    red = np.array([0.85, 0.05, 0.1])
    alpha = 0.8 * heat[..., None]
    return list(gray * (1 - alpha) + red * alpha)


def contributions(maps: NDArray[np.float32]) -> list[NDArray[np.float64]]:
    """Draw signed maps [n, h, w]: red is for the class, blue against it, white neutral."""
    strong = np.quantile(np.abs(maps), _STRONG_QUANTILE, axis=(1, 2), keepdims=True)
    value = (maps / np.maximum(strong, np.finfo(np.float32).tiny)).clip(-1, 1)[..., None]
    fades = 1 - np.abs(value)
    red, blue = np.where(value > 0, 1.0, fades), np.where(value < 0, 1.0, fades)
    return list(np.concatenate([red, fades, blue], axis=3))


def draw_outline(picture: NDArray[Any], region: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Convert a picture to floats in [0, 1], and outline a region bool [H, W] in green on its inner edge.

    An empty region is not drawn.
    """
    height, width = picture.shape[:2]
    shown = picture / 255 if picture.dtype == np.uint8 else picture.astype(np.float64)
    rows, columns = (
        np.arange(n) * full // n for n, full in zip((height, width), region.shape, strict=True)
    )
    inside = region[np.ix_(rows, columns)]
    core = inside.copy()
    for _ in range(max(1, round(min(height, width) / 80))):
        padded = np.pad(core, 1)
        core = core & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return np.where((inside & ~core)[..., None], _EDGE, shown)


def composite_on_white(colors: NDArray[np.uint8]) -> list[NDArray[np.float64]]:
    """Composite RGBA pictures [n, h, w, 4] on white."""
    values = colors / 255
    alpha = values[..., 3:]
    return list(values[..., :3] * alpha + 1 - alpha)
