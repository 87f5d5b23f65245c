"""Evaluators by name, each imported when it is first used."""

from __future__ import annotations

from pipeline.config.evaluators import EVALUATORS
from pipeline.config.options import resolve_implementation
from pipeline.evaluation.evaluators.evaluator import Evaluator


def evaluator_named(name: str) -> Evaluator:
    """Return the evaluator of that name in config.evaluators.EVALUATORS."""
    evaluator: Evaluator = resolve_implementation(EVALUATORS[name])
    return evaluator
