"""The numbers of an evaluation by which students can be compared."""

from __future__ import annotations

from typing import NamedTuple


class Metric(NamedTuple):
    """How a metric is read."""

    higher_is_better: bool = True
    scale: float = 100.0
    """As people are shown it: per cent where it is a fraction."""


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
