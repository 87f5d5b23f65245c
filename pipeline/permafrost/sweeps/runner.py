"""A student of a sweep, and the execution of the unfinished ones with progress and errors.

Not here: search strategies and early stopping of poor points. Every grid point is trained to its last epoch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from permafrost.config.distillation import DistillConfig
from permafrost.config.points import Point
from permafrost.config.verbs import EvaluateConfig
from permafrost.core.errors import UserError
from permafrost.core.interrupts import check_interrupted
from permafrost.core.progress import progress
from permafrost.core.tasks import Executor, Task
from permafrost.evaluation.evaluator import evaluators_of
from permafrost.evaluation.results import (
    METRICS_NAME,
    evaluation_folder,
    folder_of_evaluation,
    missing_evaluators,
    place_beside,
)
from permafrost.loading.subset import HOLDOUT
from permafrost.models.saved import SavedNetwork
from permafrost.runs.folder import STUDENTS, RunFolder, saved_options
from permafrost.runs.mirrors import RunFiles
from permafrost.store.reader import Store
from permafrost.training.distill import plan_student

_RECORD_SECONDS, _MACS_PER_SECOND = 0.5e-3, 5e9
"""Seconds of a core for the views of a record, and multiply-accumulates of a forward pass in a second of training."""

logger = logging.getLogger("permafrost.sweep")


@dataclass(frozen=True, kw_only=True)
class ComposedStudent:
    """Options of a student's training and evaluation."""

    distill: DistillConfig
    evaluate: EvaluateConfig
    records: int
    """Number of records that an epoch reads."""

    @property
    def name(self) -> str:
        """Name of the student's run."""
        return self.distill.run


@dataclass(frozen=True, kw_only=True)
class StudentRun(ComposedStudent):
    """A student to train, unless it is trained, and to evaluate. The run is done when its metrics exist."""

    metrics_folder: str = "evaluate"
    """Folder of the metrics within the run's folder."""

    @property
    def baselines(self) -> tuple[str, ...]:
        """Names of the runs with which the evaluators compare this one."""
        return tuple(sorted(self.evaluate.baselines))

    @property
    def metrics(self) -> Path:
        """File with the metrics by split, as written by evaluate."""
        return RunFolder(self.name).path / self.metrics_folder / METRICS_NAME

    @property
    def is_done(self) -> bool:
        """True if every evaluator is done.

        Raises:
            ConfigError: If one was run with other options.
        """
        run, inputs = RunFolder(self.name), saved_options(self.metrics.parent).get("inputs", {})
        run.check(self.metrics_folder, self.evaluate.shared, inputs)
        return not missing_evaluators(self.metrics.parent, self.evaluate)

    @property
    def epochs(self) -> int:
        """Maximum number of epochs that remain to be trained."""
        return (
            0
            if SavedNetwork(RunFolder(self.name).path / "distill").is_finished
            else self.distill.trainer.epochs
        )


@dataclass(frozen=True, kw_only=True)
class Student(ComposedStudent):
    """One student of the sweep."""

    variant: str
    point: Point
    """Point of the grid, restricted to the options that its variant has."""
    seed: int
    reads: dict[str, str]
    """Fingerprints of the store and of the passes of its training, by name."""
    fingerprints: tuple[str, ...]
    """Fingerprints of all inputs of its training."""
    evaluated: Store
    """Store of the records to evaluate."""
    compared: dict[str, str]
    """Fingerprints of the passes that it is compared with, by name, if store.teacher names them for that alone."""

    def record_reads(self) -> None:
        """Write what it reads into the folder of its training, which keeps to it, unless the folder has options."""
        folder = RunFolder(self.name)
        if not saved_options(folder.path / "distill"):
            with folder.open("distill", self.distill, self.reads):
                pass

    @property
    def row(self) -> dict[str, Any]:
        """Row of the student in sweep.json, whose folder is relative to the folder of the sweep."""
        folder = f"{STUDENTS}/{self.name.rpartition('/')[2]}"
        return {"variant": self.variant, "point": self.point, "seed": self.seed, "run": folder}

    def final_run(self) -> StudentRun:
        """Return the run that computes its metrics on evaluate.splits."""
        run, against = RunFolder(self.name).path, self.evaluate.evaluate.against
        place = place_beside(run / evaluation_folder(against), self.evaluated)
        return self._run(self.evaluate, evaluation_folder(against, place), self.compared)

    def selection_run(self, split: str, metric: str) -> StudentRun:
        """Return the run that computes only the metric for selecting points.

        Args:
            split: Split of the metric; HOLDOUT is the records held out of training.
            metric: Name of the metric.
        """
        options, main, compared = self.evaluate.evaluate, f"select/{split}", self.compared
        if split != HOLDOUT:
            main += place_beside(RunFolder(self.name).path / main, self.evaluated)
        elif options.store is not None:
            compared = {}
        options = replace(
            options.without_requests(),
            against=None,
            splits=(split,),
            # Held-out records are in the store that the student is trained on, not in evaluate.store.
            store=None if split == HOLDOUT else options.store,
            num_pictures=0,
        )
        evaluate = replace(self.evaluate, evaluate=options, evaluators=evaluators_of(metric))
        return self._run(evaluate, main, compared)

    def _run(self, evaluate: EvaluateConfig, main: str, compared: dict[str, str]) -> StudentRun:
        """Return the run of an evaluation, whose folder is `main` or next to it."""
        path, options, picture = RunFolder(self.name).path, evaluate.evaluate, None
        if (student := SavedNetwork(path / "distill")).is_finished:
            picture = student.describe().in_frame(options.frame, self.evaluated).picture
        return StudentRun(
            distill=self.distill,
            evaluate=evaluate,
            records=self.records,
            metrics_folder=folder_of_evaluation(path, main, options, picture, compared),
        )


