"""Targets at the level of superfeatures at which a student is compared with its teachers.

Shape letters: B batch, M superfeatures of that level, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from pipeline.core.records import Batch, Guidance, Targets
from pipeline.models.additive.hierarchy import coarsen
from pipeline.training.targets import TargetSource

_FIELD = "superfeature_logits"


@dataclass(frozen=True, kw_only=True)
class SuperfeatureLevel:
    """One level of all hierarchies; wraps a target source."""

    number: int
    """M."""
    coarsenings: tuple[Tensor, ...]
    """Of each teacher: i64 [its finest M], which of the level each belongs to."""

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
                self._set_coarsening(teacher, coarsening)
                for teacher, coarsening in zip(teachers, self.coarsenings, strict=True)
            )

        return united

    def _set_coarsening(self, teacher: Targets | Guidance, coarsening: Tensor) -> Targets:
        assert isinstance(teacher, Targets)
        fine = teacher.intermediates[_FIELD]
        return replace(
            teacher,
            intermediates=teacher.intermediates | {_FIELD: coarsen(fine, coarsening, self.number)},
        )
