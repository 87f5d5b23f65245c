"""e2KD (Parchami-Araghi et al. 2024): the student should say what the teacher says, for the same reasons."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.config.methods import E2KDConfig
from pipeline.core.records import Targets
from pipeline.losses.base import LossTerms, StudentOutput
from pipeline.losses.kd import KDLoss
from pipeline.losses.map_cosine import map_cosine


class E2KDLoss(KDLoss):
    """lambda_ce * ce + lambda_kd * kd + lambda_map * (1 - cosine of the maps) (eq. 3).

    Pairs in which either map is zero add nothing; the authors' code counts 1 for each, a constant, so that its logged
    value is higher by 1 / N a record with a zero map and its gradient the same.

    A record's term is the mean over its E_n classes, and the batch's the mean over its N records, so that a record
    weighs the same however many classes it has:

        1 / N sum_n 1 / E_n sum_e (1 - cosine)    over valid pairs

    `normalise_by` says who counts in N and E_n: "batch" every record and every class that the teacher
    explains (the paper's lambda), "valid" those with valid pairs only. Padding never counts.
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
        assert targets.explained_class is not None
        assert targets.maps is not None
        assert targets.map_valid is not None
        cosine, nonzero = map_cosine(student.maps, targets.maps, student.input_size)
        explained = targets.explained_class >= 0
        valid = nonzero & targets.map_valid
        counted = valid if self.config.normalise_by == "valid" else explained
        distance = torch.where(valid, 1 - cosine, 0.0).sum(dim=1)  # [B]
        of_records = distance / counted.sum(dim=1).clamp(min=1)
        count = torch.tensor(len(valid))
        if self.config.normalise_by == "valid":
            count = valid.any(dim=1).sum()
        map_loss = of_records.sum() / count.clamp(min=1)
        return LossTerms(
            total=logit_terms.total + self.config.lambda_map * map_loss,
            terms={**logit_terms.terms, "map": map_loss},
            statistics={"valid_map_fraction": valid.sum() / explained.sum().clamp(min=1)},
        )
