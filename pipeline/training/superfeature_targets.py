"""Targets coarsened to the level of superfeatures at which a student is compared with its teachers.

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
    """One level of the hierarchies of student and teachers, which wraps a target source."""

    number: int
    """Number M of superfeatures."""
    coarsenings: tuple[Tensor, ...]
    """Superfeature of the level for each of a teacher's finest ones, one i64 [finest M] per teacher."""

    def targets(self, source: TargetSource) -> TargetSource:
        """Wrap `source` so that every teacher's superfeatures are at this level."""

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
