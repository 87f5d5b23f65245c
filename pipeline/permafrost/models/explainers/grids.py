"""Checks that the grids of explanation maps have enough cells to localize."""

from __future__ import annotations

import logging

import torch

from permafrost.core.errors import ConfigError
from permafrost.models.classifier import Classifier

logger = logging.getLogger("permafrost.explainers")

Grid = tuple[int, int]
"""(rows, columns)."""

_MOST_TIMES_COARSER = 4


@torch.no_grad()
def map_grid(model: Classifier, input_size: Grid) -> Grid:
    """Grid of a network's explanations for images of (height, width) `input_size`.

    It is the grid of the features for GradCAM, and that of the input for B-cos weights.
    """
    if model.explainer != "gradcam":
        return input_size
    was_training = model.training
    device = next(model.parameters()).device
    features = model.eval()(torch.zeros(1, 3, *input_size, device=device)).features
    model.train(was_training)
    return features.shape[-2], features.shape[-1]


def require_places(grid: Grid, input_size: Grid, whose: str, recovery_hint: str) -> None:
    """Raise ConfigError for a grid of one cell, which cannot localize.

    whose, recovery_hint  parts of the message
    """
    if max(grid) == 1:
        raise ConfigError(
            f"{whose} have a grid of 1x1 cells on images of {input_size[0]}x{input_size[1]} pixels, and one cell "
            f"cannot localize anything; {recovery_hint}, or disable explanations with method.lambda_map=0"
        )


def warn_of_coarse_grid(student: Grid, teacher: Grid) -> None:
    """Log a warning if one grid is more than four times coarser than the other."""
    ratios = [a / b for a, b in zip(student, teacher, strict=True)]
    if max(*ratios, *(1 / ratio for ratio in ratios)) > _MOST_TIMES_COARSER:
        logger.warning(
            "explanations of the student have a grid of %dx%d cells, those of the teacher %dx%d; the coarser grid "
            "limits how much the student can learn from them, see augment.size and the networks' strides",
            *student,
            *teacher,
        )
