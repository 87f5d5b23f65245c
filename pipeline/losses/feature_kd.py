"""What losses that look inside the networks have in common: the labels and the logits beside their own term."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from pipeline.config.methods import FeatureKDConfig
from pipeline.core.errors import require
from pipeline.core.records import Targets
from pipeline.losses.base import DistillationLoss, LossTerms, StudentOutput
from pipeline.losses.kd import kd_loss
from pipeline.losses.labels import label_term, off_label_bce_loss
from pipeline.models.output import NOTHING, Inner


class FeatureKDLoss(DistillationLoss):
    """lambda_ce * labels + lambda_kd * kd + the weight of the own term * that term.

    A term of weight 0 is not computed, and nothing is asked of the networks for it: with the labels alone this
    is the supervised loss.
    """

    term: ClassVar[str]
    """Its name, in the log and as the fields of `Targets.extra` that it reads."""
    reads: ClassVar[str] = ""
    """The fields of `Targets.extra`, where they are not named like the term."""
    compares: ClassVar[Inner]
    """What it asks of both networks."""

    def __init__(self, config: FeatureKDConfig) -> None:
        super().__init__()
        self.config = config

    @property
    @abstractmethod
    def weight(self) -> float:
        """Of the own term."""

    @abstractmethod
    def compare(self, student: StudentOutput, targets: Targets) -> Tensor:
        """The own term."""

    @property
    def needs_labels(self) -> bool:
        return self.config.lambda_ce > 0

    def check_labels(self, *, many: bool) -> None:
        require(
            not many or self.config.lambda_kd == 0,
            f"method.lambda_kd={self.config.lambda_kd} compares one distribution over all classes, and a record of "
            "this store has many labels; set it to 0, or take method=kd method.logits=mld",
        )

    @property
    def inner(self) -> Inner:
        return self.compares if self.weight > 0 else NOTHING

    @property
    def extra(self) -> str | None:
        return (self.reads or self.term) if self.weight > 0 else None

    def forward(self, student: StudentOutput, targets: Targets | None, labels: Tensor) -> LossTerms:
        assert targets is not None
        terms, weighted = self._labels_and_logits(student.logits, targets.logits, labels)
        if self.weight > 0:
            terms[self.term] = self.compare(student, targets)
            weighted.append(self.weight * terms[self.term])
        return LossTerms(total=torch.stack(weighted).sum(), terms=terms)

    def _labels_and_logits(
        self, logits: Tensor, teacher_logits: Tensor, labels: Tensor
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """The terms beside the own one, and each times its weight."""
        config = self.config
        terms: dict[str, Tensor] = {}
        weighted = []
        if config.lambda_ce > 0:
            name, supervised = label_term(logits, labels)
            if config.label_loss == "bce_offlabel":
                name, supervised = "bce", off_label_bce_loss(logits, labels)
            terms[name] = supervised
            weighted.append(config.lambda_ce * supervised)
        if config.lambda_kd > 0:
            terms["kd"] = kd_loss(logits, teacher_logits, config.tau)
            weighted.append(config.lambda_kd * terms["kd"])
        if not weighted:
            weighted.append(0 * logits.sum())  # ranks wait for a gradient of every parameter
        return terms, weighted
