"""Distil and judge many students from one store: every arm with every seed, several side by side.

    python -m stages.sweep experiment=demo
    python -m stages.sweep experiment=demo seeds=[5,6,7] parallel=4 cluster.gpus_per_student=0.25
    python -m stages.sweep store.path=stores/demo run=taus executor=serial \\
        "arms={t1: ['method.tau=1'], t4: ['method.tau=4']}"
    python -m stages.sweep experiment=demo run=search subset.holdout=10 select=holdout.accuracy \\
        "grid={method.tau: [1, 4], method.lambda_map: [1, 5, 10]}"

An arm takes the options of `grid` that its method knows. With `select` all students are judged on that
split, and only those of each arm's best point (in the mean over seeds) on evaluate.splits.

Reads   <store.path>
Writes  runs/<run>/students/<arm>-seed<n>-<id>/ as distill and evaluate do (select/<split>/ beside
        evaluate/), then runs/<run>/sweep.json
Again   a run's id is the hash of its config and of what it reads, so finished runs are skipped
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from pipeline.cluster import build_task_runner
from pipeline.commandline import compose, main, place_paths, section_of
from pipeline.config import ConfigError, require
from pipeline.config.builder import build_verb_config
from pipeline.distillation import fingerprint_inputs, open_passes
from pipeline.errors import UserError
from pipeline.evaluation.baselines import matching_run, named_baselines, with_baselines
from pipeline.evaluation.findings import METRICS_NAME, missing_judges
from pipeline.evaluation.metrics import (
    JUDGE_METRICS,
    METRICS,
    judges_of,
    metric_of,
    numbers_of,
)
from pipeline.grid import best_position, iter_points, knows_option, point_label, point_words
from pipeline.progress import progress
from pipeline.report.results import SWEEP_NAME
from pipeline.report.summary import summary_table
from pipeline.runs import RUNS, identity, is_finished, plain
from pipeline.selection import HOLDOUT, rows_of_split
from pipeline.shard_tasks import torch_threads
from pipeline.store.files import sha256_json, write_atomically
from pipeline.store.reader import Store
from pipeline.tables import fit_distill
from stages import distill, evaluate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pipeline.config import DistillConfig, EvaluateConfig, SweepConfig
    from pipeline.grid import Point

logger = logging.getLogger("permafrost.sweep")

_OWN_SECTIONS = ("arms", "grid", "select", "seeds", "parallel", "run")


class SweepError(UserError, RuntimeError):
    """Students that could not be finished; the finished ones stay."""


@dataclass(frozen=True, kw_only=True)
class StudentTask:
    """To train a student, where it is not trained yet, and to judge it; done when its metrics are there."""

    distill: DistillConfig
    evaluate: EvaluateConfig
    judged_in: str = "evaluate"
    """The folder of the metrics, in the run's."""

    @property
    def name(self) -> str:
        """The student's run."""
        return self.distill.run

    @property
    def metrics(self) -> Path:
        """By split, as evaluate writes them."""
        return RUNS / self.name / self.judged_in / METRICS_NAME

    @property
    def is_done(self) -> bool:
        """Whether every judge is; ConfigError where one was asked otherwise."""
        return not missing_judges(self.metrics.parent, self.evaluate)

    @property
    def epochs(self) -> int:
        """That may still have to be trained."""
        return 0 if is_finished(RUNS / self.name / "distill") else self.distill.trainer.epochs

    def __call__(self, report: Callable[[str], None]) -> None:
        with torch_threads(1):  # side by side or alone: the same sums in the same order
            distill.run(self.distill, lambda epoch, line: report(line))
            evaluate.run(self.evaluate, self.judged_in)


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

    def judged(self) -> StudentTask:
        """What makes its metrics on evaluate.splits."""
        return StudentTask(distill=self.distill, evaluate=self.evaluate)

    def judged_on(self, split: str, metric: str) -> StudentTask:
        """What makes the metric on the split by which points are chosen, and on no other."""
        judged = self.evaluate.evaluate
        options = replace(
            judged,
            splits=(split,),
            # What was held out is of the store that the student learns from, wherever it is reported.
            store=None if split == HOLDOUT else judged.store,
            max_shift=None,
            num_pictures=0,
        )
        return StudentTask(
            distill=self.distill,
            evaluate=replace(self.evaluate, evaluate=options, judges=judges_of(metric)),
            judged_in=f"select/{split}",
        )


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """How many students there are, and how many this call trained or judged."""

    students: int
    finished_now: int
    table: str
    summary: str
    """Mean and standard deviation over seeds, in words and columns."""


