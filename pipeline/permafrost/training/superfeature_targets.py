"""The level of superfeatures at which a student is compared with its teachers, and targets coarsened to it.

Shape letters: B batch, M superfeatures of that level, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from permafrost.config.distillation import DistillConfig
from permafrost.config.methods import KEDConfig
from permafrost.config.models import AdditiveModelConfig
from permafrost.core.errors import require
from permafrost.core.records import Batch, Guidance, Targets
from permafrost.losses.base import DistillationLoss
from permafrost.losses.ked import KEDLoss
from permafrost.models.additive.hierarchy import (
    coarsen,
    hierarchy_of,
    pass_hierarchy,
    require_same_level,
)
from permafrost.models.additive.network import network_partition
from permafrost.models.providers import build_model
from permafrost.store.reader import TeacherPass
from permafrost.training.student_passes import live_teacher
from permafrost.training.targets import TargetSource
from permafrost.training.transforms import BatchTransform, Chimeras, Mixup

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


def compare_superfeatures(
    config: DistillConfig, loss: DistillationLoss, passes: list[TeacherPass], num_classes: int
) -> tuple[SuperfeatureLevel | None, tuple[BatchTransform, ...]]:
    """Return the level of superfeatures that `method.superfeatures` names, and the batch transforms for it.

    Raises ConfigError unless student and teachers share that level.
    """
    method = config.method
    if not isinstance(method, KEDConfig) or not method.needs_superfeatures:
        return None, (Mixup(),)

    partition = network_partition(build_model(config.student, num_classes, may_replace_head=True))
    student = hierarchy_of(partition)
    number = method.superfeatures or student.most
    teachers = {teacher.name: pass_hierarchy(teacher) for teacher in passes}
    in_input_mode = {teacher.name: _is_input_mode(teacher) for teacher in passes}
    if (live := live_teacher(config)) is not None:
        teachers[live.name] = hierarchy_of(network_partition(build_model(live, num_classes)))
        in_input_mode[live.name] = isinstance(live, AdditiveModelConfig) and live.is_input_mode
    coarsenings = []
    for name, hierarchy in teachers.items():
        assert hierarchy is not None  # passes without superfeature_logits have been rejected
        require_same_level(student, hierarchy, number, name)
        coarsenings.append(hierarchy.coarsening(number))
        require(
            method.chimera_fraction == 0 or in_input_mode[name],
            f"method.chimera_fraction={method.chimera_fraction} combines the teacher's superfeature logits of "
            f"different records, but those of {name} depend on the whole input; choose a teacher of name=mlp or conv, "
            "or set method.chimera_fraction=0",
        )
    if number < student.most:
        assert isinstance(loss, KEDLoss)
        loss.set_student_coarsening(student.coarsening(number))
    level = SuperfeatureLevel(number=number, coarsenings=tuple(coarsenings))
    if method.chimera_fraction == 0 or method.lambda_ked == 0:
        return level, (Mixup(),)
    chimeras = Chimeras(
        fraction=method.chimera_fraction,
        number=number,
        assignment=partition.assignment(number),
        grid=partition.grid,
    )
    return level, (chimeras, Mixup())


def _is_input_mode(teacher: TeacherPass) -> bool:
    architecture = teacher.manifest.teacher["architecture"]
    return bool(architecture["kind"] == "additive" and architecture["name"] != "trunk")
