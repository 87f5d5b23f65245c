"""What is minimised: modules from (StudentOutput, Targets, labels) to LossTerms, by method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.config.distilling import MethodConfig
from pipeline.losses.at import ATLoss
from pipeline.losses.base import DistillationLoss
from pipeline.losses.cat_kd import CatKDLoss
from pipeline.losses.crd import CRDLoss
from pipeline.losses.e2kd import E2KDLoss
from pipeline.losses.ft import FTLoss
from pipeline.losses.guided import GuidedLoss
from pipeline.losses.kd import KDLoss
from pipeline.losses.ked import KEDLoss
from pipeline.losses.ked_teacher import ExplainingTeacherLoss
from pipeline.losses.labels import LabelsLoss
from pipeline.losses.review_kd import ReviewKDLoss
from pipeline.losses.sskd import SSKDLoss

LOSSES: dict[str, Callable[[Any], DistillationLoss]] = {
    "labels": LabelsLoss,
    "kd": KDLoss,
    "e2kd": E2KDLoss,
    "at": ATLoss,
    "cat_kd": CatKDLoss,
    "review_kd": ReviewKDLoss,
    "ft": FTLoss,
    "crd": CRDLoss,
    "sskd": SSKDLoss,
    "ked": KEDLoss,
}

TEACHINGS: dict[str, Callable[[Any], DistillationLoss]] = {
    "labels": LabelsLoss,
    "guided": GuidedLoss,
    "ked": ExplainingTeacherLoss,
}
"""How a teacher is trained, by `teaching=`."""


def build_loss(config: MethodConfig) -> DistillationLoss:
    """The loss that `method=` names."""
    return LOSSES[config.kind](config)
