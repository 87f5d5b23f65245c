"""Results of the students of a report, read from their runs."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from permafrost.config.distillation import DistillConfig
from permafrost.config.points import Point, point_label
from permafrost.config.verbs import EvaluationRun
from permafrost.core.digests import sha256_json
from permafrost.core.errors import UserError, require
from permafrost.core.json_entries import from_dict, require_inside
from permafrost.evaluation.evaluator import numbers_of
from permafrost.evaluation.results import (
    MAPS,
    METRICS_NAME,
    NETWORK_EVALUATION,
    PICTURE,
    RANDOM_NETWORKS,
    TEACHER_EVALUATION,
    TEACHER_PICTURE,
    evaluation_folder,
    evaluations_beside,
    place_beside,
    place_of,
    read_results,
    without_outputs,
)
from permafrost.evaluation.trained_student import TrainedStudent
from permafrost.models.saved import SavedNetwork
from permafrost.models.trained_weights import read_entries
from permafrost.runs.folder import (
    CONFIG_NAME,
    SWEEP_NAME,
    RunFolder,
    describe_run,
    passes_in,
    read_config,
)
from permafrost.runs.mirrors import RUNS
from permafrost.storage.rooted_paths import name_of_path
from permafrost.storage.signed_files import naming_damage, read_json
from permafrost.store.reader import Store
from permafrost_report.comparison import group_pairs
from permafrost_report.options import ReportConfig

logger = logging.getLogger("permafrost.report")

_OWN_FILES = {
    f"report.{kind}"
    for kind in ("yaml", "html", "json", "csv", "variants.csv", "tex", "times.json")
}
"""Files of a run that the report itself writes."""
_NAMED = 20
"""Largest number of runs that a message names."""


class UnknownRunError(UserError, ValueError):
    """Report of a run that does not exist."""


def check_run(run: str) -> None:
    """Check that the run has any output, or is the default, for a report of the store alone.

    Raises:
        UnknownRunError: If it has none.
    """
    folder = RunFolder(run).path
    if run == ReportConfig.run or _has_output(folder):
        return
    # What the command line has already written for a misspelled run.
    for name in _OWN_FILES:
        (folder / name).unlink(missing_ok=True)
    if folder.is_dir():
        folder.rmdir()
    known = sorted(path.name for path in RUNS.glob("*") if _has_output(path))
    named = ", ".join(known[:_NAMED]) + (", ..." if len(known) > _NAMED else "")
    raise UnknownRunError(
        f"{folder} does not exist; the runs in {Path.cwd()} are: {named or 'none'}; correct run=, or "
        "leave it out for a report of the store alone"
    )


def _has_output(folder: Path) -> bool:
    return folder.is_dir() and any(path.name not in _OWN_FILES for path in folder.iterdir())


# ---- results ---------------------------------------------------------------------------------------


ALL_SPLITS = "all"
"""Split name in a column's source for the mean over all splits, weighted by their records."""


