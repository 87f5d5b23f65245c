"""Supervised losses, for one label per record (i64 [B]) or many (f32 [B, K])."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from permafrost.config.methods import LabelsConfig
from permafrost.config.teaching import LabelTeachingConfig
from permafrost.core.batches import AnyLabels, MixedLabels, Targets
from permafrost.core.errors import require
from permafrost.core.label_forms import (
    IndependentLogits,
    has_many,
    known_cells,
    known_mask,
    multi_hot,
)
from permafrost.core.records import NO_LABEL
from permafrost.losses.base import DistillationLoss, Needs, StudentOutput, Term
from permafrost.models.classifier import to_float32


def _mean_of_known(
    loss: Callable[[Tensor], Tensor], labels: AnyLabels, known_of: Callable[[Tensor], Tensor]
) -> Tensor:
    """Average a loss over what is known, 0 if nothing is.

    That of mixtures is the sum over both records' labels, each with its share and divided by the number of its own
    known labels. A label term is affine in its target, so with all labels known this is the loss of the mixed target.

    Args:
        loss: Function from labels of one record each to losses, [B] or [B, K].
        labels: Labels of images or of mixtures.
        known_of: Function from labels of one record each to the mask of the losses that count.
    """

    def mean(unmixed: Tensor, weights: Tensor | None = None) -> Tensor:
        known, losses = known_of(unmixed), loss(unmixed)
        if weights is not None:
            losses = losses * weights.view(-1, *[1] * (losses.ndim - 1))
        return torch.where(known, losses, 0.0).sum() / known.sum().clamp(min=1)

    if isinstance(labels, MixedLabels):
        return mean(labels.first, labels.shares) + mean(labels.second, 1 - labels.shares)
    return mean(labels)


def _require_labels(loss: str, logits: Tensor, labels: AnyLabels, most: int) -> None:
    """Raise ConfigError unless labels are i64 [B] or, if `most` is 2, f32 [B, K] for logits [B, K]."""
    first = labels.first if isinstance(labels, MixedLabels) else labels
    require(
        logits.ndim == 2
        and not isinstance(first, IndependentLogits)
        and first.ndim <= most
        and first.shape == logits.shape[: first.ndim]
        and first.is_floating_point() == (first.ndim == 2),
        f"{loss} compares logits [B, K] with labels i64 [B]{' or f32 [B, K]' if most == 2 else ''}, got "
        f"{[*logits.shape]} and {str(first.dtype).removeprefix('torch.')} {[*first.shape]}",
    )


def cross_entropy_loss(logits: Tensor, labels: AnyLabels, label_smoothing: float = 0.0) -> Tensor:
    """Compute the mean cross-entropy over the records whose label is known, 0 if none is.

    Args:
        logits: [B, K].
        labels: i64 [B], NO_LABEL where unknown, or those of mixtures.
        label_smoothing: Fraction of the target that is spread over all classes.
    """
    _require_labels("cross_entropy_loss", logits, labels, 1)
    return _mean_of_known(
        lambda unmixed: F.cross_entropy(
            to_float32(logits),
            unmixed,
            ignore_index=NO_LABEL,
            label_smoothing=label_smoothing,
            reduction="none",
        ),
        labels,
        known_mask,
    )


def bce_loss(logits: Tensor, labels: AnyLabels) -> Tensor:
    """Compute the mean binary cross-entropy over the pairs of record and class that are known, 0 if none is.

    Unknown ones have weight zero, as the ignored labels of a cross-entropy do.

    Args:
        logits: [B, K], one binary prediction per class.
        labels: i64 [B] or f32 [B, K], with target 1 for each class of a record, 0 for every other class and NaN where
            that is unknown, or those of mixtures.
    """
    return _mean_bce(logits, labels, off_label=0.0)


def off_label_bce_loss(logits: Tensor, labels: AnyLabels) -> Tensor:
    """Compute `bce_loss` with target 1 / K instead of 0 for the classes that a record does not have (e2KD, B-cos).

    targets = max(multi_hot(labels), 1 / K), without renormalization

    Args:
        logits: [B, K], one binary prediction per class.
        labels: i64 [B] or f32 [B, K], or those of mixtures.
    """
    return _mean_bce(logits, labels, off_label=1 / logits.shape[1])


def _mean_bce(logits: Tensor, labels: AnyLabels, off_label: float) -> Tensor:
    _require_labels("bce_loss", logits, labels, 2)
    wide = to_float32(logits)

    def loss(unmixed: Tensor) -> Tensor:
        targets = multi_hot(unmixed, logits.shape[1]).to(wide.dtype).clamp(min=off_label)
        return F.binary_cross_entropy_with_logits(wide, targets, reduction="none")

    return _mean_of_known(loss, labels, lambda unmixed: known_cells(unmixed, logits.shape[1]))


def label_term(logits: Tensor, labels: AnyLabels, weight: float = 1.0) -> Term:
    """Return the supervised term for the data: ce for one label per record, bce for many.

    BCE is a mean over classes, whereas soft targets are summed over them, so their scales differ by K.

    Args:
        logits: [B, K].
        labels: i64 [B], or f32 [B, K] for many labels per record, or those of mixtures.
        weight: Weight of the term.
    """
    if has_many(labels.first if isinstance(labels, MixedLabels) else labels):
        return Term("bce", weight, lambda: bce_loss(logits, labels))
    return Term("ce", weight, lambda: cross_entropy_loss(logits, labels))


class LabelsLoss(DistillationLoss):
    """Loss on labels only, the baseline without a teacher."""

    config: LabelsConfig | LabelTeachingConfig

    @property
    def needs(self) -> Needs:
        return Needs(labels=True, targets=False)

    def check_labels(self, *, many: bool) -> None:
        require(
            not many or self.config.loss != "ce",
            "loss=ce needs one label per record, but records of this store have many labels; set method.loss=bce "
            "(teaching.loss=bce for permafrost teach)",
        )

    def terms(self, student: StudentOutput, targets: Targets, labels: AnyLabels) -> Iterable[Term]:
        logits, smoothing = student.logits, self.config.label_smoothing
        match self.config.loss:
            case "ce":
                yield Term("ce", 1.0, lambda: cross_entropy_loss(logits, labels, smoothing))
            case "bce":
                yield Term("bce", 1.0, lambda: bce_loss(logits, labels))
            case "bce_offlabel":
                yield Term("bce", 1.0, lambda: off_label_bce_loss(logits, labels))
