"""Accuracy by stored bytes: what each target of a teacher taught students of few images, at searched options."""

from __future__ import annotations

from decimal import Decimal
from itertools import chain
from math import nan, sqrt
from statistics import fmean, variance
from typing import NamedTuple

from docs.cells import Cell, Rows, Run, difference_interval, rounded, single, spread, table
from docs.measured import results_of, runs_of
from docs.tables.e2kd import EQUAL_TERMS, LOGITS_BYTES, SHOTS, TARGET_BYTES
from permafrost_report.comparison import welch_interval

FRONTIER = "cifar10_frontier"
SPREAD = "cifar10_spread"


class Point(NamedTuple):
    """Targets of a pass, and the students that were trained on them."""

    stored: str
    """Description of the stored targets."""
    method: str
    experiment: str
    variant: str
    size: int | str
    """Bytes per image that the method reads, or the pass of the results that states them."""
    search: str
    """Options that were searched, and where in the grid the chosen ones lie."""
    unread: int = 0
    """Bytes of the pass that the method does not read."""

    @property
    def bytes(self) -> float:
        """Bytes per image, as stored."""
        if not isinstance(self.size, str):
            return self.size
        passes = {each["name"]: each["bytes"] for each in results_of(self.experiment)["passes"]}
        (value,) = (count for name, count in passes.items() if name.startswith(f"{self.size}-"))
        return float(value) - self.unread

    @property
    def runs(self) -> list[Run]:
        """Students of the ResNet-56."""
        runs = runs_of(self.experiment, self.variant)
        return [run for run in runs if run.get("teacher", "resnet56") == "resnet56"]


def _size(target: str) -> int:
    return LOGITS_BYTES + TARGET_BYTES[target]


_FEATURES = "weight inside*; `tau` stays 1"
POINTS = (
    Point("logits alone", "kd", SHOTS, "kd", LOGITS_BYTES, "`tau` inside; `lr` upper end"),
    Point(
        "class maps of 2x2 cells",
        "cat_kd",
        EQUAL_TERMS,
        "cat_kd_logits searched",
        _size("class maps"),
        "`tau` lower end; weight upper end",
    ),
    Point("the embedding", "embedding", FRONTIER, "embedding", "f_pooled", "`tau`, weight inside*"),
    Point(
        "one map of 8x8 cells",
        "e2kd",
        SHOTS,
        "e2kd",
        _size("one map"),
        "`tau`, weight, `lr` upper ends",
    ),
    Point("logits of 16 views", "kd", FRONTIER, "views_16", "v16p_final", "`tau` inside*"),
    Point("logits of 16 mixtures", "kd", FRONTIER, "mixtures_16", "mix16_final", "`tau` inside*"),
    Point(
        "class maps of 8x8 cells",
        "cat_kd",
        EQUAL_TERMS,
        "cat_kd_logits searched size=8",
        _size("class maps, 8x8"),
        "`tau`, weight inside",
    ),
    Point(
        "maps of all classes",
        "e2kd",
        EQUAL_TERMS,
        "e2kd_logits_all searched tau=8",
        _size("10 maps"),
        "`tau`, weight inside",
    ),
    Point(
        "features of the last stage, 4x4 cells", "features", FRONTIER, "s3_4", "f_s3_4", _FEATURES
    ),
    Point("features of all stages, 4x4 cells", "features", FRONTIER, "stages_4", "f_4", _FEATURES),
    Point(
        "attention of all stages",
        "at",
        EQUAL_TERMS,
        "at_logits searched",
        _size("attention"),
        "`tau`, weight inside",
    ),
    Point("features of all stages", "features", FRONTIER, "stages_8", "f_canonical", _FEATURES),
    Point(
        "features of all stages, also flipped",
        "features",
        SPREAD,
        "features",
        "all_resnet56",
        _FEATURES,
        TARGET_BYTES["10 maps"],
    ),
)
"""In the order of their bytes. All students learn from the logits, too."""


