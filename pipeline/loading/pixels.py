"""Pixel augmentation of views after the warp: RandAugment, then mixup.

Neither can be expressed as a matrix, so stored targets cannot be transformed accordingly. Both are for training on
labels, or with a live teacher on the same images. Shape letters: B batch, h w images at any size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.config.augment import AugmentOptions
from pipeline.core.records import PixelAugment
from pipeline.core.seeds import derive_seed


class PixelAugmentSchedule:
    """Random draws for the steps of an epoch, independent of rank and process.

    The RandAugment seed of a record is a pure function of (seed, epoch, position in the epoch's order). The mixup
    coefficient, one per global batch, is a pure function of (seed, epoch, step).
    """

    def __init__(self, config: AugmentOptions, seed: int) -> None:
        self.config = config
        self.seed = seed

    def draw(self, epoch: int, step: int, start: int, count: int) -> PixelAugment | None:
        """Draw for `count` positions of `step` starting at `start`, or return None without pixel augmentation."""
        if not self.config.pixel_options:
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
    if pixel_augment.mixup_lambda is not None:
        images = mix(images, pixel_augment.mixup_lambda)
    return images


def mix(images: Tensor, mixup_lambda: float) -> Tensor:
    """Mix each image with the previous one in the batch, cyclically: lambda * image + (1 - lambda) * previous."""
    return mixup_lambda * images + (1 - mixup_lambda) * images.roll(1, dims=0)


def randaugment(images: Tensor, magnitude: int, seeds: Sequence[int]) -> Tensor:
    """Apply torchvision's RandAugment to each image f32 [B, 3, h, w] in [0, 1], with a separate seed per image.

    Translations are relative to the side, so equal seeds have the same effect at any size. Records are processed one
    after the other, about 3 ms each at 224 pixels on one core. On a GPU every step is synchronized, because
    torchvision creates the matrices of its geometric operations on the host.
    """
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import RandAugment  # the import takes seconds

    # Bilinear as in the paper's code, because torchvision's default is nearest.
    transform = RandAugment(magnitude=magnitude, interpolation=InterpolationMode.BILINEAR)
    changed = []
    with torch.random.fork_rng(devices=[]):
        for image, seed in zip(images, seeds, strict=True):
            # torch.manual_seed would also seed the generators of the GPUs, which dropout uses.
            torch.default_generator.manual_seed(seed)
            changed.append(transform(image))
    return torch.stack(changed)
