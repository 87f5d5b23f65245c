"""Colors of maps and features, the same in every picture: red is for the class, blue against it.

Features have the colors of their first three principal components.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from permafrost.core.batches import Batch
from permafrost.core.records import FEATURES, FOLD
from permafrost.evaluation.metrics import upsample
from permafrost.loading.geometry import TargetRequest, view_targets
from permafrost.models.classifier import stage_number
from permafrost.store.reader import TeacherPass

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


def feature_colors(features: Tensor) -> Tensor:
    """Color features by their first three principal components, which are fitted to all images together.

    The sign of a component makes its entry of the largest absolute value positive. Its values from the 2nd to the 98th
    percentile are red, green or blue from none to full.

    Args:
        features: Features [n, C, h, w] of a stage.

    Returns:
        Pictures u8 [n, h, w, 3]. Components that do not vary are 0.
    """
    cells = features.movedim(1, -1).flatten(0, 2).double()  # [n * h * w, C]
    cells = cells - cells.mean(dim=0)
    axes = torch.linalg.svd(cells, full_matrices=False).Vh[:3]  # [3, C]
    axes = axes * axes.gather(1, axes.abs().argmax(dim=1, keepdim=True)).sign()
    values = F.pad(cells @ axes.T, (0, 3 - len(axes)))
    low, high = values.quantile(values.new_tensor([0.02, 0.98]), dim=0)
    colors: Tensor = ((values - low) / (high - low)).where(
        high - low > 1e-6 * features.abs().max(),  # a smaller range is rounding
        0,
    )
    return (
        (255 * colors.clamp(0, 1)).round().to(torch.uint8).reshape(-1, *features.shape[2:], 3).cpu()
    )


def deepest_features(teacher: TeacherPass) -> str | None:
    """Return the field of a pass's deepest stored features.

    None stands for a pass without them, or with features of several networks (teacher=folds), whose channels differ.
    """
    names = {*teacher.fields_of(FEATURES)} - {f"{FEATURES}_pooled"}
    return None if teacher.fields_of(FOLD) else max(names, key=stage_number, default=None)


def stored_features(batch: Batch, field: str) -> Tensor:
    """Return a field of features of a batch's first pass in the batch's view, f32 [n, C, h, w]."""
    return view_targets(batch, TargetRequest((1, 1), with_maps=False))[0].intermediates[field]