@dataclass(frozen=True, kw_only=True)
class StudentResult:
    """Results of one finished student."""

    variant: str
    label: str
    """Variant, followed by the grid point if the variant has several."""
    point: Point = field(default_factory=dict)
    seed: int | None
    """None for a network that the run has not trained."""
    run: str = ""
    """Its run, or that of an evaluation of a given network."""
    folder: Path
    metrics: dict[str, dict[str, Any]]
    """Metrics by split, as written by evaluate; empty for a student that was not evaluated yet."""
    against: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    """Metrics by split of each evaluation against a named pass (evaluate.against)."""
    further: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Metrics of evaluations of other splits, and of another frame, by split or <split>-<frame>."""
    place: str = ""
    """Part of the names of its evaluations that is of another store than the one of its training (results.place_of)."""
    evaluation_name: str = evaluation_folder(None)
    """Name of the folder of the records and pictures to show, that of `metrics` if there are any."""
    frame: str = ""
    """Part of the images that was evaluated there."""
    folders: dict[str, str] = field(default_factory=dict)
    """Names of the folders of the evaluations against named passes."""

    @property
    def training_folder(self) -> Path:
        """Folder of the training."""
        return self.folder / "distill"

    @cached_property
    def training(self) -> dict[str, Any]:
        """Options and inputs of the training, empty if they are not recorded."""
        path = self.training_folder / CONFIG_NAME
        return read_config(path, DistillConfig) if path.exists() else {}

    @property
    def evaluation(self) -> Path:
        """Folder of the evaluation."""
        return self.folder / self.evaluation_name

    @property
    def evaluations(self) -> list[str]:
        """Names of the folders of all its evaluations."""
        return [self.evaluation_name, *self.folders.values()]

    @property
    def is_evaluated(self) -> bool:
        """True if there is any evaluation."""
        return bool(self.metrics or self.against)

    @cached_property
    def other_store(self) -> str:
        """Path of the store of evaluate.store, empty if the evaluation is on the store of the page."""
        return self._evaluated_by.get("evaluate", {}).get("store") or ""

    @cached_property
    def trains_classifier(self) -> bool:
        """False for a student whose last layer was not trained, so that its logits and maps mean nothing."""
        return self.seed is None or TrainedStudent(self.training_folder).trains_classifier

    @cached_property
    def pictures(self) -> tuple[str, str, str]:
        """Pictures that the student and the teacher of its pass received, and their explainers if these differ."""
        results = read_results(self.evaluation)
        return results[PICTURE], results[TEACHER_PICTURE], results[MAPS]

    @cached_property
    def compared_pass(self) -> str | None:
        """Name of the pass with which its evaluation compares it, None without one."""
        return next(iter(passes_in(self._evaluated_by.get("inputs", {}))), None)

    @cached_property
    def _evaluated_by(self) -> dict[str, Any]:
        """Config of the evaluation, empty if there is none."""
        path = self.evaluation / CONFIG_NAME
        return read_config(path, EvaluationRun) if path.exists() else {}

    @cached_property
    def numbers(self) -> dict[str, dict[str, float]]:
        """Numbers by split and metric, with nested metrics named <evaluator>.<metric>.

        Those of an evaluation against a named pass are <metric>@<pass>. Those of a last layer that was not trained are
        left out.
        """
        chosen = dict if self.trains_classifier else without_outputs
        measured = {**self.metrics, **self.further}
        numbers = {split: numbers_of(chosen(metrics)) for split, metrics in measured.items()}
        for teacher, splits in self.against.items():
            for split, metrics in splits.items():
                pass_numbers = numbers_of(chosen(metrics))
                numbers.setdefault(split, {"records": pass_numbers["records"]})
                numbers[split] |= {
                    f"{name}@{teacher}": value for name, value in pass_numbers.items()
                }
        return numbers

    @property
    def sources(self) -> list[str]:
        """All sources that a column can name for this student."""
        return sorted(
            f"{split}.{name}" for split, metrics in self.numbers.items() for name in metrics
        )

    def find(self, source: str) -> float | None:
        """Return the metric that `source` names, or None if it does not exist.

        Args:
            source: <split>.<metric>, <split>-<frame>.<metric> or all.<metric>. all is the mean over the splits of the
                evaluation, which for <metric>@<pass> is the one against that pass.
        """
        split, _, name = source.partition(".")
        of_all: Iterable[str] = self.against.get(name.partition("@")[2], self.metrics)
        splits = of_all if split == ALL_SPLITS else [split]
        in_frame = {f"{split}-{self.frame}": numbers for split, numbers in self.numbers.items()}
        chosen = [self.numbers.get(split, in_frame.get(split, {})) for split in splits]
        if not chosen or any(name not in metrics for metrics in chosen):
            return None
        records = sum(metrics["records"] for metrics in chosen)
        return float(sum(metrics[name] * metrics["records"] for metrics in chosen) / records)


def load_results(
    run: str, other_runs: Sequence[str] = (), store: Store | None = None
) -> list[StudentResult]:
    """Load the students of a run in the order of its sweep, then those of other runs, or [] if there are none.

    A student that was distilled without a sweep may not have been evaluated yet; then its metrics are empty.

    Args:
        run: Name of the run, or its address in a bucket.
        other_runs: Sweeps, or runs of one student each. Variants of several runs that are called alike are one variant
            if their students differ in the seed only; else all are prefixed with the names of their runs.
        store: Store of the page. Of a student that was trained on another one the evaluations on this one are loaded;
            None loads those on the store of its training.

    Raises:
        UnknownRunError: If the run does not exist.
        ConfigError: If another run has no students, or if a student of a sweep has no metrics.
        DamagedFileError: If a file of a run is damaged.
    """
    results: list[StudentResult] = []
    if (RunFolder(run).path / SWEEP_NAME).exists():
        results = _read_run(run, store)
    elif SavedNetwork(RunFolder(run).path / "distill").is_finished:
        results = [_load_student(run, store, must_be_evaluated=False)]
    elif not (other_runs or load_network(run, store) or load_teacher(run, store)):
        check_run(run)
        logger.info(
            "%s has neither a sweep nor a finished student, so the report shows only the store",
            RunFolder(run).path,
        )
    names = names_of_runs([run, *other_runs])
    by_run = {run: results} | {other: _read_run(other, store) for other in other_runs}
    by_label = group_pairs(
        (result.label, (name, result)) for name, members in by_run.items() for result in members
    )
    ambiguous = {
        label
        for label, pairs in by_label.items()
        if len({name for name, _ in pairs}) > 1
        and not _differ_in_seed_only([result for _, result in pairs])
    }
    return [
        replace(result, label=f"{names[name]}: {result.label}")
        if result.label in ambiguous
        else replace(result, label=names.get(result.label, result.label))
        for name, members in by_run.items()
        for result in members
    ]


def _differ_in_seed_only(results: Sequence[StudentResult]) -> bool:
    """Return whether students of several runs, as the tasks of a job array have, are the seeds of one variant."""
    options = [
        describe_run(result.training, DistillConfig) | {"seed": None}
        for result in results
        if "inputs" in result.training
    ]
    return len({result.seed for result in results}) == len(options) == len(results) and all(
        each == options[0] for each in options
    )


def names_of_runs(runs: Sequence[str]) -> dict[str, str]:
    """Return the name of each run without its folders elsewhere, as far as the names of several runs then differ."""
    for parts in range(1, max(run.count("/") for run in runs) + 3):
        names = {run: name_of_path(run, parts) for run in runs}
        if len(set(names.values())) == len(names):
            break
    return names


def untrained_results(results: Sequence[StudentResult]) -> list[StudentResult]:
    """Return the results of the untrained networks of evaluate.random_networks, one label for each architecture.

    The first student of an architecture that was evaluated with them counts.
    """
    by_network: dict[str, StudentResult] = {}
    for result in results:
        network = result.training.get("student", {"name": result.label})
        if any(RANDOM_NETWORKS in metrics for metrics in result.metrics.values()):
            by_network.setdefault(sha256_json({**network, "weights": None}), result)
    return [
        replace(
            result,
            label="random networks" + f" like {result.label}" * (len(by_network) > 1),
            seed=None,
            run="",
            evaluation_name=RANDOM_NETWORKS,  # a folder without records, which are not kept
            metrics={
                split: metrics[RANDOM_NETWORKS][number]
                for split, metrics in result.metrics.items()
                if number < len(metrics.get(RANDOM_NETWORKS, ()))
            },
            against={},
            further={},
        )
        for result in by_network.values()
        for number in range(
            max(len(metrics.get(RANDOM_NETWORKS, ())) for metrics in result.metrics.values())
        )
    ]


def split_by_evaluation(results: Sequence[StudentResult]) -> list[StudentResult]:
    """Split students that were evaluated several times into one result per evaluation, labeled by its pass."""
    split = []
    for result in results:
        if result.metrics or not result.against:
            metrics = {**result.metrics, **result.further}
            split.append(replace(result, metrics=metrics, further={}, against={}))
        split += [
            replace(
                result,
                label=f"{result.label} against {teacher}",
                metrics=metrics,
                against={},
                evaluation_name=result.folders[teacher],
            )
            for teacher, metrics in result.against.items()
        ]
    return split


def select_first_seed(results: Sequence[StudentResult]) -> list[StudentResult]:
    """Return the students of the first one's seed, and all networks that the run has not trained."""
    return [result for result in results if result.seed in (None, results[0].seed)]


