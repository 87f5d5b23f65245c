"""The supervised term."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F

from pipeline.losses.terms import DistillationLoss, LossTerms
from pipeline.records import NO_LABEL

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.config import LabelsConfig, LabelTeachingConfig
    from pipeline.losses.terms import StudentOutput
    from pipeline.records import Targets


def cross_entropy_loss(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of logits [B, K] over the records whose label [B] is known; 0 if none is."""
    total = F.cross_entropy(
        logits, labels, ignore_index=NO_LABEL, label_smoothing=label_smoothing, reduction="sum"
    )
    return total / (labels != NO_LABEL).sum().clamp(min=1)


class LabelsLoss(DistillationLoss):
    """Labels only: the baseline that no teacher has touched."""

    needs_targets = False

    def __init__(self, config: LabelsConfig | LabelTeachingConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def needs_labels(self) -> bool:
        return True

    def forward(self, student: StudentOutput, targets: Targets | None, labels: Tensor) -> LossTerms:
        ce = cross_entropy_loss(student.logits, labels, self.config.label_smoothing)
        return LossTerms(total=ce, terms={"ce": ce})
