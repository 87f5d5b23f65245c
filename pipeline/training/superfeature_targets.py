"""At which level a student's superfeatures are compared with its teachers', and what that makes of their targets.

Shape letters: B batch, n chimeras, M superfeatures of that level, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.core.records import NO_LABEL, Batch, Guidance, Targets
from pipeline.models.additive.chimeras import draw_donors, mix_inputs, mix_rows
from pipeline.models.additive.hierarchy import coarsen
from pipeline.training.targets import TargetSource

FIELD = "ked_z"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One level of all the hierarchies."""

    number: int
    """M."""
    coarsenings: tuple[Tensor, ...]
    """Of each teacher: i64 [its finest M], which of the level each belongs to."""
    assignment: Tensor
    """i64 [d]: the level in the student's features."""
    grid: tuple[int, int] | None

    def targets(self, source: TargetSource) -> TargetSource:
        """`source` with every teacher's superfeatures at this level."""

        def united(
            batch: Batch,
            grid: tuple[int, int],
            map_control: str = "none",
            *,
            with_maps: bool = True,
        ) -> tuple[Targets | Guidance, ...]:
            teachers = source(batch, grid, map_control, with_maps=with_maps)
            return tuple(
                self._unite(teacher, coarsening)
                for teacher, coarsening in zip(teachers, self.coarsenings, strict=True)
            )

        return united

    def _unite(self, teacher: Targets | Guidance, coarsening: Tensor) -> Targets:
        assert isinstance(teacher, Targets)
        fine = teacher.extra[FIELD]
        return replace(
            teacher, extra=teacher.extra | {FIELD: coarsen(fine, coarsening, self.number)}
        )

    # ---- chimeras ----

    def draw(self, fraction: float, images: Tensor) -> Tensor:
        """Donors i64 [n, M] of the chimeras that are added to a batch of images [B, 3, H, W]."""
        return draw_donors(round(fraction * len(images)), len(images), self.number, images.device)

    def with_chimeras(self, images: Tensor, donors: Tensor) -> Tensor:
        """[B + n, 3, H, W]."""
        return torch.cat([images, mix_inputs(images, self.assignment, donors, self.grid)])


def add_chimeras(targets: Targets | Guidance, donors: Tensor) -> Targets:
    """A teacher's targets of a batch and, after them, of its chimeras: their logits are the sum of their parts'."""
    assert isinstance(targets, Targets)
    extra = {
        name: torch.cat([values, mix_rows(values, donors)])
        for name, values in targets.extra.items()
    }
    mixed = extra[FIELD][len(targets.logits) :].sum(dim=1)
    return replace(targets, logits=torch.cat([targets.logits, mixed]), extra=extra)


def label_chimeras(labels: Tensor, count: int) -> Tensor:
    """Labels i64 [B] and, after them, those of chimeras, of which no label is right."""
    return torch.cat([labels, labels.new_full((count,), NO_LABEL)])
