"""The nested partition of input features into superfeatures.

Shape letters: d features (a table's columns, an image's cells row by row, or the cells of a trunk), M superfeatures.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Partition:
    """A partition for every number of superfeatures up to M, each inside the next finer one."""

    assignments: Tensor
    """i64 [M, d]: row m - 1 says which of m superfeatures, 0 to m - 1, each feature belongs to."""
    grid: tuple[int, int] | None = None
    """(rows, columns) of the features where they are cells of an image or of a trunk; None for a table."""

    def __post_init__(self) -> None:
        for number, assignment in enumerate(self.assignments, start=1):
            if not torch.equal(torch.unique(assignment), torch.arange(number)):
                raise ValueError(f"{number} superfeatures need each at least one feature")
        for finer, coarser in zip(self.assignments[1:], self.assignments[:-1], strict=True):
            if torch.unique(torch.stack([finer, coarser]), dim=1).shape[1] != int(finer.max()) + 1:
                raise ValueError("a coarser partition must unite groups of the finer one")

    @property
    def most(self) -> int:
        """M of the finest partition."""
        return len(self.assignments)

    def assignment(self, number: int) -> Tensor:
        """Of `number` superfeatures: i64 [d]."""
        if not 1 <= number <= self.most:
            raise ConfigError(
                f"a partition into {number} superfeatures is not there; choose 1 to {self.most}"
            )
        return self.assignments[number - 1]

    def coarsening(self, number: int) -> Tensor:
        """Which of `number` superfeatures each of the finest ones belongs to: i64 [M]."""
        coarse = self.assignment(number)
        of_finest = torch.empty(self.most, dtype=torch.int64)
        of_finest[self.assignments[-1]] = coarse
        return of_finest

    @property
    def sha256(self) -> str:
        """Of what it says, whoever found it."""
        digest = hashlib.sha256(f"{self.grid} {tuple(self.assignments.shape)}\n".encode())
        digest.update(self.assignments.contiguous().numpy().tobytes())
        return digest.hexdigest()


PARTITION_NAME = "partition.safetensors"
"""Of superfeatures that a run found, all levels; network options partition=<the run's folder> read it."""
