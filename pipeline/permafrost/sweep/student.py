"""A student of a sweep, and the runs that train and evaluate it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from permafrost.config.evaluators import ShiftOptions
from permafrost.config.runs import RUNS
from permafrost.evaluation.baselines import named_baselines
from permafrost.evaluation.evaluators.quantities import evaluators_of
from permafrost.evaluation.results import METRICS_NAME, evaluation_folder, missing_evaluators
from permafrost.loading.selection import HOLDOUT
from permafrost.models.saved import is_finished

if TYPE_CHECKING:
    from pathlib import Path

    from permafrost.config.distillation import DistillConfig
    from permafrost.config.points import Point
    from permafrost.config.verbs import EvaluateConfig


@dataclass(frozen=True, kw_only=True)
class StudentRun:
    """A student to train, unless it is trained, and to evaluate. The run is done when its metrics exist."""

    distill: DistillConfig
    evaluate: EvaluateConfig
    metrics_folder: str = "evaluate"
    """Folder of the metrics within the run's folder."""

    @property
    def name(self) -> str:
        """Name of the student's run."""
        return self.distill.run

    @property
    def baselines(self) -> tuple[str, ...]:
        """Names of the runs with which the evaluators compare this one."""
        return tuple(sorted(named_baselines(self.evaluate)))

    @property
    def metrics(self) -> Path:
        """File with the metrics by split, as written by evaluate."""
        return RUNS / self.name / self.metrics_folder / METRICS_NAME

    @property
    def is_done(self) -> bool:
        """True if every evaluator is done. Raises ConfigError if one was run with other options."""
        return not missing_evaluators(self.metrics.parent, self.evaluate)

    @property
    def epochs(self) -> int:
        """Maximum number of epochs that remain to be trained."""
        return 0 if is_finished(RUNS / self.name / "distill") else self.distill.trainer.epochs


@dataclass(frozen=True, kw_only=True)
class Student:
    """One student of the sweep."""

    arm: str
    point: Point
    """Point of the grid, restricted to the options that its arm has."""
    seed: int
    distill: DistillConfig
    evaluate: EvaluateConfig

    @property
    def name(self) -> str:
        """Name of the student's run."""
        return self.distill.run

    @property
    def row(self) -> dict[str, Any]:
        """Row of the student in sweep.json."""
        return {"arm": self.arm, "point": self.point, "seed": self.seed, "run": self.name}

    def final_run(self) -> StudentRun:
        """Return the run that computes its metrics on evaluate.splits."""
        return StudentRun(
            distill=self.distill,
            evaluate=self.evaluate,
            metrics_folder=evaluation_folder(self.evaluate.evaluate.against),
        )

    def selection_run(self, split: str, metric: str) -> StudentRun:
        """Return the run that computes the metric only on the split by which points are selected."""
        options = self.evaluate.evaluate
        options = replace(
            options,
            against=None,
            splits=(split,),
            # Held-out records are in the store that the student is trained on, not in evaluate.store.
            store=None if split == HOLDOUT else options.store,
            shift=ShiftOptions(),
            num_pictures=0,
        )
        return StudentRun(
            distill=self.distill,
            evaluate=replace(self.evaluate, evaluate=options, evaluators=evaluators_of(metric)),
            metrics_folder=f"select/{split}",
        )
