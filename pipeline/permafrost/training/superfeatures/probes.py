"""Probe directions: the direction in input space that represents each feature.

The directions of two features have no input value in common. One tensor of the input's shape therefore contains the
feature of each value, and another the displacement of each value by one step.

Shape letters: d features, N records, H W image, K channels of a trunk, h w its grid.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Probes:
    """One direction per feature, for inputs of one shape."""

    feature_of: Tensor
    """Feature, 0 to d - 1, of each value of an input, i64 [*shape]."""
    amplitude: Tensor | None
    """Displacement of each value by one step, f64 [*shape]. None moves each value by its own amount, so a step back
    removes a feature and a step forward doubles it."""
    grid: tuple[int, int] | None = None
    """(rows, columns) of the features, None for a table."""

    @cached_property
    def num_features(self) -> int:
        """Number d of features."""
        return int(self.feature_of.max()) + 1

    def steps(self, record: Tensor) -> Tensor:
        """Displacement of each value of one input [*shape] by one step along its feature."""
        if record.shape != self.feature_of.shape:
            raise ValueError(
                f"probes for inputs {tuple(self.feature_of.shape)} do not fit an input {tuple(record.shape)}"
            )
        return record.detach() if self.amplitude is None else self.amplitude.to(record)

    def members(self, like: Tensor) -> Tensor:
        """Membership of flattened values in features, 0 or 1 in [values, d], with dtype and device of `like`."""
        return self._members.to(like)

    @cached_property
    def _members(self) -> Tensor:
        return self.feature_of.flatten()[:, None] == torch.arange(self.num_features)

    def scale_amplitudes(self, scales: Tensor) -> Probes:
        """Return the same directions with the step of feature j scaled by scales[j]."""
        if self.amplitude is None:
            raise ValueError("probes without an amplitude cannot be scaled")
        return replace(self, amplitude=self.amplitude * scales.double()[self.feature_of])


def table_probes(num_features: int) -> Probes:
    """Probe each column of a table [N, d] separately. Scale them by standard deviations to be independent of units."""
    return Probes(
        feature_of=torch.arange(num_features),
        amplitude=torch.ones(num_features, dtype=torch.float64),
    )


def pixel_probes(size: tuple[int, int], grid: tuple[int, int], channels: int = 3) -> Probes:
    """Probe blocks of an image [channels, H, W], each along gray: all values of a block move together in all channels.

    A direction has length 1. There are no separate color directions, because a superfeature is a region. The hue of a
    block is therefore only measured as far as the network's response to it changes with the brightness.

    size  (H, W)
    grid  (rows, columns) of blocks, whose sizes differ by one pixel if the grid does not divide the image
    """
    if any(blocks > pixels for blocks, pixels in zip(grid, size, strict=True)):
        raise ValueError(
            f"an image of {size} pixels cannot be divided into {grid} blocks; choose at most one block per pixel"
        )
    row, column = (torch.arange(n) * blocks // n for n, blocks in zip(size, grid, strict=True))
    feature_of = (row[:, None] * grid[1] + column).expand(channels, *size).contiguous()
    num_values = torch.bincount(feature_of.flatten())
    return Probes(
        feature_of=feature_of, amplitude=num_values.double().rsqrt()[feature_of], grid=grid
    )


def cell_probes(channels: int, grid: tuple[int, int]) -> Probes:
    """Probe cells of a trunk's features [K, h, w], each along its own activation, whose norm is the cell's scale.

    These directions occur in the trunk's output, and features after a ReLU stay non-negative at a step of 1. If logits
    are linear in the features (a global average pooling before a linear layer), no cell depends on another. In that
    case cut the trunk earlier, or probe pixel blocks of the trunk's grid instead.
    """
    cells = torch.arange(grid[0] * grid[1]).view(grid)
    return Probes(feature_of=cells.expand(channels, *grid).contiguous(), amplitude=None, grid=grid)


def feature_scales(batches: Iterable[Tensor], probes: Probes) -> Tensor:
    """Standard deviation sigma over records of each feature's coordinate along its direction, f64 [d].

    batches  inputs [B, *shape]
    """
    if probes.amplitude is None:
        raise ValueError("probes without an amplitude have no separate scale")
    members, amplitude = probes.members(probes.amplitude), probes.amplitude
    places = torch.cat([(batch.cpu() * amplitude).flatten(1) @ members for batch in batches])
    # Sorting makes the sum independent of the order of the records, down to the last bit.
    return places.sort(dim=0).values.std(dim=0, correction=0)
