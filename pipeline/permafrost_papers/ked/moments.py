"""Moments of a table's columns, which a network on rows learns from its training split and stores with its weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_ROUNDING = 1e-12
"""Rounding error of a float64 standard deviation in units of the mean, below that of any values distinct in float32."""


class Standardize(nn.Module):
    """Standardization (rows - mean) / std by column of a table, whose moments are stored with the weights.

    Until `set_moments` is called, and in an untrained network, rows are not changed.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(columns))
        self.register_buffer("std", torch.ones(columns))

    def set_moments(self, mean: Tensor, std: Tensor) -> None:
        """Set the moments [d] of a training split. A constant column is only shifted."""
        varies = std > _ROUNDING * mean.abs()
        self.mean.copy_(mean)
        self.std.copy_(torch.where(varies, std, 1.0))

    def forward(self, rows: Tensor) -> Tensor:
        return (rows - self.mean) / self.std


def column_moments(parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Compute mean and standard deviation over all rows, f64 [d] each.

    Moments of parts are merged (Chan et al. 1979), which is accurate for columns with a large mean and small spread.

    Args:
        parts: Rows [n, d], in parts.
    """
    count, mean, squares = 0, torch.zeros(()), torch.zeros(())
    for part in parts:
        rows = part.double()
        part_mean = rows.mean(dim=0)
        total = count + len(rows)
        squares = (
            squares
            + (rows - part_mean).square().sum(dim=0)
            + (part_mean - mean).square() * (count * len(rows) / total)
        )
        mean = mean + (part_mean - mean) * (len(rows) / total)
        count = total
    return mean, (squares / count).sqrt()
