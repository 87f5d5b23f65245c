"""Exact activation thresholds of units, computed in one pass.

    T_k = the smallest activation of unit k with P(a_k > T_k) <= quantile

over all images and positions. It is the (m + 1)-th largest of the N activations, with m = floor(quantile N). The m + 1
largest activations seen so far are therefore kept, and those of two parts merge into the largest of both.

Shape letters: B images, U units, h w grid, n activations kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_ROUNDING = 1e-9
"""Tolerance on quantile N, against rounding errors just below a whole number."""


def kept_of(quantile: float, activations: int) -> int:
    """Number m + 1 of activations per unit that must be kept to determine its threshold."""
    return math.floor(quantile * activations + _ROUNDING) + 1


@dataclass(frozen=True)
class LargestActivations:
    """Largest activations of each unit over some images, which can be merged over parts."""

    values: Tensor
    """Activations [U, n] in descending order, n <= keep."""
    keep: int

    @classmethod
    def of(cls, activations: Tensor, keep: int) -> LargestActivations:
        """Select from activations [B, U, h, w]."""
        flat = activations.transpose(0, 1).flatten(1)
        return cls(flat.topk(min(keep, flat.shape[1]), dim=1).values, keep)

    def __add__(self, other: LargestActivations) -> LargestActivations:
        both = torch.cat([self.values, other.values], dim=1)
        return LargestActivations(both.topk(min(self.keep, both.shape[1]), dim=1).values, self.keep)

    @property
    def thresholds(self) -> Tensor:
        """Thresholds [U]."""
        return self.values[:, -1]


@dataclass(frozen=True)
class TopImages:
    """The images with the highest maximal activation of each unit, which can be merged over parts."""

    values: Tensor
    """Maximal activations [U, n] in descending order."""
    numbers: Tensor
    """Numbers of the images, i64 [U, n]."""
    keep: int

    @classmethod
    def of(cls, activations: Tensor, numbers: Tensor, keep: int) -> TopImages:
        """Select from activations [B, U, h, w] of images with numbers i64 [B]."""
        highest = activations.amax(dim=(2, 3)).T
        return cls(highest, numbers.expand_as(highest), keep)._cut()

    def __add__(self, other: TopImages) -> TopImages:
        values = torch.cat([self.values, other.values], dim=1)
        numbers = torch.cat([self.numbers, other.numbers], dim=1)
        return TopImages(values, numbers, self.keep)._cut()

    def _cut(self) -> TopImages:
        values, order = self.values.sort(dim=1, descending=True, stable=True)
        order, values = order[:, : self.keep], values[:, : self.keep]
        return TopImages(values, self.numbers.gather(1, order), self.keep)
