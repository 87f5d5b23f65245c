"""Comparison of variants over seeds: means, their differences and intervals.

One seed has no spread, so nothing is concluded from it. With several, two variants differ conclusively if the 95 %
interval of the difference of their means (Welch's t) excludes 0. Seeds are not paired, so variants may have different
ones. How much two variants share through a seed differs between experiments (docs/results/index.md, "Seeds of two
variants"); where their values rise and fall together, the interval is wider than needed. Values without any spread do
not settle a difference
either: a metric of N records is a multiple of 1/N, so equal values happen by chance.

Rows of accuracies also have the images that each student got right. Then the variance over images is added to that over
seeds (docs/reference/metrics.md, "Intervals of a report"): other test images would give other numbers, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import inf, sqrt
from statistics import mean, stdev, variance
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from permafrost.core.errors import require

StudentRow = Mapping[str, Any]
"""Row of a student: method, seed and the value of each column."""
ONE_SEED = "1 seed: no spread known"
K = TypeVar("K")
V = TypeVar("V")
_CONFIDENCE = 0.95
_ROUNDING = 1e-9
"""Width of an interval relative to its bounds, up to which it is a rounding error."""


class ScoredRow(dict[str, Any]):
    """Row of a student that knows which records it got right."""

    right: Mapping[str, Mapping[str, bool]] = MappingProxyType({})
    """By column of an accuracy, and by key of the record."""
    is_unlabeled: bool = False
    """True if no evaluated record has a label among the classes of the network."""


def group_pairs(pairs: Iterable[tuple[K, V]]) -> dict[K, list[V]]:
    """Collect the second entries of pairs by the first ones, both in their order."""
    groups: dict[K, list[V]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


def summarize(values: Sequence[float]) -> dict[str, Any]:
    """Compute the mean, and the sample standard deviation `sd` or None for a single value."""
    return {"mean": mean(values), "sd": stdev(values) if len(values) > 1 else None}


def mean_interval(summary: Mapping[str, Any], seeds: int) -> Sequence[float]:
    """Return the 95 % interval of a mean, empty without known images for one seed or for equal values.

    Args:
        summary: Mean and deviation from `summarize`, and the `interval` over images and seeds if it is known; without
            one, the interval is Student's over seeds.
        seeds: Number of seeds.
    """
    if "interval" in summary or not summary["sd"]:
        return tuple(summary.get("interval", ()))
    half = _student_t(seeds - 1) * summary["sd"] / sqrt(seeds)
    return summary["mean"] - half, summary["mean"] + half


def right_images(rows: Sequence[StudentRow], column: str) -> NDArray[np.float64]:
    """Return which images each student got right, [students, images], of no images if they are not the same of all."""
    known = [row.right.get(column, {}) if isinstance(row, ScoredRow) else {} for row in rows]
    keys = [] if any(right.keys() != known[0].keys() for right in known) else sorted(known[0])
    return np.array([[right[key] for key in keys] for right in known], np.float64)


def accuracy_interval(right: NDArray[np.float64]) -> tuple[float, float]:
    """Compute the 95 % interval of an accuracy over other images and other seeds.

    It is Wilson's interval of p (1 - p) / V images, with the variance V of the mean over images and over seeds, which
    are crossed. Of one student V is p (1 - p) / images, so the interval is Wilson's.

    Args:
        right: 1 where a student is right and 0 elsewhere, [seeds, images].
    """
    seeds, images = right.shape
    p = float(right.mean())
    over_seeds = float(right.mean(axis=1).var(ddof=1)) / seeds if seeds > 1 else 0.0
    total = float(right.mean(axis=0).var()) / images + over_seeds
    share = _student_t((seeds - 1) * (total / over_seeds) ** 2 if over_seeds else inf) ** 2 * (
        total / (p * (1 - p)) if total else 1 / images
    )
    half = sqrt(share * p * (1 - p) + share**2 / 4)
    return (p + share / 2 - half) / (1 + share), (p + share / 2 + half) / (1 + share)


def welch_interval(
    candidate: Sequence[float], baseline: Sequence[float], over_images: float = 0.0
) -> tuple[float, float] | None:
    """Compute the 95 % interval of mean(candidate) - mean(baseline) by Welch's t, None if one has a single value.

    The variances may differ. The degrees of freedom are those of Welch and Satterthwaite, (a + b + v)^2 divided by
    (a^2 / (n - 1) + b^2 / (m - 1)), with the squared standard errors a and b of the two means.

    Args:
        candidate: Values of one variant.
        baseline: Values of the other.
        over_images: Variance v of the difference over images, whose degrees of freedom are not limited.
    """
    if min(len(candidate), len(baseline)) < 2:
        return None
    a, b = (variance(values) / len(values) for values in (candidate, baseline))
    shares = a**2 / (len(candidate) - 1) + b**2 / (len(baseline) - 1)
    total = a + b + over_images
    half = total and _student_t(total**2 / shares if shares else inf) * sqrt(total)
    middle = mean(candidate) - mean(baseline)
    return float(middle - half), float(middle + half)


def _student_t(degrees_of_freedom: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(degrees_of_freedom, (1 + _CONFIDENCE) / 2))


def excludes_zero(interval: Sequence[float] | None) -> bool:
    """Return whether a difference with this interval is conclusive, which needs a spread and a sign."""
    return interval is not None and has_width(interval) and (interval[0] > 0 or interval[1] < 0)


def has_width(interval: Sequence[float]) -> bool:
    """Return whether an interval is wider than a rounding error."""
    low, high = interval
    return high - low > _ROUNDING * max(abs(low), abs(high))


def variant_difference(
    rows: Sequence[StudentRow], candidate: str, baseline: str, column: str
) -> dict[str, Any]:
    """Compare the means of two variants in a column.

    Args:
        rows: One row per student, with `method`, `seed` and the columns.
        candidate: Variant from which the other is subtracted.
        baseline: The other variant.
        column: Name of the column.

    Returns:
        `mean` and `interval` of candidate - baseline (`interval` is None if a variant has one seed), `seeds`, their
        numbers, and `images`, the number of images over which the interval is, too, 0 if they are not known.

    Raises:
        ConfigError: If they are the same, or one is not a variant or has no value in the column.
    """
    values = group_pairs((row["method"], row) for row in rows if row[column] is not None)
    require(
        candidate != baseline,
        f"report.candidate and report.baseline are both {baseline}; choose two of: {', '.join(sorted(values))}",
    )
    for option, variant in (("candidate", candidate), ("baseline", baseline)):
        require(
            variant in values,
            f"report.{option}={variant} is not a variant of this run with a value of {column}; choose one of: "
            + ", ".join(sorted(values)),
        )
    right = right_images([*values[candidate], *values[baseline]], column)
    pair = [[float(row[column]) for row in values[variant]] for variant in (candidate, baseline)]
    gains = right[: len(pair[0])].mean(axis=0) - right[len(pair[0]) :].mean(axis=0)
    interval = welch_interval(
        pair[0], pair[1], float(gains.var()) / len(gains) if len(gains) else 0.0
    )
    return {
        "mean": mean(pair[0]) - mean(pair[1]),
        "interval": None if interval is None else list(interval),
        "seeds": [len(variant) for variant in pair],
        "images": len(gains),
    }


def differences_by_column(
    rows: Sequence[StudentRow], baseline: str, baselines: Mapping[str, str], columns: Sequence[str]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Compare every variant with its baseline in every column.

    Columns in which no variant has two seeds are left out.

    Args:
        rows: One row per student.
        baseline: Variant that the others are compared with.
        baselines: Baseline of each variant that has one of its own.
        columns: Names of the columns.

    Returns:
        By column and variant, `mean`, `interval` and `seeds` of the difference.

    Raises:
        ConfigError: If a baseline is not a variant.
    """
    variants = list(dict.fromkeys(str(row["method"]) for row in rows))
    for variant, other in baselines.items():
        require(
            variant not in variants or other in variants,
            f"report.baselines={{{variant}: {other}}} names no variant of this run; choose one of: "
            + ", ".join(sorted(variants)),
        )
    pairs = {variant: baselines.get(variant, baseline) for variant in variants}
    by_column: dict[str, dict[str, dict[str, Any]]] = {}
    for column in columns:
        counts = Counter(row["method"] for row in rows if row[column] is not None)
        by_column[column] = {
            variant: variant_difference(rows, variant, other, column)
            for variant, other in pairs.items()
            if variant != other and counts[variant] and counts[other]
        }
    return {
        column: variants_of
        for column, variants_of in by_column.items()
        if any(found["interval"] for found in variants_of.values())
    }


