"""Probe directions: the direction of the input that stands for each feature.

The directions of two features share no value of the input, so one tensor of the input's shape says which
feature each value belongs to, and another how far one step moves it.

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
    """One direction a feature, of inputs of one shape."""

    feature_of: Tensor
    """i64 [*shape]: the feature, 0 to d - 1, of each value of an input."""
    amplitude: Tensor | None
    """f64 [*shape]: how far one step moves each value; None moves each by itself, so that a step back
    removes a feature and a step forward doubles it."""
    grid: tuple[int, int] | None = None
    """(rows, columns) of the features; None for a table."""

    @cached_property
    def num_features(self) -> int:
        """d."""
        return int(self.feature_of.max()) + 1

    def steps(self, record: Tensor) -> Tensor:
        """How far one step along its feature moves each value of one input [*shape]."""
        if record.shape != self.feature_of.shape:
            raise ValueError(
                f"probes of inputs {tuple(self.feature_of.shape)} do not fit one of {tuple(record.shape)}"
            )
        return record.detach() if self.amplitude is None else self.amplitude.to(record)

    def members(self, like: Tensor) -> Tensor:
        """Which values, flattened, belong to which feature: 0 or 1 in [values, d], of the type of `like`."""
        return self._members.to(like)

    @cached_property
    def _members(self) -> Tensor:
        return self.feature_of.flatten()[:, None] == torch.arange(self.num_features)

    def scale_amplitudes(self, scales: Tensor) -> Probes:
        """The same directions, feature j's step scales[j] times as long."""
        if self.amplitude is None:
            raise ValueError("features that are moved by themselves have their scale already")
        return replace(self, amplitude=self.amplitude * scales.double()[self.feature_of])


def table_probes(num_features: int) -> Probes:
    """Each column of a table [N, d] alone; give it `scaled` standard deviations, or units decide."""
    return Probes(
        feature_of=torch.arange(num_features),
        amplitude=torch.ones(num_features, dtype=torch.float64),
    )


def pixel_probes(size: tuple[int, int], grid: tuple[int, int], channels: int = 3) -> Probes:
    """Blocks of an image [channels, H, W], each along gray: all of its values, of every color, move together.

    A direction has length 1. Color has no direction of its own, since a superfeature is a place: a block
    that matters by its hue alone is seen as far as the network's answer to its hue changes with its brightness.

    size  (H, W)
    grid  (rows, columns) of blocks, which may differ by a pixel where the size is no multiple
    """
    if any(blocks > pixels for blocks, pixels in zip(grid, size, strict=True)):
        raise ValueError(
            f"an image of {size} pixels has no {grid} blocks; choose at most one a pixel"
        )
    row, column = (torch.arange(n) * blocks // n for n, blocks in zip(size, grid, strict=True))
    feature_of = (row[:, None] * grid[1] + column).expand(channels, *size).contiguous()
    num_values = torch.bincount(feature_of.flatten())
    return Probes(
        feature_of=feature_of, amplitude=num_values.double().rsqrt()[feature_of], grid=grid
    )


def cell_probes(channels: int, grid: tuple[int, int]) -> Probes:
    """Cells of a trunk's features [K, h, w], each along its own activation: its length is the cell's scale.

    That keeps to directions the trunk makes, and features that went through a ReLU stay non-negative at
    a step of 1. Where logits are linear in the features (a global average pooling before a linear layer)
    no cell depends on another: cut the trunk earlier, or probe pixel blocks of the trunk's grid instead.
    """
    cells = torch.arange(grid[0] * grid[1]).view(grid)
    return Probes(feature_of=cells.expand(channels, *grid).contiguous(), amplitude=None, grid=grid)


def feature_scales(batches: Iterable[Tensor], probes: Probes) -> Tensor:
    """sigma: the standard deviation over records of each feature's place along its direction, f64 [d].

    batches  inputs [B, *shape]
    """
    if probes.amplitude is None:
        raise ValueError("features that are moved by themselves have their scale already")
    members, amplitude = probes.members(probes.amplitude), probes.amplitude
    places = torch.cat([(batch.cpu() * amplitude).flatten(1) @ members for batch in batches])
    # Sorted, so that no last bit depends on the order of the records.
    return places.sort(dim=0).values.std(dim=0, correction=0)
