"""Accuracy, overall and by group, and agreement with the teacher."""

from __future__ import annotations

from typing import Any

from pipeline.evaluation.context import EvaluationContext
from pipeline.evaluation.evaluators.evaluator import Evaluator
from pipeline.evaluation.predictions import label_metrics


def _accuracy(context: EvaluationContext) -> dict[str, Any]:
    return label_metrics(context.predictions, context.options.group_sets)


EVALUATOR = Evaluator(_accuracy)