def run(config: SweepConfig, base: Sequence[str] = ()) -> SweepResult:
    """Finish every student that `base` (the overrides typed) describes for each arm, point and seed."""
    students = _plan(config, base)
    work = _Work(config)
    values: dict[str, Any] = {}
    reported = students
    if config.select is not None:
        split, metric = _split_and_metric(config.select)
        for turn in _in_turns(students):
            work.finish([student.judged_on(split, metric) for student in turn])
        candidates, reported = _choose(students, split, metric)
        values = {"select": config.select, "candidates": candidates}
    for turn in _in_turns(reported):
        work.finish([student.judged() for student in turn])
    finished = [student for student in reported if student.judged().is_done]
    values["runs"] = [student.row for student in finished]
    table = RUNS / config.run / SWEEP_NAME
    write_atomically(table, json.dumps(values, indent=1).encode())
    if work.errors:
        raise SweepError(
            f"{len(work.errors)} of {len(students)} students failed, {table} lists the others: "
            + " | ".join(work.errors)
        )
    return SweepResult(
        students=len(students),
        finished_now=len(work.done),
        table=str(table),
        summary="\n" + summary_table(config.run),
    )


# ---- what there is to do -------------------------------------------------------------------------


def _plan(config: SweepConfig, base: Sequence[str]) -> list[Student]:
    shared = [word for word in base if section_of(word) not in _OWN_SECTIONS]
    known: set[str] = set()
    planned: list[tuple[str, Point, DistillConfig, EvaluateConfig, list[str]]] = []
    for arm, overrides in config.arms.items():
        words = [*shared, "trainer.num_threads=1", *overrides]
        for point in _points(words, config.grid):
            known |= set(point)
            composed = compose("sweep", [*words, *point_words(point)])
            trained: DistillConfig = place_paths(build_verb_config("distill", composed))
            judged: EvaluateConfig = place_paths(build_verb_config("evaluate", composed))
            require(
                trained.trainer.ranks == 1 or config.executor == "serial",
                f"trainer.ranks={trained.trainer.ranks} in arm {arm}: ranks would wait for what other students "
                "hold; take executor=serial for students one after the other, or trainer.ranks=1",
            )
            require(
                judged.subject == "student",
                "a sweep judges its students: judge the teacher once, with stages.evaluate subject=teacher",
            )
            if config.select is not None:
                _check_selection(config.select, trained, judged)
            planned.append((arm, point, trained, judged, _fingerprints(trained, judged)))
    for option in config.grid:
        require(
            option in known, f"grid: no arm knows the option {option}; correct it or leave it out"
        )
    # Seeds outermost: whatever finishes first is comparable.
    students = [
        _student(config.run, arm, point, replace(trained, seed=seed), judged, inputs)
        for seed in config.seeds
        for arm, point, trained, judged, inputs in planned
    ]
    names = [student.name for student in students]
    for student in students:
        require(
            names.count(student.name) == 1,
            f"grid: two points make the same student of arm {student.arm}, one of them "
            f"{point_label(student.point)}; name each value once",
        )
    return [_with_baselines(student, students) for student in students]


def _with_baselines(student: Student, students: Sequence[Student]) -> Student:
    """The student, compared with that of its seed where a judge's baseline is an arm; an arm with nobody itself."""
    runs: dict[str, str | None] = {}
    for arm in named_baselines(student.evaluate) & {other.arm for other in students}:
        of_arm = {o.name: o.point for o in students if (o.arm, o.seed) == (arm, student.seed)}
        runs[arm] = None if arm == student.arm else matching_run(arm, student.point, of_arm)
    return replace(student, evaluate=with_baselines(student.evaluate, runs)) if runs else student


def _in_turns(students: Sequence[Student]) -> list[list[Student]]:
    """Those first that others are compared with."""
    compared = {name for student in students for name in named_baselines(student.evaluate)}
    first = [student for student in students if student.name in compared]
    return [first, [student for student in students if student.name not in compared]]


def _points(words: list[str], grid: dict[str, tuple[Any, ...]]) -> Iterator[Point]:
    """The points of the options that an arm knows; a choice of group (optimizer: [adam, sgd]) may
    decide which those are.
    """
    choices = {option: values for option, values in grid.items() if "." not in option}
    for choice in iter_points(choices):
        composed = compose("sweep", [*words, *point_words(choice)])
        options = {o: v for o, v in grid.items() if o not in choices and knows_option(composed, o)}
        yield from ({**choice, **point} for point in iter_points(options))


def _student(
    sweep: str,
    arm: str,
    point: Point,
    trained: DistillConfig,
    judged: EvaluateConfig,
    inputs: list[str],
) -> Student:
    parts = [identity(plain(config)) for config in (trained, judged.shared)]
    digest = sha256_json([*parts, inputs])
    name = f"{sweep}/students/{arm}-seed{trained.seed}-{digest[:8]}"
    return Student(
        arm=arm,
        point=point,
        seed=trained.seed,
        distill=replace(trained, run=name),
        evaluate=replace(judged, run=name),
    )


