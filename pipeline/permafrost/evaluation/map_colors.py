"""Colors of explanation maps, the same in every picture: red is for the class, blue against it."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from permafrost.evaluation.metrics import upsample

_STRONG_QUANTILE = 0.995
"""Quantile of the absolute contributions at and above which a position is fully red or blue."""


def overlays(images: NDArray[np.uint8], maps: NDArray[np.float32]) -> list[NDArray[np.float64]]:
    """Draw maps over a pale gray image, red for the class and blue against it, each scaled to its largest value.

    Args:
        images: u8 [n, H, W, 3].
        maps: f32 [n, h, w].

    Returns:
        Pictures [H, W, 3] in [0, 1].
    """
    heat = upsample(torch.from_numpy(maps), (images.shape[1], images.shape[2])).numpy()
    largest = np.abs(heat).max(axis=(1, 2), keepdims=True)
    heat = (heat / np.maximum(largest, np.finfo(np.float32).tiny))[..., None]
    gray = 0.5 + 0.5 * images.mean(axis=3, keepdims=True) / 255
    color = np.where(heat < 0, [0.1, 0.2, 0.85], [0.85, 0.05, 0.1])
    alpha = 0.8 * np.abs(heat)
    return list(gray * (1 - alpha) + color * alpha)


def contributions(maps: NDArray[np.float32]) -> list[NDArray[np.float64]]:
    """Draw signed maps: red is for the class, blue against it, white neutral.

    Args:
        maps: f32 [n, h, w].

    Returns:
        Pictures [h, w, 3] in [0, 1].
    """
    strong = np.quantile(np.abs(maps), _STRONG_QUANTILE, axis=(1, 2), keepdims=True)
    value = (maps / np.maximum(strong, np.finfo(np.float32).tiny)).clip(-1, 1)[..., None]
    fades = 1 - np.abs(value)
    red, blue = np.where(value > 0, 1.0, fades), np.where(value < 0, 1.0, fades)
    return list(np.concatenate([red, fades, blue], axis=3))
