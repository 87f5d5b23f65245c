"""The two students that a report compares case by case, with the records they were evaluated on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from permafrost.config.evaluation import EvaluateOptions
from permafrost.config.report import ReportOptions
from permafrost.config.verbs import ReportConfig
from permafrost.evaluation.forward import EvaluatedModel, open_split
from permafrost.evaluation.record_table import RECORDS_NAME, RECORDS_SCHEMA
from permafrost.evaluation.results import check_written
from permafrost.loading.dataset import StoreDataset
from permafrost.models.saved import load_model, read_description
from permafrost.models.trained_weights import MODEL_NAME
from permafrost.report.cases import Row
from permafrost.report.evaluation import read_evaluation
from permafrost.report.pictures import readable_classes
from permafrost.report.results import StudentResult
from permafrost.store.parquet import read_table

_EVALUATION_OPTIONS = ("store", "splits", "frame", "region", "iou_threshold")
"""Options of evaluate that must be the same for both students."""

logger = logging.getLogger("permafrost.report")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A student of the pair."""

    name: str
    seed: int
    model: EvaluatedModel
    rows: dict[str, list[Row]]
    """Rows by split, as written by evaluate."""


@dataclass(frozen=True, kw_only=True)
class CasePair:
    """Two students with the same seed that were evaluated on the same records in the same way."""

    baseline: Arm
    candidate: Arm
    evaluation: EvaluateOptions
    datasets: dict[str, StoreDataset]
    """Evaluated records by split."""
    classes: tuple[str, ...]

    @cached_property
    def class_names(self) -> list[str]:
        """Names of the classes on the page."""
        return readable_classes(self.classes)

    @property
    def arms(self) -> tuple[Arm, Arm]:
        """Pair of baseline and candidate."""
        return self.baseline, self.candidate


def open_pair(config: ReportConfig, results: Sequence[StudentResult]) -> CasePair | None:
    """Open report.baseline and report.candidate of the first seed that both have.

    If a requirement is missing, the reason is logged and None returned.
    """
    pair = _find(results, config.report)
    if pair is None or not all(_is_there(result) for result in pair):
        return None
    other, own = (read_evaluation(result) for result in pair)
    evaluation = own.options
    store = own.open_store(config.store.folder)
    passes = own.open_passes(store)
    if (
        own.inputs != other.inputs
        or any(
            getattr(evaluation, name) != getattr(other.options, name)
            for name in _EVALUATION_OPTIONS
        )
        or own.inputs["store"] != store.manifest.fingerprint
        or len(passes) != len(own.teachers)
    ):
        logger.info(
            "no cases: %s and %s were not evaluated in the same way on the records of %s; delete both folders and run "
            "permafrost sweep again",
            *(result.evaluation for result in pair),
            store.path,
        )
        return None
    trained = read_description(pair[1].folder / "distill")
    datasets = {split: open_split(store, passes, split, trained) for split in evaluation.splits}
    baseline, candidate = (_open(result) for result in pair)
    return CasePair(
        baseline=baseline,
        candidate=candidate,
        evaluation=evaluation,
        datasets=datasets,
        classes=tuple(store.manifest.classes),
    )


def _find(
    results: Sequence[StudentResult], options: ReportOptions
) -> tuple[StudentResult, StudentResult] | None:
    found = {(result.label, result.seed): result for result in results}
    for result in results:
        baseline = found.get((options.baseline, result.seed))
        candidate = found.get((options.candidate, result.seed))
        if baseline is not None and candidate is not None and baseline is not candidate:
            return baseline, candidate
    return None


def _is_there(result: StudentResult) -> bool:
    table = result.evaluation / RECORDS_NAME
    weights = result.folder / "distill" / MODEL_NAME
    if not table.exists():
        logger.info(
            "no cases: %s does not exist; delete the folder %s and run permafrost sweep again",
            table,
            table.parent,
        )
    elif not weights.exists():
        logger.info("no cases: %s does not exist; run permafrost sweep again", weights)
    return table.exists() and weights.exists()


def _open(result: StudentResult) -> Arm:
    assert result.seed is not None  # cases are of students
    network, trained = load_model(result.folder / "distill")
    table = read_table(check_written(result.evaluation, RECORDS_NAME), RECORDS_SCHEMA, most=None)
    rows: dict[str, list[Row]] = {}
    for row in table.to_pylist():
        rows.setdefault(row["split"], []).append(row)
    model = EvaluatedModel(network=network, input_size=trained.input_size)
    return Arm(name=result.label, seed=result.seed, model=model, rows=rows)
