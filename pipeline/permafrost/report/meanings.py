"""Sentences that say what the columns of the main table are, with their chance levels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from permafrost.config.evaluators import EVALUATORS
from permafrost.evaluation.evaluators.build import evaluator_named
from permafrost.report.columns import CHANCE, Column

_MEANINGS = {
    "accuracy": "Accuracy is the share of records whose label is predicted",
    "f1": "F1 is the harmonic mean of precision and recall over all pairs of a record and a class",
    "worst_group_accuracy": "Worst-group accuracy is the accuracy in the group where it is lowest",
    "agreement": "Agreement is the share of records for which student and teacher predict the same",
    "kl_to_teacher": "KL is the divergence of the predicted probabilities from the teacher's, in nats",
    "epg": "EPG is the share of a map's positive energy inside the object's region",
    "iou": "IoU is the overlap of the object's region with the part of a map above a threshold, over their union",
    "map_cosine": "Map cosine is the cosine of a student's map with the teacher's map of the same class",
}
_CONSTANT = {
    "accuracy": "always predicting the most frequent class",
    "epg": "a uniform map",
    "iou": "a uniform map",
}
"""Prediction or map that has the chance level."""
_NO_LIMIT = (
    "That is the share of the frame that the regions cover, as all of a uniform map is above any threshold; a map that "
    "marks a part of a large object has less, which is not worse than chance."
)


def meanings(columns: Sequence[Column], chance: Mapping[str, float]) -> list[str]:
    """Write one sentence for each metric of the columns.

    chance  level of each column that has one
    """
    by_metric: dict[str, list[Column]] = {}
    for column in columns:
        metric = column.source.partition(".")[2].partition("@")[0]
        by_metric.setdefault(metric, []).append(column)
    return [
        sentence
        for metric, same in by_metric.items()
        if (sentence := _sentence(metric, same, chance))
    ]


def _sentence(metric: str, columns: Sequence[Column], chance: Mapping[str, float]) -> str:
    if metric not in _MEANINGS:
        return _of_evaluator(metric, columns[0])
    levels = dict.fromkeys(columns[0].value(chance[c.name]) for c in columns if c.name in chance)
    if metric not in CHANCE or not levels:
        return f"{_MEANINGS[metric]}."
    sentence = f"{_MEANINGS[metric]}; {_CONSTANT[metric]} would have {' or '.join(levels)}."
    return f"{sentence} {_NO_LIMIT}" if metric == "iou" else sentence


def _of_evaluator(metric: str, column: Column) -> str:
    """Return the sentence of an evaluator's quantity, empty if it has none."""
    evaluator, _, name = metric.partition(".")
    page = evaluator_named(evaluator).page if evaluator in EVALUATORS else None
    for quantity in page.quantities if page else ():
        if f"{name}.".startswith(f"{quantity.name}."):
            return f"Column {column.name.replace('_', ' ')}: {quantity.meaning}"
    return ""
