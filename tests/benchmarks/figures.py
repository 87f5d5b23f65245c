"""A figure: two sides measured alternately, the median of their ratio and its confidence interval."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

_RESAMPLES = 2000


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

    @property
    def is_met(self) -> bool:
        """True if the median ratio reaches the aim, or if there is no aim."""
        if not self.aim:
            return True
        sign, _, limit = self.aim.partition(" ")
        return self.ratio >= float(limit) if sign == ">=" else self.ratio <= float(limit)


def seconds(function: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def in_turn(
    ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int, *, warm_up: int = 1
) -> list[tuple[float, float]]:
    """Seconds of both sides in each of `rounds` rounds. The side that runs first alternates."""
    for _ in range(warm_up):
        ours()
        theirs()
    pairs = []
    for number in range(rounds):
        if number % 2:
            second = seconds(theirs)
            pairs.append((seconds(ours), second))
        else:
            first = seconds(ours)
            pairs.append((first, seconds(theirs)))
    return pairs


def figure(
    name: str,
    pairs: Sequence[tuple[float, float]],
    *,
    faster: bool,
    unit: str,
    scale: float,
    aim: str,
) -> Figure:
    """Compute a figure from the seconds of both sides.

    faster  the ratio is theirs / ours (our speedup), otherwise ours / theirs (our cost)
    scale   factor from seconds to `unit`
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
