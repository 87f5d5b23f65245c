"""Distill and evaluate many students from one store: every variant with every seed, several in parallel.

    permafrost sweep experiment=demo
    permafrost sweep experiment=demo seeds=[5,6,7] parallel=4 cluster.gpus_per_student=0.25
    permafrost sweep store.path=stores/demo run=taus executor=serial \\
        "variants={t1: ['method.tau=1'], t4: ['method.tau=4']}"
    permafrost sweep experiment=demo run=search subset.holdout=10 select=holdout.accuracy \\
        "grid={method.tau: [1, 4], method.lambda_map: [1, 5, 10]}"

A variant uses the options of `grid` that its method has. With `select`, all students are evaluated on that split, and
only those of each variant's best point (by the mean over seeds) on evaluate.splits.

Reads   <store.path>
Writes  runs/<run>/students/<variant>-seed<n>-<id>/ in the form of distill and evaluate (with select/<split>/ next to
        evaluate/), then runs/<run>/sweep.json
Rerun   a student's id is the hash of the options and inputs of its training, so finished students are not trained
        again; other splits, frames, passes or stores are evaluated next to the earlier ones
"""

from __future__ import annotations

import logging
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from types import MappingProxyType
from typing import Any

from permafrost.cluster.executors import ExecutorChoice
from permafrost.config.verbs import SWEEP_SUMMARIES, Plan, SweepConfig, report_command
from permafrost.core.errors import UserError
from permafrost.runs.folder import COST_NAME, STUDENTS, SWEEP_NAME, RunFolder
from permafrost.storage.files import file_at
from permafrost.storage.rooted_paths import rooted
from permafrost.storage.signed_files import write_json
from permafrost.store.entries import ManifestError
from permafrost.store.manifest import MANIFEST_NAME
from permafrost.sweeps.plan import baselines_first, compose_students, plan_students
from permafrost.sweeps.runner import Student, StudentRun, StudentRunner, estimate_seconds
from permafrost.sweeps.select import choose, split_and_metric
from permafrost.sweeps.student_task import StudentTask
from permafrost.training.distill import StudentPlan, plan_student

logger = logging.getLogger("permafrost.sweep")


class SweepError(UserError, RuntimeError):
    """Error for students that could not be finished. The finished ones are kept."""


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """Number of students, and numbers of those that this call has trained, and has trained or evaluated."""

    students: int
    trained_now: int
    finished_now: int
    table: str
    summary: str
    """Text table of mean and standard deviation over seeds."""
    next: str = ""


