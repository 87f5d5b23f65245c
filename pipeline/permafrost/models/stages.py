"""Stages of a network: their numbers, the names of their fields, and their attention."""

from __future__ import annotations

from torch import Tensor

from permafrost.core.records import FEATURES
from permafrost.models.classifier import to_float32

POOLED_STAGE = f"{FEATURES}_pooled"
"""Field of the average of the last stage's output."""


def stage_index(number: int, count: int) -> int:
    """Convert the number of a stage, from 1 at the finest or -1 at the deepest, to its place among `count`."""
    return number - 1 if number > 0 else count + number


def stage_number(name: str) -> int:
    """Number of the stage whose field has this name."""
    return int(name.removeprefix(f"{FEATURES}_"))


def attention_map(features: Tensor) -> Tensor:
    """Compute Q = mean over channels of A^2, float32 or wider: [B, C, h, w] -> [B, h, w] (section 3.1)."""
    return to_float32(features).square().mean(dim=1)
