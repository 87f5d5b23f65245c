"""Changes to the pixels of a batch after the warp.

All lengths are relative to the side, so a student and a live teacher of different input sizes receive the same
disturbance. Each change holds for the rows that drew it, and its result for a row does not depend on the others, on the
size of the batch or on the number of threads: pixels are added in a fixed order, or as whole numbers.

Shape letters: B batch, n rows of a change, h w images at any size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from permafrost.core.batches import PixelAugment, PixelChange, PixelChangeName

_PART_BYTES = 2**20
"""Size of the images that the host's processor changes at once, so that they stay in its cache."""
_GRAY_STEPS = 255 * 256
"""Steps in which gray values are averaged, as whole numbers."""


def change_rows(images: Tensor, changes: Sequence[PixelChange]) -> Tensor:
    """Apply changes in their order, in place. Nothing is read back from a device.

    Args:
        images: f32 [B, 3, h, w] in [0, 1], which are overwritten.
        changes: Changes of rows of the batch.

    Returns:
        The images.
    """
    on_host = images.device.type == "cpu"
    count = max(1, _PART_BYTES // images[0].nbytes) if on_host else len(images)
    for change in changes:
        for start in range(0, len(change.rows), count):
            rows = change.rows[start : start + count]
            part = replace(change, rows=rows, values=change.values[start : start + count])
            if on_host and count == 1:  # a copy of an image of this size takes as long as a change
                image = images.narrow(0, int(rows), 1)
                image.copy_(_CHANGES[change.name](image, part))
            else:
                chosen = images.index_select(0, rows)
                images.index_copy_(0, rows, _CHANGES[change.name](chosen, part))
    return images


def _brightness(images: Tensor, change: PixelChange) -> Tensor:
    return (images * _per_image(change)).clamp_(0, 1)


def _contrast(images: Tensor, change: PixelChange) -> Tensor:
    """Blend with the mean gray, as torchvision and Pillow do."""
    steps = (_gray(images) * _GRAY_STEPS).round_().long()
    mean = steps.sum(dim=(1, 2, 3), keepdim=True) / (_GRAY_STEPS * images[0, 0].numel())
    return _blend(images, mean.to(images.dtype), change)


def _hue(images: Tensor, change: PixelChange) -> Tensor:
    from kornia.enhance import adjust_hue

    adjusted: Tensor = adjust_hue(images, change.values[:, 0])
    return adjusted.clamp(0, 1)


def _sharpness(images: Tensor, change: PixelChange) -> Tensor:
    """Blend with an image smoothed by [[1, 1, 1], [1, 5, 1], [1, 1, 1]] / 13, except at its border."""
    if min(images.shape[-2:]) <= 2:
        return images
    factor = _per_image(change)
    weight = (1 - factor) / 13
    rows = (images[..., :-2, :] + images[..., 1:-1, :]).add_(images[..., 2:, :])
    around = (rows[..., :-2] + rows[..., 1:-1]).add_(rows[..., 2:])
    sharp = images.clone()
    sharp[..., 1:-1, 1:-1].mul_(factor + 4 * weight).add_(around.mul_(weight))
    return sharp.clamp_(0, 1)


def _posterize(images: Tensor, change: PixelChange) -> Tensor:
    levels = torch.exp2(_per_image(change))
    return (images * levels).floor_().minimum(levels - 1).div_(levels)


def _solarize(images: Tensor, change: PixelChange) -> Tensor:
    inverted = images.clone().ge_(_per_image(change))  # 0 or 1
    return torch.addcmul(images, inverted, 1 - 2 * images)


def _autocontrast(images: Tensor, change: PixelChange) -> Tensor:
    from torchvision.transforms.v2.functional import autocontrast  # the import takes seconds

    stretched: Tensor = autocontrast(images)
    return stretched


def _equalize(images: Tensor, change: PixelChange) -> Tensor:
    """Make the histogram of each channel even in 256 levels, as torchvision and Pillow do.

    A level becomes (pixels below it + step / 2) / step, where a step is a 255th of the pixels that do not have the
    highest level, all in whole numbers. A channel with a step of 0 keeps its levels.
    """
    channels = images.flatten(0, 1).flatten(1)
    first = 256 * torch.arange(len(channels), device=images.device, dtype=torch.int32)
    levels = (channels * _BYTE_LEVELS).to(torch.int32)
    counts = _count((levels + first[:, None]).flatten(), 256 * len(channels)).view(-1, 256)
    below = counts.cumsum(dim=1) - counts
    pixels = channels.shape[1]
    highest = pixels - torch.where(counts > 0, below, 0).amax(dim=1, keepdim=True)
    step = (pixels - highest).div(255, rounding_mode="floor")
    even = (below + step.div(2, rounding_mode="floor")).div(
        step.clamp(min=1), rounding_mode="floor"
    )
    kept = torch.arange(256, device=images.device).expand_as(even)
    table = torch.where(step > 0, even.clamp(max=255), kept).to(images.dtype) / 255
    return table.flatten().index_select(0, (levels + first[:, None]).flatten()).view_as(images)


_BYTE_LEVELS = 255 + 1 - 1e-3
"""Factor of torchvision's conversion from floats to bytes."""


def _count(values: Tensor, length: int) -> Tensor:
    """Count whole numbers below `length`, i64 [length]."""
    if values.device.type == "cpu":
        return values.bincount(minlength=length)  # on a GPU it would wait for the largest number
    counts = torch.zeros(length, dtype=torch.int64, device=values.device)
    return counts.scatter_add_(0, values.long(), torch.ones_like(values, dtype=torch.int64))


def _blur(images: Tensor, change: PixelChange) -> Tensor:
    """Blur with a kernel that reaches three of the largest standard deviations, for any drawn one."""
    side = min(images.shape[-2:])
    radius = min(max(1, math.ceil(3 * change.largest * side)), side - 1)
    places = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    weights = (-((places / (change.values * side)) ** 2) / 2).exp()
    total = torch.zeros_like(weights[:, :1])
    for weight in weights.unbind(dim=1):
        total = total + weight[:, None]
    taps = (weights / total)[:, :, None, None, None].unbind(dim=1)
    for dim in (2, 3):
        padding = (0, 0, radius, radius) if dim == 2 else (radius, radius, 0, 0)
        padded = torch.nn.functional.pad(images, padding, mode="reflect")
        length = images.shape[dim]
        images = torch.zeros_like(images)
        for place, tap in enumerate(taps):
            images = images + tap * padded.narrow(dim, place, length)
    return images


def _erase(images: Tensor, change: PixelChange) -> Tensor:
    """Set the pixels whose centers are inside the rectangle to its value."""
    height, width = images.shape[-2:]
    x0, y0, x1, y1, value = change.values[:, :, None].unbind(dim=1)
    xs, ys = (
        (torch.arange(length, device=images.device, dtype=images.dtype) + 0.5) / length
        for length in (width, height)
    )
    inside = ((y0 <= ys) & (ys < y1))[:, None, :, None] & ((x0 <= xs) & (xs < x1))[:, None, None, :]
    return torch.where(inside, value[:, :, None, None], images)


def _per_image(change: PixelChange) -> Tensor:
    return change.values[:, :1, None, None]


def _gray(images: Tensor) -> Tensor:
    """Compute the gray values [n, 1, h, w] of ITU-R BT.601."""
    red, green, blue = images.unbind(dim=1)
    return (0.299 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)[:, None]


def _blend(images: Tensor, base: Tensor, change: PixelChange) -> Tensor:
    """Compute base + factor * (images - base), in [0, 1]."""
    return torch.lerp(base.expand_as(images), images, _per_image(change)).clamp_(0, 1)


_CHANGES: dict[PixelChangeName, Callable[[Tensor, PixelChange], Tensor]] = {
    "brightness": _brightness,
    "contrast": _contrast,
    "saturation": lambda images, change: _blend(images, _gray(images), change),
    "hue": _hue,
    "grayscale": lambda images, change: _gray(images).expand_as(images),
    "sharpness": _sharpness,
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
    "gaussian_blur": _blur,
    "random_erasing": _erase,
}


def blank_maps(maps: Tensor, pixel_augment: PixelAugment | None) -> Tensor:
    """Set maps to 0 where an erasing of `maps: blank` has set the pixels, by the fraction of each cell outside of it.

    Args:
        maps: f32 [B, E, A, h, w] on any grid of the view.
        pixel_augment: Changes of the batch.
    """
    for change in () if pixel_augment is None else pixel_augment.changes:
        if change.blanks_maps:
            inside = box_fractions(change.values[:, :4], (maps.shape[-2], maps.shape[-1]))
            kept = (1 - inside)[:, None, None]
            maps = maps.index_copy(0, change.rows, maps.index_select(0, change.rows) * kept)
    return maps


def box_fractions(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Compute the fraction of each cell that is inside of a box, [n, height, width].

    Args:
        boxes: x0, y0, x1, y1 in [0, 1], f32 [n, 4].
        size: (height, width) of the grid.
    """
    x0, y0, x1, y1 = boxes[:, :, None].unbind(dim=1)

    def lengths(start: Tensor, end: Tensor, count: int) -> Tensor:
        edges = torch.arange(count, device=boxes.device, dtype=boxes.dtype)
        return ((end * count).minimum(edges + 1) - (start * count).maximum(edges)).clamp(min=0)

    return lengths(y0, y1, size[0])[:, :, None] * lengths(x0, x1, size[1])[:, None, :]
