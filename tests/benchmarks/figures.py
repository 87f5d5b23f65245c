"""A figure: two sides measured in turn, the median of their ratio and how sure it is."""

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
    """One line of the table."""

    name: str
    ratio: float
    low: float
    """95 % bootstrap interval of the median ratio; equal to it where nothing varies."""
    high: float
    ours: float
    """Median, in `unit`."""
    theirs: float
    """Of the baseline, in `unit`."""
    unit: str
    aim: str
    """Of the ratio, as >= or <= a number; empty where there is none."""
    command: str

    @property
    def is_met(self) -> bool:
        """Whether the median ratio reaches the aim."""
        if not self.aim:
            return True
        sign, _, limit = self.aim.partition(" ")
        return self.ratio >= float(limit) if sign == ">=" else self.ratio <= float(limit)


def seconds(function: Callable[[], Any]) -> float:
    """That a call takes."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def in_turn(
    ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int, *, warm_up: int = 1
) -> list[tuple[float, float]]:
    """Seconds of both, `rounds` times, the first of a round now the one and now the other."""
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
    """From seconds of both sides.

    faster  the ratio is theirs / ours (how many times faster we are); ours / theirs (our cost) otherwise
    scale   from seconds to `unit`
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
    """A ratio ours / theirs that does not vary, as of bytes."""
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
    """Of the median: 2.5 to 97.5 per cent of its bootstrap distribution."""
    generator = np.random.default_rng(0)
    resampled = generator.choice(np.asarray(values), (_RESAMPLES, len(values)))
    low, high = np.percentile(np.median(resampled, axis=1), [2.5, 97.5])
    return float(low), float(high)
