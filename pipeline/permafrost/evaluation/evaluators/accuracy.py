"""Accuracy, overall and by group, and agreement with the teacher."""

from __future__ import annotations

from typing import Any

from permafrost.evaluation.context import EvaluationContext
from permafrost.evaluation.evaluators.evaluator import Evaluator
from permafrost.evaluation.predictions import label_metrics


def _accuracy(context: EvaluationContext) -> dict[str, Any]:
    return label_metrics(context.predictions, context.options.group_sets)


EVALUATOR = Evaluator(_accuracy)
