"""Judges that compare with another student: in a sweep `baseline` may name an arm, whose student of the seed it is."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.config import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pipeline.config import EvaluateConfig
    from pipeline.grid import Point

COMPARING = ("distance_correlation", "unicam")
"""Judges whose options have a `baseline`."""


def named_baselines(config: EvaluateConfig) -> set[str]:
    """What the judges that are asked name as baseline."""
    options = [getattr(config.evaluate, judge) for judge in COMPARING if judge in config.asked]
    return {option.baseline for option in options if option.baseline is not None}


def with_baselines(config: EvaluateConfig, runs: Mapping[str, str | None]) -> EvaluateConfig:
    """The config with each baseline that is one of `runs` replaced by that run; by none where the run is None.

    runs  arm -> the run of its student; None for the arm that is judged itself
    """
    changed = {}
    for judge in COMPARING:
        options = getattr(config.evaluate, judge)
        if options.baseline in runs:
            changed[judge] = replace(options, baseline=runs[options.baseline])
    return replace(config, evaluate=replace(config.evaluate, **changed))


def matching_run(arm: str, point: Point, candidates: Mapping[str, Point]) -> str:
    """The only run of an arm whose options of the grid are not other than `point`'s.

    candidates  run -> its point
    """
    found = [
        run
        for run, other in candidates.items()
        if all(point.get(option, value) == value for option, value in other.items())
    ]
    if len(found) != 1:
        raise ConfigError(
            f"baseline={arm} names an arm with {len(found)} students that fit one point of another arm; choose an arm "
            "without options of its own in grid, or name a run"
        )
    return found[0]