class SweepTable:
    """Writer of sweep.json: the finished students of a sweep, which a report shows while others are trained."""

    def __init__(
        self,
        path: Path,
        total: int,
        students: Sequence[Student],
        selection: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Name the table.

        Args:
            path: File of the table.
            total: Number of students of the sweep.
            students: Students that are reported.
            selection: How their points were selected.
        """
        self._path, self._students = path, students
        self._values = {**selection, "students": total}
        self._finished: set[str] = set()

    def write(self, *names: str) -> None:
        """Write the table with these students, which have finished, and with those that other processes have ended."""
        self._finished.update(names)
        left = [student for student in self._students if student.name not in self._finished]
        self._finished.update(each.name for each in left if each.final_run().is_done)
        listed = [student for student in self._students if student.name in self._finished]
        folders = {each.row["run"]: each.final_run().metrics_folder for each in listed}
        rows = [student.row for student in listed]
        write_json(self._path, {**self._values, "runs": rows, "evaluations": folders})


@dataclass(frozen=True)
class SweepPlan(Plan):
    """Students of a sweep, seeds outermost, each with its options and its inputs."""

    config: SweepConfig
    students: list[Student]
    unpacked: dict[str, str] = field(default_factory=dict)
    """Description of a sweep whose store does not exist yet; it has no students here."""

    def first_runs(self, students: Sequence[Student]) -> list[StudentRun]:
        """Return the runs of students that precede a selection of points, or else their final ones."""
        if self.config.select is None:
            return [student.final_run() for student in students]
        return [
            student.selection_run(*split_and_metric(self.config.select)) for student in students
        ]

    def count_missing(self) -> int:
        """Return the number of students whose first run is not finished."""
        return sum(not run.is_done for run in self.first_runs(self.students))

    def describe_work(self) -> dict[str, str]:
        if self.unpacked:
            return self.unpacked
        missing = self.count_missing()
        return {
            "students": f"{len(self.students)} (variants: {len(self.config.variants)}, seeds: "
            f"{len(self.config.seeds)}) from {self.students[0].distill.store.path}",
            "unfinished": str(missing),
            "executor": _describe_executor(
                self.config, missing, lambda: estimate_seconds(self.first_runs(self.students))
            ),
            "new": self.describe_new(),
            "folder": str(RunFolder(self.config.run).path / STUDENTS),
        }

    def describe_new(self) -> str:
        """Say how many students are new, and what differs from the nearest student for each new variant and point."""
        old = [*RunFolder(self.config.run).path.glob(f"{STUDENTS}/*/distill/{COST_NAME}")]
        new = [
            each
            for each in self.students
            if RunFolder(each.name).path / "distill" / COST_NAME not in old
        ]
        changes = [
            plan.describe_new([path.parent for path in old])
            for plan in _plans_of_points(new if old else [])
        ]
        counted = f"{len(new)} of {len(self.students)} students are new"
        return ": ".join([counted, *filter(None, ["; ".join(dict.fromkeys(changes))])])

    def run(self) -> SweepResult:
        """Finish the students that are missing.

        Raises:
            ConfigError: If a student cannot be trained as its options say.
            SweepError: If students could not be finished. The others are in sweep.json.
        """
        config, students = self.config, self.students
        # Its checks come before hours of others.
        _plans_of_points([student for student in students if student.final_run().epochs])
        reported = students if config.select is None else []  # which are selected later
        missing = self.count_missing()
        path = RunFolder(config.run).path / SWEEP_NAME
        with ExecutorChoice(config.executor, config.cluster) as choice:
            executor, reason = choice.for_tasks(
                missing, config.parallel, lambda: estimate_seconds(self.first_runs(students))
            )
            logger.info(
                "%d students (variants: %d, seeds: %d) from %s, of which %d are finished; executor=%s%s",
                len(students),
                len(config.variants),
                len(config.seeds),
                students[0].distill.store.path,
                len(students) - missing,
                executor.name,
                f" ({reason})" if reason else "",
            )
            logger.info("%s", self.describe_new())
            with executor.alone(rooted(str(path.parent)), "writes what the students read"):
                for student in students:
                    student.record_reads()
            table = SweepTable(path, len(students), reported)
            table.write()
            # It reads the table as a report does, before any student is trained.
            _summarize(config.run)
            runner = StudentRunner(executor, StudentTask, config.parallel)
            if config.select is not None:
                runner.finish(self.first_runs(baselines_first(students)))
                candidates, reported = choose(students, *split_and_metric(config.select))
                selection = {"select": config.select, "candidates": candidates}
                table = SweepTable(path, len(reported), reported, selection)
                table.write()
            runner.finish(
                [student.final_run() for student in baselines_first(reported)], table.write
            )
        if runner.errors:
            raise SweepError(
                f"{len(runner.errors)} of {len(students)} students failed ({path} lists the others): "
                + " | ".join(runner.errors)
            )
        return SweepResult(
            students=len(students),
            trained_now=len(runner.trained),
            finished_now=len(runner.done),
            table=str(path),
            summary=_summarize(config.run),
            next=report_command(students[0].distill.store.path, config.run),
        )


def _plans_of_points(students: Sequence[Student]) -> list[StudentPlan]:
    """Plan a student, of any seed, of each variant and point."""
    of_points = {f"{each.variant} {each.point}": each for each in students}
    return [plan_student(each.distill) for each in of_points.values()]


def plan_sweep(config: SweepConfig, base: Sequence[str] = ()) -> SweepPlan:
    """Plan every student of a sweep, or count them if their store does not exist yet.

    Args:
        config: Options of the sweep.
        base: Overrides from the command line, which all variants share.

    Raises:
        ConfigError: If variants, grid or options do not fit.
    """
    try:
        return SweepPlan(config, plan_students(config, base))
    except ManifestError:
        if not (unpacked := _describe_unpacked(config, base)):
            raise
        return SweepPlan(config, [], unpacked)


def _describe_unpacked(config: SweepConfig, base: Sequence[str]) -> dict[str, str]:
    """Describe a sweep over stores that do not exist; empty if all of them do."""
    stores = [trained.store for _, _, trained, _ in compose_students(config, base)]
    missing = {each.path for each in stores if not file_at(each.folder / MANIFEST_NAME).exists()}
    if not missing:
        return {}
    packing = [word for word in base if word.startswith(_PACKING_ARGUMENTS)]
    count = len(stores) * len(config.seeds)
    return {
        "students": f"{count} (variants: {len(config.variants)}, seeds: {len(config.seeds)})",
        "store": f"{', '.join(sorted(missing))} does not exist; make it first with: "
        + shlex.join(["permafrost", "precompute", *packing])
        + (
            ""
            if any(word.startswith("experiment=") for word in packing)
            else ", and your data= and teacher="
        ),
        "executor": _describe_executor(config, count, lambda: math.inf),
        "folder": str(RunFolder(config.run).path / STUDENTS),
    }


_PACKING_ARGUMENTS = ("experiment=", "plugins=", "store.path=", "store=", "data", "teacher")
"""Beginnings of the arguments of a sweep that precompute takes, too."""


def _describe_executor(config: SweepConfig, missing: int, estimate: Callable[[], float]) -> str:
    """Say where students are trained, and how to do without Ray."""
    executor, reason = ExecutorChoice(config.executor, config.cluster).for_tasks(
        missing, config.parallel, estimate
    )
    hint = "; this starts or joins Ray, set executor=serial to stay in this process"
    return executor.name + f" ({reason})" * bool(reason) + hint * (executor.name == "ray")


def sweep_students(config: SweepConfig, base: Sequence[str] = ()) -> SweepResult:
    """Finish every student for each variant, point and seed.

    Args:
        config: Options of the sweep.
        base: Overrides from the command line, which all variants share.

    Raises:
        ConfigError: If variants, grid or options do not fit.
        SweepError: If students could not be finished. The others are in sweep.json.
    """
    return SweepPlan(config, plan_students(config, base)).run()


def _summarize(run: str) -> str:
    """Return the texts that packages make of a sweep's table."""
    return "".join(f"\n{summary(run)}" for summary in map(resolve_name, SWEEP_SUMMARIES.values()))
