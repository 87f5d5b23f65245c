"""Mixtures with chosen shares and boxes, and batches of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from permafrost.core.batches import Batch, Mixture, PixelAugment
from permafrost.loading.mixtures import mixture_of, paired_rows

PAIRS = [1, 0, 3, 2]
"""Partners of the rows of a batch of four."""


def share_of(*shares: float) -> Mixture:
    """Return a MixUp of four records with these shares, or all with the only one."""
    return mixture_with(np.broadcast_to(np.array(shares), 4), np.zeros((4, 4)))


def boxes_of(*boxes: tuple[float, float, float, float]) -> Mixture:
    """Return a CutMix of four records with these boxes x0, y0, x1, y1, or all with the only one."""
    return mixture_with(np.zeros(4), np.broadcast_to(np.array(boxes), (4, 4)))


def mixture_with(shares, boxes) -> Mixture:
    """Return a mixture of neighbors with the given values."""
    values = np.concatenate([np.asarray(shares)[:, None], boxes], axis=1)
    return mixture_of(values, paired_rows(len(values)))


def mixed(batch: Batch, mixture: Mixture) -> Batch:
    """Return a batch whose images are mixed."""
    return replace(batch, pixel_augment=PixelAugment(mixture=mixture))
