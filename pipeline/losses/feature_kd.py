"""What losses on features have in common: the labels and the logits beside a term of their own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import replace
from typing import ClassVar

from torch import Tensor

from pipeline.config.methods import FeatureKDConfig
from pipeline.core.errors import require
from pipeline.core.records import Guidance, Targets
from pipeline.losses.base import DistillationLoss, Needs, StudentOutput, Term
from pipeline.losses.kd import kd_loss
from pipeline.losses.labels import label_term, off_label_bce_loss
from pipeline.models.output import ModelOutput


def pooled_fields(output: ModelOutput) -> dict[str, Tensor]:
    """feature [B, d]: the pooled feature before the classifier."""
    assert output.pooled is not None
    return {"pooled": output.pooled.detach()}


class FeatureKDLoss(DistillationLoss):
    """lambda_ce * labels + lambda_kd * kd + the weight of the own term * that term.

    A term of weight 0 is not computed, and nothing is asked of the networks for it: with the labels alone this
    is the supervised loss.
    """

    term: ClassVar[str]
    """The own term's name."""
    term_needs: ClassVar[Needs]
    """What the own term reads."""

    def __init__(self, config: FeatureKDConfig) -> None:
        super().__init__()
        self.config = config

    @property
    @abstractmethod
    def weight(self) -> float:
        """The own term's weight."""

    @abstractmethod
    def compare(self, student: StudentOutput, targets: Targets) -> Tensor:
        """The own term."""

    @property
    def needs(self) -> Needs:
        own = self.term_needs if self.weight > 0 else Needs()
        return replace(own, labels=self.config.lambda_ce > 0)

    def check_labels(self, *, many: bool) -> None:
        require(
            not many or self.config.lambda_kd == 0,
            f"method.lambda_kd={self.config.lambda_kd} compares one distribution over all classes, and a record of "
            "this store has many labels; set it to 0, or take method=kd method.logits=mld",
        )

    def terms(
        self, student: StudentOutput, targets: Targets | Guidance | None, labels: Tensor
    ) -> Iterable[Term]:
        assert isinstance(targets, Targets)
        yield from self.logit_terms(student.logits, targets.logits, labels)
        yield Term(self.term, self.weight, lambda: self.compare(student, targets))

    def logit_terms(self, logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Iterable[Term]:
        """The terms beside the own one."""
        config = self.config
        if config.label_loss == "bce_offlabel":
            yield Term("bce", config.lambda_ce, lambda: off_label_bce_loss(logits, labels))
        else:
            yield label_term(logits, labels, config.lambda_ce)
        yield Term("kd", config.lambda_kd, lambda: kd_loss(logits, teacher_logits, config.tau))