def load_teacher(run: str, store: Store | None = None) -> StudentResult | None:
    """Load the teacher's results of runs/<run>/evaluate-teacher (evaluate model=teacher), or None if there are none.

    Args:
        run: Name of the run.
        store: Store of the page, None for the one of its first evaluation.
    """
    return _load_untrained(run, "teacher", TEACHER_EVALUATION, store)


def load_network(run: str, store: Store | None = None) -> StudentResult | None:
    """Load the results of runs/<run>/evaluate-network (evaluate model=network), as `load_teacher` does."""
    return _load_untrained(run, "given network", NETWORK_EVALUATION, store)


def _load_untrained(
    run: str, label: str, evaluation_name: str, store: Store | None
) -> StudentResult | None:
    """Load the results of a network that the run has not trained."""
    main = RunFolder(run).path / evaluation_name
    evaluation_name += "" if store is None else place_beside(main, store)
    folder = RunFolder(run).path
    if not (measured := _measured(folder, evaluation_name)):
        return None
    return StudentResult(variant=label, label=label, seed=None, run=run, folder=folder, **measured)


def _load_student(run: str, store: Store | None, *, must_be_evaluated: bool) -> StudentResult:
    """Load a student that was distilled without a sweep."""
    seed = read_config(_config_of(run), DistillConfig).get("seed", DistillConfig.seed)
    return _load_result(
        {"variant": run, "run": run, "seed": seed, "point": {}},
        store,
        several=False,
        must_be_evaluated=must_be_evaluated,
    )


