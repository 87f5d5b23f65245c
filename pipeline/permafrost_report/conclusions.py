"""Sentences at the top of a report: which variant is best, by how much, and whether the seeds show it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean
from typing import Any

from permafrost_report.comparison import (
    ONE_SEED,
    StudentRow,
    excludes_zero,
    group_pairs,
    has_width,
    means_by_variant,
    seeds_in_words,
    variant_difference,
)
from permafrost_report.main_table import ChanceLimit, Column
from permafrost_report.model_selection import ModelSelection
from permafrost_report.student_results import StudentResult

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
    """Write one sentence about the best variant, one about the pair and one about teachers and chance, if any.

    Args:
        rows: One row per student.
        column: Column by which variants are compared.
        pair: Candidate and baseline.
        teachers: Values by column of each teacher, by "teacher", or by "teacher <pass>" if there are several.
        chance: Chance level of each column that has one.
    """
    means = means_by_variant(rows, column.name)
    sentences = []
    if len(means) == 1:
        sentences.append(_alone(rows, column, means))
    elif means and column.metric.higher_is_better is not None:
        ranked = sorted(means, key=means.__getitem__, reverse=column.metric.higher_is_better)
        sentences.append(_best(rows, column, means, ranked))
        if set(pair) == set(ranked[:2]):
            pair = ("", "")  # the first sentence is about them
    if set(pair) <= {row["method"] for row in rows if row[column.name] is not None}:
        sentences.append(_pair(rows, column, pair))
    return [*sentences, *_levels(column, teachers, chance)]


def _alone(rows: Sequence[StudentRow], column: Column, means: Mapping[str, float]) -> str:
    (variant,) = means
    number = sum(row["method"] == variant for row in rows)
    seeds = ONE_SEED if number == 1 else seeds_in_words(number)
    value = f"{column.words} {column.value(means[variant])}"
    return f"{variant}: {value} ({seeds}), without another variant to compare it with."


def _best(
    rows: Sequence[StudentRow], column: Column, means: Mapping[str, float], ranked: Sequence[str]
) -> str:
    """Compare the variant with the best mean with the second best."""
    best, second = ranked[:2]
    if means[best] == means[second]:
        return (
            f"{best} and {second} have the same mean {column.words}, {column.value(means[best])}."
        )
    lead = variant_difference(rows, best, second, column.name)
    rank = "highest" if column.metric.higher_is_better else "lowest"
    opening = f"{best} has the {rank} mean {column.words}, {column.value(means[best])}"
    if lead["interval"] is None:
        return f"{opening}, before {second}, but the order is not conclusive ({ONE_SEED})."
    if not excludes_zero(lead["interval"]):
        return (
            f"{opening}, but its lead over {second} is not conclusive: {_interval(column, lead)}."
        )
    among = (
        f" This interval does not account for the choice among {len(means)} variants."
        if len(means) > 2
        else ""
    )
    return f"{opening}: {_interval(column, lead)} against {second}, the second best.{among}"


def _pair(rows: Sequence[StudentRow], column: Column, pair: tuple[str, str]) -> str:
    candidate, baseline = pair
    gain = variant_difference(rows, candidate, baseline, column.name)
    is_open = gain["interval"] is not None and not excludes_zero(gain["interval"])
    verdict = ", which is not conclusive" if is_open else ""
    return f"{candidate} - {baseline} in {column.words}: {_interval(column, gain)}{verdict}."


def _interval(column: Column, difference: Mapping[str, Any]) -> str:
    middle, interval = column.difference(difference["mean"]), difference["interval"]
    if interval is None:
        return f"{middle} ({ONE_SEED})"
    seeds = seeds_in_words(*difference["seeds"], images=difference["images"])
    if not has_width(interval):
        return f"{middle}, with equal values for all of {seeds}, so no spread is known"
    low, high = (column.difference(bound, unit=False) for bound in interval)
    return f"{middle} on average (95 % interval {low} to {high} by Welch's t, {seeds})"


def _levels(
    column: Column, teachers: Mapping[str, Mapping[str, float]], chance: Mapping[str, float]
) -> list[str]:
    # For measures of maps it is not a lower limit: maps may mark a part of an object.
    of_chance = "a uniform map has" if column.measure in ("epg", "iou") else f"{_MAJORITY} has"
    known = [
        f"{whose} {column.value(values[column.name])}"
        for whose, values in (
            {f"the {name} has": values for name, values in teachers.items()} | {of_chance: chance}
        ).items()
        if column.name in values
    ]
    if not known:
        return []
    text = " and ".join([", ".join(known[:-1]), known[-1]] if len(known) > 1 else known)
    return [f"{text[0].upper()}{text[1:]}."]


def student_to_ship(
    rows: Sequence[StudentRow],
    results: Sequence[StudentResult],
    column: Column,
    selection: ModelSelection | None,
) -> tuple[StudentResult, str] | None:
    """Choose the best student of the best variant, by the selection if all have its values, else by a column.

    Args:
        rows: Rows of the report.
        results: Results of the students that can be exported.
        column: Column by which variants are compared.
        selection: Selection of the run.

    Returns:
        The student and a sentence on the choice, None if nothing is better or worse.
    """
    by, metric = column.words, column.metric
    scores = {result.run: result.find(column.source) for result in results}
    if selection is not None and scores.keys() <= selection.scores.keys():
        by, metric, scores = selection.select, selection.metric, selection.scores
    if not results or metric.higher_is_better is None or None in scores.values():
        return None
    values = {
        run: (1 if metric.higher_is_better else -1) * value
        for run, value in scores.items()
        if value is not None
    }
    variants = group_pairs((result.label, result) for result in results)
    best = max(variants, key=lambda name: mean(values[result.run] for result in variants[name]))
    student = max(variants[best], key=lambda result: values[result.run])
    ties = [
        name
        for name in variants
        if name != best
        and not excludes_zero(variant_difference(rows, best, name, column.name)["interval"])
    ]
    caveat = f", but its lead over {', '.join(ties)} is not conclusive" if ties else ""
    chosen = f" Of its students, seed {student.seed} has the best." * (len(variants[best]) > 1)
    return student, f"{best} has the best {by}{caveat}.{chosen}"


def chance_remarks(
    rows: Sequence[StudentRow], column: Column, limit: ChanceLimit
) -> dict[str, str]:
    """Return a remark on each variant whose mean accuracy is below the most frequent class's, or not clearly above.

    Args:
        rows: One row per student.
        column: Column of the accuracy.
        limit: Chance level of the column.
    """
    return {
        variant: f"below {_MAJORITY}"
        if value < limit.level and not math.isclose(value, limit.level)
        else f"not clearly above {_MAJORITY}"
        for variant, value in means_by_variant(rows, column.name).items()
        if value <= limit.highest
    }


def unmeasured_accuracy(row: StudentRow, variants: Iterable[str], classes: int) -> str:
    """Say why the accuracy of variants was not measured, so that no prediction is right or wrong.

    Args:
        row: Row of one of their students, with the number of outputs of its network, if that is known.
        variants: Names of the variants.
        classes: Number of classes of the store.
    """
    reason = (
        f"its network has {row['outputs']} outputs, and the labels are of {classes} classes"
        if 0 < classes != row.get("outputs", classes)
        else "no evaluated record has a label among the classes of its network"
    )
    return f"The accuracy of {', '.join(variants)} was not measured, because {reason}. No prediction is marked."


def remarks_in_words(
    remarks: Mapping[str, str],
    column: Column,
    teachers: Mapping[str, Mapping[str, float]],
    limit: ChanceLimit,
) -> list[str]:
    """Write one sentence for all variants with the same remark on their values of a column.

    Args:
        remarks: Remarks by variant, from `chance_remarks`.
        column: Column of the accuracy.
        teachers: Values by column of each teacher; one that is not better is named in place of the training.
        limit: Chance level of the column.
    """
    weak = [
        name for name, values in teachers.items() if values.get(column.name, 1.0) <= limit.highest
    ]
    cause = (
        f"the {' and the '.join(weak)}, whose accuracy is not clearly above it either,"
        if weak
        else "what was trained"
    )
    return [
        f"The {column.words} of {', '.join(variants)} is {remark}, so look at {cause} before comparing it."
        for remark, variants in group_pairs(
            (remark, variant) for variant, remark in remarks.items()
        ).items()
    ]
