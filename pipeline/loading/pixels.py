"""What becomes of a view's pixels after the warp: RandAugment, then mixup.

No matrix says either, so stored targets cannot follow: they are for those who learn from labels, or from a
teacher that looks at the very same images. Shape letters: B batch, h w images at any size.
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
    """What is drawn for the steps of an epoch, whatever the rank or the process that asks.

    A record's RandAugment is a pure function of (seed, epoch, position in the epoch's order), the share of
    mixup, one for a whole global batch, of (seed, epoch, step).
    """

    def __init__(self, config: AugmentOptions, seed: int) -> None:
        self.config = config
        self.seed = seed

    def draw(self, epoch: int, step: int, start: int, count: int) -> PixelAugment | None:
        """Of the `count` positions from `start` on, which belong to `step`; None where no pixel changes."""
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
    """Images f32 [B, 3, h, w] in [0, 1] as `appearance` says, of the same shape and range."""
    if pixel_augment.magnitude is not None:
        images = randaugment(images, pixel_augment.magnitude, pixel_augment.seeds)
    if pixel_augment.mixup_lambda is not None:
        images = mix(images, pixel_augment.mixup_lambda)
    return images


def mix(images: Tensor, mixup_lambda: float) -> Tensor:
    """lambda * each image + (1 - lambda) * the one before it in the batch, whose first follows its last."""
    return mixup_lambda * images + (1 - mixup_lambda) * images.roll(1, dims=0)


def randaugment(images: Tensor, magnitude: int, seeds: Sequence[int]) -> Tensor:
    """torchvision's RandAugment of each image f32 [B, 3, h, w] in [0, 1], drawn from its own seed.

    Translations are in shares of the side, so equal seeds mean the same at any size. Records come one after
    the other: about 3 ms each at 224 pixels on one core. On a GPU every step waits for it, as torchvision makes
    the matrices of its geometric operations on the host.
    """
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import RandAugment  # takes seconds

    # As the paper's code has it; torchvision's default is nearest.
    transform = RandAugment(magnitude=magnitude, interpolation=InterpolationMode.BILINEAR)
    changed = []
    with torch.random.fork_rng(devices=[]):
        for image, seed in zip(images, seeds, strict=True):
            # torch.manual_seed would seed the GPUs' generators, too, from which dropout draws.
            torch.default_generator.manual_seed(seed)
            changed.append(transform(image))
    return torch.stack(changed)
