"""Soft targets for many labels per record, with a binary prediction for each class (e2KD eq. C.1, after L2D)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def mld_loss(student_logits: Tensor, teacher_logits: Tensor, tau: float) -> Tensor:
    """Compute tau * KL(teacher || student) of Bernoulli variables, summed over classes, averaged over the batch.

    student_logits  [B, K]  gradients flow here
    teacher_logits  [B, K]  constant, raw
    tau             temperature > 0; the factor is tau as in the paper, not tau^2 as for a softmax

    With a = teacher_logits / tau, b = student_logits / tau and p = sigmoid(a), the divergence of one class is
    p (log sigmoid(a) - log sigmoid(b)) + (1 - p) (log sigmoid(-a) - log sigmoid(-b)). It is exactly 0 for equal
    logits and finite for any logits, and its gradient sigmoid(b) - p does not saturate while the two differ.
    """
    student, teacher = student_logits / tau, teacher_logits.detach() / tau
    yes = teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))
    no = (-teacher).sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    return tau * (yes + no).sum(dim=1).mean()
