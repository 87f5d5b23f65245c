"""Candidates of a sweep: the points of its grid, each with the values of its students, and which one was chosen."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from permafrost.config.points import Point, point_label
from permafrost.config.runs import RUNS
from permafrost.evaluation.evaluators.quantities import metric_of
from permafrost.evaluation.metrics import Metric
from permafrost.report.comparison import summarize
from permafrost.report.results import SWEEP_NAME, StudentResult, read_sweep


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A point of the grid as a candidate of an arm."""

    arm: str
    point: Point
    values: list[float]
    """Values of the selection metric, one per seed."""
    chosen: bool

    @property
    def summary(self) -> dict[str, Any]:
        """Mean and standard deviation over seeds."""
        return summarize(self.values)


@dataclass(frozen=True, kw_only=True)
class ModelSelection:
    """Selection of the point of each arm."""

    select: str
    """Selection metric <split>.<metric>."""
    candidates: list[Candidate]

    @property
    def metric(self) -> Metric:
        """Metric by which candidates are compared. The sweep has checked that it is known."""
        return metric_of(self.select.partition(".")[2]) or Metric()


def load_selection(run: str) -> ModelSelection | None:
    """Load the candidates of runs/<run>/sweep.json by arm, or None without a selection."""
    sweep = read_sweep(run) if (RUNS / run / SWEEP_NAME).exists() else {}
    if "candidates" not in sweep:
        return None
    rows = sweep["candidates"]
    members = defaultdict(list)
    for arm in dict.fromkeys(row["arm"] for row in rows):
        for row in rows:
            if row["arm"] == arm:
                members[arm, point_label(row["point"])].append(row)
    candidates = [
        Candidate(
            arm=arm,
            point=found[0]["point"],
            values=[row["value"] for row in found],
            chosen=found[0]["chosen"],
        )
        for (arm, _), found in members.items()
    ]
    return ModelSelection(select=sweep["select"], candidates=candidates)


def curve_of(result: StudentResult) -> str:
    """Name of an arm without its point, with the run if the label has it."""
    return result.label.removesuffix(point_label(result.point)).strip() or result.arm


def over_the_grid(results: Sequence[StudentResult], source: str) -> ModelSelection | None:
    """Collect the values of every arm's points in the form of a selection, without a choice.

    A point of which a student has no value is left out. The result is None if no arm has several points.
    """
    found_values = defaultdict(list)
    points = {}
    for result in results:
        key = (curve_of(result), result.label)
        found_values[key].append(result.find(source))
        points[key] = result.point
    values = {
        key: [value for value in of if value is not None]
        for key, of in found_values.items()
        if None not in of
    }
    if len(values) == len({arm for arm, _ in values}):
        return None
    candidates = [
        Candidate(arm=key[0], point=points[key], values=found, chosen=False)
        for key, found in values.items()
    ]
    return ModelSelection(select=source, candidates=candidates)
