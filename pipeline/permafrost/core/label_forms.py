"""Operations on the ground-truth labels of a batch, which have one of two forms.

    single label per record   i64 [B], NO_LABEL where unknown
    multi-label               f32 [B, K], 1 for each class of a record; a row of zeros for none, of NaN where unknown

Batches of a store have the second form if its manifest sets `multi_label`. Shape letters: B records, K classes,
E largest number of classes of one record.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from permafrost.core.batches import Logits, require_all_logits, top_class
from permafrost.core.records import NO_CLASS, NO_LABEL


def has_many(labels: Tensor) -> bool:
    """Return whether the labels have the multi-label form."""
    return labels.dim() == 2


def known_mask(labels: Tensor) -> Tensor:
    """Return the mask of the records whose labels are known, bool [B]."""
    return ~labels.isnan().any(dim=1) if has_many(labels) else labels != NO_LABEL


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
        classes: The lists, one after another. An empty list is unknown; a list of NO_CLASS alone has no label.
        lengths: Length of each list, [B].
        num_classes: Number K of classes.
    """
    hot = torch.zeros(len(lengths), num_classes)
    owners = np.repeat(np.arange(len(lengths)), lengths)
    is_class = classes != NO_CLASS
    hot[
        torch.from_numpy(owners[is_class]), torch.from_numpy(classes[is_class].astype(np.int64))
    ] = 1
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


def predict_labels(logits: Logits, *, many: bool) -> Tensor:
    """Return the predicted classes of logits [N, K] in the form of the labels.

    Args:
        logits: Raw logits.
        many: Whether records have several labels.

    Returns:
        The argmax, i64 [N]; with `many`, f32 [N, K] with 1 for each class whose logit is >= 0.

    Raises:
        ConfigError: If `many` and the logits are only the largest ones.
    """
    if many:
        return (require_all_logits(logits, "a record with many labels") >= 0).float()
    return top_class(logits)
