"""DKD: the divergence of the softened predictions in two parts, of the label's class and of the other classes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from permafrost.config.methods import DKDConfig
from permafrost.core.batches import AnyLabels, MixedLabels, Targets, require_all_logits
from permafrost.core.errors import ConfigError, require
from permafrost.core.label_forms import known_mask
from permafrost.losses.base import DistillationLoss, Needs, StudentOutput, Term
from permafrost.losses.labels import label_term
from permafrost.losses.logit_distances import divergence
from permafrost.models.classifier import to_float32


def split_divergence(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, tau: float
) -> tuple[Tensor, Tensor]:
    """Compute the two parts of KL(teacher || student) of each record, TCKD and NCKD (Zhao et al. 2022, eq. 5).

    With p the teacher's probability of the label, KL(teacher || student) = TCKD + (1 - p) NCKD (eq. 7).

    Args:
        student_logits: [B, K]. Gradients flow here.
        teacher_logits: [B, K], constant.
        labels: i64 [B], a class of each record.
        tau: Temperature > 0.

    Returns:
        TCKD [B], the divergence of "the label or not", and NCKD [B], that of the classes besides the label.
    """
    label = labels[:, None]
    places = torch.arange(student_logits.shape[1] - 1, device=labels.device)
    other_classes = places + (places >= label)  # [B, K - 1]

    def parts(logits: Tensor) -> tuple[Tensor, Tensor]:
        wide = to_float32(logits)
        others = wide.gather(1, other_classes)
        rest = tau * torch.logsumexp(others / tau, dim=1, keepdim=True)
        return torch.cat((wide.gather(1, label), rest), dim=1), others

    either, others = zip(parts(student_logits), parts(teacher_logits.detach()), strict=True)
    return divergence(*either, tau), divergence(*others, tau)


class DKDLoss(DistillationLoss):
    """Loss lambda_ce * ce + lambda_target * target + lambda_others * others (Zhao et al. 2022, eq. 8).

    The terms are tau^2 times TCKD and NCKD, averaged over the records whose label is known.
    """

    config: DKDConfig

    @property
    def needs(self) -> Needs:
        return Needs(labels=True)

    def check_labels(self, *, many: bool) -> None:
        require(
            not many,
            "method=dkd divides the classes by the one label of a record, but records of this store have many labels; "
            "set method=kd method.logits=mld",
        )

    def terms(self, student: StudentOutput, targets: Targets, labels: AnyLabels) -> Iterable[Term]:
        if isinstance(labels, MixedLabels):
            raise ConfigError("method=dkd needs one label per record; set augment.mix=[]")
        teacher = require_all_logits(targets.logits, "method=dkd")
        known, tau = known_mask(labels), self.config.tau
        parts = split_divergence(student.logits, teacher, labels.clamp(min=0), tau)

        def mean(part: Tensor) -> Tensor:
            return tau**2 * torch.where(known, part, 0.0).sum() / known.sum().clamp(min=1)

        yield Term("target", self.config.lambda_target, lambda: mean(parts[0]))
        yield Term("others", self.config.lambda_others, lambda: mean(parts[1]))
        yield label_term(student.logits, labels, self.config.lambda_ce)
