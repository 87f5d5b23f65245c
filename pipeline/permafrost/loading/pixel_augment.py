"""Changes to the pixels of a batch after the warp: photometric operations and RandAugment.

The operations of `augment.pixels` change pixels in place: no object moves, so maps, boxes and logits of the undisturbed
image still apply, and they are also allowed with stored targets. All lengths are relative to the side, so a student and
a live teacher of different input sizes see the same disturbance. Each change holds for the rows that drew it, and its
result for a row does not depend on the others.

RandAugment and mixup make an image that a stored target does not describe, so they are for training on labels, or with
a live teacher on the same images.

Shape letters: B batch, n rows of a change, h w images at any size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from permafrost.config.augment import AugmentOptions, PixelOperationConfig
from permafrost.core.batches import PixelAugment, PixelChange
from permafrost.core.digests import derive_seed
from permafrost.loading.method_cache import cache_method

BLOCK_SIZE = 1024
"""Number of consecutive positions of an epoch's order drawn together."""

_Color = Literal["brightness", "contrast", "saturation", "hue"]

_NUMBERS = 9
"""Random numbers per record and operation: the probability's, then up to 8 of the operation's own."""


# ---- draws ---------------------------------------------------------------------------------------


class PixelSchedule:
    """Random draws of `augment.pixels`, as pure functions of (seed, epoch, position in the epoch's order)."""

    def __init__(self, operations: Sequence[PixelOperationConfig], seed: int) -> None:
        self.operations = tuple(operations)
        self.seed = seed
        self._block = cache_method(self._draw_block, 4)

    def draw(self, epoch: int, start: int, count: int) -> tuple[PixelChange, ...]:
        """Draw the changes of consecutive positions of an epoch's order, in the order in which they are applied.

        Args:
            epoch: Number of the epoch.
            start: First position.
            count: Number of positions.
        """
        if not self.operations:
            return ()
        first, last = start // BLOCK_SIZE, (start + count - 1) // BLOCK_SIZE
        blocks = torch.cat([self._block(epoch, block) for block in range(first, last + 1)], dim=1)
        begin = start - first * BLOCK_SIZE
        changes: list[PixelChange] = []
        for operation, numbers in zip(
            self.operations, blocks[:, begin : begin + count], strict=True
        ):
            rows = (numbers[:, 0] < operation.p).nonzero()[:, 0]
            if len(rows):
                changes += _DRAWS[operation.kind](operation, rows, numbers[rows, 1:])
        return tuple(changes)

    def _draw_block(self, epoch: int, block: int) -> Tensor:
        """Draw uniform numbers in [0, 1) for a block, f64 [operations, BLOCK_SIZE, _NUMBERS]."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "pixels", epoch, block))
        size = (len(self.operations), BLOCK_SIZE, _NUMBERS)
        return torch.rand(size, generator=generator, dtype=torch.float64)


def _draw_jitter(
    operation: PixelOperationConfig, rows: Tensor, numbers: Tensor
) -> list[PixelChange]:
    """Draw four factors and their order for each record. Equal steps of the order become one change."""
    ranges = (operation.brightness, operation.contrast, operation.saturation, operation.hue)
    order = numbers[:, 4:8].argsort(dim=1)
    changes = []
    for turn in range(4):
        for index, (name, largest) in enumerate(zip(_COLORS, ranges, strict=True)):
            chosen = (order[:, turn] == index).nonzero()[:, 0]
            if largest == 0 or not len(chosen):
                continue
            if name == "hue":
                values = 2 * math.pi * largest * (2 * numbers[chosen, index] - 1)
            else:
                values = _between((max(0.0, 1 - largest), 1 + largest), numbers[chosen, index])
            changes.append(
                PixelChange(name=name, rows=rows[chosen], values=values[:, None].float())
            )
    return changes


def _draw_grayscale(
    operation: PixelOperationConfig, rows: Tensor, numbers: Tensor
) -> list[PixelChange]:
    return [PixelChange(name="grayscale", rows=rows, values=numbers[:, :0].float())]


def _draw_blur(operation: PixelOperationConfig, rows: Tensor, numbers: Tensor) -> list[PixelChange]:
    sigma = _between(operation.sigma, numbers[:, :1]).float()
    return [PixelChange(name="blur", rows=rows, values=sigma, largest=operation.sigma[1])]


def _draw_erasing(
    operation: PixelOperationConfig, rows: Tensor, numbers: Tensor
) -> list[PixelChange]:
    """Draw rectangles x0, y0, x1, y1 in [0, 1] with exactly the drawn fraction of the area, and their value.

    A rectangle that is longer than a side is cut to it and widened.
    """
    low, high = operation.ratio
    share = _between(operation.scale, numbers[:, 0])
    ratio = _between((math.log(low), math.log(high)), numbers[:, 1]).exp()
    width = (share * ratio).sqrt().clamp(max=1).maximum(share)
    height = share / width
    x, y = numbers[:, 2] * (1 - width), numbers[:, 3] * (1 - height)
    value = torch.full_like(x, operation.value)
    corners = torch.stack([x, y, x + width, y + height, value], dim=1).float()
    return [PixelChange(name="erase", rows=rows, values=corners)]


def _between(limits: tuple[float, float], numbers: Tensor) -> Tensor:
    return limits[0] + (limits[1] - limits[0]) * numbers


_COLORS: tuple[_Color, ...] = ("brightness", "contrast", "saturation", "hue")
_DRAWS: dict[str, Callable[[PixelOperationConfig, Tensor, Tensor], list[PixelChange]]] = {
    "color_jitter": _draw_jitter,
    "grayscale": _draw_grayscale,
    "gaussian_blur": _draw_blur,
    "random_erasing": _draw_erasing,
}


# ---- pixels --------------------------------------------------------------------------------------


def change_rows(images: Tensor, changes: Sequence[PixelChange]) -> Tensor:
    """Apply changes in their order to images f32 [B, 3, h, w] in [0, 1]. Nothing is read back from the device."""
    if not changes:
        return images
    images = images.clone()
    for change in changes:
        changed = _CHANGES[change.name](images.index_select(0, change.rows), change)
        images.index_copy_(0, change.rows, changed)
    return images


def _adjust(images: Tensor, change: PixelChange) -> Tensor:
    """Adjust one property of the colors, as torchvision's ColorJitter and Pillow do."""
    from kornia import enhance

    adjusted: Tensor = {
        "brightness": enhance.adjust_brightness_accumulative,
        "contrast": enhance.adjust_contrast_with_mean_subtraction,
        "saturation": enhance.adjust_saturation_with_gray_subtraction,
        "hue": enhance.adjust_hue,
    }[change.name](images, change.values[:, 0])
    return adjusted.clamp(0, 1)