def estimate_seconds(runs: Sequence[StudentRun]) -> float:
    """Estimate the seconds in which one core trains what remains of students, by the network of the first one.

    It is infinite with a live teacher, whose cost is not estimated.
    """
    import torch

    from permafrost.core.generators import kept_generators
    from permafrost.models.cost import measure_cost
    from permafrost.models.providers import build_model

    if runs[0].distill.mode == "live":
        return math.inf
    try:
        job = plan_student(runs[0].distill)
        spec = job.spec()
        with kept_generators():
            model = build_model(spec.model, spec.data_classes, may_replace_head=True)
    except UserError:  # of one student; the others are trained all the same
        return math.inf
    record = torch.zeros(1, *job.store.form.input_shape(spec.input_size))
    seconds = _RECORD_SECONDS + measure_cost(model, record).macs / _MACS_PER_SECOND
    return seconds * sum(run.epochs * run.records for run in runs)


# ---- runner ----------------------------------------------------------------------------------------


class StudentRunner:
    """Runner of students in parallel. A failed student does not stop the others."""

    def __init__(
        self, executor: Executor, build_task: Callable[[StudentRun], Task], at_once: int | None
    ) -> None:
        """Prepare the runner.

        Args:
            executor: Executor of the tasks.
            build_task: Function that makes the task of a run.
            at_once: Largest number of tasks in parallel; None for no limit.
        """
        self.executor, self.build_task, self.at_once = executor, build_task, at_once
        self.done: set[str] = set()
        """Names of the students that were trained or evaluated by this runner."""
        self.trained: set[str] = set()
        """Those of them that were trained."""
        self.errors: list[str] = []

    def finish(
        self, runs: Sequence[StudentRun], on_done: Callable[[str], object] = lambda name: None
    ) -> None:
        """Finish each run whose metrics are missing, and call `on_done` with the name of each that is finished."""
        missing = {run.name: run for run in runs if not run.is_done}
        if not missing:
            return
        untrained = {name for name, run in missing.items() if run.epochs}
        splits = ", ".join(next(iter(missing.values())).evaluate.evaluate.splits)
        logger.info(
            "%d of %d students to evaluate on %s, of which %d to train",
            len(missing),
            len(runs),
            splits,
            len(untrained),
        )
        total = sum(run.epochs * run.records for run in missing.values())
        finished = done = 0
        with progress("sweep", total=total, unit="record") as bar:

            def show(name: str, line: str) -> None:
                nonlocal done
                done += missing[name].records
                bar.set_description(f"sweep {finished}/{len(missing)} students", refresh=False)
                bar.set_postfix_str(f"{Path(name).name} {line}", refresh=False)
                bar.update(done - bar.n)  # this process may have counted some of them

            tasks = [self.build_task(run) for run in missing.values()]
            for outcome in self.executor.run_tasks(tasks, show, self.at_once):
                check_interrupted()
                RunFiles(outcome.name).fetch()  # of the machine that ran it
                run, error = missing[outcome.name], outcome.error
                if not error and not run.is_done:
                    error = (
                        f"{run.metrics} of the machine that ran it is not visible here; set run= to a folder on shared "
                        "storage"
                    )
                if outcome.traceback:
                    logger.error("%s failed:", outcome.name)
                    for line in outcome.traceback.splitlines():
                        logger.error("%s", line)
                if error:
                    self.errors.append(f"{outcome.name}: {error}")
                    continue
                finished += 1
                if not outcome.is_elsewhere:
                    self.done.add(outcome.name)
                    self.trained |= {outcome.name} & untrained
                on_done(outcome.name)
                bar.set_description(f"sweep {finished}/{len(missing)} students")
                logger.info(
                    "%s evaluated on %s (%d of %d)", outcome.name, splits, finished, len(missing)
                )
