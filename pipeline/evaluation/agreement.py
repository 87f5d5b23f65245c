"""Is the student right, and does it say what its teacher says? Fractions in [0, 1]."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from pipeline.records import NO_GROUP, NO_LABEL

if TYPE_CHECKING:
    from torch import Tensor


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of labelled records whose highest logit [N, K] is the label [N]; nan where none is labelled."""
    known = labels != NO_LABEL
    return float((logits.argmax(dim=1) == labels)[known].double().mean())


def agreement(student_logits: Tensor, teacher_logits: Tensor) -> float:
    """Share of records on which both networks have the same top-1 class (e2KD eq. 4); labels play no part."""
    return float((student_logits.argmax(dim=1) == teacher_logits.argmax(dim=1)).double().mean())


def kl_to_teacher(student_logits: Tensor, teacher_logits: Tensor) -> float:
    """Mean KL(teacher || student) of the class probabilities, in nats."""
    student = F.log_softmax(student_logits.double(), dim=1)
    teacher = F.log_softmax(teacher_logits.double(), dim=1)
    return float(F.kl_div(student, teacher, reduction="batchmean", log_target=True))


def group_accuracies(logits: Tensor, labels: Tensor, groups: Tensor) -> dict[str, float]:
    """Accuracy of each group of records, by the group's number; empty where there are no groups."""
    known = torch.unique(groups[groups != NO_GROUP]).tolist()
    return {
        str(group): accuracy(logits[groups == group], labels[groups == group]) for group in known
    }
