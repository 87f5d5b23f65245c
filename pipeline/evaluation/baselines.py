"""Baseline runs of the evaluators that compare a student with another run."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.config.evaluators import EVALUATORS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pipeline.config.verbs import EvaluateConfig

_COMPARING = [name for name, options in EVALUATORS.items() if options.compares]


def named_baselines(config: EvaluateConfig) -> set[str]:
    """Baselines that the requested evaluators name."""
    options = [
        getattr(config.evaluate, evaluator)
        for evaluator in _COMPARING
        if evaluator in config.requested_evaluators
    ]
    return {option.baseline for option in options if option.baseline is not None}


def with_baselines(config: EvaluateConfig, runs: Mapping[str, str | None]) -> EvaluateConfig:
    """Return the config with each baseline that is a key of `runs` replaced by its run, or by None.

    runs  arm -> the run of its student, None for the arm that is being evaluated
    """
    changed = {}
    for evaluator in _COMPARING:
        options = getattr(config.evaluate, evaluator)
        if options.baseline in runs:
            changed[evaluator] = replace(options, baseline=runs[options.baseline])
    return replace(config, evaluate=replace(config.evaluate, **changed))