def _read_run(run: str, store: Store | None) -> list[StudentResult]:
    if not (RunFolder(run).path / SWEEP_NAME).exists():
        return [_load_student(run, store, must_be_evaluated=True)]
    rows = read_sweep(run)["runs"]
    points = group_pairs((row["variant"], point_label(row["point"])) for row in rows)
    return [_load_result(row, store, several=len(set(points[row["variant"]])) > 1) for row in rows]


def read_sweep(run: str) -> dict[str, Any]:
    """Read sweep.json of a run, with the full names of the students' runs.

    Raises:
        DamagedFileError: If the digest or the type of an entry is wrong.
    """
    path = RunFolder(run).path / SWEEP_NAME
    advice = "delete it, and run the same permafrost sweep again, which keeps its students"
    values = read_json(path, advice)
    with naming_damage(path, advice):
        checked = from_dict(
            _SweepFile,
            {"students": None, "select": None, "candidates": None, "evaluations": {}, **values},
        )
        rows = (*checked.runs, *(checked.candidates or ()))
        for folder in (*(row.run for row in rows), *checked.evaluations.values()):
            require_inside(folder)
    for row in (*values["runs"], *values.get("candidates", ())):
        row |= {"evaluation": shown} if (shown := checked.evaluations.get(row["run"])) else {}
        row["run"] = f"{run}/{row['run']}"
    return values


def progress_in_words(run: str) -> list[str]:
    """Write a sentence on a sweep that has not finished, none on another one."""
    sweep = read_sweep(run) if (RunFolder(run).path / SWEEP_NAME).exists() else {}
    finished, students = len(sweep.get("runs", ())), sweep.get("students", 0)
    if finished >= students:
        return []
    return [f"The sweep has not finished: {finished} of {students} students are evaluated."]


def records_in_words(results: Sequence[StudentResult]) -> list[str]:
    """Write a sentence on students of different records or classes, none if all of them are the same."""
    inputs = ((result, result.training.get("inputs", {}).get("store")) for result in results)
    groups = group_pairs(
        (
            (store, _classes_of(result.training_folder)),
            f"{result.label} ({result.seed})",
        )
        for result, store in inputs
        if store
    )
    if len(groups) < 2:
        return []
    named = " | ".join(", ".join(students) for students in groups.values())
    return [
        "Students (seeds) were trained on different records or classes, generations of a store or different stores, so "
        f"their numbers do not compare: {named}."
    ]


