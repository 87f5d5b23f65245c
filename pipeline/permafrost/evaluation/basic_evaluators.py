"""The evaluators `accuracy` and `localization`, which read the predictions of one forward pass."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from permafrost.config.evaluation import EVALUATORS
from permafrost.core.errors import ConfigError
from permafrost.evaluation.evaluator import EvaluationContext, Evaluator, evaluator_named
from permafrost.evaluation.forward import label_metrics, localization_metrics
from permafrost.evaluation.scores import METRICS, Metric


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


# ---- accuracy --------------------------------------------------------------------------------------


def _accuracy(context: EvaluationContext) -> dict[str, Any]:
    return label_metrics(context.predictions, context.options.group_sets)


ACCURACY = Evaluator(_accuracy)


# ---- localization ----------------------------------------------------------------------------------


logger = logging.getLogger("permafrost.evaluate")


def _localization(context: EvaluationContext) -> dict[str, Any]:
    return localization_metrics(context.predictions)


def _check_localization(context: EvaluationContext) -> Mapping[str, str]:
    if context.has_regions or context.has_maps:
        return {}
    needs = (
        f"{context.split} has no {context.options.region} and no teacher maps to compare with; localization needs "
        "boxes or masks from the data (evaluate.region), or a pass with annotate.payloads=[logits,map]"
    )
    if context.config.evaluators is not None:
        raise ConfigError(f"evaluators={','.join(context.config.evaluators)}, but {needs}")
    logger.info("%s", needs)
    return {}


LOCALIZATION = Evaluator(_localization, _check_localization)
