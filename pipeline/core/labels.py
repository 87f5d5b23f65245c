"""What is known of the classes of a batch's records, in one of two forms.

    one label a record     i64 [B], NO_LABEL where it is not known
    many labels a record   f32 [B, K], 1 for each class that a record has; a row of zeros is not known

A store whose manifest says `multi_label` gives the second form. Shape letters: B records, K classes,
E classes of the record that has most.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pipeline.core.records import NO_CLASS, NO_LABEL

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def has_many(labels: Tensor) -> bool:
    """Whether a record may have many labels."""
    return labels.dim() == 2


def known(labels: Tensor) -> Tensor:
    """Whose labels are known: bool [B]."""
    return labels.any(dim=1) if has_many(labels) else labels != NO_LABEL


def multi_hot(labels: Tensor, num_classes: int) -> Tensor:
    """Either form as the second: f32 [B, K]."""
    if has_many(labels):
        return labels
    hot = torch.zeros(len(labels), num_classes, device=labels.device)
    return hot.scatter_(1, labels.clamp(min=0)[:, None], known(labels)[:, None].float())


def multi_hot_of_lists(lists: Sequence[Sequence[int]], num_classes: int) -> Tensor:
    """The index's column `labels` as f32 [B, K]."""
    hot = torch.zeros(len(lists), num_classes)
    for row, classes in zip(hot, lists, strict=True):
        row[list(classes)] = 1
    return hot


def classes_of(labels: Tensor) -> Tensor:
    """Each record's classes in ascending order: i64 [B, E], NO_CLASS after the last one; E is at least 1."""
    if not has_many(labels):
        return labels[:, None]
    most = max(1, int(labels.sum(dim=1).max()))
    present, classes = labels.sort(dim=1, descending=True, stable=True)
    return classes.masked_fill(present == 0, NO_CLASS)[:, :most]


def decide(logits: Tensor, *, many: bool) -> Tensor:
    """What logits [N, K] say, in the form of the labels: the highest class, or every class from 0 upwards."""
    return (logits >= 0).float() if many else logits.argmax(dim=1)
