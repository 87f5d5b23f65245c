"""A measured quantity: the median of its measurements, with the lowest and the highest."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median, lowest and highest of some measurements."""

    median: float
    lowest: float
    highest: float

    def times(self, factor: float) -> Spread:
        """Return the same measurements in another unit; the factor is positive."""
        return Spread(
            median=self.median * factor, lowest=self.lowest * factor, highest=self.highest * factor
        )

    def plus(self, other: Spread) -> Spread:
        """Return the sum of two quantities that are measured apart, from the lowest to the highest that is possible."""
        return Spread(
            median=self.median + other.median,
            lowest=self.lowest + other.lowest,
            highest=self.highest + other.highest,
        )


def spread_of(values: Sequence[float]) -> Spread:
    """Return the spread of at least one measurement."""
    return Spread(median=median(values), lowest=min(values), highest=max(values))
