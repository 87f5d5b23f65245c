"""KD: soft targets, and the labels."""

from __future__ import annotations

from collections.abc import Iterable

from permafrost.config.methods import KDConfig
from permafrost.core.batches import (
    AnyLabels,
    Targets,
    require_logits,
)
from permafrost.core.errors import require
from permafrost.losses.base import DistillationLoss, Needs, StudentOutput, Term
from permafrost.losses.labels import label_term
from permafrost.losses.logit_distances import LOGIT_LOSSES


class KDLoss(DistillationLoss):
    """Loss lambda_ce * ce + lambda_kd * kd, where the supervised term is bce if records have many labels."""

    config: KDConfig

    @property
    def needs(self) -> Needs:
        return Needs(labels=self.config.lambda_ce > 0, logits=self.config.lambda_kd > 0)

    def check_labels(self, *, many: bool) -> None:
        require(
            not many or self.config.logits == "mld",
            f"method.logits={self.config.logits} assumes one label per record, but records of this store have many "
            "labels; set method.logits=mld",
        )

    def terms(self, student: StudentOutput, targets: Targets, labels: AnyLabels) -> Iterable[Term]:
        yield Term(
            "kd",
            self.config.lambda_kd,
            lambda: LOGIT_LOSSES[self.config.logits](
                student.logits, require_logits(targets.logits), self.config.tau
            ),
        )
        yield label_term(student.logits, labels, self.config.lambda_ce)
