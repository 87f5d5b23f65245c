"""The supervised term."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
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


def off_label_bce_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean binary cross-entropy over classes and records with a known label; 0 if none is (e2KD, B-cos).

    logits  [B, K]; each class is a question of its own
    labels  i64 [B]; the target is 1 for the label and 1 / K, not 0, for every other class
    """
    known = labels != NO_LABEL
    targets = torch.full_like(logits, 1 / logits.shape[1])
    targets.scatter_(1, labels.clamp(min=0)[:, None], 1.0)
    per_record = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=1)
    return torch.where(known, per_record, 0.0).sum() / known.sum().clamp(min=1)


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
        if self.config.loss == "bce_offlabel":
            bce = off_label_bce_loss(student.logits, labels)
            return LossTerms(total=bce, terms={"bce": bce})
        ce = cross_entropy_loss(student.logits, labels, self.config.label_smoothing)
        return LossTerms(total=ce, terms={"ce": ce})
