"""Scores of each label where records have many, their means, and the thresholds from which a label is predicted.

Pairs of a record and a class that are unknown count for nothing. A number that is not defined, such as the recall of a
label that no record has, is left out, and out of the mean over labels, too. Average precision and AUROC are those of
scikit-learn. Intervals are of 95 %, of one label each:

- precision, recall: Wilson's score interval; F1 = 2 J / (1 + J) that of J = TP / (TP + FP + FN)
- average precision: Wilson's, of as many trials as there are positives
- AUROC: Newcombe's score interval with the variance of Hanley and McNeil (Statistics in Medicine 25, 2006, method 5)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import brentq
from torch import Tensor

Scores = dict[str, float]
"""Numbers by name."""
MEASURES = ("f1", "precision", "recall", "average_precision", "auroc")
"""Scores of a label, in the order of tables. The first three depend on the threshold."""


class Thresholds(NamedTuple):
    """Logits from which a class is predicted, of a model and of its teacher: one, or f64 [K] one for each class."""

    model: Tensor | float = 0.0
    teacher: Tensor | float = 0.0


AT_HALF = Thresholds()
"""A probability of 0.5 for all classes."""
_Z = 1.959963984540054


def wilson_interval(share: float, trials: float) -> tuple[float, float]:
    """Compute Wilson's score interval of 95 % of a share.

    Args:
        share: Observed share in [0, 1].
        trials: Number of trials, above 0.
    """
    center = (share + _Z**2 / (2 * trials)) / (1 + _Z**2 / trials)
    half = _Z * math.sqrt(share * (1 - share) / trials + _Z**2 / (4 * trials**2))
    half /= 1 + _Z**2 / trials
    return max(0.0, center - half), min(1.0, center + half)


def auroc_interval(area: float, positives: int, negatives: int) -> tuple[float, float]:
    """Compute the interval of 95 % of an area under the ROC curve: the areas A with (A - area)^2 <= z^2 var(A).

    Args:
        area: Observed area in [0, 1].
        positives: Number of positives, above 0; `negatives` likewise.
    """
    pairs = (positives + negatives) / 2 - 1

    def excess(other: float) -> float:
        spread = 1 + pairs * ((1 - other) / (2 - other) + other / (1 + other))
        variance = other * (1 - other) * spread / (positives * negatives)
        return float((other - area) ** 2 - _Z**2 * variance)

    inside = min(max(area, 1e-9), 1 - 1e-9)
    low = brentq(excess, 0.0, inside) if excess(inside) < 0 < excess(0.0) else 0.0
    high = brentq(excess, inside, 1.0) if excess(inside) < 0 < excess(1.0) else 1.0
    return float(low), float(high)


def binary_scores(logits: Tensor, truth: Tensor, predicted: Tensor) -> Scores:
    """Compute the defined scores of MEASURES of binary predictions, each as a fraction in [0, 1].

    Args:
        logits: f32 [n].
        truth: Bool [n].
        predicted: Bool [n].
    """
    hits, named, there = (int(mask.sum()) for mask in (predicted & truth, predicted, truth))
    shares = {"f1": (2 * hits, named + there), "precision": (hits, named), "recall": (hits, there)}
    scores = {name: part / total for name, (part, total) in shares.items() if total}
    if 0 < there < len(truth):
        scores["average_precision"], scores["auroc"] = _ranking_scores(logits, truth)
    elif there:
        scores["average_precision"] = 1.0
    return scores


def _ranking_scores(logits: Tensor, truth: Tensor) -> tuple[float, float]:
    """Compute average precision and the area under the ROC curve, both over all distinct thresholds.

    Records of equal logits enter together, so their order has no effect.

    Args:
        logits: f32 [n].
        truth: Bool [n] with both values.
    """
    _, place = torch.unique(-logits.double(), return_inverse=True)  # the largest logit first
    named = torch.bincount(place).cumsum(0).double()
    hits = torch.bincount(place, weights=truth.double()).cumsum(0)
    recall, alarms = hits / hits[-1], (named - hits) / (named[-1] - hits[-1])
    steps = recall.diff(prepend=recall.new_zeros(1))
    area = torch.trapezoid(*(F.pad(values, (1, 0)) for values in (recall, alarms)))
    return float((steps * hits / named).sum()), float(area)


def with_intervals(scores: Scores, truth: Tensor, predicted: Tensor) -> Scores:
    """Return scores each followed by the ends of its interval, <score>_low and <score>_high.

    Args:
        scores: Result of `binary_scores`.
        truth: As there.
        predicted: As there.
    """
    named, there = int(predicted.sum()), int(truth.sum())
    union = int((predicted | truth).sum())
    intervals: dict[str, Callable[[float], tuple[float, float]]] = {
        "f1": lambda score: _f1_interval(score, union),
        "precision": lambda score: wilson_interval(score, named),
        "recall": lambda score: wilson_interval(score, there),
        "average_precision": lambda score: wilson_interval(score, there),
        "auroc": lambda score: auroc_interval(score, there, len(truth) - there),
    }
    complete: Scores = {}
    for name, score in scores.items():
        low, high = intervals[name](score)
        complete |= {name: score, f"{name}_low": low, f"{name}_high": high}
    return complete


def _f1_interval(score: float, trials: int) -> tuple[float, float]:
    low, high = wilson_interval(score / (2 - score), trials)
    return 2 * low / (1 + low), 2 * high / (1 + high)


def many_label_scores(logits: Tensor, labels: Tensor, threshold: Tensor | float = 0.0) -> Scores:
    """Compute the scores over all known pairs of record and class, and their means over labels.

    Args:
        logits: f32 [N, K].
        labels: f32 [N, K], NaN where unknown.
        threshold: Logit from which a label is predicted, or [K] one for each label.

    Returns:
        Scores in [0, 1]: `f1` and micro_<score> over all pairs, macro_<score> the mean over the labels of which the
        score is defined.
    """
    known, predicted = ~labels.isnan(), logits >= threshold
    micro = binary_scores(logits[known], labels[known] > 0, predicted[known])
    each = [
        binary_scores(logits[rows, label], labels[rows, label] > 0, predicted[rows, label])
        for label, rows in enumerate(known.T)
    ]
    means = {
        f"macro_{name}": fmean(scores[name] for scores in each if name in scores)
        for name in MEASURES
        if any(name in scores for scores in each)
    }
    first = {"f1": micro["f1"]} if "f1" in micro else {}
    return first | {f"micro_{name}": micro[name] for name in MEASURES[1:] if name in micro} | means


def label_table(
    logits: Tensor, labels: Tensor, thresholds: Thresholds, classes: Sequence[str]
) -> dict[str, Scores]:
    """Compute counts, threshold and scores of each label.

    Args:
        logits: f32 [N, K].
        labels: f32 [N, K], NaN where unknown.
        thresholds: Those of the model, and of its teacher, which are only listed.
        classes: Names of the K classes.

    Returns:
        By class `positives`, `negatives`, `unknown` (numbers of records), `threshold` (a probability),
        `threshold_logit`, `teacher_threshold_logit`, and the scores with their intervals.
    """
    of_model, of_teacher = (
        torch.as_tensor(logit, dtype=torch.float64).expand(logits.shape[1]) for logit in thresholds
    )
    table = {}
    for label, name in enumerate(classes):
        known = ~labels[:, label].isnan()
        truth, values = labels[known, label] > 0, logits[known, label]
        predicted = values >= of_model[label]
        table[name] = {
            "positives": int(truth.sum()),
            "negatives": int((~truth).sum()),
            "unknown": int((~known).sum()),
            "threshold": float(of_model[label].sigmoid()),
            "threshold_logit": float(of_model[label]),
            "teacher_threshold_logit": float(of_teacher[label]),
            **with_intervals(binary_scores(values, truth, predicted), truth, predicted),
        }
    return table


def best_thresholds(logits: Tensor, labels: Tensor) -> Tensor:
    """Choose the logit of each label from which on predictions have the highest F1: f64 [K].

    It is half way between two observed logits, the middle pair of equally good ones. A label of which all known records
    are alike has 0, a probability of 0.5.

    Args:
        logits: f32 [N, K].
        labels: f32 [N, K], NaN where unknown.
    """
    chosen = torch.zeros(logits.shape[1], dtype=torch.float64)
    for label in range(len(chosen)):
        known = ~labels[:, label].isnan()
        truth = (labels[known, label] > 0).numpy()
        if 0 < truth.sum() < len(truth):
            chosen[label] = _best_threshold(logits[known, label].double().numpy(), truth)
    return chosen


def _best_threshold(logits: NDArray[np.float64], truth: NDArray[np.bool_]) -> float:
    values, groups = np.unique(logits, return_inverse=True)
    positives = np.bincount(groups, weights=truth)[::-1].cumsum()[::-1]  # at or above each value
    scores = 2 * positives / (np.bincount(groups)[::-1].cumsum()[::-1] + truth.sum())
    best = np.flatnonzero(scores == scores.max())
    place = int(best[len(best) // 2])
    below = values[place - 1] if place else values[place] - 1
    return float((below + values[place]) / 2)
