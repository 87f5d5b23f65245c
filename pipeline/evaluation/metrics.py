"""The numbers of an evaluation by which students can be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_args

from pipeline.config.judging import JudgeName


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

_PLAIN = Metric(scale=1.0)
_LESS = Metric(higher_is_better=False, scale=1.0)
JUDGE_METRICS: dict[str, Metric] = {
    "superfeatures.kl": _LESS,  # nats
    "superfeatures.agreement": Metric(),
    "distance_correlation.fss": _PLAIN,
    "distance_correlation.relevance": _PLAIN,
    "distance_correlation.rs.teacher_given_student": _LESS,  # what the student left
    "distance_correlation.rs.student_given_baseline": _PLAIN,
    "gradient_alignment.mask_energy": _PLAIN,  # a share of energy above that of area
    "gradient_alignment.margin_alignment": _PLAIN,
    "gradient_alignment.map_cosine": _PLAIN,
    "class_similarity.spearman": _PLAIN,
    "dissection.detectors": Metric(scale=1.0, digits=0),
    "dissection.unique_concepts": Metric(scale=1.0, digits=0),
    "dissection.mean_iou": Metric(),
    "diffroar.difference": _PLAIN,
    "diffroar.mean": _PLAIN,
    "five_band.accuracy": Metric(),
    "five_band.recall": Metric(),
    "five_band.precision": Metric(),
    "five_band.fpr": Metric(higher_is_better=False),
}
"""Of judges whose metrics lie below their name: <judge>.<quantity>, which may have a value a layer below it."""


def metric_of(name: str) -> Metric | None:
    """How a metric is read that is named as in `numbers_of`; None where it is not known which is better."""
    if name in METRICS:
        return METRICS[name]
    found = [
        metric for of, metric in JUDGE_METRICS.items() if name == of or name.startswith(f"{of}.")
    ]
    return found[0] if found else None


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


def best_position(values: Sequence[float], metric: Metric) -> int:
    """Where the best value is; the first of equal ones."""
    sign = 1 if metric.higher_is_better else -1
    return max(range(len(values)), key=lambda position: sign * values[position])
