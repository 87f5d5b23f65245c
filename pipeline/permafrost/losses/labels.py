"""Supervised losses, for one label per record (i64 [B]) or many (f32 [B, K])."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from permafrost.config.methods import LabelsConfig
from permafrost.config.teaching import LabelTeachingConfig
from permafrost.core.batches import Guidance, Targets
from permafrost.core.errors import require
from permafrost.core.label_forms import has_many, known_mask, multi_hot
from permafrost.core.records import NO_LABEL
from permafrost.losses.base import DistillationLoss, Needs, StudentOutput, Term


def cross_entropy_loss(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Compute the mean cross-entropy over the records whose label is known, 0 if none is.

    Args:
        logits: [B, K].
        labels: i64 [B], NO_LABEL where unknown.
        label_smoothing: Fraction of the target that is spread over all classes.
    """
    total = F.cross_entropy(
        logits, labels, ignore_index=NO_LABEL, label_smoothing=label_smoothing, reduction="sum"
    )
    return total / (labels != NO_LABEL).sum().clamp(min=1)


def bce_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the mean binary cross-entropy over classes and records with known labels, 0 if there are none.

    Args:
        logits: [B, K], one binary prediction per class.
        labels: i64 [B] or f32 [B, K], with target 1 for each class of a record and 0 for every other class.
    """
    return _mean_bce(logits, labels, off_label=0.0)


def off_label_bce_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute `bce_loss` with target 1 / K instead of 0 for the classes that a record does not have (e2KD, B-cos).

    targets = max(multi_hot(labels), 1 / K), without renormalization

    Args:
        logits: [B, K], one binary prediction per class.
        labels: i64 [B] or f32 [B, K].
    """
    return _mean_bce(logits, labels, off_label=1 / logits.shape[1])


def _mean_bce(logits: Tensor, labels: Tensor, off_label: float) -> Tensor:
    targets = multi_hot(labels, logits.shape[1]).to(logits.dtype).clamp(min=off_label)
    per_record = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=1)
    counted = known_mask(labels)
    return torch.where(counted, per_record, 0.0).sum() / counted.sum().clamp(min=1)


def label_term(logits: Tensor, labels: Tensor, weight: float = 1.0) -> Term:
    """Return the supervised term for the data: ce for one label per record, bce for many.

    BCE is a mean over classes, whereas soft targets are summed over them, so their scales differ by K.

    Args:
        logits: [B, K].
        labels: i64 [B], or f32 [B, K] for many labels per record.
        weight: Weight of the term.
    """
    if has_many(labels):
        return Term("bce", weight, lambda: bce_loss(logits, labels))
    return Term("ce", weight, lambda: cross_entropy_loss(logits, labels))


class LabelsLoss(DistillationLoss):
    """Loss on labels only, the baseline without a teacher."""

    def __init__(self, config: LabelsConfig | LabelTeachingConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def needs(self) -> Needs:
        return Needs(labels=True, targets=False)

    def check_labels(self, *, many: bool) -> None:
        require(
            not many or self.config.loss != "ce",
            "loss=ce needs one label per record, but records of this store have many labels; set method.loss=bce "
            "(teaching.loss=bce for permafrost teach)",
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
