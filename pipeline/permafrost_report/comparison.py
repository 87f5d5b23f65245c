"""Comparison of arms over seeds: means, their differences and intervals.

One seed has no spread, so nothing is concluded from it. With several, two arms differ conclusively if the 95 % interval
of the difference of their means (Welch's t) excludes 0. Seeds are not paired, so arms may have different ones. How much
two arms share through a seed differs between experiments (docs/results/index.md, "Seeds of two arms"); where their
values rise and fall together, the interval is wider than needed. Values without any spread do not settle a difference
either: a metric of N records is a multiple of 1/N, so equal values happen by chance.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import sqrt
from statistics import mean, stdev, variance
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


def welch_interval(
    candidate: Sequence[float], baseline: Sequence[float]
) -> tuple[float, float] | None:
    """Compute the 95 % interval of mean(candidate) - mean(baseline) by Welch's t, None if one has a single value.

    The variances may differ. The degrees of freedom are those of Welch and Satterthwaite, (a + b)^2 / (a^2 / (n - 1) +
    b^2 / (m - 1)) with the squared standard errors a and b of the two means.
    """
    if min(len(candidate), len(baseline)) < 2:
        return None
    a, b = (variance(values) / len(values) for values in (candidate, baseline))
    # Without any spread the width is 0, whatever the degrees are.
    shares = a**2 / (len(candidate) - 1) + b**2 / (len(baseline) - 1) or 1.0
    return _around(mean(candidate) - mean(baseline), sqrt(a + b), (a + b) ** 2 / shares)


def _around(middle: float, error: float, degrees_of_freedom: float) -> tuple[float, float]:
    from scipy.special import stdtrit

    half = error and float(stdtrit(degrees_of_freedom, (1 + _CONFIDENCE) / 2)) * error
    return float(middle - half), float(middle + half)


def excludes_zero(interval: Sequence[float] | None) -> bool:
    """Return whether a difference with this interval is conclusive, which needs a spread and a sign."""
    return interval is not None and has_width(interval) and (interval[0] > 0 or interval[1] < 0)


def has_width(interval: Sequence[float]) -> bool:
    """Return whether an interval is wider than a rounding error."""
    low, high = interval
    return high - low > _ROUNDING * max(abs(low), abs(high))


def arm_difference(
    rows: Sequence[StudentRow], candidate: str, baseline: str, column: str
) -> dict[str, Any]:
    """Compare the means of two arms in a column.

    Args:
        rows: One row per student, with `method`, `seed` and the columns.
        candidate: Arm from which the other is subtracted.
        baseline: The other arm.
        column: Name of the column.

    Returns:
        `mean` and `interval` of candidate - baseline (`interval` is None if an arm has one seed), and `seeds`, their
        numbers.

    Raises:
        ConfigError: If they are the same, or one is not an arm or has no value in the column.
    """
    values: dict[str, list[float]] = group_pairs(
        (row["method"], row[column]) for row in rows if row[column] is not None
    )
    require(
        candidate != baseline,
        f"report.candidate and report.baseline are both {baseline}; choose two of: {', '.join(sorted(values))}",
    )
    for option, arm in (("candidate", candidate), ("baseline", baseline)):
        require(
            arm in values,
            f"report.{option}={arm} is not an arm of this run with a value of {column}; choose one of: "
            + ", ".join(sorted(values)),
        )
    pair = values[candidate], values[baseline]
    interval = welch_interval(*pair)
    return {
        "mean": mean(pair[0]) - mean(pair[1]),
        "interval": None if interval is None else list(interval),
        "seeds": [len(arm) for arm in pair],
    }


def differences_by_column(
    rows: Sequence[StudentRow], baseline: str, baselines: Mapping[str, str], columns: Sequence[str]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Compare every arm with its baseline in every column.

    Columns in which no arm has two seeds are left out.

    Args:
        rows: One row per student.
        baseline: Arm that the others are compared with.
        baselines: Baseline of each arm that has one of its own.
        columns: Names of the columns.

    Returns:
        By column and arm, `mean`, `interval` and `seeds` of the difference.

    Raises:
        ConfigError: If a baseline is not an arm.
    """
    arms = list(dict.fromkeys(str(row["method"]) for row in rows))
    for arm, other in baselines.items():
        require(
            arm not in arms or other in arms,
            f"report.baselines={{{arm}: {other}}} names no arm of this run; choose one of: "
            + ", ".join(sorted(arms)),
        )
    pairs = {arm: baselines.get(arm, baseline) for arm in arms}
    by_column: dict[str, dict[str, dict[str, Any]]] = {}
    for column in columns:
        counts = Counter(row["method"] for row in rows if row[column] is not None)
        by_column[column] = {
            arm: arm_difference(rows, arm, other, column)
            for arm, other in pairs.items()
            if arm != other and counts[arm] and counts[other]
        }
    return {
        column: arms_of
        for column, arms_of in by_column.items()
        if any(found["interval"] for found in arms_of.values())
    }


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
        if excludes_zero(arm_difference(rows, ranked[0], arm, column)["interval"]):
            return set(ranked[:position])
    return set()


def seeds_in_words(*numbers: int) -> str:
    """Format the number of seeds of an arm or of two, once if they are equal."""
    text = " and ".join(map(str, dict.fromkeys(numbers)))
    return f"{text} seed{'' if text == '1' else 's'}"


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
