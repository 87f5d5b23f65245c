"""Factor transfer (Kim et al. 2018): compare the student's translated last stage with the teacher's paraphrased one.

The paraphraser is trained to reconstruct the teacher's features from fewer channels before the student's first step,
and is then frozen. The translator is trained with the student. Neither is exported.
"""

from __future__ import annotations

from itertools import chain, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from permafrost.core.batches import Targets
from permafrost.core.records import FEATURES
from permafrost.losses.base import Needs, StudentOutput
from permafrost.losses.feature_kd import covered_mse, pool_cells, stored_stages
from permafrost.models.classifier import Intermediates, ModelOutput, to_float32
from permafrost_papers.interpretability.options import FTConfig
from permafrost_papers.interpretability.pretraining import AuxiliaryPretraining, PretrainedLoss

_SLOPE = 0.1
"""Negative slope of the leaky ReLUs."""
_WEIGHT_DECAY = 1e-4


def factor_loss(student: Tensor, teacher: Tensor, coverage: Tensor | None = None) -> Tensor:
    """Compute the mean of |F_s / ||F_s|| - F_t / ||F_t||| over records and elements (eq. 3, p = 1).

    Norms are over the whole factor of a record. If the grids differ, the finer one is first averaged over the cells of
    the coarser one.

    Args:
        student: [B, C, h, w]. Gradients flow here.
        teacher: [B, C, h, w], constant.
        coverage: [B, 1, teacher's h, w] in [0, 1], by which both factors are multiplied, or None.
    """
    h, w = map(min, student.shape[2:], teacher.shape[2:])
    share = None if coverage is None else pool_cells(coverage, (h, w))
    student_factor, teacher_factor = (
        F.normalize((pooled if share is None else pooled * share).flatten(1), dim=1)
        for pooled in (pool_cells(factor, (h, w)) for factor in (student, teacher.detach()))
    )
    return (student_factor - teacher_factor).abs().mean()


def last_stage_fields(output: ModelOutput) -> dict[str, Tensor]:
    """Return the field ft [B, C, h, w]: the features to paraphrase."""
    return {_LIVE: to_float32(output.stages[-1].output.detach())}


_LIVE = "ft"


def last_stage(targets: Targets) -> tuple[Tensor, Tensor | None]:
    """Return the output of the teacher's last stage, live or the deepest of a pass, [B, C, h, w], and its coverage."""
    if _LIVE in targets.intermediates:
        return targets.intermediates[_LIVE], None
    name = f"{FEATURES}_{stored_stages(targets)[-1]}"
    values = targets.intermediates[name]
    if targets.specs[name].before_relu:
        values = F.relu(values)
    return values, targets.coverage.get(name)


class FTLoss(PretrainedLoss):
    """Loss `factor_loss` of the last stages, in addition to labels and logits."""

    term = "ft"
    restores_features = True
    term_needs = Needs(
        intermediates=Intermediates(stages=True),
        target_fields=last_stage_fields,
        outputs=(FEATURES,),
    )
    config: FTConfig

    def build(self, student: StudentOutput, targets: Targets) -> None:
        teacher_channels = last_stage(targets)[0].shape[1]
        channels = max(1, round(teacher_channels * self.config.paraphrase_rate))
        self.translator = _encoder(student.output.stages[-1].output.shape[1], channels)
        self.paraphraser = _encoder(teacher_channels, channels)
        self.reconstruction = _convolutions(channels, channels, teacher_channels, teacher_channels)

    @property
    def pretraining(self) -> AuxiliaryPretraining:
        return AuxiliaryPretraining(
            parameters=[*self.paraphraser.parameters(), *self.reconstruction.parameters()],
            epochs=self.config.paraphraser_epochs,
            lr=self.config.paraphraser_lr,
            decay_every_epochs=max(1, self.config.paraphraser_epochs),
            weight_decay=_WEIGHT_DECAY,
            loss=self._reconstruction_error,
        )

    def _reconstruction_error(self, targets: Targets, view_index: Tensor) -> Tensor:
        """Mean squared error of the reconstructed features."""
        features, coverage = last_stage(targets)
        return covered_mse(self.reconstruction(self.paraphraser(features)), features, coverage)

    def compare(self, student: StudentOutput, targets: Targets) -> Tensor:
        features, coverage = last_stage(targets)
        with torch.no_grad():
            teacher_factor = self.paraphraser(features)
        student_factor = self.translator(to_float32(student.output.stages[-1].output))
        return factor_loss(student_factor, teacher_factor, coverage)


def _encoder(channels: int, factor_channels: int) -> nn.Sequential:
    """Three convolutions from features to their factor, on the same grid."""
    return _convolutions(channels, channels, factor_channels, factor_channels)


def _convolutions(*channels: int) -> nn.Sequential:
    """Build 3x3 convolutions, each followed by a leaky ReLU, without norms."""
    pairs = (
        (nn.Conv2d(before, after, 3, padding=1), nn.LeakyReLU(_SLOPE))
        for before, after in pairwise(channels)
    )
    return nn.Sequential(*chain.from_iterable(pairs))
