"""Numbers of a sweep: what each student reached, arm by arm and seed by seed."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from pipeline.config import ConfigError
from pipeline.evaluation.metrics import Metric, metric_of, numbers_of
from pipeline.grid import point_label
from pipeline.runs import RUNS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pipeline.grid import Point

SWEEP_NAME = "sweep.json"
ALL_SPLITS = "all"
"""In a column's source: the mean over all splits, weighted by their records."""

logger = logging.getLogger("permafrost.report")


@dataclass(frozen=True, kw_only=True)
class StudentResult:
    """One finished student."""

    arm: str
    label: str
    """The arm, with its point of the grid where the arm has several."""
    seed: int
    folder: Path
    metrics: dict[str, dict[str, Any]]
    """By split, as evaluate wrote them."""

    def value(self, source: str) -> float:
        """The metric that `source` names: <split>.<metric>, <split>.<judge>.<metric>, or all. and either."""
        split, _, name = source.partition(".")
        numbers = {s: numbers_of(metrics) for s, metrics in self.metrics.items()}
        chosen = list(numbers.values()) if split == ALL_SPLITS else [numbers.get(split, {})]
        if any(name not in metrics for metrics in chosen):
            known = sorted(f"{s}.{m}" for s, metrics in numbers.items() for m in metrics)
            raise ConfigError(
                f"report.columns: {source} is not in {self.folder}; name what there is, as in "
                "report.columns={f1: test.f1} report.paired_column=f1: " + ", ".join(known)
            )
        records = sum(metrics["records"] for metrics in chosen)
        return float(sum(metrics[name] * metrics["records"] for metrics in chosen) / records)


def load_results(run: str) -> list[StudentResult]:
    """The students that runs/<run>/sweep.json lists, in its order; none where there is no sweep."""
    path = RUNS / run / SWEEP_NAME
    if not path.exists():
        logger.info("%s does not exist: the report shows the store alone", path)
        return []
    rows = json.loads(path.read_text())["runs"]
    points = defaultdict(set)
    for row in rows:
        points[row["arm"]].add(point_label(row.get("point", {})))
    return [_load_result(row, several=len(points[row["arm"]]) > 1) for row in rows]


def _load_result(row: dict[str, Any], several: bool) -> StudentResult:
    path = RUNS / row["run"] / "evaluate" / "metrics.json"
    if not path.exists():
        raise ConfigError(f"{path} is gone; run stages.sweep again")
    metrics = json.loads(path.read_text())["splits"]
    return StudentResult(
        arm=row["arm"],
        label=f"{row['arm']} {point_label(row['point'])}" if several else row["arm"],
        seed=row["seed"],
        folder=RUNS / row["run"],
        metrics=metrics,
    )


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A point of the grid that an arm could take."""

    arm: str
    point: Point
    values: list[float]
    """Of the metric by which points are chosen, a value a seed."""
    chosen: bool

    @property
    def summary(self) -> dict[str, float]:
        """Mean and standard deviation over seeds."""
        return summarise(self.values)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """How each arm's point was chosen."""

    select: str
    """<split>.<metric>."""
    candidates: list[Candidate]

    @property
    def metric(self) -> Metric:
        """By which the candidates are compared."""
        metric = metric_of(self.select.partition(".")[2])
        assert metric is not None  # checked before the sweep began
        return metric


def load_selection(run: str) -> Selection | None:
    """Arm by arm, what runs/<run>/sweep.json chose from; None where nothing was chosen."""
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
    return Selection(select=sweep["select"], candidates=candidates)


def student_rows(
    results: Sequence[StudentResult], columns: Mapping[str, str]
) -> list[dict[str, Any]]:
    """One row a student: method, seed and the columns."""
    return [
        {"method": r.label, "seed": r.seed}
        | {name: r.value(source) for name, source in columns.items()}
        for r in results
    ]


def teacher_row(results: Sequence[StudentResult], columns: Mapping[str, str]) -> dict[str, float]:
    """The teacher's own value of each column it has one of, from what evaluate found in the store."""
    row = {}
    for name, source in columns.items():
        split, _, metric = source.partition(".")
        if metric == "agreement":
            continue
        if all(f"teacher_{metric}" in metrics for metrics in results[0].metrics.values()):
            row[name] = results[0].value(f"{split}.teacher_{metric}")
    return row


def arm_summary(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds of each column, a row an arm."""
    by_arm = defaultdict(list)
    for row in rows:
        by_arm[row["method"]].append(row)
    return [
        {"method": arm, "seeds": len(members)}
        | {name: summarise([row[name] for row in members]) for name in columns}
        for arm, members in by_arm.items()
    ]


def summarise(values: Sequence[float]) -> dict[str, float]:
    """Mean and sample standard deviation (0 for one value)."""
    return {"mean": mean(values), "sd": stdev(values) if len(values) > 1 else 0.0}


def paired_difference(
    rows: Sequence[Mapping[str, Any]], candidate: str, baseline: str, column: str
) -> dict[str, Any]:
    """candidate - baseline in `column`, seed by seed, over the seeds that both have."""
    values = {(row["method"], row["seed"]): row[column] for row in rows}
    seeds = sorted({seed for method, seed in values if method == candidate})
    per_seed = {
        str(seed): values[candidate, seed] - values[baseline, seed]
        for seed in seeds
        if (baseline, seed) in values
    }
    if not per_seed:
        known = ", ".join(sorted({str(row["method"]) for row in rows}))
        raise ConfigError(
            f"report.candidate={candidate} and report.baseline={baseline} share no seed; the sweep has: {known}"
        )
    return summarise(list(per_seed.values())) | {"per_seed": per_seed}
