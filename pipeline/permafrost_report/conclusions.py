"""Sentences at the top of a report: which arm is best, by how much, and whether the seeds show it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean

from permafrost_report.comparison import (
    ONE_SEED,
    StudentRow,
    confidence_interval,
    differences,
    excludes_zero,
    group_pairs,
    has_width,
    means_by_arm,
    seeds_in_words,
)
from permafrost_report.main_table import ChanceLimit, Column

_MAJORITY = "the most frequent class"
"""Prediction of one class for all records, whose accuracy any network should have."""


def conclusions(
    rows: Sequence[StudentRow],
    column: Column,
    pair: tuple[str, str],
    *,
    teachers: Mapping[str, Mapping[str, float]],
    chance: Mapping[str, float],
) -> list[str]:
    """Write one sentence about the best arm, one about the pair and one about teachers and chance, where they apply.

    Args:
        rows: One row per student.
        column: Column by which arms are compared.
        pair: Candidate and baseline.
        teachers: Values by column of each teacher, by "teacher", or by "teacher <pass>" if there are several.
        chance: Chance level of each column that has one.
    """
    means = means_by_arm(rows, column.name)
    sentences = []
    if len(means) == 1:
        sentences.append(_alone(rows, column, means))
    elif means and column.metric.higher_is_better is not None:
        ranked = sorted(means, key=lambda arm: means[arm], reverse=column.metric.higher_is_better)
        sentences.append(_best(rows, column, means, ranked))
        if set(pair) == set(ranked[:2]):
            pair = ("", "")  # the first sentence is about them
    if differences(rows, *pair, column.name):
        sentences.append(_pair(rows, column, pair))
    return [*sentences, *_levels(column, teachers, chance)]


def _alone(rows: Sequence[StudentRow], column: Column, means: Mapping[str, float]) -> str:
    (arm,) = means
    number = sum(row["method"] == arm for row in rows)
    seeds = ONE_SEED if number == 1 else seeds_in_words(number)
    value = f"{column.words} {column.value(means[arm])}"
    return f"{arm}: {value} ({seeds}), without another arm to compare it with."


def _best(
    rows: Sequence[StudentRow], column: Column, means: Mapping[str, float], ranked: Sequence[str]
) -> str:
    """Compare the arm with the best mean with the second best.

    Means are over all seeds of an arm, but arms are compared over the seeds that they share. If the arm with the best
    mean is behind another one there, its rank comes from the choice of seeds.
    """
    best, second = ranked[:2]
    if means[best] == means[second]:
        return (
            f"{best} and {second} have the same mean {column.words}, {column.value(means[best])}."
        )
    values = list(differences(rows, best, second, column.name).values())
    rank = "highest" if column.metric.higher_is_better else "lowest"
    opening = f"{best} has the {rank} mean {column.words}, {column.value(means[best])}"
    for rival in ranked[1:]:
        shared = list(differences(rows, best, rival, column.name).values())
        if shared and _is_behind(column, mean(shared)):
            return (
                f"{opening}, but the order is not conclusive (different seeds): on those that it shares with {rival} "
                f"the difference is {_interval(column, shared)}."
            )
    if len(values) < 2:
        reason = ONE_SEED if values else "they share no seed"
        return f"{opening}, before {second}, but the order is not conclusive ({reason})."
    if not excludes_zero(confidence_interval(values)):
        return (
            f"{opening}, but its lead over {second} is not conclusive: {_interval(column, values)}."
        )
    among = (
        f" This interval does not account for the choice among {len(means)} arms."
        if len(means) > 2
        else ""
    )
    return f"{opening}: {_interval(column, values)} against {second}, the second best.{among}"


def _is_behind(column: Column, difference: float) -> bool:
    return difference < 0 if column.metric.higher_is_better else difference > 0


def _pair(rows: Sequence[StudentRow], column: Column, pair: tuple[str, str]) -> str:
    candidate, baseline = pair
    values = list(differences(rows, candidate, baseline, column.name).values())
    opening = f"{candidate} - {baseline} in {column.words}"
    if len(values) == 1:
        return f"{opening}: {column.difference(values[0])} ({ONE_SEED})."
    verdict = "" if excludes_zero(confidence_interval(values)) else ", which is not conclusive"
    return f"{opening}: {_interval(column, values)}{verdict}."


def _interval(column: Column, values: Sequence[float]) -> str:
    interval = confidence_interval(values)
    if interval is None:
        return f"{column.difference(values[0])} ({ONE_SEED})"
    if not has_width(interval):
        return f"{column.difference(values[0])} for each of {seeds_in_words(len(values))}, so no spread is known"
    low, high = interval
    return (
        f"{column.difference(mean(values))} on average (95 % interval {column.difference(low, unit=False)} to "
        f"{column.difference(high, unit=False)}, {seeds_in_words(len(values))})"
    )


def _levels(
    column: Column, teachers: Mapping[str, Mapping[str, float]], chance: Mapping[str, float]
) -> list[str]:
    owners = {f"the {name} has": values for name, values in teachers.items()}
    known = [
        f"{whose} {column.value(values[column.name])}"
        for whose, values in (owners | {_chance_of(column): chance}).items()
        if column.name in values
    ]
    if not known:
        return []
    text = " and ".join([", ".join(known[:-1]), known[-1]] if len(known) > 1 else known)
    return [f"{text[0].upper()}{text[1:]}."]


def chance_remarks(
    rows: Sequence[StudentRow], column: Column, limit: ChanceLimit
) -> dict[str, str]:
    """Return a remark on each arm whose mean accuracy is below the most frequent class's, or not clearly above.

    Args:
        rows: One row per student.
        column: Column of the accuracy.
        limit: Chance level of the column.
    """
    return {
        arm: f"below {_MAJORITY}"
        if value < limit.level and not math.isclose(value, limit.level)
        else f"not clearly above {_MAJORITY}"
        for arm, value in means_by_arm(rows, column.name).items()
        if value <= limit.highest
    }


def remarks_in_words(
    remarks: Mapping[str, str],
    column: Column,
    teachers: Mapping[str, Mapping[str, float]],
    limit: ChanceLimit,
) -> list[str]:
    """Write one sentence for all arms with the same remark on their values of a column.

    Args:
        remarks: Remarks by arm, from `chance_remarks`.
        column: Column of the accuracy.
        teachers: Values by column of each teacher; one that is not better is named in place of the training.
        limit: Chance level of the column.
    """
    weak = [
        name for name, values in teachers.items() if values.get(column.name, 1.0) <= limit.highest
    ]
    cause = (
        f"the {' and the '.join(weak)}, whose accuracy is not better,"
        if weak
        else "what was trained"
    )
    by_remark = group_pairs((remark, arm) for arm, remark in remarks.items())
    return [
        f"The {column.words} of {', '.join(arms)} is {remark}, so look at {cause} before comparing it."
        for remark, arms in by_remark.items()
    ]


def _chance_of(column: Column) -> str:
    """Words for the chance level. For measures of maps it is not a lower limit: maps may mark a part of an object."""
    return "a uniform map has" if column.measure in ("epg", "iou") else f"{_MAJORITY} has"
