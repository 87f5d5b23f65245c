"""Accuracy by stored bytes: what each target of a teacher taught students of few images, at searched options."""

from __future__ import annotations

from itertools import chain
from math import nan, sqrt
from statistics import fmean, variance
from typing import NamedTuple

from docs.cells import Cell, Rows, Run, spread, table
from docs.measured import results_of, runs_of
from docs.tables.e2kd import EQUAL_TERMS, LOGITS_BYTES, SHOTS, TARGET_BYTES
from permafrost_report.comparison import confidence_interval

FRONTIER = "cifar10_frontier"
SPREAD = "cifar10_spread"


class Point(NamedTuple):
    """Targets of a pass, and the students that were trained on them."""

    stored: str
    """Description of the stored targets."""
    method: str
    experiment: str
    arm: str
    size: int | str
    """Bytes per image that the method reads, or the pass of the results that states them."""

    @property
    def bytes(self) -> float:
        """Bytes per image."""
        if not isinstance(self.size, str):
            return self.size
        passes = {each["name"]: each["bytes"] for each in results_of(self.experiment)["passes"]}
        (value,) = (count for name, count in passes.items() if name.startswith(f"{self.size}-"))
        return float(value)

    @property
    def runs(self) -> list[Run]:
        """Students of the ResNet-56."""
        runs = runs_of(self.experiment, self.arm)
        return [run for run in runs if run.get("teacher", "resnet56") == "resnet56"]


def _size(target: str) -> int:
    return LOGITS_BYTES + TARGET_BYTES[target]


POINTS = (
    Point("logits alone", "kd", SHOTS, "kd", LOGITS_BYTES),
    Point(
        "class maps of 2x2 cells",
        "cat_kd",
        EQUAL_TERMS,
        "cat_kd_logits searched",
        _size("class maps"),
    ),
    Point("the embedding", "embedding", FRONTIER, "embedding", "f_pooled"),
    Point("one map of 8x8 cells", "e2kd", SHOTS, "e2kd", _size("one map")),
    Point("logits of 16 views", "kd", FRONTIER, "views_16", "v16p_final"),
    Point("logits of 16 mixtures", "kd", FRONTIER, "mixtures_16", "mix16_final"),
    Point(
        "class maps of 8x8 cells",
        "cat_kd",
        EQUAL_TERMS,
        "cat_kd_logits searched size=8",
        _size("class maps, 8x8"),
    ),
    Point("maps of all classes", "e2kd", EQUAL_TERMS, "e2kd_logits_all searched", _size("10 maps")),
    Point("features of the last stage, 4x4 cells", "features", FRONTIER, "s3_4", "f_s3_4"),
    Point("features of all stages, 4x4 cells", "features", FRONTIER, "stages_4", "f_4"),
    Point("attention of all stages", "at", EQUAL_TERMS, "at_logits searched", _size("attention")),
    Point("features of all stages", "features", FRONTIER, "stages_8", "f_canonical"),
    Point("features of all stages, also flipped", "features", SPREAD, "features", "all_resnet56"),
)
"""In the order of their bytes. All students learn from the logits, too."""


def frontier() -> str:
    """Every point, in the order of its bytes, the best so far in bold."""
    rows: Rows = []
    best = 0.0
    for point in POINTS:
        accuracy = spread(point.runs, "accuracy")
        is_best = accuracy.number is not None and accuracy.number > best
        best = max(best, accuracy.number or 0.0)
        text = accuracy.bold if is_best else accuracy.text
        cells = [Cell(f"`method={point.method}`"), Cell(f"{point.bytes:,.0f}"), Cell(text)]
        rows.append((point.stored, cells))
    return table(
        ("stored with the logits", "trained with", "bytes per image", "test accuracy, %"), rows
    )


_PAIRS = (("e2kd", "kd"), ("features", "kd"), ("features", "e2kd"))
_NAMES = {"kd": "KD", "e2kd": "e2KD, all maps", "features": "features"}
TEACHERS = {"resnet56": "ResNet-56 (83.2 %)", "efficientnet": "EfficientNet-Lite0 (90.4 %)"}


def _by_selection(arm: str, teacher: str) -> dict[int, list[float]]:
    """Accuracies of the students of each selection of images, in per cent, in the order of their seeds."""
    selections: dict[int, list[float]] = {}
    for run in runs_of(SPREAD, arm):
        if run["teacher"] == teacher:
            selections.setdefault(run["selection"], []).append(100 * run["accuracy"])
    return selections


def spread_difference(
    one: str, other: str, teacher: str
) -> tuple[float, float, float, float, float]:
    """Return a mean difference with its 95 % interval over selections, and the deviations of selections and seeds.

    The deviations are those of a random effect of the selection and of the residual, by the method of moments.
    """
    first, second = (_by_selection(arm, teacher) for arm in (one, other))
    differences = [
        [a - b for a, b in zip(first[selection], second[selection], strict=True)]
        for selection in sorted(first)
    ]
    means = [fmean(each) for each in differences]
    low, high = confidence_interval(means) or (nan, nan)
    seeds = len(differences[0])
    within = fmean(variance(each) for each in differences)
    between = max(0.0, variance(means) - within / seeds)
    return fmean(means), low, high, sqrt(between), sqrt(within)


def spread_over_selections() -> str:
    """Means of three methods with each teacher, and their differences with the deviations of selections and seeds."""
    known = {run["teacher"] for run in results_of(SPREAD)["runs"]}
    teachers = [teacher for teacher in TEACHERS if teacher in known]
    means: Rows = [
        (
            TEACHERS[teacher],
            [
                Cell(f"{fmean(chain.from_iterable(_by_selection(arm, teacher).values())):.1f}")
                for arm in _NAMES
            ],
        )
        for teacher in teachers
    ]
    rows: Rows = []
    for teacher in teachers:
        for one, other in _PAIRS:
            middle, low, high, selections, seeds = spread_difference(one, other, teacher)
            cells = [
                Cell(TEACHERS[teacher].partition(" (")[0]),
                Cell(f"{middle:+.1f} ({low:+.1f} to {high:+.1f})"),
                Cell(f"{selections:.1f}"),
                Cell(f"{seeds:.1f}"),
            ]
            rows.append((f"{_NAMES[one]} minus {_NAMES[other]}", cells))
    return "\n".join(
        [
            table(("test accuracy, %", *_NAMES.values()), means),
            table(("difference", "teacher", "95 % interval", "selections", "seeds"), rows),
        ]
    )


TABLES = (frontier, spread_over_selections)
