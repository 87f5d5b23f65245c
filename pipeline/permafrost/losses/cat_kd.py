"""CAT-KD (Guo et al. 2023): match the class activation maps of student and teacher."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from permafrost.config.methods import CatKDConfig
from permafrost.core.errors import require
from permafrost.core.records import Targets
from permafrost.losses.base import Needs, StudentOutput
from permafrost.losses.feature_kd import FeatureKDLoss
from permafrost.models.output import Intermediates, ModelOutput


def class_map_loss(
    student_maps: Tensor, teacher_maps: Tensor, resolution: int, *, normalize: bool = False
) -> Tensor:
    """Mean squared difference of pooled class maps, over records, classes and resolution^2 cells.

    student_maps  [B, K, h, w]  gradients flow here
    teacher_maps  [B, K, h, w]  constant, in the logits' units, on any grid
    normalize     divide each pooled map by its L2 norm first
    """
    student, teacher = (
        F.adaptive_avg_pool2d(maps, resolution).flatten(2)
        for maps in (student_maps, teacher_maps.detach())
    )
    if normalize:
        student, teacher = F.normalize(student, dim=2), F.normalize(teacher, dim=2)
    return F.mse_loss(student, teacher)


def class_map_fields(output: ModelOutput) -> dict[str, Tensor]:
    """Field class_maps [B, K, h, w], on the features' grid."""
    assert output.class_maps is not None
    return {"class_maps": output.class_maps.detach()}


CLASS_MAP_NEEDS = Needs(
    intermediates=Intermediates(class_maps=True),
    target_fields=class_map_fields,
    payload="class_maps",
)
"""Needs of `class_map_loss`."""


def check_resolution(resolution: int, targets: Targets) -> None:
    """Raise ConfigError if the teacher's class maps have fewer cells per side than `resolution`."""
    h, w = targets.intermediates["class_maps"].shape[-2:]
    require(
        resolution <= min(h, w),
        f"method.resolution={resolution} is finer than the teacher's class maps of {h}x{w} cells; lower it or, if the "
        "teacher's features are finer, store finer maps with annotate.class_map_size",
    )


class CatKDLoss(FeatureKDLoss):
    """Loss `class_map_loss`, in addition to labels and logits (e2KD, section 5)."""

    term = "cat"
    term_needs = CLASS_MAP_NEEDS
    config: CatKDConfig

    @property
    def weight(self) -> float:
        return self.config.lambda_cat

    def build(self, student: StudentOutput, targets: Targets) -> None:
        check_resolution(self.config.resolution, targets)

    def compare(self, student: StudentOutput, targets: Targets) -> Tensor:
        assert student.output.class_maps is not None
        return class_map_loss(
            student.output.class_maps,
            targets.intermediates["class_maps"],
            self.config.resolution,
            normalize=self.config.normalize,
        )