def _classes_of(training: Path) -> tuple[str, ...]:
    return read_entries(training).classes if SavedNetwork(training).is_finished else ()


@dataclass(frozen=True, kw_only=True)
class _SweepRow:
    """Row of a student in sweep.json."""

    variant: str
    point: dict[str, Any]
    seed: int
    run: str


@dataclass(frozen=True, kw_only=True)
class _CandidateRow(_SweepRow):
    """Row of a student that was compared with others."""

    value: float
    chosen: bool


@dataclass(frozen=True, kw_only=True)
class _SweepFile:
    """Entries of sweep.json."""

    runs: tuple[_SweepRow, ...]
    students: int | None
    """Number of students that the sweep reports when it has finished."""
    select: str | None
    candidates: tuple[_CandidateRow, ...] | None
    evaluations: dict[str, str]
    """Folder of the evaluation of each student that the sweep was called for."""


def _config_of(run: str) -> Path:
    path = RunFolder(run).path / "distill" / CONFIG_NAME
    require(
        path.exists(),
        f"report.runs names {run}, but {RunFolder(run).path} contains neither a sweep nor a student; correct "
        "report.runs",
    )
    return path


def _load_result(
    row: dict[str, Any], store: Store | None, *, several: bool, must_be_evaluated: bool = True
) -> StudentResult:
    folder = RunFolder(row["run"]).path
    place = "" if store is None else place_beside(folder / "distill", store)
    shown = row.get("evaluation") or evaluation_folder(None)
    if store is not None and (place or "evaluation" not in row):
        here = (
            name
            for name in (shown, evaluation_folder(None), evaluation_folder(None, place_of(store)))
            if (folder / name / METRICS_NAME).exists() and not place_beside(folder / name, store)
        )
        shown = next(here, evaluation_folder(None, place))
        place = place if shown.startswith(evaluation_folder(None, place)) else ""
    measured = _measured(folder, shown)
    require(
        not must_be_evaluated or bool(place) or bool(measured),
        f"{folder / shown / METRICS_NAME} does not exist; run permafrost sweep (or permafrost evaluate for a single "
        "student) again",
    )
    return StudentResult(
        variant=row["variant"],
        label=f"{row['variant']} {point_label(row['point'])}" if several else row["variant"],
        point=row["point"],
        seed=row["seed"],
        run=row["run"],
        folder=folder,
        place=place,
        **({"metrics": {}} | measured),
    )


def _measured(folder: Path, evaluation_name: str) -> dict[str, Any]:
    """Return the metrics of an evaluation and of those next to it, by the name of their entry in a result."""
    if not (evaluations := evaluations_beside(folder, evaluation_name)):
        return {}
    plain = [each for each in evaluations if not each.against]
    named = {each.against: each for each in reversed(evaluations) if each.against}
    main = (plain or evaluations)[0]
    return {
        "metrics": main.metrics if plain else {},
        "further": {
            split: metrics
            for other in reversed(plain[1:])
            for split, metrics in other.metrics.items()
            if split not in main.metrics
        },
        "against": {name: each.metrics for name, each in sorted(named.items())},
        "folders": {name: each.folder for name, each in named.items()},
        "evaluation_name": main.folder,
        "frame": main.frame,
    }


def epoch_curves(
    results: Sequence[StudentResult],
) -> dict[str, dict[str, list[dict[int, float]]]]:
    """Collect curves over the epochs of a training.

    Returns:
        By <split>.<metric> and variant, the value by epoch of each of its students.
    """
    from permafrost.training.epoch_selection import read_curve

    by_metric = group_pairs(
        (name, (result.label, values))
        for result in results
        for name, values in read_curve(result.training_folder).items()
    )
    return {name: group_pairs(curves) for name, curves in by_metric.items()}
