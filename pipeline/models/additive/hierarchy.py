"""The levels of a partition, as a teacher pass keeps them, and the exact way from a finer level to a coarser one.

Logits of superfeatures add, so a coarser superfeature's are the sum of those it unites: what was stored at the
finest level serves all of them. Shape letters: B batch, M superfeatures, K classes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.core.errors import require
from pipeline.models.additive.partition import Partition
from pipeline.store.reader import TeacherPass


def coarsen(logits: Tensor, coarsening: Tensor, number: int) -> Tensor:
    """[B, M, K] summed to the `number` superfeatures of a coarser level: [B, number, K], float32 or wider.

    coarsening  i64 [M]: which of them each of the finest belongs to
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    coarse = wide.new_zeros(len(wide), number, wide.shape[2])
    return coarse.index_add(1, coarsening.to(wide.device), wide)


def class_centered(logits: Tensor) -> Tensor:
    """Logits minus their mean over classes, the last dimension: no softmax and no KL sees the difference."""
    return logits - logits.mean(dim=-1, keepdim=True)


@dataclass(frozen=True, kw_only=True)
class Level:
    """One number of superfeatures."""

    coarsening: tuple[int, ...]
    """Which of them each of the finest belongs to."""
    sha256: str
    """Of its groups, whatever finer levels there are: equal ones compare superfeature by superfeature."""


@dataclass(frozen=True)
class Hierarchy:
    """All levels of a partition, the first of one superfeature."""

    levels: tuple[Level, ...]

    @property
    def most(self) -> int:
        """M of the finest level."""
        return len(self.levels)

    def coarsening(self, number: int) -> Tensor:
        """To `number` superfeatures: i64 [M]."""
        return torch.tensor(self.levels[number - 1].coarsening)


def hierarchy_of(partition: Partition) -> Hierarchy:
    """Its levels, without its features."""
    numbers = range(1, partition.most + 1)
    return Hierarchy(
        tuple(
            Level(
                coarsening=tuple(partition.coarsening(number).tolist()),
                sha256=_sha256(partition.grid, partition.assignment(number)),
            )
            for number in numbers
        )
    )


def describe_partition(partition: Partition) -> dict[str, Any]:
    """What a teacher pass's manifest says of it; `pass_hierarchy` reads it."""
    levels = hierarchy_of(partition).levels
    return {
        "partition_sha256": partition.sha256,
        "hierarchy": [
            {"coarsening": list(level.coarsening), "sha256": level.sha256} for level in levels
        ],
    }


def pass_hierarchy(teacher: TeacherPass) -> Hierarchy | None:
    """The levels of superfeatures at which a pass's superfeature_logits can be read; None where it holds none."""
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
    """ConfigError unless both divide their features alike into `number` superfeatures.

    name  of the teacher, for messages
    """
    require(
        number <= student.most,
        f"method.superfeatures={number} is finer than the student's {student.most} superfeatures; lower it, or raise "
        "student.superfeatures",
    )
    require(
        number <= teacher.most,
        f"{name} has {teacher.most} superfeatures, fewer than the {number} that are compared; set "
        f"method.superfeatures={teacher.most} (the student's are then united) or student.superfeatures={teacher.most}, "
        "or teach with a finer teacher",
    )
    require(
        student.levels[number - 1].sha256 == teacher.levels[number - 1].sha256,
        f"the student and {name} divide their features differently into {number} superfeatures: give both the same "
        "student.partition and teacher.partition (or their partition_control and partition_seed) and the same grid, or "
        "set method.superfeatures to a level that they share, such as 1",
    )


def _sha256(grid: tuple[int, int] | None, assignment: Tensor) -> str:
    # One superfeature is the whole, however it is cut: all networks share that level.
    if int(assignment.max()) == 0:
        return hashlib.sha256(b"whole").hexdigest()
    digest = hashlib.sha256(f"{grid}\n".encode())
    digest.update(assignment.contiguous().numpy().tobytes())
    return digest.hexdigest()
