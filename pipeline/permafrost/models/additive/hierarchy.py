"""The levels of a partition, as stored in a teacher pass, and the exact conversion from a finer to a coarser level.

Logits of superfeatures are additive: those of a coarser superfeature are the sum of those it unites. Logits stored at
the finest level are therefore sufficient for all levels. Shape letters: B batch, M superfeatures, K classes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from permafrost.core.errors import require
from permafrost.models.additive.partition import Partition
from permafrost.store.reader import TeacherPass


def coarsen(logits: Tensor, coarsening: Tensor, number: int) -> Tensor:
    """Sum logits [B, M, K] over the `number` superfeatures of a coarser level: [B, number, K], float32 or wider.

    coarsening  i64 [M]: the superfeature of the coarser level for each of the finest ones
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    coarse = wide.new_zeros(len(wide), number, wide.shape[2])
    return coarse.index_add(1, coarsening.to(wide.device), wide)


def class_centered(logits: Tensor) -> Tensor:
    """Subtract the mean over classes, the last dimension, from logits, which does not change softmax or KL."""
    return logits - logits.mean(dim=-1, keepdim=True)


@dataclass(frozen=True, kw_only=True)
class Level:
    """The level with a given number of superfeatures."""

    coarsening: tuple[int, ...]
    """Superfeature of this level for each of the finest ones."""
    sha256: str
    """Hash of its groups, independent of finer levels. Levels with equal hashes can be compared."""


@dataclass(frozen=True)
class Hierarchy:
    """All levels of a partition, starting with one superfeature."""

    levels: tuple[Level, ...]

    @property
    def most(self) -> int:
        """Number M of superfeatures of the finest level."""
        return len(self.levels)

    def coarsening(self, number: int) -> Tensor:
        """Superfeature of the level with `number` superfeatures for each of the finest ones, i64 [M]."""
        return torch.tensor(self.levels[number - 1].coarsening)


def hierarchy_of(partition: Partition) -> Hierarchy:
    """Return the levels of a partition, without its features."""
    numbers = range(1, partition.most + 1)
    return Hierarchy(
        tuple(
            Level(
                coarsening=tuple(partition.coarsening(number).tolist()),
                sha256=_sha256(partition, number),
            )
            for number in numbers
        )
    )


def describe_partition(partition: Partition) -> dict[str, Any]:
    """Describe a partition for the manifest of a teacher pass, as read by `pass_hierarchy`."""
    levels = hierarchy_of(partition).levels
    return {
        "partition_sha256": partition.sha256,
        "hierarchy": [
            {"coarsening": list(level.coarsening), "sha256": level.sha256} for level in levels
        ],
    }


def pass_hierarchy(teacher: TeacherPass) -> Hierarchy | None:
    """Return the levels at which a pass's superfeature_logits can be read, or None if it has none."""
    described = teacher.manifest.hierarchy
    if described is None:
        return None
    return Hierarchy(
        tuple(
            Level(coarsening=tuple(level["coarsening"]), sha256=level["sha256"])
            for level in described
        )
    )


def require_same_level(student: Hierarchy, teacher: Hierarchy, number: int, name: str) -> None:
    """Raise ConfigError unless both divide their features into the same `number` superfeatures.

    name  name of the teacher, for messages
    """
    require(
        number <= student.most,
        f"method.superfeatures={number} is finer than the student's {student.most} superfeatures; lower it or raise "
        "student.superfeatures",
    )
    require(
        number <= teacher.most,
        f"{name} has {teacher.most} superfeatures, fewer than the {number} that are compared; set "
        f"method.superfeatures={teacher.most} (which unites the student's) or student.superfeatures={teacher.most}, "
        "or use a finer teacher",
    )
    require(
        student.levels[number - 1].sha256 == teacher.levels[number - 1].sha256,
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
    digest = hashlib.sha256(f"{partition.grid}\n".encode())
    digest.update(partition.assignment(number).contiguous().numpy().tobytes())
    return digest.hexdigest()
