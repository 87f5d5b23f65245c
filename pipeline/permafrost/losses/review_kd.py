"""ReviewKD (Chen et al. 2021): each stage of the teacher is compared with a fusion of the student's deeper stages.

The compared levels are the stages and the spatial average of the last stage. The student's levels are fused starting
at the deepest. The fusion modules are trained with the student and not exported.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from permafrost.config.methods import ReviewKDConfig
from permafrost.core.errors import require
from permafrost.core.records import Targets
from permafrost.losses.base import Needs, StudentOutput
from permafrost.losses.feature_kd import FeatureKDLoss
from permafrost.models.output import Intermediates, ModelOutput, Stage, to_float32

_POOLED_SIZES = (4, 2, 1)
_MAX_FUSED_CHANNELS = 512


def review_levels(stages: Sequence[Stage], *, preactivation: bool = False) -> list[Tensor]:
    """Levels of a network to compare, float32 or wider: each stage [B, C, h, w], then the average [B, C, 1, 1].

    preactivation  use the stages before their last ReLU, as for a teacher; the average is always that of the output
    """
    grids = [to_float32(stage.preactivation if preactivation else stage.output) for stage in stages]
    return [*grids, to_float32(stages[-1].output).mean(dim=(2, 3), keepdim=True)]


def hierarchical_context_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """HCL (section 3.3) of features [B, C, h, w]: mean squared differences, from the full grid to its average.

    The full grid has weight 1, and each coarser pooling (to 4, 2 and 1 cells per side, if the grid has more) has half
    the weight of the previous one. The result is divided by the sum of the weights.
    """
    teacher = teacher.detach()
    loss, weight, total_weight = F.mse_loss(student, teacher), 1.0, 1.0
    for size in _POOLED_SIZES:
        if size < min(student.shape[-2:]):
            weight /= 2
            total_weight += weight
            coarse, taught = (F.adaptive_avg_pool2d(full, size) for full in (student, teacher))
            loss = loss + weight * F.mse_loss(coarse, taught)
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
        """Compute the level to compare [B, teacher channels, *size], and the input of the next finer level."""
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


def review_fields(output: ModelOutput) -> dict[str, Tensor]:
    """Fields review_1, ... [B, C, h, w]: the levels to compare, which are too large to store."""
    levels = review_levels(output.stages, preactivation=True)
    return {f"review_{number}": level.detach() for number, level in enumerate(levels, start=1)}


class ReviewKDLoss(FeatureKDLoss):
    """Sum over levels of `hierarchical_context_loss`, in addition to labels and logits (e2KD, section 5)."""

    term = "review"
    term_needs = Needs(intermediates=Intermediates(stages=True), target_fields=review_fields)
    config: ReviewKDConfig

    def __init__(self, config: ReviewKDConfig) -> None:
        super().__init__(config)
        self.fusions = nn.ModuleList()
        """Fusion of each level, the finest first, created by `build`."""

    @property
    def weight(self) -> float:
        return self.config.lambda_review

    def build(self, student: StudentOutput, targets: Targets) -> None:
        levels, teacher = review_levels(student.output.stages), list(targets.intermediates.values())
        require(
            len(levels) == len(teacher),
            f"method=review_kd: the student has {len(levels) - 1} stages, the teacher {len(teacher) - 1}; choose "
            "networks with the same number of stages",
        )
        fused_channels = min(_MAX_FUSED_CHANNELS, levels[-1].shape[1])
        self.fusions = nn.ModuleList(
            Fusion(own.shape[1], fused_channels, taught.shape[1], is_deepest=number == len(levels))
            for number, (own, taught) in enumerate(zip(levels, teacher, strict=True), start=1)
        )

    def compare(self, student: StudentOutput, targets: Targets) -> Tensor:
        deeper: Tensor | None = None
        losses = []
        levels = zip(
            self.fusions,
            review_levels(student.output.stages),
            targets.intermediates.values(),
            strict=True,
        )
        for fusion, level, taught in reversed(list(levels)):
            compared, deeper = fusion(level, deeper, taught.shape[-2:])
            losses.append(hierarchical_context_loss(compared, taught))
        return torch.stack(losses).sum()
