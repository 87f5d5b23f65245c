"""Operations on the ground-truth labels of a batch, which have one of two forms.

    single label per record   i64 [B], NO_LABEL where unknown
    multi-label               f32 [B, K], 1 for each class of a record, 0 for every other, NaN where that is unknown

Batches of a store have the second form if its manifest sets `multi_label`. Shape letters: B records, K classes,
E largest number of classes of one record.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from permafrost.core.batches import (
    AnyLogits,
    Logits,
    MixedLogits,
    require_all_logits,
    top_class,
)
from permafrost.core.records import NO_CLASS, NO_LABEL, mark_unknown


class IndependentLogits(Tensor):
    """Logits of classes that are predictions of their own, so that functions of one label per record can refuse them.

    What is computed from them is of this type, too.
    """


def as_independent(logits: AnyLogits | None) -> AnyLogits | None:
    """Return logits, or those of both records of mixtures, as IndependentLogits."""
    if isinstance(logits, MixedLogits):
        parts = (as_independent(part) for part in (logits.first, logits.second))
        first, second = (cast("Logits", part) for part in parts)
        return replace(logits, first=first, second=second)
    return logits.as_subclass(IndependentLogits) if isinstance(logits, Tensor) else logits


def has_many(labels: Tensor) -> bool:
    """Return whether the labels have the multi-label form."""
    return labels.dim() == 2


def known_mask(labels: Tensor) -> Tensor:
    """Return the mask of the records of which a label is known, bool [B]."""
    return ~labels.isnan().all(dim=1) if has_many(labels) else labels != NO_LABEL


def known_cells(labels: Tensor, num_classes: int) -> Tensor:
    """Return the mask of the pairs of record and class of which it is known whether they belong together, bool [B, K].

    A single label says it of every class.
    """
    return (
        ~labels.isnan() if has_many(labels) else known_mask(labels)[:, None].expand(-1, num_classes)
    )


def multi_hot(labels: Tensor, num_classes: int) -> Tensor:
    """Convert labels of either form to f32 [B, K] with 1 for each class of a record, zeros where they are unknown."""
    if has_many(labels):
        return labels.nan_to_num(0)
    hot = torch.zeros(len(labels), num_classes, device=labels.device)
    return hot.scatter_(1, labels.clamp(min=0)[:, None], known_mask(labels)[:, None].float())


def multi_hot_of_lists(
    classes: NDArray[np.integer[Any]], lengths: NDArray[np.integer[Any]], num_classes: int
) -> Tensor:
    """Convert lists of classes, such as the column `labels` of the index, to f32 [B, K].

    Args:
        classes: The lists, one after another, as in `Record.labels`.
        lengths: Length of each list, [B].
        num_classes: Number K of classes.
    """
    hot = torch.zeros(len(lengths), num_classes)
    owners = np.repeat(np.arange(len(lengths)), lengths)
    numbers = classes.astype(np.int64)
    for are_meant, columns, value in (
        (numbers > NO_CLASS, numbers, 1.0),
        (numbers < NO_CLASS, mark_unknown(numbers), torch.nan),
    ):
        hot[torch.from_numpy(owners[are_meant]), torch.from_numpy(columns[are_meant])] = value
    hot[torch.from_numpy(np.flatnonzero(lengths == 0))] = torch.nan
    return hot


def classes_of(labels: Tensor) -> Tensor:
    """Return the classes of each record in ascending order, i64 [B, E], padded with NO_CLASS. E is at least 1."""
    if not has_many(labels):
        return labels[:, None]
    labels = labels.nan_to_num(0)
    most = max(1, int(labels.sum(dim=1).max()))
    present, classes = labels.sort(dim=1, descending=True, stable=True)
    return classes.masked_fill(present == 0, NO_CLASS)[:, :most]


def predict_labels(logits: Logits, *, many: bool, threshold: Tensor | float = 0.0) -> Tensor:
    """Return the predicted classes of logits [N, K] in the form of the labels.

    Args:
        logits: Raw logits.
        many: Whether records have several labels.
        threshold: With `many`, the logit from which a class is predicted, or f64 [K] one for each class.

    Returns:
        The argmax, i64 [N]; with `many`, f32 [N, K] with 1 for each predicted class.

    Raises:
        ConfigError: If `many` and the logits are only the largest ones.
    """
    if many:
        return (require_all_logits(logits, "a record with many labels") >= threshold).float()
    return top_class(logits)
