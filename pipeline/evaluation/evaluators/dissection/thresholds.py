"""The activation above which a unit fires: exact, in one pass, in memory that knows no number of images.

    T_k = the smallest activation of unit k with P(a_k > T_k) <= quantile

over all images and places. It is the (m + 1)-th largest of the N activations, m = floor(quantile N); so the m + 1
largest are kept of what has been seen, and those of two parts are the largest of both.

Shape letters: B images, U units, h w grid, n activations kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_ROUNDING = 1e-9
"""Of quantile N, which is a whole number where it looks like one."""


def kept_of(quantile: float, activations: int) -> int:
    """m + 1: how many of each unit's activations must be kept to know its threshold."""
    return math.floor(quantile * activations + _ROUNDING) + 1


@dataclass(frozen=True)
class LargestActivations:
    """Of each unit, over some images; those of parts merge into those of the whole."""

    values: Tensor
    """[U, n], in descending order; n <= keep."""
    keep: int

    @classmethod
    def of(cls, activations: Tensor, keep: int) -> LargestActivations:
        """Of activations [B, U, h, w]."""
        flat = activations.transpose(0, 1).flatten(1)
        return cls(flat.topk(min(keep, flat.shape[1]), dim=1).values, keep)

    def __add__(self, other: LargestActivations) -> LargestActivations:
        both = torch.cat([self.values, other.values], dim=1)
        return LargestActivations(both.topk(min(self.keep, both.shape[1]), dim=1).values, self.keep)

    @property
    def thresholds(self) -> Tensor:
        """[U]."""
        return self.values[:, -1]


@dataclass(frozen=True)
class TopImages:
    """The images in which each unit is most active, by their highest activation; parts merge."""

    values: Tensor
    """[U, n], in descending order."""
    numbers: Tensor
    """i64 [U, n]: of the images."""
    keep: int

    @classmethod
    def of(cls, activations: Tensor, numbers: Tensor, keep: int) -> TopImages:
        """Of activations [B, U, h, w] and the images' numbers i64 [B]."""
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
