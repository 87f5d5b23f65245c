"""The supervised term, of one label a record (i64 [B]) or of many (f32 [B, K])."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config.methods import LabelsConfig
from pipeline.config.teaching import LabelTeachingConfig
from pipeline.core.errors import require
from pipeline.core.labels import has_many, known, multi_hot
from pipeline.core.records import NO_LABEL, Guidance, Targets
from pipeline.losses.base import DistillationLoss, Needs, StudentOutput, Term


def cross_entropy_loss(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of logits [B, K] over the records whose label [B] is known; 0 if none is."""
    total = F.cross_entropy(
        logits, labels, ignore_index=NO_LABEL, label_smoothing=label_smoothing, reduction="sum"
    )
    return total / (labels != NO_LABEL).sum().clamp(min=1)


def bce_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean binary cross-entropy over classes and records with known labels; 0 if there is none.

    logits  [B, K]; each class is a question of its own
    labels  i64 [B] or f32 [B, K]; the target is 1 for each class that a record has and 0 for every other
    """
    return _mean_bce(logits, labels, off_label=0.0)


def off_label_bce_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """`bce_loss` with the target 1 / K, not 0, for every class that a record has not (e2KD, B-cos).

    targets = max(multi_hot(labels), 1 / K), never renormalized
    """
    return _mean_bce(logits, labels, off_label=1 / logits.shape[1])


def _mean_bce(logits: Tensor, labels: Tensor, off_label: float) -> Tensor:
    targets = multi_hot(labels, logits.shape[1]).to(logits.dtype).clamp(min=off_label)
    per_record = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=1)
    counted = known(labels)
    return torch.where(counted, per_record, 0.0).sum() / counted.sum().clamp(min=1)


def label_term(logits: Tensor, labels: Tensor, weight: float = 1.0) -> Term:
    """The supervised term that fits the set: ce of one label, bce of many.

    BCE is a mean over classes, and soft targets sum over them: their scales differ by K.
    """
    if has_many(labels):
        return Term("bce", weight, lambda: bce_loss(logits, labels))
    return Term("ce", weight, lambda: cross_entropy_loss(logits, labels))


class LabelsLoss(DistillationLoss):
    """Labels only: the baseline that no teacher has touched."""

    def __init__(self, config: LabelsConfig | LabelTeachingConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def needs(self) -> Needs:
        return Needs(labels=True, targets=False)

    def check_labels(self, *, many: bool) -> None:
        require(
            not many or self.config.loss != "ce",
            "loss=ce takes one label a record, and this store has many: set method.loss=bce "
            "(in stages.teach teaching.loss=bce)",
        )

    def terms(
        self, student: StudentOutput, targets: Targets | Guidance | None, labels: Tensor
    ) -> Iterable[Term]:
        logits, smoothing = student.logits, self.config.label_smoothing
        match self.config.loss:
            case "ce":
                yield Term("ce", 1.0, lambda: cross_entropy_loss(logits, labels, smoothing))
            case "bce":
                yield Term("bce", 1.0, lambda: bce_loss(logits, labels))
            case "bce_offlabel":
                yield Term("bce", 1.0, lambda: off_label_bce_loss(logits, labels))
