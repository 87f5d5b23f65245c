"""Quantities of all evaluators by which students can be compared, with the names that `numbers_of` produces."""

from __future__ import annotations

from permafrost.config.evaluators import EVALUATORS
from permafrost.evaluation.evaluators.build import evaluator_named
from permafrost.evaluation.metrics import METRICS, Metric


def metric_of(name: str) -> Metric | None:
    """Return the Metric of a name, or None if neither direction is better.

    name  accuracy, or <evaluator>.<quantity>, or either followed by the name of a part, and by @<pass> if it is of an
          evaluation against a named pass
    """
    name = name.partition("@")[0]
    if name in METRICS:
        return METRICS[name]
    evaluator, _, quantity = name.partition(".")
    if evaluator not in EVALUATORS:
        return None
    known = comparable_quantities(evaluator)
    return next((m for of, m in known.items() if f"{quantity}.".startswith(f"{of}.")), None)


def comparable_quantities(evaluator: str) -> dict[str, Metric]:
    """Quantities of an evaluator for which higher or lower is better."""
    page = evaluator_named(evaluator).page
    quantities = () if page is None else page.quantities
    return {q.name: q.metric for q in quantities if q.metric.higher_is_better is not None}


def comparable_metrics() -> list[str]:
    """All names that `metric_of` accepts, without parts."""
    names = [f"{e}.{q}" for e in EVALUATORS for q in comparable_quantities(e)]
    return [*METRICS, *names]


def evaluators_of(name: str) -> tuple[str, ...] | None:
    """Evaluator of a metric, as a value of the option `evaluators`, or None for a metric of every evaluation."""
    evaluator = name.partition(".")[0]
    return (evaluator,) if evaluator in EVALUATORS and "." in name else None
