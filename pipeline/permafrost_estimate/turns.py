"""Measurements that take turns within a budget of time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import monotonic

from permafrost.core.progress import progress


class TimeBudget:
    """Seconds for the parts of an estimate, from its beginning on."""

    def __init__(self, seconds: float | None) -> None:
        """Begin to count.

        Args:
            seconds: Seconds of all parts, None for any number.
        """
        self.seconds = seconds
        self._started = monotonic()

    def remaining(self, share: float = 1.0) -> float:
        """Return the seconds until a share of the budget is used up, 0 if it is.

        Args:
            share: Share, at most 1.
        """
        if self.seconds is None:
            return float("inf")
        return max(0.0, self._started + share * self.seconds - monotonic())

    def in_turn(
        self,
        sides: Mapping[str, Callable[[], float]],
        rounds: int,
        what: str,
        share: float,
    ) -> dict[str, list[float]]:
        """Measure every side once in each round, in another order each time, after one that is not counted.

        A round is begun only while time is left, but the first one always is.

        Args:
            sides: Measurement of each side, by its name.
            rounds: Largest number of rounds.
            what: Title of the progress.
            share: Share of the budget at which the last round begins.

        Returns:
            Seconds of each round by side.
        """
        for measure in sides.values():
            measure()
        names = list(sides)
        seconds: dict[str, list[float]] = {name: [] for name in names}
        with progress(what, total=rounds, unit="round") as bar:
            for number in range(rounds):
                if number and self.remaining(share) == 0:
                    break
                first = number % len(names)
                for name in names[first:] + names[:first]:
                    seconds[name].append(sides[name]())
                bar.update(1)
        return seconds
