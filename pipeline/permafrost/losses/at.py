"""Attention transfer (Zagoruyko & Komodakis 2017): match the spatial activation of student and teacher."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from permafrost.config.methods import ATConfig
from permafrost.core.errors import require
from permafrost.core.records import Targets
from permafrost.losses.base import Needs, StudentOutput
from permafrost.losses.feature_kd import FeatureKDLoss
from permafrost.models.output import Intermediates, ModelOutput, to_float32


def attention_map(features: Tensor) -> Tensor:
    """Compute Q = mean over channels of A^2, float32 or wider: [B, C, h, w] -> [B, h, w] (section 3.1)."""
    return to_float32(features).square().mean(dim=1)


def attention_loss(
    student_attention: Tensor, teacher_attention: Tensor, norm: Literal["mse", "l2"] = "mse"
) -> Tensor:
    """Mean over records and positions of (Q_s / ||Q_s|| - Q_t / ||Q_t||)^2, with norms over a record's positions.

    If the grids differ, the finer map is first averaged over the cells of the coarser one. A map that is zero
    everywhere has no gradient.

    student_attention  [B, h, w]  gradients flow here
    teacher_attention  [B, h, w]  constant, of any positive scale
    norm               mse, as in public code, or l2, as printed in the paper: the mean over records of the norm of the
                       difference, not squared
    """
    h, w = map(min, student_attention.shape[1:], teacher_attention.shape[1:])
    student, teacher = (
        F.normalize(F.adaptive_avg_pool2d(attention, (h, w)).flatten(1), dim=1)
        for attention in (student_attention, teacher_attention.detach())
    )
    if norm == "l2":
        norms: Tensor = torch.linalg.vector_norm(student - teacher, dim=1)
        return norms.mean()
    return F.mse_loss(student, teacher)


def attention_fields(output: ModelOutput) -> dict[str, Tensor]:
    """Fields attention_1, ... [B, h, w]: Q of each stage."""
    return {
        f"attention_{number}": attention_map(stage.output.detach())
        for number, stage in enumerate(output.stages, start=1)
    }


class ATLoss(FeatureKDLoss):
    """Sum over stages of `attention_loss`, in addition to labels and logits (e2KD, section 5)."""

    term = "at"
    term_needs = Needs(
        intermediates=Intermediates(stages=True),
        target_fields=attention_fields,
        payload="attention",
    )
    config: ATConfig

    @property
    def weight(self) -> float:
        return self.config.lambda_at

    def build(self, student: StudentOutput, targets: Targets) -> None:
        own, taught = len(student.output.stages), len(targets.intermediates)
        have = f"the student has {own} stages, the teacher {taught}"
        if not self.config.stages:
            both = list(range(-min(own, taught), 0))
            require(
                own == taught,
                f"method=at: {have}; name the stages to compare, counted from the deepest as in method.stages={both} "
                "or from the finest, or choose other networks",
            )
        require(
            max(map(abs, self.config.stages), default=1) <= min(own, taught),
            f"method.stages={list(self.config.stages)}: {have}; name stages that both have",
        )

    def compare(self, student: StudentOutput, targets: Targets) -> Tensor:
        own, taught = len(student.output.stages), len(targets.intermediates)
        numbers = self.config.stages or range(1, own + 1)
        losses = [
            attention_loss(
                attention_map(student.output.stages[_place(number, own)].output),
                targets.intermediates[f"attention_{_place(number, taught) + 1}"],
                self.config.norm,
            )
            for number in numbers
        ]
        return torch.stack(losses).sum()


def _place(number: int, count: int) -> int:
    """Convert the number of a stage, from 1 at the finest or -1 at the deepest, to its place among `count`."""
    return number - 1 if number > 0 else count + number
