"""Comparison of arms over seeds: means, paired differences and their intervals.

One seed has no spread, so nothing is concluded from it. With several, two arms are compared seed by seed, and a
difference counts if its 95 % confidence interval (Student's t) excludes 0. Equal differences for all seeds have no
spread either: a metric of N records is a multiple of 1/N, so equal values happen by chance.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from math import sqrt
from statistics import mean, stdev
from typing import Any, TypeVar

from permafrost.core.errors import require

StudentRow = Mapping[str, Any]
"""Row of a student: method, seed and the value of each column."""
ONE_SEED = "1 seed: no spread known"
K = TypeVar("K")
V = TypeVar("V")
_CONFIDENCE = 0.95
_ROUNDING = 1e-9
"""Width of an interval relative to its bounds, up to which it is a rounding error."""


def group_pairs(pairs: Iterable[tuple[K, V]]) -> dict[K, list[V]]:
    """Collect the second entries of pairs by the first ones, both in their order."""
    groups: dict[K, list[V]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


def summarize(values: Sequence[float]) -> dict[str, Any]:
    """Compute the mean, and the sample standard deviation `sd` or None for a single value."""
    return {"mean": mean(values), "sd": stdev(values) if len(values) > 1 else None}


def confidence_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Compute the 95 % interval of the mean by Student's t, None for a single value."""
    if len(values) < 2:
        return None
    half = _quantile(len(values) - 1) * stdev(values) / sqrt(len(values))
    return float(mean(values) - half), float(mean(values) + half)


@cache
def _quantile(degrees_of_freedom: int) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(degrees_of_freedom, (1 + _CONFIDENCE) / 2))


def excludes_zero(interval: Sequence[float] | None) -> bool:
    """Return whether a difference with this interval is conclusive, which needs a spread and a sign."""
    return interval is not None and has_width(interval) and (interval[0] > 0 or interval[1] < 0)


def has_width(interval: Sequence[float]) -> bool:
    """Return whether an interval is wider than a rounding error."""
    low, high = interval
    return high - low > _ROUNDING * max(abs(low), abs(high))


def paired_difference(
    rows: Sequence[StudentRow], candidate: str, baseline: str, column: str
) -> dict[str, Any]:
    """Compare two arms in a column, seed by seed.

    Args:
        rows: One row per student, with `method`, `seed` and the columns.
        candidate: Arm from which the other is subtracted.
        baseline: The other arm.
        column: Name of the column.

    Returns:
        `mean`, `sd` and `interval` of candidate - baseline over the seeds that both have (`sd` and `interval` are None
        for one seed), and `per_seed`, the difference by seed.

    Raises:
        ConfigError: If one of them is not an arm, or if they share no seed.
    """
    arms = {str(row["method"]) for row in rows}
    known = ", ".join(sorted(arms))
    for option, arm in (("candidate", candidate), ("baseline", baseline)):
        require(
            arm in arms, f"report.{option}={arm} is not an arm of this run; choose one of: {known}"
        )
    per_seed = differences(rows, candidate, baseline, column)
    require(
        bool(per_seed),
        f"report.candidate={candidate} and report.baseline={baseline} share no seed; choose two of: {known}",
    )
    values = list(per_seed.values())
    interval = confidence_interval(values)
    return summarize(values) | {
        "interval": None if interval is None else list(interval),
        "per_seed": per_seed,
    }


def differences(
    rows: Sequence[StudentRow], candidate: str, baseline: str, column: str
) -> dict[str, float]:
    """Compute candidate - baseline by seed, for the seeds for which both have a value.

    Args:
        rows: One row per student, with `method`, `seed` and the columns.
        candidate: Arm from which the other is subtracted.
        baseline: The other arm.
        column: Name of the column.
    """
    values = {(row["method"], row["seed"]): row[column] for row in rows if row[column] is not None}
    seeds = sorted({seed for method, seed in values if method == candidate})
    return {
        str(seed): values[candidate, seed] - values[baseline, seed]
        for seed in seeds
        if (baseline, seed) in values
    }


def _compared_arms(
    rows: Sequence[StudentRow], baseline: str, baselines: Mapping[str, str], column: str
) -> dict[str, dict[str, Any]]:
    arms = list(dict.fromkeys(str(row["method"]) for row in rows))
    pairs = {arm: baselines.get(arm, baseline) for arm in arms}
    return {
        arm: paired_difference(rows, arm, other, column)
        for arm, other in pairs.items()
        if arm != other and len(differences(rows, arm, other, column)) > 1
    }


def differences_by_column(
    rows: Sequence[StudentRow], baseline: str, baselines: Mapping[str, str], columns: Sequence[str]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Compare every arm with its baseline in every column.

    Arms that share fewer than two seeds with their baseline are left out, and so are columns without any arm.

    Args:
        rows: One row per student.
        baseline: Arm that the others are compared with.
        baselines: Baseline of each arm that has one of its own.
        columns: Names of the columns.

    Returns:
        By column and arm, `mean`, `sd`, `interval` and `per_seed` of the difference.

    Raises:
        ConfigError: If a baseline is not an arm.
    """
    arms = {str(row["method"]) for row in rows}
    for arm, other in baselines.items():
        require(
            arm not in arms or other in arms,
            f"report.baselines={{{arm}: {other}}} names no arm of this run; choose one of: "
            + ", ".join(sorted(arms)),
        )
    by_column = {column: _compared_arms(rows, baseline, baselines, column) for column in columns}
    return {column: arms for column, arms in by_column.items() if arms}


def leading_arms(rows: Sequence[StudentRow], column: str, *, higher_is_better: bool) -> set[str]:
    """Return the arms that are not conclusively below the one with the best mean, down to the first that is.

    The set is empty if all arms are within the best one's uncertainty. An arm with a lower mean than one that is below
    is not among them, as few or noisy seeds alone may leave its difference open.

    Args:
        rows: One row per student.
        column: Name of the column by which arms are compared.
        higher_is_better: Direction of the column.
    """
    means = means_by_arm(rows, column)
    ranked = sorted(means, key=lambda arm: means[arm], reverse=higher_is_better)
    for position, arm in enumerate(ranked[1:], start=1):
        values = list(differences(rows, ranked[0], arm, column).values())
        if excludes_zero(confidence_interval(values)):
            return set(ranked[:position])
    return set()


def seeds_in_words(number: int) -> str:
    """Format a number of seeds."""
    return f"{number} seed{'s' if number > 1 else ''}"


def means_by_arm(rows: Sequence[StudentRow], column: str) -> dict[str, float]:
    """Compute the mean of each arm whose students all have a value."""
    values: dict[str, list[float | None]] = group_pairs(
        (row["method"], row[column]) for row in rows
    )
    return {
        arm: mean(number for number in numbers if number is not None)
        for arm, numbers in values.items()
        if None not in numbers
    }
