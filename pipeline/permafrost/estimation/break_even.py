"""Training from which a store is cheaper than a teacher that runs in every step."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from permafrost.estimation.spread import Spread


@dataclass(frozen=True, kw_only=True)
class BreakEven:
    """Quantity of training at which both cost the same; infinite where the live teacher is not dearer."""

    median: float
    lowest: float
    highest: float

    def in_students(self, epochs: int) -> BreakEven:
        """Return the number of students of `epochs` epochs each, for a break-even in epochs."""
        return BreakEven(
            median=self.median / epochs, lowest=self.lowest / epochs, highest=self.highest / epochs
        )


def break_even_epochs(annotation: Spread, saved_per_epoch: Spread) -> BreakEven:
    """Return the epochs, over all students, after which stored targets have cost as much as a live teacher.

    annotation       seconds of a worker that store the teacher's targets of all records, once
    saved_per_epoch  seconds by which an epoch with the live teacher is longer than one with stored targets

    Lowest and highest are those of the extreme measurements: the cheapest annotation with the largest saving, and the
    dearest with the smallest.
    """
    return BreakEven(
        median=_epochs(annotation.median, saved_per_epoch.median),
        lowest=_epochs(annotation.lowest, saved_per_epoch.highest),
        highest=_epochs(annotation.highest, saved_per_epoch.lowest),
    )


def _epochs(cost: float, saved: float) -> float:
    return cost / saved if saved > 0 else inf
