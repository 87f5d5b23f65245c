"""Soft targets of many labels: each class is a question of its own (e2KD eq. C.1, after L2D)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def mld_loss(student_logits: Tensor, teacher_logits: Tensor, tau: float) -> Tensor:
    """tau * KL(teacher || student) of Bernoulli variables, summed over classes and averaged over the batch.

    student_logits  [B, K]  gradients flow here
    teacher_logits  [B, K]  constant, raw
    tau             temperature > 0; the factor is tau, as in the paper, and not tau^2 as of a softmax

    With a = teacher_logits / tau, b = student_logits / tau and p = sigmoid(a), the divergence of one class is
    p (log sigmoid(a) - log sigmoid(b)) + (1 - p) (log sigmoid(-a) - log sigmoid(-b)): exactly 0 for equal
    logits, finite for any, and its gradient sigmoid(b) - p never saturates while the two differ.
    """
    student, teacher = student_logits / tau, teacher_logits.detach() / tau
    yes = teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))
    no = (-teacher).sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    return tau * (yes + no).sum(dim=1).mean()