def _grayscale(images: Tensor, change: PixelChange) -> Tensor:
    from kornia.color import rgb_to_grayscale

    gray: Tensor = rgb_to_grayscale(images)
    return gray.expand_as(images)


def _blur(images: Tensor, change: PixelChange) -> Tensor:
    """Blur with a kernel that reaches three of the largest standard deviations, for any drawn one."""
    # Kornia's gaussian_blur2d reads sigma back from the device to check it, and these two do not.
    from kornia.filters import filter2d_separable, get_gaussian_kernel1d

    side = min(images.shape[-2:])
    radius = min(max(1, math.ceil(3 * change.largest * side)), side - 1)
    kernel = get_gaussian_kernel1d(2 * radius + 1, change.values * side)
    blurred: Tensor = filter2d_separable(images, kernel, kernel)
    return blurred


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


_CHANGES: dict[str, Callable[[Tensor, PixelChange], Tensor]] = {
    **dict.fromkeys(_COLORS, _adjust),
    "grayscale": _grayscale,
    "blur": _blur,
    "erase": _erase,
}


# ---- randaugment -----------------------------------------------------------------------------------


NUM_OPERATIONS = 2
"""Operations per image, as in the paper."""

Drawn = tuple[str, int]
"""Name of an operation of torchvision's space, and the sign of its magnitude."""