def steps() -> list[tuple[Point, bool]]:
    """Every point, and whether its interval against the best smaller one excludes zero."""
    judged: list[tuple[Point, bool]] = []
    best: list[Run] = []
    for point in POINTS:
        runs = point.runs
        middle, low, _ = difference_interval(runs, best or runs, "accuracy")
        judged.append((point, low > 0))
        if middle > 0 or not best:
            best = runs
    return judged


def frontier() -> str:
    """Every point, in the order of its bytes, in bold where it is conclusively above the best smaller one."""
    rows: Rows = []
    for point, is_ahead in steps():
        accuracy = spread(point.runs, "accuracy")
        text = accuracy.bold if is_ahead else accuracy.text
        cells = [Cell(f"`method={point.method}`"), Cell(f"{point.bytes:,.0f}"), Cell(text)]
        rows.append((point.stored, [*cells, Cell(point.search)]))
    return table(
        ("stored with the logits", "trained with", "bytes per image", "test accuracy, %", "search"),
        rows,
    )


_PAIRS = (("e2kd", "kd"), ("features", "kd"), ("features", "e2kd"))
_NAMES = {"kd": "KD", "e2kd": "e2KD, all maps", "features": "features"}
TEACHERS = {"resnet56": "ResNet-56", "efficientnet": "EfficientNet-Lite0"}


def _of_teacher(name: str) -> str:
    """Network and test accuracy of a teacher."""
    return f"{TEACHERS[name]} ({single(results_of(SPREAD)['teachers'][name], 100, 1).text} %)"


def _by_selection(variant: str, teacher: str) -> dict[int, list[float]]:
    """Accuracies of the students of each selection of images, in per cent, in the order of their seeds."""
    selections: dict[int, list[float]] = {}
    for run in runs_of(SPREAD, variant):
        if run["teacher"] == teacher:
            selections.setdefault(run["selection"], []).append(100 * run["accuracy"])
    return selections


def spread_difference(
    one: str, other: str, teacher: str
) -> tuple[float, float, float, float, float]:
    """Return a mean difference with its 95 % interval over selections, and the deviations of selections and seeds.

    The deviations are those of a random effect of the selection and of the residual, by the method of moments.
    """
    first, second = (_by_selection(variant, teacher) for variant in (one, other))
    differences = [
        [a - b for a, b in zip(first[selection], second[selection], strict=True)]
        for selection in sorted(first)
    ]
    means = [fmean(each) for each in differences]
    low, high = welch_interval(means, [0.0, 0.0]) or (nan, nan)
    seeds = len(differences[0])
    within = fmean(variance(each) for each in differences)
    between = max(0.0, variance(means) - within / seeds)
    return fmean(means), low, high, sqrt(between), sqrt(within)


def _text(value: float, sign: str = "") -> str:
    # Sums of a few values of five digits: the rest of a float is an error of its arithmetic.
    return f"{rounded(Decimal(str(round(value, 9))), 1):{sign}}"


def spread_over_selections() -> str:
    """Means of three methods with each teacher, and their differences with the deviations of selections and seeds."""
    known = {run["teacher"] for run in results_of(SPREAD)["runs"]}
    teachers = [teacher for teacher in TEACHERS if teacher in known]
    means: Rows = [
        (
            _of_teacher(teacher),
            [
                Cell(_text(fmean(chain.from_iterable(_by_selection(variant, teacher).values()))))
                for variant in _NAMES
            ],
        )
        for teacher in teachers
    ]
    rows: Rows = []
    for teacher in teachers:
        for one, other in _PAIRS:
            middle, low, high, selections, seeds = spread_difference(one, other, teacher)
            cells = [
                Cell(TEACHERS[teacher]),
                Cell(f"{_text(middle, '+')} ({_text(low, '+')} to {_text(high, '+')})"),
                Cell(_text(selections)),
                Cell(_text(seeds)),
            ]
            rows.append((f"{_NAMES[one]} minus {_NAMES[other]}", cells))
    return "\n".join(
        [
            table(("test accuracy, %", *_NAMES.values()), means),
            table(("difference", "teacher", "95 % interval", "selections", "seeds"), rows),
        ]
    )


TABLES = (frontier, spread_over_selections)
