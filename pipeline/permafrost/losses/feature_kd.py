"""Base of losses on features: a loss-specific term in addition to labels and logits."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import replace
from typing import ClassVar

from torch import Tensor

from permafrost.config.methods import FeatureKDConfig
from permafrost.core.errors import require
from permafrost.core.records import Guidance, Targets
from permafrost.losses.base import DistillationLoss, Needs, StudentOutput, Term
from permafrost.losses.kd import kd_loss
from permafrost.losses.labels import label_term, off_label_bce_loss
from permafrost.models.output import ModelOutput


def pooled_fields(output: ModelOutput) -> dict[str, Tensor]:
    """Field pooled [B, d]: the pooled feature before the classifier."""
    assert output.pooled is not None
    return {"pooled": output.pooled.detach()}


class FeatureKDLoss(DistillationLoss):
    """Loss lambda_ce * labels + lambda_kd * kd + weight * specific term.

    A term with weight 0 is not computed, and its inputs are not requested from the networks. With labels only, this is
    the supervised loss.
    """

    term: ClassVar[str]
    """Name of the specific term."""
    term_needs: ClassVar[Needs]
    """Needs of the specific term."""

    def __init__(self, config: FeatureKDConfig) -> None:
        super().__init__()
        self.config = config

    @property
    @abstractmethod
    def weight(self) -> float:
        """Weight of the specific term."""

    @abstractmethod
    def compare(self, student: StudentOutput, targets: Targets) -> Tensor:
        """Compute the specific term."""

    @property
    def needs(self) -> Needs:
        own = self.term_needs if self.weight > 0 else Needs()
        return replace(own, labels=self.config.lambda_ce > 0)

    def check_labels(self, *, many: bool) -> None:
        require(
            not many or self.config.lambda_kd == 0,
            f"method.lambda_kd={self.config.lambda_kd} compares one distribution over all classes, but records of "
            "this store have many labels; set it to 0, or set method=kd method.logits=mld",
        )

    def terms(
        self, student: StudentOutput, targets: Targets | Guidance | None, labels: Tensor
    ) -> Iterable[Term]:
        assert isinstance(targets, Targets)
        yield from self.logit_terms(student.logits, targets.logits, labels)
        yield Term(self.term, self.weight, lambda: self.compare(student, targets))

    def logit_terms(self, logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Iterable[Term]:
        """Return the terms on labels and logits."""
        config = self.config
        if config.label_loss == "bce_offlabel":
            yield Term("bce", config.lambda_ce, lambda: off_label_bce_loss(logits, labels))
        else:
            yield label_term(logits, labels, config.lambda_ce)
        yield Term("kd", config.lambda_kd, lambda: kd_loss(logits, teacher_logits, config.tau))
