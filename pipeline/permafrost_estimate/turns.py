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
        self.unmeasured: list[str] = []
        """Options for which no time was left, as they are typed."""

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
        needed: int,
    ) -> dict[str, list[float]]:
        """Measure every side once in each round, in another order each time, after one that is not counted.

        A round is begun only while time is left, but the first one always is.

        Args:
            sides: Measurement of each side, by its name.
            rounds: Largest number of rounds.
            what: Title of the progress.
            share: Share of the budget at which the last round begins.
            needed: Number of sides, the first ones, that are measured in any case. The others are left out, and listed
                in `unmeasured`, if their first measurement would begin too late.

        Returns:
            Seconds of each round by side.
        """
        names: list[str] = []
        for name, measure in sides.items():
            if len(names) >= needed and self.remaining(share) == 0:
                self.unmeasured.append(name)
                continue
            measure()
            names.append(name)
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
