"""The numbers of an evaluation by which students can be compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

from pipeline.config import JudgeName


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
"""Of judge.judge_split; some need groups, regions or a teacher."""

JUDGE_METRICS: dict[str, Metric] = {
    "superfeatures.kl": Metric(higher_is_better=False, scale=1.0),  # nats
    "superfeatures.agreement": Metric(),
    "gradient_alignment.mask_energy": Metric(scale=1.0),  # a share of energy above that of area
    "gradient_alignment.margin_alignment": Metric(scale=1.0),
    "gradient_alignment.map_cosine": Metric(scale=1.0),
    "class_similarity.spearman": Metric(scale=1.0),
    "five_band.accuracy": Metric(),
    "five_band.recall": Metric(),
    "five_band.precision": Metric(),
    "five_band.fpr": Metric(higher_is_better=False),
}
"""Of judges whose metrics lie below their name: <judge>.<quantity>, which may have a name for each layer or pair
below it."""


def metric_of(name: str) -> Metric | None:
    """How a metric is read that is named as in `numbers_of`; None where it is not known which is better."""
    quantity = ".".join(name.split(".")[:2])
    return METRICS.get(name) or JUDGE_METRICS.get(quantity)


def judges_of(name: str) -> tuple[JudgeName, ...] | None:
    """The judge that finds a metric, as the option `judges` names it; null for those of every evaluation."""
    found = [judge for judge in get_args(JudgeName) if name.startswith(f"{judge}.")]
    return tuple(found) or None


def numbers_of(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Every number of a split's metrics by its name: accuracy, group_accuracy.0, <judge>.<quantity>.<layer>."""
    numbers: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            numbers |= numbers_of(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            numbers[prefix + name] = value
    return numbers
