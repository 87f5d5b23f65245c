"""The nested partition of input features into superfeatures: found by a search, contiguous, or a random control.

Shape letters: d features (a table's columns, an image's cells row by row, or the cells or channels of a trunk), M
superfeatures.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from permafrost.config.models import AdditiveModelConfig
from permafrost.core.errors import ConfigError, require
from permafrost.core.files import RootedPath
from permafrost.core.seeds import derive_seed
from permafrost.store.artifacts import load_artifact
from permafrost.store.manifest import MANIFEST_NAME


@dataclass(frozen=True, kw_only=True)
class Partition:
    """Nested partitions into every number of superfeatures up to M, each uniting groups of the next finer one."""

    assignments: Tensor
    """Superfeature of each feature, i64 [M, d]. Row m - 1 contains the partition into superfeatures 0 to m - 1."""
    grid: tuple[int, int] | None = None
    """(rows, columns) of the features if they are cells of an image or of a trunk, None for columns and channels."""
    of_channels: bool = False
    """True if the features are channels of a trunk, which have no counterpart in another network: two networks then
    agree in their number of groups only."""

    def __post_init__(self) -> None:
        for number, assignment in enumerate(self.assignments, start=1):
            if not torch.equal(torch.unique(assignment), torch.arange(number)):
                raise ValueError(f"each of {number} superfeatures needs at least one feature")
        for finer, coarser in zip(self.assignments[1:], self.assignments[:-1], strict=True):
            if torch.unique(torch.stack([finer, coarser]), dim=1).shape[1] != int(finer.max()) + 1:
                raise ValueError("a coarser partition must unite groups of the finer one")

    @property
    def most(self) -> int:
        """Number M of superfeatures of the finest partition."""
        return len(self.assignments)

    def assignment(self, number: int) -> Tensor:
        """Partition into `number` superfeatures: i64 [d]."""
        if not 1 <= number <= self.most:
            raise ConfigError(
                f"the partition has no level of {number} superfeatures; choose 1 to {self.most}"
            )
        return self.assignments[number - 1]

    def coarsening(self, number: int) -> Tensor:
        """Superfeature among `number` for each of the finest ones: i64 [M]."""
        coarse = self.assignment(number)
        of_finest = torch.empty(self.most, dtype=torch.int64)
        of_finest[self.assignments[-1]] = coarse
        return of_finest

    @property
    def sha256(self) -> str:
        """Hash of the partition, independent of its origin."""
        digest = hashlib.sha256(f"{self.grid} {tuple(self.assignments.shape)}\n".encode())
        digest.update(self.assignments.contiguous().numpy().tobytes())
        return digest.hexdigest()


PARTITION_NAME = "partition.safetensors"
"""File with all levels of the partition that a run found, as read by the network option partition=<run folder>."""


def random_partition(like: Partition, seed: int = 0) -> Partition:
    """Permute the features at random, which keeps group sizes and nesting."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "random partition"))
    order = torch.randperm(like.assignments.shape[1], generator=generator)
    return replace(like, assignments=like.assignments[:, order])


def contiguous_partition(
    number: int, num_features: int, grid: tuple[int, int] | None = None
) -> Partition:
    """Divide features into `number` groups of neighbors: rectangles of the grid, or runs of a table's columns.

    Starting from the whole, the largest rectangle (the first of equal ones) is cut across its longer side.
    """
    if number > num_features:
        raise ValueError(f"{num_features} features cannot be divided into {number} groups")
    blocks = [torch.arange(num_features).view(grid or (1, num_features))]
    assignments = torch.zeros(number, num_features, dtype=torch.int64)
    for level in range(1, number):
        largest = max(blocks, key=torch.numel)
        side = int(largest.shape[1] >= largest.shape[0])
        near, far = largest.tensor_split(2, dim=side)
        blocks = [b for b in blocks if b is not largest] + [near, far]
        blocks.sort(key=lambda block: int(block[0, 0]))
        for group, block in enumerate(blocks):
            assignments[level, block.flatten()] = group
    return Partition(assignments=assignments, grid=grid)


def build_partition(config: AdditiveModelConfig, num_features: int | None = None) -> Partition:
    """Build M levels over the config's features. Raises ConfigError if its partition file does not fit.

    If weights are named, they contain the partition, and the partition file is not read.

    num_features  number of features if the config does not determine it
    """
    number = num_features or config.features
    assert number is not None
    require(
        config.superfeatures <= number,
        f"superfeatures={config.superfeatures}, but the last stage of trunk={config.trunk} has {number} channels; "
        "lower it",
    )
    of_channels = config.trunk_features == "channels"
    grid = None if config.columns or of_channels else config.grid
    is_named = config.partition is not None and config.weights in (None, "random")
    if not is_named or config.partition_control == "contiguous":
        found = replace(
            contiguous_partition(config.superfeatures, number, grid), of_channels=of_channels
        )
    else:
        assert config.partition is not None
        found = Partition(assignments=_read_assignments(Path(config.partition), config), grid=grid)
    if config.partition_control == "random":
        return random_partition(found, config.partition_seed)
    return found


def _read_assignments(path: Path, config: AdditiveModelConfig) -> Tensor:
    """Read assignments i64 [M, d] from an artifact, which may have finer levels in addition."""
    from safetensors.torch import load_file

    file = path / PARTITION_NAME if path.is_dir() else path
    if (path / MANIFEST_NAME).is_file():
        load_artifact(
            RootedPath(path), "permafrost teach with teaching=ked"
        )  # raises ManifestError if it is damaged
    if not file.is_file():
        raise ConfigError(
            f"partition={path} holds no {PARTITION_NAME}; find a partition with permafrost teach, correct the path, or "
            "set partition=null for contiguous blocks (the weights of a trained network include its partition)"
        )
    tensors = load_file(file)
    require(
        "assignments" in tensors and tensors["assignments"].dtype == torch.int64,
        f"{file} holds no i64 tensor `assignments` and is not a partition; correct partition=",
    )
    assignments = tensors["assignments"]
    most, features = assignments.shape
    require(
        features == config.features,
        f"{file} groups {features} features, but the network has {config.features}; set grid=[rows, columns] (or "
        "columns= for a table) to that of the partition",
    )
    require(
        config.superfeatures <= most,
        f"{file} has up to {most} superfeatures, fewer than superfeatures={config.superfeatures}; lower it or find a "
        "finer partition",
    )
    return assignments[: config.superfeatures]
