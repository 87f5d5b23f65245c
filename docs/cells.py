"""Cells of the generated tables: numbers as they are written, their spread, and the Markdown of a table."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from permafrost_report.comparison import welch_interval

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

Run = dict[str, Any]
"""Values of one student in a file of results."""


@dataclass(frozen=True)
class Cell:
    """Text of a cell, and the number by which its column is compared."""

    text: str
    number: float | None = None

    @property
    def bold(self) -> str:
        return f"**{self.text}**"


def rounded(value: Decimal, digits: int) -> Decimal:
    """Round as by hand: a 5 is rounded away from zero."""
    return value.quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP)


def numbers_of(runs: Sequence[Run], metric: str, scale: float = 100) -> list[Decimal]:
    """Values of a metric, exactly as they are written in the results."""
    return [Decimal(str(run[metric])) * Decimal(str(scale)) for run in runs]


def spread(runs: Sequence[Run], metric: str, scale: float = 100, digits: int = 1) -> Cell:
    """Mean and sample standard deviation over the runs."""
    values = numbers_of(runs, metric, scale)
    middle, width = rounded(mean(values), digits), rounded(stdev(values), digits)
    return Cell(f"{middle} &plusmn; {width}", float(middle))


def average(runs: Sequence[Run], metric: str, scale: float = 100, digits: int = 1) -> Cell:
    """Mean over the runs."""
    value = rounded(mean(numbers_of(runs, metric, scale)), digits)
    return Cell(str(value), float(value))


def single(value: float, scale: float = 1, digits: int = 2) -> Cell:
    """One number."""
    return Cell(str(rounded(Decimal(str(value)) * Decimal(str(scale)), digits)))


def difference(
    runs: Sequence[Run],
    baseline: Sequence[Run],
    metric: str = "accuracy",
    scale: float = 100,
    digits: int = 1,
    *,
    paired: bool = False,
) -> Cell:
    """Mean difference from the baseline and its 95 % interval, without one if a variant has a single value.

    A dash for the baseline itself.

    paired  whether values with the same number are pairs, as those of one teacher or one selection of images are;
            seeds are not
    """
    if runs == baseline:
        return Cell("&ndash;")
    middle, *bounds = difference_interval(runs, baseline, metric, scale, paired=paired)
    first, *others = (f"{rounded(value, digits):+}" for value in (middle, *bounds))
    return Cell(
        f"{first} ({' to '.join(others)})" if others else f"{first} (one seed)", float(middle)
    )


def difference_interval(
    runs: Sequence[Run],
    baseline: Sequence[Run],
    metric: str,
    scale: float = 100,
    *,
    paired: bool = False,
) -> list[Decimal]:
    """Mean difference, exactly, and the bounds of its 95 % interval: Welch's, or Student's over pairs.

    Without bounds if a variant has a single value.
    """
    first, second = numbers_of(runs, metric, scale), numbers_of(baseline, metric, scale)
    if paired:  # Welch's interval against a constant is Student's
        first, second = [a - b for a, b in zip(first, second, strict=True)], [Decimal(0)] * 2
    middle = mean(first) - mean(second)
    interval = welch_interval(*([float(value) for value in variant] for variant in (first, second)))
    return [middle, *(Decimal(str(bound)) for bound in interval or ())]


def by_seed(runs: Sequence[Run], metric: str) -> Cell:
    """Value of each run in per cent."""
    return Cell(", ".join(single(run[metric], 100, 1).text for run in runs))


def table(header: Sequence[str], rows: Iterable[tuple[str, Sequence[Cell]]]) -> str:
    """Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for label, cells in rows:
        texts = [label, *(cell.text for cell in cells)]
        lines.append("| " + " | ".join(texts) + " |")
    return "\n".join(re.sub(r"  +", " ", line) for line in lines) + "\n"


Rows = list[tuple[str, list[Cell]]]


def with_best(rows: Rows, columns: Sequence[int], best: Callable[..., float] = max) -> Rows:
    """Mark the best cells of some columns."""
    for column in columns:
        numbers = [cells[column].number for _, cells in rows]
        highest = best(number for number in numbers if number is not None)
        for _, cells in rows:
            if cells[column].number == highest:
                cells[column] = Cell(cells[column].bold, highest)
    return rows
