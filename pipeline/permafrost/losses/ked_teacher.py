"""Loss of a teacher with superfeatures (KED): labels and the logits of the black box.

It depends only on the sum of the subnets' logits, so each subnet can specialize on its own features.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from permafrost.config.teaching import KEDTeachingConfig
from permafrost.core.records import Guidance, Targets
from permafrost.losses.base import Needs, StudentOutput, Term
from permafrost.losses.kd import kd_loss
from permafrost.losses.labels import LabelsLoss


class ExplainingTeacherLoss(LabelsLoss):
    """Loss ce + lambda_kd * kd, where kd compares with the black box."""

    config: KEDTeachingConfig

    @property
    def needs(self) -> Needs:
        return Needs(labels=True, targets=self.config.lambda_kd > 0)

    def terms(
        self, student: StudentOutput, targets: Targets | Guidance | None, labels: Tensor
    ) -> Iterable[Term]:
        yield from super().terms(student, None, labels)
        if isinstance(targets, Targets):
            taught, config = targets.logits, self.config
            yield Term("kd", config.lambda_kd, lambda: kd_loss(student.logits, taught, config.tau))