def leading_variants(rows: Sequence[StudentRow], column: str, higher_is_better: bool) -> set[str]:
    """Return the variants that are not conclusively below the one with the best mean, down to the first that is.

    The set is empty if all variants are within the best one's uncertainty. A variant with a lower mean than one that is
    below is not among them, as few or noisy seeds alone may leave its difference open.

    Args:
        rows: One row per student.
        column: Name of the column by which variants are compared.
        higher_is_better: Direction of the column.
    """
    means = means_by_variant(rows, column)
    ranked = sorted(means, key=lambda variant: means[variant], reverse=higher_is_better)
    clear = (
        position
        for position, variant in enumerate(ranked)
        if position
        and excludes_zero(variant_difference(rows, ranked[0], variant, column)["interval"])
    )
    return set(ranked[: next(clear, 0)])


def seeds_in_words(*numbers: int, images: int = 0) -> str:
    """Format the number of seeds of a variant or of two, once if they are equal, and that of the images, if known."""
    text = " and ".join(map(str, dict.fromkeys(numbers)))
    return f"{text} seed{'' if text == '1' else 's'}" + f", {images:,} images" * bool(images)


def means_by_variant(rows: Sequence[StudentRow], column: str) -> dict[str, float]:
    """Compute the mean of each variant whose students all have a value."""
    values: dict[str, list[float | None]] = group_pairs(
        (row["method"], row[column]) for row in rows
    )
    return {
        variant: mean(number for number in numbers if number is not None)
        for variant, numbers in values.items()
        if None not in numbers
    }
