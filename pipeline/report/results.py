"""Results of a sweep: the metrics of each student, by arm and seed."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

from pipeline.config.points import Point, point_label
from pipeline.config.runs import CONFIG_NAME, RUNS
from pipeline.core.errors import ConfigError
from pipeline.evaluation.evaluators.quantities import metric_of
from pipeline.evaluation.metrics import Metric, numbers_of
from pipeline.evaluation.results import METRICS_NAME

SWEEP_NAME = "sweep.json"
ALL_SPLITS = "all"
"""Split name in a column's source for the mean over all splits, weighted by their records."""

logger = logging.getLogger("permafrost.report")


@dataclass(frozen=True, kw_only=True)
class StudentResult:
    """Results of one finished student."""

    arm: str
    label: str
    """Arm, followed by the point of the grid if the arm has several."""
    point: Point = field(default_factory=dict)
    seed: int
    folder: Path
    metrics: dict[str, dict[str, Any]]
    """Metrics by split, as written by evaluate."""

    @cached_property
    def numbers(self) -> dict[str, dict[str, float]]:
        """Numbers by split and metric, with nested metrics named <evaluator>.<metric>."""
        return {split: numbers_of(metrics) for split, metrics in self.metrics.items()}

    @property
    def sources(self) -> list[str]:
        """All sources that a column can name for this student."""
        return sorted(
            f"{split}.{name}" for split, metrics in self.numbers.items() for name in metrics
        )

    def find(self, source: str) -> float | None:
        """Return the metric that `source` names as <split>.<metric> or all.<metric>, or None if it does not exist."""
        split, _, name = source.partition(".")
        chosen = (
            list(self.numbers.values()) if split == ALL_SPLITS else [self.numbers.get(split, {})]
        )
        if any(name not in metrics for metrics in chosen):
            return None
        records = sum(metrics["records"] for metrics in chosen)
        return float(sum(metrics[name] * metrics["records"] for metrics in chosen) / records)


def load_results(run: str, others: Sequence[str] = ()) -> list[StudentResult]:
    """Load the students of runs/<run>/sweep.json in its order, then those of other runs, or [] without a sweep.

    others  sweeps, or runs of one student each; an arm whose name is already used is prefixed with the name of its run
    """
    if not others and not (RUNS / run / SWEEP_NAME).exists():
        logger.info(
            "%s does not exist, so the report shows only the store", RUNS / run / SWEEP_NAME
        )
        return []
    results = _of_run(run) if (RUNS / run / SWEEP_NAME).exists() else []
    for other in others:
        known = {result.label for result in results}
        for result in _of_run(other):
            label = f"{other}: {result.label}" if result.label in known else result.label
            results.append(replace(result, label=label))
    return results


def load_teacher(run: str) -> StudentResult | None:
    """Load the teacher's results of runs/<run>/evaluate-teacher (evaluate model=teacher), or None if there are none."""
    path = RUNS / run / "evaluate-teacher" / METRICS_NAME
    if not path.exists():
        return None
    return StudentResult(
        arm="teacher",
        label="teacher",
        seed=0,
        folder=RUNS / run,
        metrics=json.loads(path.read_text())["splits"],
    )


def _of_run(run: str) -> list[StudentResult]:
    path = RUNS / run / SWEEP_NAME
    if not path.exists():
        seed = yaml.safe_load(_config_of(run).read_text())["seed"]
        return [_load_result({"arm": run, "run": run, "seed": seed, "point": {}}, several=False)]
    rows = json.loads(path.read_text())["runs"]
    points = defaultdict(set)
    for row in rows:
        points[row["arm"]].add(point_label(row["point"]))
    return [_load_result(row, several=len(points[row["arm"]]) > 1) for row in rows]


def _config_of(run: str) -> Path:
    path = RUNS / run / "distill" / CONFIG_NAME
    if not path.exists():
        raise ConfigError(
            f"report.runs names {run}, but {RUNS / run} contains neither a sweep nor a student; correct report.runs"
        )
    return path


def _load_result(row: dict[str, Any], several: bool) -> StudentResult:
    path = RUNS / row["run"] / "evaluate" / METRICS_NAME
    if not path.exists():
        raise ConfigError(
            f"{path} does not exist; run stages.sweep (or stages.evaluate for a single student) again"
        )
    metrics = json.loads(path.read_text())["splits"]
    return StudentResult(
        arm=row["arm"],
        label=f"{row['arm']} {point_label(row['point'])}" if several else row["arm"],
        point=row["point"],
        seed=row["seed"],
        folder=RUNS / row["run"],
        metrics=metrics,
    )


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A point of the grid as a candidate of an arm."""

    arm: str
    point: Point
    values: list[float]
    """Values of the selection metric, one per seed."""
    chosen: bool

    @property
    def summary(self) -> dict[str, float]:
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
    path = RUNS / run / SWEEP_NAME
    sweep = json.loads(path.read_text()) if path.exists() else {}
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


def over_the_grid(results: Sequence[StudentResult], source: str) -> ModelSelection | None:
    """Collect the values of every arm's points in the form of a selection, without a choice.

    The result is None if no arm has several points, or if a student has no value.
    """
    values = defaultdict(list)
    points = {}
    for result in results:
        value = result.find(source)
        if value is None:
            return None
        values[result.arm, result.label].append(value)
        points[result.arm, result.label] = result.point
    if len(values) == len({arm for arm, _ in values}):
        return None
    candidates = [
        Candidate(arm=key[0], point=points[key], values=found, chosen=False)
        for key, found in values.items()
    ]
    return ModelSelection(select=source, candidates=candidates)


def summarize(values: Sequence[float]) -> dict[str, float]:
    """Compute mean and sample standard deviation (0 for one value)."""
    return {"mean": mean(values), "sd": stdev(values) if len(values) > 1 else 0.0}


def paired_difference(
    rows: Sequence[Mapping[str, Any]], candidate: str, baseline: str, column: str
) -> dict[str, Any]:
    """Compute candidate - baseline in `column` for each seed that both have."""
    values = {(row["method"], row["seed"]): row[column] for row in rows if row[column] is not None}
    seeds = sorted({seed for method, seed in values if method == candidate})
    per_seed = {
        str(seed): values[candidate, seed] - values[baseline, seed]
        for seed in seeds
        if (baseline, seed) in values
    }
    if not per_seed:
        known = ", ".join(sorted({str(row["method"]) for row in rows}))
        raise ConfigError(
            f"report.candidate={candidate} and report.baseline={baseline} share no seed; choose two of: {known}"
        )
    return summarize(list(per_seed.values())) | {"per_seed": per_seed}
