"""The loss of a teacher that explains by superfeatures (KED): labels, and what the black box says of them.

It reads the sum of the subnets' logits alone, so each subnet is free to say what only its features can tell.
"""

from __future__ import annotations

from torch import Tensor

from pipeline.config.teaching import KEDTeachingConfig
from pipeline.core.records import Targets
from pipeline.losses.base import LossTerms, StudentOutput
from pipeline.losses.kd import kd_loss
from pipeline.losses.labels import LabelsLoss


class ExplainingTeacherLoss(LabelsLoss):
    """ce + lambda_kd * kd, the latter towards the black box where it is asked."""

    config: KEDTeachingConfig

    def __init__(self, config: KEDTeachingConfig) -> None:
        super().__init__(config)
        self.needs_targets = config.lambda_kd > 0

    def forward(self, student: StudentOutput, targets: Targets | None, labels: Tensor) -> LossTerms:
        of_labels = super().forward(student, targets, labels)
        if targets is None:
            return of_labels
        kd = kd_loss(student.logits, targets.logits, self.config.tau)
        return LossTerms(
            total=of_labels.total + self.config.lambda_kd * kd, terms={**of_labels.terms, "kd": kd}
        )
