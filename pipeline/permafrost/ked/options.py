"""Options of KED."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from permafrost.config.evaluators import EVALUATORS, EvaluatorOptions


@dataclass(frozen=True, kw_only=True)
class SuperfeaturesOptions(EvaluatorOptions):
    """Agreement with the teacher, superfeature by superfeature (KED)."""

    implementation: ClassVar[str] = "permafrost.ked.superfeature_agreement:EVALUATOR"


def register() -> None:
    """Add the evaluator of KED."""
    EVALUATORS["superfeatures"] = SuperfeaturesOptions
