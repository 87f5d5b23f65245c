"""The metrics of an evaluation by which students can be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Metric(NamedTuple):
    """Direction and display format of a metric."""

    higher_is_better: bool | None = True
    """Direction of improvement, None if neither higher nor lower is better."""
    scale: float = 100.0
    """Factor for display: 100 shows a fraction in per cent."""
    digits: int = 3
    """Decimal places of a metric that is not a fraction."""


METRICS = {
    "accuracy": Metric(),
    "f1": Metric(),  # replaces accuracy if records have many labels
    "worst_group_accuracy": Metric(),
    "agreement": Metric(),
    "kl_to_teacher": Metric(higher_is_better=False, scale=1.0),  # nats
    "epg": Metric(),
    "iou": Metric(),
    "map_cosine": Metric(),
}
"""Metrics of forward.evaluate_split. Some need groups, regions or a teacher."""

PLAIN = Metric(higher_is_better=None, scale=1.0)
"""A metric for which neither higher nor lower is better."""
MORE = Metric(scale=1.0)
LESS = Metric(higher_is_better=False, scale=1.0)
PER_CENT = Metric()
LESS_PER_CENT = Metric(higher_is_better=False)
COUNT = Metric(scale=1.0, digits=0)


def numbers_of(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Flatten a split's metrics to numbers by name: accuracy, group_accuracy.0, <evaluator>.<quantity>.<layer>."""
    numbers: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            numbers |= numbers_of(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            numbers[prefix + name] = value
    return numbers


def best_position(values: Sequence[float], metric: Metric) -> int:
    """Position of the best value, the first of equal ones."""
    sign = 1 if metric.higher_is_better else -1
    return max(range(len(values)), key=lambda position: sign * values[position])
