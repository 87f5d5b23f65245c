"""The quantities of all evaluators by which students can be compared, as `numbers_of` names them."""

from __future__ import annotations

from pipeline.config.evaluators import EVALUATORS
from pipeline.evaluation.evaluators.build import evaluator_named
from pipeline.evaluation.metrics import METRICS, Metric


def metric_of(name: str) -> Metric | None:
    """How a metric is read; None where it is not known which value is better.

    name  accuracy, or <evaluator>.<quantity>, or either with the name of a part after it
    """
    if name in METRICS:
        return METRICS[name]
    evaluator, _, quantity = name.partition(".")
    if evaluator not in EVALUATORS:
        return None
    known = comparable_quantities(evaluator)
    return next((m for of, m in known.items() if f"{quantity}.".startswith(f"{of}.")), None)


def comparable_quantities(evaluator: str) -> dict[str, Metric]:
    """The quantities of an evaluator of which more or less is better."""
    page = evaluator_named(evaluator).page
    quantities = () if page is None else page.quantities
    return {q.name: q.metric for q in quantities if q.metric.higher_is_better is not None}


def comparable_metrics() -> list[str]:
    """Every name that `metric_of` knows, without parts."""
    names = [f"{e}.{q}" for e in EVALUATORS for q in comparable_quantities(e)]
    return [*METRICS, *names]


def evaluators_of(name: str) -> tuple[str, ...] | None:
    """The evaluator of a metric, as the option `evaluators` names it; None for those of every evaluation."""
    evaluator = name.partition(".")[0]
    return (evaluator,) if evaluator in EVALUATORS and "." in name else None
