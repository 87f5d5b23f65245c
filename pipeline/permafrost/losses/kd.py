"""Soft targets: the divergence of student and teacher over classes (KD), or of each class (MLD)."""

from __future__ import annotations

from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor

from permafrost.config.methods import KDConfig
from permafrost.core.errors import require
from permafrost.core.records import Guidance, Targets
from permafrost.losses.base import DistillationLoss, Needs, StudentOutput, Term
from permafrost.losses.labels import label_term


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


# ---- kd --------------------------------------------------------------------------------------------


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, tau: float) -> Tensor:
    """Compute tau^2 * KL(teacher || student), summed over classes and averaged over the batch.

    student_logits  [B, K]  gradients flow here
    teacher_logits  [B, K]  constant, raw
    tau             temperature > 0; the factor tau^2 makes the gradient's scale independent of it

    The paper uses the cross-entropy, which differs by tau^2 * entropy(teacher) and has the same gradient. This form
    is exactly 0 for equal logits.

    >>> import torch
    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> kd_loss(logits, logits, tau=4.0).item(), kd_loss(logits, -logits, tau=4.0).item() > 0
    (0.0, True)
    """
    student_log_probs = F.log_softmax(student_logits / tau, dim=1)
    teacher_log_probs = F.log_softmax(teacher_logits.detach() / tau, dim=1)
    kl = F.kl_div(student_log_probs, teacher_log_probs, reduction="batchmean", log_target=True)
    return tau**2 * kl


def softmax_mse_loss(student_logits: Tensor, teacher_logits: Tensor, tau: float) -> Tensor:
    """Compute tau^2 * mean squared difference of the softened probabilities, over records and classes.

    student_logits  [B, K]  gradients flow here
    teacher_logits  [B, K]  constant, raw
    tau             temperature > 0

    This is the logit term of UniCAM's released code. Near uniform probabilities, as at tau = 20, its gradient is about
    K^2 / 2 times smaller than that of `kd_loss` for K classes.
    """
    student = F.softmax(student_logits / tau, dim=1)
    teacher = F.softmax(teacher_logits.detach() / tau, dim=1)
    return tau**2 * F.mse_loss(student, teacher)


LOGIT_LOSSES = {"softmax": kd_loss, "softmax_mse": softmax_mse_loss, "mld": mld_loss}
"""Losses selected by `method.logits`: (student, teacher, tau) -> the term kd."""


class KDLoss(DistillationLoss):
    """Loss lambda_ce * ce + lambda_kd * kd, where the supervised term is bce if records have many labels."""

    def __init__(self, config: KDConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def needs(self) -> Needs:
        return Needs(labels=self.config.lambda_ce > 0)

    def check_labels(self, *, many: bool) -> None:
        require(
            not many or self.config.logits == "mld",
            f"method.logits={self.config.logits} assumes one label per record, but records of this store have many "
            "labels; set method.logits=mld",
        )

    def terms(
        self, student: StudentOutput, targets: Targets | Guidance | None, labels: Tensor
    ) -> Iterable[Term]:
        assert isinstance(targets, Targets)
        config, logit_loss = self.config, LOGIT_LOSSES[self.config.logits]
        taught = targets.logits
        yield Term("kd", config.lambda_kd, lambda: logit_loss(student.logits, taught, config.tau))
        yield label_term(student.logits, labels, config.lambda_ce)
