"""The nested partition of input features into superfeatures, its levels, and the exact conversion to a coarser level.

A partition is the result of a search, contiguous, or a random control. Logits of superfeatures are additive: those of a
coarser superfeature are the sum of those it unites. Logits stored at the finest level are therefore sufficient for all
levels.

Shape letters: B batch, K classes, d features (a table's columns, an image's cells row by row, or the cells or channels
of a trunk), M superfeatures.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from permafrost.core.digests import derive_seed
from permafrost.core.errors import ConfigError, require
from permafrost.storage.rooted_paths import RootedPath
from permafrost.storage.untrusted import FormatError, load_tensors
from permafrost.store.artifacts import load_artifact
from permafrost.store.manifest import MANIFEST_NAME
from permafrost.store.reader import TeacherPass
from permafrost_papers.ked.options import PARTITION_NAME, AdditiveModelConfig


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
            require(
                torch.equal(torch.unique(assignment), torch.arange(number)),
                f"each of {number} superfeatures needs at least one feature",
                ValueError,
            )
        for finer, coarser in zip(self.assignments[1:], self.assignments[:-1], strict=True):
            require(
                torch.unique(torch.stack([finer, coarser]), dim=1).shape[1] == int(finer.max()) + 1,
                "a coarser partition must unite groups of the finer one",
                ValueError,
            )

    @property
    def most(self) -> int:
        """Number M of superfeatures of the finest partition."""
        return len(self.assignments)

    def assignment(self, number: int) -> Tensor:
        """Return the partition into `number` superfeatures: i64 [d].

        Raises:
            ConfigError: If there is no such level.
        """
        require(
            1 <= number <= self.most,
            f"the partition has no level of {number} superfeatures; choose 1 to {self.most}",
        )
        return self.assignments[number - 1]

    def coarsening(self, number: int) -> Tensor:
        """Return the superfeature among `number` for each of the finest ones: i64 [M].

        Raises:
            ConfigError: If there is no such level.
        """
        of_finest = torch.empty(self.most, dtype=torch.int64)
        of_finest[self.assignments[-1]] = self.assignment(number)
        return of_finest

    @property
    def sha256(self) -> str:
        """Hash of the partition, independent of its origin."""
        described = f"{self.grid} {tuple(self.assignments.shape)}\n".encode()
        return hashlib.sha256(described + self.assignments.numpy().tobytes()).hexdigest()


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

    Args:
        number: Number of groups of the finest level.
        num_features: Number of features.
        grid: (rows, columns) of the features, None for columns of a table or channels.

    Raises:
        ValueError: If there are more groups than features.
    """
    require(
        number <= num_features,
        f"{num_features} features cannot be divided into {number} groups",
        ValueError,
    )
    blocks = [torch.arange(num_features).view(grid or (1, num_features))]
    assignments = torch.zeros(number, num_features, dtype=torch.int64)
    for level in range(1, number):
        largest = max(blocks, key=torch.numel)
        near, far = largest.tensor_split(2, dim=int(largest.shape[1] >= largest.shape[0]))
        blocks = [block for block in blocks if block is not largest] + [near, far]
        blocks.sort(key=lambda block: int(block[0, 0]))
        for group, block in enumerate(blocks):
            assignments[level, block.flatten()] = group
    return Partition(assignments=assignments, grid=grid)


def build_partition(config: AdditiveModelConfig, num_features: int | None = None) -> Partition:
    """Build M levels over the config's features.

    If weights are named, they contain the partition, and the partition file is not read.

    Args:
        config: Options of the network.
        num_features: Number of features if the config does not determine it.

    Raises:
        ConfigError: If there are too few features, or the partition file does not fit.
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
        partition = replace(
            contiguous_partition(config.superfeatures, number, grid), of_channels=of_channels
        )
    else:
        assignments = _read_assignments(Path(str(config.partition)), config)
        try:
            partition = Partition(assignments=assignments, grid=grid)
        except ValueError as error:
            raise ConfigError(
                f"partition={config.partition} is damaged: {error}; copy it again, or find one with permafrost teach"
            ) from error
    is_random = config.partition_control == "random"
    return random_partition(partition, config.partition_seed) if is_random else partition


def partition_digests(config: AdditiveModelConfig) -> dict[str, str]:
    """Return the SHA-256 of the partition that the options name, if any."""
    return {} if config.partition is None else {"partition": build_partition(config).sha256}


def _read_assignments(path: Path, config: AdditiveModelConfig) -> Tensor:
    """Read assignments i64 [M, d] from an artifact, which may have finer levels in addition."""
    file = path / PARTITION_NAME if path.is_dir() else path
    if (path / MANIFEST_NAME).is_file():
        load_artifact(
            RootedPath(path), "permafrost teach with teaching=ked"
        )  # raises ManifestError if it is damaged
    require(
        file.is_file(),
        f"partition={path} holds no {PARTITION_NAME}; find a partition with permafrost teach, correct the path, or "
        "set partition=null for contiguous blocks (the weights of a trained network include its partition)",
    )
    try:
        assignments = load_tensors(file).get("assignments")
    except FormatError as error:
        raise ConfigError(f"{file} cannot be read ({error}); correct partition=") from error
    if assignments is None or assignments.dtype != torch.int64 or assignments.ndim != 2:
        raise ConfigError(
            f"{file} holds no i64 tensor `assignments` of two axes and is not a partition; correct partition="
        )
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


def coarsen(logits: Tensor, coarsening: Tensor, number: int) -> Tensor:
    """Sum logits over the superfeatures of a coarser level.

    Args:
        logits: [B, M, K].
        coarsening: i64 [M], the superfeature of the coarser level for each of the finest ones.
        number: Number of superfeatures of the coarser level.

    Returns:
        [B, number, K], float32 or wider.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    coarse = wide.new_zeros(len(wide), number, wide.shape[2])
    return coarse.index_add(1, coarsening.to(wide.device), wide)


