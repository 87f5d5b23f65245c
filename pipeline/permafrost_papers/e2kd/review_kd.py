"""ReviewKD (Chen et al. 2021), a baseline of e2KD: features of all stages, fused from the deepest.

It compares the stages and the spatial average of the last stage. The fusion modules are trained with the student and
not exported. Its targets are a live teacher's features, or those of a pass, warped to the view.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from permafrost.core.batches import Targets
from permafrost.core.errors import require
from permafrost.core.records import FEATURES
from permafrost.losses.base import Needs, StudentOutput
from permafrost.losses.feature_kd import (
    FeatureKDLoss,
    covered_mse,
    covered_pool,
    field_of_stage,
    pool_cells,
    stored_stages,
)
from permafrost.losses.shapes import require_same_shape
from permafrost.models.classifier import Intermediates, Stage, stage_index, to_float32
from permafrost_papers.e2kd.options import ReviewKDConfig

_POOLED_SIZES = (4, 2, 1)
_MAX_FUSED_CHANNELS = 512


def review_levels(stages: Sequence[Stage]) -> list[Tensor]:
    """Return the levels of a student to compare: each stage [B, C, h, w], then the average [B, C, 1, 1].

    They are float32 or wider. Those of a teacher are in annotation/teacher_fields.py.
    """
    grids = [to_float32(stage.output) for stage in stages]
    return [*grids, to_float32(stages[-1].output).mean(dim=(2, 3), keepdim=True)]


def hierarchical_context_loss(
    student: Tensor, teacher: Tensor, coverage: Tensor | None = None
) -> Tensor:
    """Compute the HCL (section 3.3): mean squared differences of features, from the full grid to its average.

    The full grid has weight 1, and each coarser pooling (to 4, 2 and 1 cells per side, if the grid has more) has half
    the weight of the previous one. The result is divided by the sum of the weights.

    Args:
        student: [B, C, h, w]. Gradients flow here.
        teacher: [B, C, h, w], constant.
        coverage: [B, 1, h, w] in [0, 1], the weight of each cell in both features and in the means; None weights all
            alike.
    """
    require_same_shape("hierarchical_context_loss", student, teacher, 4)
    student, teacher = to_float32(student), to_float32(teacher.detach())
    loss, weight, total_weight = covered_mse(student, teacher, coverage), 1.0, 1.0
    for size in _POOLED_SIZES:
        if size < min(student.shape[-2:]):
            weight /= 2
            total_weight += weight
            coarse, coarse_teacher = (
                covered_pool(full, coverage, size) for full in (student, teacher)
            )
            share = None if coverage is None else pool_cells(coverage, size)
            loss = loss + weight * covered_mse(coarse, coarse_teacher, share)
    return loss / total_weight


class Fusion(nn.Module):
    """ABF (section 3.3): fusion of one level of the student with the fused deeper levels."""

    def __init__(
        self, channels: int, fused_channels: int, teacher_channels: int, *, is_deepest: bool
    ) -> None:
        super().__init__()
        self.reduce = _conv_norm(channels, fused_channels, 1)
        self.mix = None if is_deepest else nn.Conv2d(2 * fused_channels, 2, 1)
        self.expand = _conv_norm(fused_channels, teacher_channels, 3)

    def forward(
        self, level: Tensor, deeper: Tensor | None, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Fuse one level of the student with the deeper ones.

        Args:
            level: Features of the student at this level, [B, C, h, w].
            deeper: Second result of the next deeper level, None for the deepest.
            size: Height and width of the teacher's level.

        Returns:
            The level to compare [B, teacher channels, *size], and the input of the next finer level.
        """
        fused: Tensor = self.reduce(level)
        if self.mix is not None:
            assert deeper is not None
            deeper = F.interpolate(deeper, (fused.shape[-2], fused.shape[-1]), mode="nearest")
            share = self.mix(torch.cat([fused, deeper], dim=1)).sigmoid()  # [B, 2, h, w]
            fused = share[:, :1] * fused + share[:, 1:] * deeper
        if fused.shape[-2:] != size:
            fused = F.interpolate(fused, size, mode="nearest")
        return self.expand(fused), fused


def _conv_norm(in_channels: int, channels: int, kernel_size: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2, bias=False)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    return nn.Sequential(conv, nn.BatchNorm2d(channels))


class ReviewKDLoss(FeatureKDLoss):
    """Sum over levels of `hierarchical_context_loss`, in addition to labels and logits (e2KD, section 5)."""

    term = "review"
    restores_features = True
    term_needs = Needs(intermediates=Intermediates(stages=True), outputs=(FEATURES,))
    config: ReviewKDConfig

    def __init__(self, config: ReviewKDConfig) -> None:
        super().__init__(config)
        self.fusions = nn.ModuleList()
        """Fusion of each level, the finest first, created by `build`."""
        self.places: list[int] = []
        """Compared stages of the student, counted from 0, and -1 for the average, in the order of the fusions."""

    def build(self, student: StudentOutput, targets: Targets) -> None:
        levels = review_levels(student.output.stages)
        stages = stored_stages(targets)
        count = len(levels) - 1
        have = f"the student has {count} stages, the targets have the teacher's {', '.join(map(str, stages))}"
        require(
            max(stages) <= count,
            f"method=review_kd: {have}; choose networks with the same number of stages",
        )
        require(
            bool(self.config.stages) or len(stages) == count,
            f"method=review_kd: {have}; name the stages to compare with method.stages",
        )
        require(
            max(map(abs, self.config.stages), default=1) <= count,
            f"method.stages={list(self.config.stages)}: {have}; name stages that both have",
        )
        wanted = sorted(stage_index(number, count) + 1 for number in self.config.stages) or stages
        require(
            set(wanted) <= set(stages),
            f"method.stages={list(self.config.stages)}: the targets have stages {', '.join(map(str, stages))}; choose "
            "among them, or run permafrost precompute with annotate.features_stages",
        )
        self.places = [*(number - 1 for number in wanted), -1]
        fused_channels = min(_MAX_FUSED_CHANNELS, levels[-1].shape[1])
        self.fusions = nn.ModuleList(
            Fusion(
                levels[place].shape[1],
                fused_channels,
                targets.intermediates[field_of_stage(place)].shape[1],
                is_deepest=place == -1,
            )
            for place in self.places
        )

    def compare(self, student: StudentOutput, targets: Targets) -> Tensor:
        deeper: Tensor | None = None
        losses = []
        levels = review_levels(student.output.stages)
        for fusion, place in reversed(list(zip(self.fusions, self.places, strict=True))):
            name = field_of_stage(place)
            teacher_level = targets.intermediates[name]
            if place == -1:
                teacher_level = teacher_level[:, :, None, None]
            compared, deeper = fusion(levels[place], deeper, teacher_level.shape[-2:])
            losses.append(
                hierarchical_context_loss(compared, teacher_level, targets.coverage.get(name))
            )
        return torch.stack(losses).sum()
