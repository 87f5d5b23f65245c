"""Sentences of a report on the selection of grid points and epochs, and on the evaluated part of an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from permafrost.config.builder import build_config
from permafrost.config.evaluation import EvaluateOptions
from permafrost.config.points import Point, point_label
from permafrost.config.verbs import EvaluationRun
from permafrost.core.errors import require
from permafrost.evaluation.evaluator import Metric, metric_of
from permafrost.evaluation.trained_student import TrainedStudent
from permafrost.runs.folder import CONFIG_NAME, SWEEP_NAME, RunFolder, passes_in, read_config
from permafrost.storage.rooted_paths import RootedPath
from permafrost.store.reader import Store, TeacherPass
from permafrost_report.comparison import group_pairs, summarize
from permafrost_report.student_results import (
    StudentResult,
    progress_in_words,
    read_sweep,
    records_in_words,
)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A grid point as a candidate of a variant."""

    variant: str
    point: Point
    values: list[float]
    """Values of the selection metric, one per seed."""
    chosen: bool
    runs: tuple[str, ...] = ()
    """Runs of the seeds."""

    @property
    def summary(self) -> dict[str, Any]:
        """Mean and standard deviation over seeds."""
        return summarize(self.values)


@dataclass(frozen=True, kw_only=True)
class ModelSelection:
    """Selection of the point of each variant."""

    select: str
    """Selection metric <split>.<metric>."""
    candidates: list[Candidate]

    @property
    def metric(self) -> Metric:
        """Metric by which candidates are compared. The sweep has checked that it is known."""
        return metric_of(self.select.partition(".")[2]) or Metric()

    @property
    def scores(self) -> dict[str, float | None]:
        """Value of every candidate's students by their runs."""
        return dict(
            chain.from_iterable(zip(one.runs, one.values, strict=True) for one in self.candidates)
        )


def load_selection(run: str) -> ModelSelection | None:
    """Load the candidates of runs/<run>/sweep.json by variant, or None without a selection.

    Raises:
        DamagedFileError: If sweep.json is damaged.
    """
    sweep = read_sweep(run) if (RunFolder(run).path / SWEEP_NAME).exists() else {}
    if "candidates" not in sweep:
        return None
    rows = sweep["candidates"]
    members = group_pairs(
        ((variant, point_label(row["point"])), row)
        for variant in dict.fromkeys(row["variant"] for row in rows)
        for row in rows
        if row["variant"] == variant
    )
    return ModelSelection(
        select=sweep["select"],
        candidates=[
            Candidate(
                variant=variant,
                point=point_rows[0]["point"],
                values=[row["value"] for row in point_rows],
                chosen=point_rows[0]["chosen"],
                runs=tuple(row["run"] for row in point_rows),
            )
            for (variant, _), point_rows in members.items()
        ],
    )


def ties_in_words(selection: ModelSelection) -> list[str]:
    """Write a sentence on each variant whose selected point has the same mean as others."""
    sentences = []
    for chosen in (candidate for candidate in selection.candidates if candidate.chosen):
        tied = [
            point_label(other.point)
            for other in selection.candidates
            if other.variant == chosen.variant and other.summary["mean"] == chosen.summary["mean"]
        ]
        if len(tied) > 1:
            sentences.append(
                f"{chosen.variant}: {', '.join(tied)} have the same {selection.select}, and the first is selected."
            )
    return sentences


def reservations(
    run: str, results: Sequence[StudentResult], selection: ModelSelection | None
) -> list[str]:
    """Write what a reader of a sweep's numbers must know: that it goes on, ties, and students of other records."""
    ties = ties_in_words(selection) if selection else []
    return [*progress_in_words(run), *records_in_words(results), *ties]


def curve_of(result: StudentResult) -> str:
    """Return the name of a variant without its point, with the run if the label has it."""
    return result.label.removesuffix(point_label(result.point)).strip() or result.variant


def over_the_grid(results: Sequence[StudentResult], source: str) -> ModelSelection | None:
    """Collect the values of every variant's points in the form of a selection, without a choice.

    A point is left out if a student has no value.

    Args:
        results: Results of the students.
        source: Metric of the values, <split>.<metric>.

    Returns:
        The candidates; None if no variant has several points.
    """
    members = group_pairs(((curve_of(result), result.label), result) for result in results)
    candidates = []
    for (variant, _), same in members.items():
        values = [value for result in same if (value := result.find(source)) is not None]
        if len(values) == len(same):
            candidates.append(
                Candidate(variant=variant, point=same[0].point, values=values, chosen=False)
            )
    if len(candidates) == len({candidate.variant for candidate in candidates}):
        return None
    return ModelSelection(select=source, candidates=candidates)


# ---- evaluation ------------------------------------------------------------------------------------


class Evaluation(NamedTuple):
    """Options of a finished evaluation, and the inputs that it read."""

    options: EvaluateOptions
    inputs: dict[str, str]
    """Fingerprints by name of the store and of each pass, the latter named "teacher <pass>"."""

    def open_store(self, store: RootedPath) -> Store:
        """Open the store with the evaluated records: evaluate.store or, if it is null, the given one."""
        return Store(replace(store, root=Path(self.options.store)) if self.options.store else store)

    @property
    def teachers(self) -> list[str]:
        """Names of the passes that the network was compared with."""
        return list(passes_in(self.inputs))

    def open_passes(self, store: Store) -> list[TeacherPass]:
        """Open those passes that the store still has."""
        stored = {folder.name for folder in store.pass_folders()}
        return [store.open_pass(name) for name in self.teachers if name in stored]


def optimistic_results(results: Sequence[StudentResult]) -> list[str]:
    """Write one sentence for each metric on a reported split that chose the epoch of students."""
    variants: dict[str, dict[str, None]] = {}
    for result in results:
        if (result.evaluation / CONFIG_NAME).exists():
            metric = TrainedStudent(result.folder / "distill").epoch_metric(
                read_evaluation(result).inputs["store"]
            )
            if metric is not None and metric.partition(".")[0] in result.numbers:
                variants.setdefault(metric, {})[result.label] = None
    return [
        f"The epoch of {', '.join(labels)} was chosen by {metric}, so its values on {metric.partition('.')[0]} look "
        "better than they are."
        for metric, labels in variants.items()
    ]


def read_evaluation(result: StudentResult) -> Evaluation:
    """Read how the results were evaluated.

    Raises:
        DamagedFileError: If the config of the evaluation is damaged.
    """
    values = read_config(result.evaluation / CONFIG_NAME, EvaluationRun, "inputs", "evaluate")
    require("store" in values["inputs"], f"{result.evaluation / CONFIG_NAME} names no store")
    inputs = {name: digest for name, digest in values["inputs"].items() if name != "student"}
    return Evaluation(build_config(EvaluateOptions, values["evaluate"], "evaluate"), inputs)
