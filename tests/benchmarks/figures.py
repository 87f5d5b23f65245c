"""A figure: two sides measured alternately, the median of their ratio and its confidence interval."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np

_RESAMPLES = 2000
_TOLERANCE = 0.02
"""Relative change that is not reported, for ratios that have no interval, such as those of memory."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Row of the table."""

    name: str
    ratio: float
    low: float
    """Lower end of the 95 % bootstrap interval of the median ratio, which equals the ratio where nothing varies."""
    high: float
    ours: float
    """Median of our side, in `unit`."""
    theirs: float
    """Median of the baseline, in `unit`."""
    unit: str
    aim: str
    """Aim of the ratio, ">= number" or "<= number", or empty if there is no aim."""
    command: str
    sides: dict[str, float] = field(default_factory=dict)
    """Medians of all sides, ours first, if there are several baselines. The figure compares ours with the best."""

    @property
    def larger_is_better(self) -> bool:
        """True for a speedup. A ratio without an aim is a cost."""
        return self.aim.startswith(">=")

    @property
    def is_met(self) -> bool:
        """True if the median ratio reaches the aim, or if there is no aim."""
        if not self.aim:
            return True
        limit = float(self.aim.partition(" ")[2])
        return self.ratio >= limit if self.larger_is_better else self.ratio <= limit

    def is_worse_than(self, earlier: Figure) -> bool:
        """Return whether the ratio is worse than an earlier one beyond both intervals and by more than _TOLERANCE."""
        if self.larger_is_better:
            return self.high < earlier.low and self.ratio < earlier.ratio * (1 - _TOLERANCE)
        return self.low > earlier.high and self.ratio > earlier.ratio * (1 + _TOLERANCE)


def seconds(function: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def in_rounds(
    sides: Mapping[str, Callable[[], Any]], rounds: int, *, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of each side in each of `rounds` rounds. The side that runs first changes from round to round."""
    for _ in range(warm_up):
        for function in sides.values():
            function()
    names = list(sides)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(seconds(sides[name]))
    return times


def in_turn(
    ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int, *, warm_up: int = 1
) -> list[tuple[float, float]]:
    """Seconds of both sides in each of `rounds` rounds. The side that runs first alternates."""
    times = in_rounds({"ours": ours, "theirs": theirs}, rounds, warm_up=warm_up)
    return list(zip(times["ours"], times["theirs"], strict=True))


def figure(
    name: str,
    pairs: Sequence[tuple[float, float]],
    *,
    faster: bool,
    unit: str,
    scale: float,
    aim: str,
    sides: Mapping[str, float] | None = None,
) -> Figure:
    """Compute a figure from the seconds of both sides.

    faster  the ratio is theirs / ours (our speedup), otherwise ours / theirs (our cost)
    scale   factor from seconds to `unit`
    sides   medians of more than two sides, in `unit`
    """
    ours, theirs = np.asarray(pairs).T
    ratios = theirs / ours if faster else ours / theirs
    low, high = interval(ratios)
    return Figure(
        name=name,
        ratio=median(ratios.tolist()),
        low=low,
        high=high,
        ours=median(ours.tolist()) * scale,
        theirs=median(theirs.tolist()) * scale,
        unit=unit,
        aim=aim,
        command=f"make bench ARGS={name}",
        sides=dict(sides or {}),
    )


def against_best(
    name: str, times: Mapping[str, Sequence[float]], *, unit: str, scale: float, aim: str
) -> Figure:
    """Compute our speedup over the best of several baselines, which is the one with the lowest median.

    times  seconds of each side in each round, ours first
    """
    ours, *peers = times
    best = min(peers, key=lambda peer: median(times[peer]))
    return figure(
        name,
        list(zip(times[ours], times[best], strict=True)),
        faster=True,
        unit=unit,
        scale=scale,
        aim=aim,
        sides={side: median(values) * scale for side, values in times.items()},
    )


def exact(name: str, ours: float, theirs: float, *, unit: str, aim: str) -> Figure:
    """Figure of a ratio ours / theirs that does not vary between runs, such as bytes."""
    ratio = ours / theirs
    return Figure(
        name=name,
        ratio=ratio,
        low=ratio,
        high=ratio,
        ours=ours,
        theirs=theirs,
        unit=unit,
        aim=aim,
        command=f"make bench ARGS={name}",
    )


def interval(values: Any) -> tuple[float, float]:
    """Interval of the median: the 2.5th and 97.5th percentiles of its bootstrap distribution."""
    generator = np.random.default_rng(0)
    resampled = generator.choice(np.asarray(values), (_RESAMPLES, len(values)))
    low, high = np.percentile(np.median(resampled, axis=1), [2.5, 97.5])
    return float(low), float(high)
