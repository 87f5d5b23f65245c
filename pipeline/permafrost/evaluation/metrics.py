"""Scores of predictions and of maps, and how they are shown: accuracy, agreement, groups, EPG and IoU.

A study compares sets of groups: in Waterbirds the groups on their usual background (in distribution, 0 and 3) and the
others (out of distribution, 1 and 2). The paper does not state whether such a set weights its records or its groups
equally, and groups differ in size, so both are reported.

EPG and IoU use positive attributions only, and compare maps with regions at the input's resolution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from permafrost.core.batches import Logits, TopLogits, require_all_logits, top_class
from permafrost.core.label_forms import has_many, known_mask, predict_labels
from permafrost.core.records import NO_GROUP, NO_LABEL
from permafrost.evaluation.per_label import AT_HALF, Thresholds, many_label_scores
from permafrost.losses.logit_distances import kd_loss, mld_loss
from permafrost.losses.map_distances import MIN_ENERGY


def group_scores(
    name: str, hits: Tensor, groups: Tensor, group_sets: Mapping[str, Sequence[int]]
) -> dict[str, Any]:
    """Compute the fractions of `hits` in [0, 1] by group and by set of groups.

    Groups and sets without a record are left out.

    Args:
        name: Name of the score, such as accuracy.
        hits: Bool [N].
        groups: Group of each record, [N], NO_GROUP where unknown, and lower for bursts, which get no scores.
        group_sets: Groups of each set, by its name.

    Returns:
        `group_<name>`, a mapping from the number of a group to its fraction; `<set>_<name>`, the fraction over all
        records of the set's groups; and `<set>_mean_group_<name>`, the mean of the fractions of the set's groups.
    """
    present = torch.unique(groups[groups > NO_GROUP]).tolist()
    shares = {group: _share(hits[groups == group]) for group in present}
    scores: dict[str, Any] = {
        f"group_{name}": {str(group): share for group, share in shares.items()}
    }
    for set_name, members in group_sets.items():
        if known_groups := [group for group in members if group in shares]:
            inside = torch.isin(groups, torch.tensor(known_groups))
            scores[f"{set_name}_{name}"] = _share(hits[inside])
            scores[f"{set_name}_mean_group_{name}"] = mean(shares[group] for group in known_groups)
    return scores


def class_scores(hits: Tensor, labels: Tensor) -> dict[str, float]:
    """Compute the mean over classes of each class's accuracy, and its 95 % interval over images.

    The interval is that of Price & Bonett (2004) for a combination of C binomials: 2 / C hits and 2 / C misses are
    added to each class's n records, and the variance is sum p (1 - p) / (n C^2) over classes.

    Args:
        hits: Bool [N].
        labels: Label of each record, [N]. Classes without a record are left out.

    Returns:
        `mean_class_accuracy`, and its bounds `mean_class_accuracy_low` and `_high`.
    """
    of_labels = labels.bincount().double()
    right = labels[hits].bincount(minlength=len(of_labels))[of_labels > 0].double()
    counts = of_labels[of_labels > 0]
    number = len(counts)
    share, trials = (right + 2 / number) / (counts + 4 / number), counts + 4 / number
    middle = float(share.mean())
    error = 1.96 * float((share * (1 - share) / trials).sum().sqrt()) / number
    return {
        "mean_class_accuracy": float((right / counts).mean()),
        "mean_class_accuracy_low": max(middle - error, 0.0),
        "mean_class_accuracy_high": min(middle + error, 1.0),
    }


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())


# ---- agreement -------------------------------------------------------------------------------------


def accuracy(logits: Logits, labels: Tensor) -> float:
    """Compute the fraction of labeled records whose highest logit [N, K] is the label [N], nan if none is labeled."""
    return float((top_class(logits) == labels)[labels != NO_LABEL].double().mean())


def top_k_accuracy(logits: Tensor, labels: Tensor, numbers: Sequence[int]) -> dict[str, float]:
    """Compute the fraction of labeled records whose label is among the k highest logits, by k.

    Of equal logits the one of the lower class is first, so that k = 1 is the accuracy.

    Args:
        logits: Logits [n, K].
        labels: Labels i64 [n], NO_LABEL for a record without one.
        numbers: Values of k.
    """
    known = labels != NO_LABEL
    hits = logits[known].argsort(dim=1, descending=True, stable=True) == labels[known, None]
    return {str(k): float(hits[:, :k].any(dim=1).double().mean()) for k in numbers}


def majority_share(labels: Tensor) -> float | None:
    """Compute the fraction of labeled records that have the most frequent label.

    Args:
        labels: Labels in the form of Batch.

    Returns:
        The fraction, None for records with many labels or without any.
    """
    if has_many(labels):
        return None
    counts = labels[labels != NO_LABEL].bincount()
    return int(counts.max()) / int(counts.sum()) if len(counts) else None


def label_scores(
    logits: Tensor,
    labels: Tensor,
    groups: Tensor,
    group_sets: Mapping[str, Sequence[int]] = MappingProxyType({}),
    threshold: Tensor | float = 0.0,
) -> dict[str, Any]:
    """Compute accuracy overall and by group and group set, or `many_label_scores` if a record has many labels.

    Without a known label nothing is computed.

    Args:
        logits: [N, K].
        labels: Labels in the form of Batch, i64 [N] or f32 [N, K].
        groups: Group of each record, [N], NO_GROUP where unknown.
        group_sets: Groups of each set, by its name.
        threshold: As for `predict_labels`.
    """
    if not (counted := known_mask(labels)).any():
        return {}
    if has_many(labels):
        return {**many_label_scores(logits, labels, threshold)}
    right = (logits.argmax(dim=1) == labels)[counted]
    of_groups = group_scores("accuracy", right, groups[counted], group_sets)
    worst = min(of_groups["group_accuracy"].values(), default=None)
    scores = {"accuracy": accuracy(logits, labels)} | class_scores(right, labels[counted])
    scores |= of_groups
    return scores if worst is None else scores | {"worst_group_accuracy": worst}


def teacher_scores(
    student_logits: Tensor,
    teacher_logits: Logits,
    labels: Tensor,
    groups: Tensor,
    group_sets: Mapping[str, Sequence[int]] = MappingProxyType({}),
    thresholds: Thresholds = AT_HALF,
) -> dict[str, Any]:
    """Compute agreement and KL of two networks' logits, agreement also by group, and the teacher's own accuracy.

    The latter is left out without a known label. If records have many labels, it is teacher_f1 and
    teacher_macro_<score> of `many_label_scores`.

    Args:
        student_logits: [N, K].
        teacher_logits: [N, K], or the largest ones.
        labels: Labels in the form of Batch, i64 [N] or f32 [N, K].
        groups: Group of each record, [N], NO_GROUP where unknown.
        group_sets: Groups of each set, by its name.
        thresholds: Those of both networks.

    Raises:
        ConfigError: If records have many labels, and only the largest logits are stored.
    """
    many = has_many(labels)
    scores = {
        "agreement": agreement(student_logits, teacher_logits, many=many, thresholds=thresholds),
        "kl_to_teacher": kl_to_teacher(student_logits, teacher_logits, many=many),
    }
    has_labels = bool(known_mask(labels).any())
    if many:
        every = require_all_logits(teacher_logits, "a record with many labels")
        if not has_labels:
            return scores
        of_teacher = many_label_scores(every, labels, thresholds.teacher)
        chosen = [name for name in of_teacher if not name.startswith("micro_")]
        return scores | {f"teacher_{name}": of_teacher[name] for name in chosen}
    same = student_logits.argmax(dim=1) == top_class(teacher_logits)
    scores |= group_scores("agreement", same, groups, group_sets)
    if has_labels:
        is_labeled = labels != NO_LABEL
        hits = (top_class(teacher_logits) == labels)[is_labeled]
        mean_over_classes = class_scores(hits, labels[is_labeled])["mean_class_accuracy"]
        scores["teacher_accuracy"] = accuracy(teacher_logits, labels)
        scores["teacher_mean_class_accuracy"] = mean_over_classes
    return scores


def agreement(
    student_logits: Tensor,
    teacher_logits: Logits,
    *,
    many: bool = False,
    thresholds: Thresholds = AT_HALF,
) -> float:
    """Compute the fraction of records for which both networks have the same top-1 class (e2KD eq. 4).

    It is independent of the labels.

    Args:
        student_logits: [N, K].
        teacher_logits: [N, K], or the largest ones.
        many: True if records have many labels, a case that the paper leaves open: compare the sets of predicted
            classes.
        thresholds: Those of both networks.
    """
    student = predict_labels(student_logits, many=many, threshold=thresholds.model)
    same = student == predict_labels(teacher_logits, many=many, threshold=thresholds.teacher)
    return float((same.all(dim=1) if many else same).double().mean())


def kl_to_teacher(student_logits: Tensor, teacher_logits: Logits, *, many: bool = False) -> float:
    """Compute the mean KL(teacher || student) of the class probabilities, in nats.

    Args:
        student_logits: [N, K].
        teacher_logits: [N, K]; of the largest ones, the result is the lower bound of `top_logits_divergence`.
        many: True to treat each class separately: the sum of the Bernoulli divergences over classes.

    Raises:
        ConfigError: If `many`, and only the largest logits are stored.
    """
    if many:
        every = require_all_logits(teacher_logits, "a record with many labels")
        return float(mld_loss(student_logits.double(), every.double(), tau=1.0))
    exact = teacher_logits if isinstance(teacher_logits, TopLogits) else teacher_logits.double()
    return float(kd_loss(student_logits.double(), exact, tau=1.0))


# ---- localization ----------------------------------------------------------------------------------


def energy_pointing_game(maps: Tensor, regions: Tensor) -> Tensor:
    """Compute the fraction of each map's positive mass inside its region (Wang et al. 2020), [n].

    Args:
        maps: [n, H, W].
        regions: Bool [n, H, W].
    """
    positive = maps.clamp(min=0)
    total = positive.sum(dim=(1, 2))
    inside = (positive * regions).sum(dim=(1, 2))
    return torch.where(total < MIN_ENERGY, 0.0, inside / total.clamp(min=MIN_ENERGY))


def uniform_score(regions: Tensor) -> Tensor:
    """Compute EPG and IoU of a uniform map, the chance level of both: the fraction of the area inside each region, [n].

    Args:
        regions: Bool [n, H, W].
    """
    return regions.float().mean(dim=(1, 2))


def localization_iou(maps: Tensor, regions: Tensor, threshold: float) -> Tensor:
    """Compute the intersection over union of each region and {map scaled to [0, 1] > threshold}, [n].

    Only positive attributions count. A constant positive map covers everything. The IoU of an empty union is 0.

    Args:
        maps: [n, H, W].
        regions: Bool [n, H, W].
        threshold: Threshold in [0, 1].
    """
    positive = maps.clamp(min=0)
    low, high = positive.amin(dim=(1, 2), keepdim=True), positive.amax(dim=(1, 2), keepdim=True)
    low = torch.where(low == high, 0.0, low)
    scaled = (positive - low) / torch.where(high > low, high - low, 1.0)
    chosen = scaled > threshold
    intersection = (chosen & regions).sum(dim=(1, 2))
    return intersection / (chosen | regions).sum(dim=(1, 2)).clamp(min=1)


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Upsample maps [n, h, w] bilinearly to (height, width) `size`: [n, height, width]."""
    return F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]
