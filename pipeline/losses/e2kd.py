"""e2KD (Parchami-Araghi et al. 2024): the student should say what the teacher says, for the same reasons."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pipeline.losses.kd import KDLoss
from pipeline.losses.map_cosine import map_cosine
from pipeline.losses.terms import LossTerms

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.config import E2KDConfig
    from pipeline.losses.terms import StudentOutput
    from pipeline.records import Targets


class E2KDLoss(KDLoss):
    """lambda_ce * ce + lambda_kd * kd + lambda_map * (1 - cosine of the maps) (eq. 3).

    Pairs in which either map is zero add nothing; `normalise_by` says what the sum is divided by.
    """

    config: E2KDConfig

    @property
    def map_control(self) -> str:
        return self.config.map_control

    def needs_maps(self, step: int) -> bool:
        return self.config.lambda_map > 0 and step % self.config.guided_step_interval == 0

    def forward(self, student: StudentOutput, targets: Targets | None, labels: Tensor) -> LossTerms:
        logit_terms = super().forward(student, targets, labels)
        if student.maps is None:
            return logit_terms
        assert targets is not None
        assert targets.maps is not None
        assert targets.map_valid is not None
        cosine, nonzero = map_cosine(student.maps, targets.maps, student.input_size)
        valid = nonzero & targets.map_valid
        count = valid.sum() if self.config.normalise_by == "valid" else torch.tensor(valid.numel())
        map_loss = torch.where(valid, 1 - cosine, 0.0).sum() / count.clamp(min=1)
        return LossTerms(
            total=logit_terms.total + self.config.lambda_map * map_loss,
            terms={**logit_terms.terms, "map": map_loss},
            statistics={"valid_map_fraction": valid.float().mean()},
        )
