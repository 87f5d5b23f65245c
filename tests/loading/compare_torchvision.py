"""Compare views of photographs with torchvision's RandomResizedCrop, RandAugment and RandomErasing on PIL images.

    python -m tests.loading.compare_torchvision [views]

Both have the same parameters: windows, flips, operations with their strengths, and erased boxes. torchvision applies
the operations one after the other, on bytes; here all that move come first. It prints, for each operation that was
drawn alone and for all views, the mean and the largest difference of a pixel in levels of 255, the correlation, and the
energy of horizontal gradients relative to torchvision's.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.v2.functional as tv
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.autoaugment import _apply_op

from permafrost.config.augment import (
    AugmentOptions,
    OperationConfig,
    PixelOperationConfig,
    PolicyConfig,
)
from permafrost.core.batches import Rendering
from permafrost.loading.geometry import render_windows
from permafrost.loading.pixel_changes import change_rows
from permafrost.loading.random_views import ViewSchedule
from permafrost.loading.recipes import SPACE, PixelSchedule, draw_policy
from permafrost.loading.windows import cut_window, pixel_boxes
from tests.support.paths import SHARED_DATA

SIDE = 224
POLICY = PolicyConfig(kind="randaugment", count=2, magnitude=9.0)
RECIPE = AugmentOptions(
    size=SIDE,
    operations=(
        OperationConfig(kind="resized_crop"),
        OperationConfig(kind="horizontal_flip"),
        POLICY,
        PixelOperationConfig(kind="random_erasing", p=0.25),
    ),
)
_NAMES = {
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateX",
    "translate_y": "TranslateY",
    "rotate": "Rotate",
    "brightness": "Brightness",
    "saturation": "Color",
    "contrast": "Contrast",
    "sharpness": "Sharpness",
    "posterize": "Posterize",
    "solarize": "Solarize",
    "autocontrast": "AutoContrast",
    "equalize": "Equalize",
    "identity": "Identity",
}


def magnitude_of(kind: str, strength: float) -> float:
    """Magnitude of torchvision for a strength of a policy."""
    if kind.startswith("translate"):
        return round(strength * SIDE)
    if kind == "posterize":
        return int(strength)
    return 255 * strength if kind == "solarize" else strength


def views_of_torchvision(
    photograph: Image.Image, box, flips, kinds, strengths, erased, interpolation
) -> np.ndarray:
    """The view of a photograph as torchvision makes it, [SIDE, SIDE, 3] in levels of 255."""
    left, top, right, bottom = box
    size = [top, left, bottom - top, right - left]
    image = tv.resized_crop(photograph, *size, [SIDE, SIDE], antialias=True)
    image = tv.horizontal_flip(image) if flips[0] else image
    for kind, strength in zip(kinds, strengths, strict=True):
        magnitude = magnitude_of(SPACE[kind], strength)
        image = _apply_op(image, _NAMES[SPACE[kind]], magnitude, interpolation, [0.0, 0.0, 0.0])
    pixels = np.array(image, np.float32)
    if erased[0] >= 0:
        x0, y0, x1, y1 = (round(SIDE * value) for value in erased)
        pixels[y0:y1, x0:x1] = 0
    return pixels


def gradient_energy(pixels: np.ndarray) -> float:
    return float((np.diff(pixels, axis=1) ** 2).mean())


def compare(count: int, interpolation: InterpolationMode) -> dict[str, np.ndarray]:
    """Differences of `count` views by the operation that was drawn alone: mean, largest, correlation, two energies."""
    photographs = [Image.open(p).convert("RGB") for p in sorted(SHARED_DATA.glob("photos/*/*.jpg"))]
    numbers = torch.arange(count) % len(photographs)
    sizes = torch.tensor([image.size[::-1] for image in photographs])[numbers]
    schedule = ViewSchedule(RECIPE, (256, 256), 0, one_aspect=False, whole_pixels=True)
    pixel_schedule = PixelSchedule(RECIPE.operations, 0, SIDE)
    blocks = -(-count // 1024)
    drawn = [draw_policy(POLICY, 0, 0, 0, block, SIDE) for block in range(blocks)]
    kinds, strengths = (torch.cat(part)[:count] for part in zip(*drawn, strict=True))
    rows = pixel_schedule.rows(0, 0, count)
    results = defaultdict(list)
    for start in range(0, count, 64):
        part = slice(start, min(start + 64, count))
        views = schedule.views(0, start, sizes[part])
        boxes = pixel_boxes(views.windows, sizes[part]).tolist()
        flips = (views.windows[:, :2] < 0).tolist()
        memory = np.empty((len(boxes), SIDE, SIDE, 3), np.uint8)
        for row, (box, flip) in enumerate(zip(boxes, flips, strict=True)):
            picture = np.array(photographs[int(numbers[start + row])])
            cut_window(picture, tuple(box), tuple(flip), "black", memory[row])
        windows = torch.from_numpy(memory).permute(0, 3, 1, 2)
        rendering = Rendering(interpolation=interpolation.value)
        images = render_windows(windows, views.moves, (SIDE, SIDE), rendering)
        images = change_rows(images, pixel_schedule.draw(0, start, len(boxes)))
        here = images.permute(0, 2, 3, 1).numpy() * 255
        for row, (box, flip) in enumerate(zip(boxes, flips, strict=True)):
            at = start + row
            there = views_of_torchvision(
                photographs[int(numbers[at])],
                box,
                flip,
                kinds[at].tolist(),
                strengths[at].tolist(),
                rows[at, -4:].tolist(),
                interpolation,
            )
            difference = np.abs(here[row] - there)
            varies = min(here[row].std(), there.std()) > 0
            correlation = np.corrcoef(here[row].ravel(), there.ravel())[0, 1] if varies else np.nan
            values = (
                difference.mean(),
                difference.max(),
                correlation,
                gradient_energy(here[row]),
                gradient_energy(there),
            )
            names = [SPACE[kind] for kind in kinds[at].tolist() if kind]
            results["all"].append(values)
            if len(names) <= 1 and rows[at, -1] < 0:
                results[names[0] if names else "crop and flip"].append(values)
    return {name: np.array(values) for name, values in results.items()}


def main() -> None:
    """Print the table."""
    if not Path(SHARED_DATA, "photos").is_dir():
        raise SystemExit("the photographs are not there")
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    for interpolation in (InterpolationMode.BILINEAR, InterpolationMode.NEAREST):
        print(f"{count} views, moves {interpolation.value}")
        print(
            f"{'operation':16}{'views':>6}{'mean':>8}{'largest':>9}{'correlation':>13}{'energy':>8}"
        )
        for name, values in sorted(compare(count, interpolation).items()):
            mean, largest, correlation, energy, other = values.T
            print(
                f"{name:16}{len(values):6}{mean.mean():8.3f}{largest.max():9.1f}"
                f"{np.nanmean(correlation):8.4f} ({np.nanmin(correlation):.3f})"
                f"{energy.sum() / other.sum():8.3f}"
            )


if __name__ == "__main__":
    main()
