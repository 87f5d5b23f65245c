"""Evaluation results per record, and the metrics computed from them.

Shape letters: n records, K classes, E classes of the record that has most, P classes explained by the teacher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from permafrost.evaluation.agreement import label_scores, majority_share, teacher_scores


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Results of the evaluated records, all tensors on the CPU."""

    keys: tuple[str, ...]
    logits: Tensor
    """Logits [n, K]."""
    labels: Tensor
    groups: Tensor
    epg: Tensor
    """EPG [n, E] of the record's own classes (labels.classes_of), nan where it has no such class or no region."""
    iou: Tensor
    """IoU, in the same form as `epg`."""
    epg_uniform: Tensor
    """EPG of a uniform map (localization.uniform_score), in the same form as `epg`."""
    teacher_logits: Tensor | None = None
    explained_class: Tensor | None = None
    """Explained classes i64 [n, P], padded with NO_CLASS. This and the fields below are None without stored maps."""
    teacher_epg: Tensor | None = None
    """EPG [n, P] of the stored maps, nan where undefined and without a region. If a record has one label, it is defined
    for the first map, independent of the class that the map explains. If it has many, it is defined for each map that
    explains one of them."""
    map_cosine: Tensor | None = None
    """Cosine [n, P] of the network's maps with the stored maps of the same class, nan where invalid. None if the two
    are not comparable."""


def join(parts: Sequence[Predictions]) -> Predictions:
    """Concatenate the results of all batches."""
    return Predictions(
        keys=tuple(key for part in parts for key in part.keys),
        logits=torch.cat([part.logits for part in parts]),
        labels=torch.cat([part.labels for part in parts]),
        groups=torch.cat([part.groups for part in parts]),
        epg=_padded([part.epg for part in parts]),
        iou=_padded([part.iou for part in parts]),
        epg_uniform=_padded([part.epg_uniform for part in parts]),
        teacher_logits=_all([part.teacher_logits for part in parts]),
        explained_class=_all([part.explained_class for part in parts]),
        teacher_epg=_all([part.teacher_epg for part in parts]),
        map_cosine=_all([part.map_cosine for part in parts]),
    )


def metrics_of(
    predictions: Predictions, group_sets: Mapping[str, Sequence[int]] = MappingProxyType({})
) -> dict[str, Any]:
    """Combine `label_metrics` and `localization_metrics` with the number of records."""
    return {
        "records": len(predictions.keys),
        **label_metrics(predictions, group_sets),
        **localization_metrics(predictions),
    }


def label_metrics(
    predictions: Predictions, group_sets: Mapping[str, Sequence[int]] = MappingProxyType({})
) -> dict[str, Any]:
    """Accuracy and agreement with the teacher, as means over the records, fractions in [0, 1].

    majority_accuracy is that of predicting the most frequent label for every record: the chance level of accuracy.

    group_sets  as in EvaluateOptions
    """
    logits, labels, groups = predictions.logits, predictions.labels, predictions.groups
    metrics = label_scores(logits, labels, groups, group_sets)
    if (majority := majority_share(labels)) is not None:
        metrics["majority_accuracy"] = majority
    if predictions.teacher_logits is not None:
        metrics |= teacher_scores(logits, predictions.teacher_logits, labels, groups, group_sets)
    return metrics


def localization_metrics(predictions: Predictions) -> dict[str, Any]:
    """EPG, IoU and map cosine, as means over all defined entries, fractions in [0, 1].

    epg_uniform is the EPG (and IoU) of a uniform map on the same regions: the chance level of both.
    """
    metrics: dict[str, Any] = {}
    places = {
        "epg": predictions.epg,
        "iou": predictions.iou,
        "epg_uniform": predictions.epg_uniform,
        "teacher_epg": predictions.teacher_epg,
    }
    for name, values in places.items():
        if values is not None and not values.isnan().all():
            metrics[name] = float(values.double().nanmean())
    if predictions.map_cosine is not None and predictions.explained_class is not None:
        cosines = predictions.map_cosine[predictions.explained_class >= 0].double()
        metrics["map_cosine"] = float(cosines.nanmean())
        metrics["valid_map_fraction"] = float((~cosines.isnan()).double().mean())
    return metrics


def _all(parts: Sequence[Tensor | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else None


def _padded(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate parts with different numbers of columns into [n, E], padded with nan."""
    most = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (0, most - part.shape[1]), value=float("nan")) for part in parts])