def randaugment(images: Tensor, magnitude: int, seeds: Sequence[int]) -> Tensor:
    """Apply torchvision's RandAugment to each image f32 [B, 3, h, w] in [0, 1], with a separate seed per image.

    Each record is changed as by torchvision's transform after `torch.manual_seed(seed)`. Translations are relative to
    the side, so equal seeds have the same effect at any size. On a GPU every step is synchronized, because torchvision
    creates the matrices of its geometric operations on the host.

    Args:
        images: f32 [B, 3, h, w] in [0, 1].
        magnitude: Number of torchvision's magnitude bin, the same for all operations.
        seeds: Seed of each image, [B].

    Returns:
        A changed copy, f32 [B, 3, h, w].
    """
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import RandAugment  # the import takes seconds

    # Bilinear as in the paper's code, because torchvision's default is nearest.
    transform = RandAugment(magnitude=magnitude, interpolation=InterpolationMode.BILINEAR)
    space = transform._AUGMENTATION_SPACE
    signed = {name: is_signed for name, (_, is_signed) in space.items()}
    drawn = [draw_operations(signed, seed) for seed in seeds]
    images = images.clone()
    for turn in range(NUM_OPERATIONS):
        for (name, sign), rows in group_by_operation([of_record[turn] for of_record in drawn]):
            values = space[name][0](transform.num_magnitude_bins, *images.shape[-2:])
            changed = transform._apply_image_or_video_transform(
                images[rows],
                name,
                0.0 if values is None else sign * float(values[magnitude]),
                interpolation=transform.interpolation,
                fill=transform._fill,
            )
            images[rows] = changed
    return images


def draw_operations(signed: dict[str, bool], seed: int) -> list[Drawn]:
    """Draw the operations of one record from its seed, in the order in which torchvision draws.

    Args:
        signed: Operations to choose from, with True where the sign of the magnitude is drawn as well.
        seed: Seed of the record.
    """
    generator = torch.Generator().manual_seed(seed)
    names = list(signed)
    drawn = []
    for _ in range(NUM_OPERATIONS):
        name = names[int(torch.randint(len(names), (), generator=generator))]
        negative = signed[name] and bool(torch.rand((), generator=generator) <= 0.5)
        drawn.append((name, -1 if negative else 1))
    return drawn


def group_by_operation(draws: Sequence[Drawn]) -> list[tuple[Drawn, list[int]]]:
    """Return each operation with the rows that drew it, without those that change nothing."""
    groups: dict[Drawn, list[int]] = {}
    for row, operation in enumerate(draws):
        if operation[0] != "Identity":
            groups.setdefault(operation, []).append(row)
    return list(groups.items())


# ---- pixels ----------------------------------------------------------------------------------------


class PixelAugmentSchedule:
    """Random draws for the steps of an epoch, independent of rank and process.

    The RandAugment seed and the operations of a record are pure functions of (seed, epoch, position in the epoch's
    order). The mixup coefficient, one per global batch, is a pure function of (seed, epoch, step).
    """

    def __init__(self, config: AugmentOptions, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.pixels = PixelSchedule(config.pixels, seed)

    def draw(self, epoch: int, step: int, start: int, count: int) -> PixelAugment | None:
        """Draw for `count` rows of a step, or return None without pixel augmentation.

        Args:
            epoch: Number of the epoch.
            step: Number of the step in the epoch, on which the mixup coefficient depends.
            start: Position of the first row in the epoch's order.
            count: Number of rows.
        """
        if not self.config.replacing_options and not self.config.pixels:
            return None
        seeds: tuple[int, ...] = ()
        if self.config.randaugment is not None:
            seeds = tuple(
                derive_seed(self.seed, "randaugment", epoch, position)
                for position in range(start, start + count)
            )
        return PixelAugment(
            magnitude=self.config.randaugment,
            seeds=seeds,
            changes=self.pixels.draw(epoch, start, count),
            mixup_lambda=self._draw_share(epoch, step),
        )

    def _draw_share(self, epoch: int, step: int) -> float | None:
        alpha = self.config.mixup_alpha
        if alpha is None:
            return None
        generator = np.random.default_rng(derive_seed(self.seed, "mixup", epoch, step))
        return float(generator.beta(alpha, alpha))


def change_pixels(images: Tensor, pixel_augment: PixelAugment) -> Tensor:
    """Apply `pixel_augment` to images f32 [B, 3, h, w] in [0, 1], keeping shape and range."""
    if pixel_augment.magnitude is not None:
        images = randaugment(images, pixel_augment.magnitude, pixel_augment.seeds)
    images = change_rows(images, pixel_augment.changes)
    if pixel_augment.mixup_lambda is not None:
        images = mix(images, pixel_augment.mixup_lambda)
    return images


def mix(images: Tensor, mixup_lambda: float) -> Tensor:
    """Mix each image with the previous one in the batch, cyclically: lambda * image + (1 - lambda) * previous."""
    return mixup_lambda * images + (1 - mixup_lambda) * images.roll(1, dims=0)
