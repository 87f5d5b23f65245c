"""Factor transfer (Kim et al. 2018): compare the student's translated last stage with the teacher's paraphrased one.

The paraphraser is trained to reconstruct the teacher's features from fewer channels before the student's first step,
and is then frozen. The translator is trained with the student. Neither is exported.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from permafrost.core.records import Targets
from permafrost.interpretability.options import FTConfig
from permafrost.losses.base import AuxiliaryPretraining, Needs, StudentOutput
from permafrost.losses.feature_kd import FeatureKDLoss
from permafrost.models.classifier import Intermediates, ModelOutput, to_float32

_SLOPE = 0.1
"""Negative slope of the leaky ReLUs."""
_WEIGHT_DECAY = 1e-4


def factor_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of |F_s / ||F_s|| - F_t / ||F_t||| over records and elements (eq. 3, p = 1).

    Norms are over the whole factor of a record. If the grids differ, the finer one is first averaged over the cells of
    the coarser one.

    student  [B, C, h, w]  gradients flow here
    teacher  [B, C, h, w]  constant
    """
    h, w = map(min, student.shape[2:], teacher.shape[2:])
    own, taught = (
        F.normalize(F.adaptive_avg_pool2d(factor, (h, w)).flatten(1), dim=1)
        for factor in (student, teacher.detach())
    )
    return (own - taught).abs().mean()


def last_stage_fields(output: ModelOutput) -> dict[str, Tensor]:
    """Field ft [B, C, h, w]: the features to paraphrase, which are too large to store."""
    return {"ft": to_float32(output.stages[-1].output.detach())}


class FTLoss(FeatureKDLoss):
    """Loss `factor_loss` of the last stages, in addition to labels and logits."""

    term = "ft"
    term_needs = Needs(intermediates=Intermediates(stages=True), target_fields=last_stage_fields)
    config: FTConfig

    @property
    def weight(self) -> float:
        return self.config.lambda_ft

    def build(self, student: StudentOutput, targets: Targets) -> None:
        taught = targets.intermediates["ft"].shape[1]
        channels = max(1, round(taught * self.config.paraphrase_rate))
        self.translator = _encoder(student.output.stages[-1].output.shape[1], channels)
        self.paraphraser = _encoder(taught, channels)
        self.reconstruction = _convolutions(channels, channels, taught, taught)

    @property
    def pretraining(self) -> AuxiliaryPretraining | None:
        if self.weight == 0:
            return None
        epochs = self.config.paraphraser_epochs
        return AuxiliaryPretraining(
            parameters=[*self.paraphraser.parameters(), *self.reconstruction.parameters()],
            epochs=epochs,
            lr=self.config.paraphraser_lr,
            decay_every_epochs=max(1, epochs),
            weight_decay=_WEIGHT_DECAY,
            loss=self._reconstruction_error,
        )

    def _reconstruction_error(self, targets: Targets, view_index: Tensor) -> Tensor:
        """Mean squared error of the reconstructed features."""
        features = targets.intermediates["ft"]
        return F.mse_loss(self.reconstruction(self.paraphraser(features)), features)

    def compare(self, student: StudentOutput, targets: Targets) -> Tensor:
        with torch.no_grad():
            taught = self.paraphraser(targets.intermediates["ft"])
        return factor_loss(self.translator(to_float32(student.output.stages[-1].output)), taught)


def _encoder(channels: int, factor_channels: int) -> nn.Sequential:
    """Three convolutions from features to their factor, on the same grid."""
    return _convolutions(channels, channels, factor_channels, factor_channels)


def _convolutions(*channels: int) -> nn.Sequential:
    """Build 3x3 convolutions, each followed by a leaky ReLU, without norms."""
    layers: list[nn.Module] = []
    for before, after in pairwise(channels):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.LeakyReLU(_SLOPE)]
    return nn.Sequential(*layers)
