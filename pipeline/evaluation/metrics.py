"""The numbers of an evaluation by which students can be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Metric(NamedTuple):
    """How a metric is read."""

    higher_is_better: bool | None = True
    """None: neither is."""
    scale: float = 100.0
    """As people are shown it: per cent where it is a fraction."""
    digits: int = 3
    """After the point, of what is no fraction."""


METRICS = {
    "accuracy": Metric(),
    "f1": Metric(),  # of many labels a record, in place of accuracy
    "worst_group_accuracy": Metric(),
    "agreement": Metric(),
    "kl_to_teacher": Metric(higher_is_better=False, scale=1.0),  # nats
    "epg": Metric(),
    "iou": Metric(),
    "map_cosine": Metric(),
}
"""Metrics of forward.evaluate_split; some need groups, regions or a teacher."""

PLAIN = Metric(higher_is_better=None, scale=1.0)
"""A number of which neither more nor less is better."""
MORE = Metric(scale=1.0)
LESS = Metric(higher_is_better=False, scale=1.0)
PER_CENT = Metric()
LESS_PER_CENT = Metric(higher_is_better=False)
COUNT = Metric(scale=1.0, digits=0)


def numbers_of(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Every number of a split's metrics by its name: accuracy, group_accuracy.0, <evaluator>.<quantity>.<layer>."""
    numbers: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            numbers |= numbers_of(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            numbers[prefix + name] = value
    return numbers


def best_position(values: Sequence[float], metric: Metric) -> int:
    """Where the best value is; the first of equal ones."""
    sign = 1 if metric.higher_is_better else -1
    return max(range(len(values)), key=lambda position: sign * values[position])
