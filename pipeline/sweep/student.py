"""A student of a sweep, and the runs that train it and evaluate it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pipeline.config.evaluators import ShiftOptions
from pipeline.config.runs import RUNS
from pipeline.evaluation.evaluators.quantities import evaluators_of
from pipeline.evaluation.results import METRICS_NAME, missing_evaluators
from pipeline.loading.selection import HOLDOUT
from pipeline.models.saved import is_finished

if TYPE_CHECKING:
    from pathlib import Path

    from pipeline.config.distillation import DistillConfig
    from pipeline.config.points import Point
    from pipeline.config.verbs import EvaluateConfig


@dataclass(frozen=True, kw_only=True)
class StudentRun:
    """A student to train, where it is not trained yet, and to evaluate; done when its metrics are there."""

    distill: DistillConfig
    evaluate: EvaluateConfig
    metrics_folder: str = "evaluate"
    """The folder of the metrics, in the run's."""

    @property
    def name(self) -> str:
        """The student's run."""
        return self.distill.run

    @property
    def metrics(self) -> Path:
        """By split, as evaluate writes them."""
        return RUNS / self.name / self.metrics_folder / METRICS_NAME

    @property
    def is_done(self) -> bool:
        """Whether every evaluator is; ConfigError where one was asked otherwise."""
        return not missing_evaluators(self.metrics.parent, self.evaluate)

    @property
    def epochs(self) -> int:
        """Epochs that may still have to be trained."""
        return 0 if is_finished(RUNS / self.name / "distill") else self.distill.trainer.epochs


@dataclass(frozen=True, kw_only=True)
class Student:
    """One student of the sweep."""

    arm: str
    point: Point
    """Of the grid: the options that its arm knows."""
    seed: int
    distill: DistillConfig
    evaluate: EvaluateConfig

    @property
    def name(self) -> str:
        """Its run."""
        return self.distill.run

    @property
    def row(self) -> dict[str, Any]:
        """As sweep.json lists it."""
        return {"arm": self.arm, "point": self.point, "seed": self.seed, "run": self.name}

    def final_run(self) -> StudentRun:
        """What makes its metrics on evaluate.splits."""
        return StudentRun(distill=self.distill, evaluate=self.evaluate)

    def selection_run(self, split: str, metric: str) -> StudentRun:
        """What makes the metric on the split by which points are chosen, and on no other."""
        options = self.evaluate.evaluate
        options = replace(
            options,
            splits=(split,),
            # What was held out is of the store that the student learns from, wherever it is reported.
            store=None if split == HOLDOUT else options.store,
            shift=ShiftOptions(),
            num_pictures=0,
        )
        return StudentRun(
            distill=self.distill,
            evaluate=replace(self.evaluate, evaluate=options, evaluators=evaluators_of(metric)),
            metrics_folder=f"select/{split}",
        )
