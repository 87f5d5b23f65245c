"""Accuracy, by group too, and agreement with the teacher."""

from __future__ import annotations

from typing import Any

from pipeline.evaluation.context import Trial
from pipeline.evaluation.evaluators.evaluator import Evaluator
from pipeline.evaluation.predictions import label_metrics


def _accuracy(trial: Trial) -> dict[str, Any]:
    return label_metrics(trial.judged, trial.options.group_sets)


EVALUATOR = Evaluator(_accuracy)
