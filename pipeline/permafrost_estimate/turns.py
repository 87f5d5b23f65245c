"""Measurements that take turns within a budget of time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import monotonic, perf_counter

from permafrost.core.progress import progress

_STEPS_ON_GPU = 4
"""Steps that are counted together on a GPU."""


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


def seconds_per_record(
    step: Callable[[], int], synchronize: Callable[[], None], device_type: str
) -> float:
    """Take steps and return their seconds per record.

    A GPU's next batch is read during a step, so a single step would not contain the time in which a slower reading is
    waited for. There the first step is not counted, as its batch was read during the other student's steps.

    Args:
        step: Takes a step and returns its number of records.
        synchronize: Waits until the device has finished its work.
        device_type: Type of the device, such as cuda.
    """
    uncounted, counted = (1, _STEPS_ON_GPU) if device_type == "cuda" else (0, 1)
    for _ in range(uncounted):
        step()
        synchronize()
    started = perf_counter()
    records = sum(step() for _ in range(counted))
    synchronize()
    return (perf_counter() - started) / records
