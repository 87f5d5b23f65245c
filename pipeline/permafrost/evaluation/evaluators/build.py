"""Evaluators by name, each imported when it is first used."""

from __future__ import annotations

from permafrost.config.evaluators import EVALUATORS
from permafrost.config.options import resolve_implementation
from permafrost.evaluation.evaluators.evaluator import Evaluator


def evaluator_named(name: str) -> Evaluator:
    """Return the evaluator of that name in config.evaluators.EVALUATORS."""
    evaluator: Evaluator = resolve_implementation(EVALUATORS[name])
    return evaluator
