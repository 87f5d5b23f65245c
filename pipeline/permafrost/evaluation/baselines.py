"""Baseline runs of the evaluators that compare a student with another run."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from permafrost.config.evaluators import EVALUATORS
from permafrost.config.runs import RUNS
from permafrost.models.saved import is_finished

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from permafrost.config.verbs import EvaluateConfig

logger = logging.getLogger("permafrost.evaluate")


def _comparing() -> list[str]:
    return [name for name, options in EVALUATORS.items() if options.compares]


def named_baselines(config: EvaluateConfig) -> set[str]:
    """Baselines that the requested evaluators name."""
    options = [
        getattr(config.evaluate, evaluator)
        for evaluator in _comparing()
        if evaluator in config.requested_evaluators
    ]
    return {option.baseline for option in options if option.baseline is not None}


def with_baselines(config: EvaluateConfig, runs: Mapping[str, str | None]) -> EvaluateConfig:
    """Return the config with each baseline that is a key of `runs` replaced by its run, or by None.

    runs  arm -> the run of its student, None for the arm that is being evaluated
    """
    changed = {}
    for evaluator in _comparing():
        options = getattr(config.evaluate, evaluator)
        if options.baseline in runs:
            changed[evaluator] = replace(options, baseline=runs[options.baseline])
    return replace(config, evaluate=replace(config.evaluate, **changed))


def without_unknown_arms(config: EvaluateConfig, typed: Sequence[str]) -> EvaluateConfig:
    """Return the config without the baselines of an experiment that are arms of its sweep, and not runs.

    A single student is not compared with an arm, which has one student for each seed. A baseline that was typed stays,
    so that its absence is an error.

    typed  words of the command line
    """
    if any(".baseline=" in word for word in typed):
        return config
    arms = {name for name in named_baselines(config) if not is_finished(RUNS / name / "distill")}
    for arm in sorted(arms):
        logger.info(
            "the comparison with baseline=%s is left out, as there is no run of that name (an arm is known in its "
            "sweep only); name a run with evaluate.<evaluator>.baseline=",
            arm,
        )
    return with_baselines(config, dict.fromkeys(arms))
