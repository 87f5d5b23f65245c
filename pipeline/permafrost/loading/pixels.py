"""Pixel augmentation of views after the warp: RandAugment, then the operations of `augment.pixels`, then mixup.

RandAugment and mixup make an image that a stored target does not describe, so they are for training on labels, or with
a live teacher on the same images. The operations of `augment.pixels` leave every object where it is, so they are also
allowed with stored targets, which belong to the undisturbed image. Shape letters: B batch, h w images at any size.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from permafrost.config.augment import AugmentOptions
from permafrost.core.records import PixelAugment
from permafrost.core.seeds import derive_seed
from permafrost.loading.pixel_operations import PixelSchedule, change_rows
from permafrost.loading.randaugment import randaugment


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
        """Draw for `count` positions of `step` starting at `start`, or return None without pixel augmentation."""
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