def class_centered(logits: Tensor) -> Tensor:
    """Subtract the mean over classes, the last dimension, from logits, which does not change softmax or KL."""
    return logits - logits.mean(dim=-1, keepdim=True)


@dataclass(frozen=True, kw_only=True)
class PartitionLevel:
    """The level with a given number of superfeatures."""

    coarsening: tuple[int, ...]
    """Superfeature of this level for each of the finest ones."""
    sha256: str
    """Hash of its groups, independent of finer levels. Levels with equal hashes can be compared."""

    @property
    def group_of_finest(self) -> Tensor:
        """Superfeature of this level for each of the finest ones, i64 [M]."""
        return torch.tensor(self.coarsening)


Hierarchy: TypeAlias = tuple[PartitionLevel, ...]
"""All levels of a partition, the one of number n at n - 1."""


def hierarchy_of(partition: Partition) -> Hierarchy:
    """Return the levels of a partition, without its features."""
    return tuple(
        PartitionLevel(
            coarsening=tuple(partition.coarsening(number).tolist()),
            sha256=_sha256(partition, number),
        )
        for number in range(1, partition.most + 1)
    )


def describe_partition(partition: Partition) -> dict[str, Any]:
    """Describe a partition for the manifest of a teacher pass, as read by `pass_hierarchy`."""
    return {
        "partition_sha256": partition.sha256,
        "hierarchy": [
            {"coarsening": list(level.coarsening), "sha256": level.sha256}
            for level in hierarchy_of(partition)
        ],
    }


@dataclass(frozen=True, kw_only=True)
class _PartitionEntries:
    """Entries of the manifest of a pass that stores superfeatures."""

    partition_sha256: str
    hierarchy: Hierarchy


def pass_hierarchy(teacher: TeacherPass) -> Hierarchy | None:
    """Return the levels at which a pass's superfeature_logits can be read, or None if it has none."""
    entries = teacher.manifest.entries(_PartitionEntries)
    return None if entries is None else entries.hierarchy


def require_same_level(student: Hierarchy, teacher: Hierarchy, number: int, name: str) -> None:
    """Raise ConfigError unless both divide their features into the same `number` superfeatures.

    Args:
        student: Levels of the student.
        teacher: Levels of the teacher.
        number: Number of superfeatures of the compared level.
        name: Name of the teacher, for messages.
    """
    require(
        number <= len(student),
        f"method.superfeatures={number} is finer than the student's {len(student)} superfeatures; lower it or raise "
        "student.superfeatures",
    )
    require(
        number <= len(teacher),
        f"{name} has {len(teacher)} superfeatures, fewer than the {number} that are compared; set "
        f"method.superfeatures={len(teacher)} (which unites the student's) or student.superfeatures={len(teacher)}, "
        "or use a finer teacher",
    )
    require(
        student[number - 1].sha256 == teacher[number - 1].sha256,
        f"the student and {name} divide their features differently into {number} superfeatures; set student.partition "
        "and teacher.partition (or their partition_control and partition_seed), their grids and trunk_features to the "
        "same values, or set method.superfeatures to a level that they share, such as 1",
    )


def _sha256(partition: Partition, number: int) -> str:
    # The level with one superfeature is the whole input, which all networks share.
    if number == 1:
        return hashlib.sha256(b"whole").hexdigest()
    if partition.of_channels:
        return hashlib.sha256(f"{number} groups of channels".encode()).hexdigest()
    described = f"{partition.grid}\n".encode()
    return hashlib.sha256(described + partition.assignment(number).numpy().tobytes()).hexdigest()