def _fingerprints(trained: DistillConfig, judged: EvaluateConfig) -> list[str]:
    store = Store(Path(trained.store.path))
    trained = fit_distill(trained, store)
    passes = open_passes(trained, store)
    _, judged_by = evaluate.open_judged(judged, judged.store.teacher)
    made_from = fingerprint_inputs(trained, store, passes)
    return [*made_from.values(), *(teacher.manifest.fingerprint for teacher in judged_by)]


def _split_and_metric(select: str) -> tuple[str, str]:
    split, _, metric = select.partition(".")
    require(
        metric_of(metric) is not None,
        f"select={select}: choose one of the metrics {', '.join([*METRICS, *JUDGE_METRICS])}",
    )
    return split, metric


def _check_selection(select: str, trained: DistillConfig, judged: EvaluateConfig) -> None:
    """ConfigError unless the split is there, and neither learned from nor reported."""
    split, _ = _split_and_metric(select)
    require(
        split not in judged.evaluate.splits,
        f"select={select}: {split} is one of evaluate.splits, where the chosen students are reported; "
        "choose by another split",
    )
    require(
        split != trained.split or judged.evaluate.store is not None,
        f"select={select}: students learn from {split}; keep records out of training with "
        f"subset.holdout=10 and choose by select={HOLDOUT}.accuracy",
    )
    if split == HOLDOUT:
        require(
            trained.subset.holdout > 0,
            f"select={select}, but subset.holdout=0 keeps no records out of training; set it to a "
            "number of each class, as in subset.holdout=10",
        )
    else:
        rows_of_split(evaluate.open_judged(judged, judged.store.teacher)[0].index, split)


# ---- doing it ------------------------------------------------------------------------------------


class _Work:
    """Runs what is missing; keeps count."""

    def __init__(self, config: SweepConfig) -> None:
        self.run_tasks = build_task_runner(config.executor, config.cluster, config.parallel)
        self.done: set[str] = set()
        self.errors: list[str] = []

    def finish(self, tasks: Sequence[StudentTask]) -> None:
        """Run each task whose metrics are missing."""
        missing = {task.name: task for task in tasks if not task.is_done}
        if not missing:
            return
        total = sum(task.epochs for task in missing.values())
        finished = 0
        with progress("sweep", total=total, unit="epoch") as bar:

            def show(name: str, line: str) -> None:
                bar.update(1)
                bar.set_postfix_str(f"{finished}/{len(missing)} students; {Path(name).name} {line}")

            for outcome in self.run_tasks(list(missing.values()), show):
                error = outcome.error or _invisible(missing[outcome.name])
                if outcome.traceback:
                    logger.error("%s failed:\n%s", outcome.name, outcome.traceback)
                if error:
                    self.errors.append(f"{outcome.name}: {error}")
                    continue
                finished += 1
                self.done.add(outcome.name)
                logger.info("%s finished (%d of %d)", outcome.name, finished, len(missing))


def _invisible(task: StudentTask) -> str:
    """What is wrong where a task has run and its metrics are not here; empty where they are."""
    if task.is_done:
        return ""
    return f"it ran on a machine whose {task.metrics} is not this one's; give a run= on a folder that all share"


# ---- choosing ------------------------------------------------------------------------------------


def _choose(
    students: Sequence[Student], split: str, metric: str
) -> tuple[list[dict[str, Any]], list[Student]]:
    """All judged students as rows with their values, and the students of each arm's best point.

    An arm of which a student is missing is not chosen from.
    """
    values = {
        student.name: _value(student, split, metric)
        for student in students
        if student.judged_on(split, metric).is_done
    }
    arms: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for student in students:
        arms[student.arm][point_label(student.point)].append(student.name)
    chosen: set[str] = set()
    for points in arms.values():
        candidates = list(points.values())
        if all(name in values for names in candidates for name in names):
            means = [mean(values[name] for name in names) for names in candidates]
            read = metric_of(metric)
            assert read is not None
            chosen |= set(candidates[best_position(means, read)])
    rows = [
        {**student.row, "value": values[student.name], "chosen": student.name in chosen}
        for student in students
        if student.name in values
    ]
    return rows, [student for student in students if student.name in chosen]


def _value(student: Student, split: str, metric: str) -> float:
    path = student.judged_on(split, metric).metrics
    numbers = numbers_of(json.loads(path.read_text())["splits"][split])
    value = numbers.get(metric, math.nan)
    if math.isnan(value):
        known = [name for name, found in numbers.items() if metric_of(name) and found == found]
        raise ConfigError(
            f"select={split}.{metric}: {path} has no {metric}; choose one of {', '.join(known)}"
        )
    return float(value)


if __name__ == "__main__":
    main("sweep", lambda config: run(config, sys.argv[1:]), __doc__)
