"""Cases: records on which two students differ, and the pair of students that is run on them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

from permafrost.config.evaluation import EvaluateOptions
from permafrost.evaluation.forward import EvaluatedModel, explained_as, open_split
from permafrost.evaluation.results import check_written
from permafrost.evaluation.saved_records import RECORDS_NAME, RECORDS_SCHEMA
from permafrost.loading.dataset import StoreDataset
from permafrost.models.saved import SavedNetwork
from permafrost.models.trained_weights import MODEL_NAME
from permafrost.store.arrow_files import read_table
from permafrost.store.reader import TeacherPass
from permafrost_report.comparison import group_pairs
from permafrost_report.model_selection import read_evaluation
from permafrost_report.options import ReportConfig, ReportOptions
from permafrost_report.pictures import readable_classes
from permafrost_report.student_results import StudentResult

logger = logging.getLogger("permafrost.report")

Measure = Literal["map_cosine", "epg"]
RecordRow = dict[str, Any]
"""Row of record_table.RECORDS_SCHEMA."""

MEASURE_WORDS: Mapping[Measure, str] = {
    "map_cosine": "the cosine of their maps with the teacher's",
    "epg": "the EPG of their maps",
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Results of two students for one class of one record."""

    label: int
    """Target class: the label of the record, or one of its labels if it has many."""
    baseline: RecordRow
    candidate: RecordRow

    @property
    def key(self) -> str:
        """Key of the record."""
        return str(self.candidate["key"])

    def margin(self, measure: Measure) -> float | None:
        """Return the difference candidate - baseline, None if one of them has no value."""
        values = [value_of(row, measure, self.label) for row in (self.candidate, self.baseline)]
        return None if None in values else values[0] - values[1]  # type: ignore[operator]


class CaseKind(NamedTuple):
    """Cases of the same kind."""

    title: str
    found: int
    """Number of such cases in the split; `cases` has the first ones."""
    cases: list[Case]


class CaseChoice(NamedTuple):
    """Selected cases of one split."""

    total: int
    """Number of (record, class) pairs on which both students were evaluated."""
    measure: Measure | None
    """Measure that determines the order, None if the students' maps cannot be compared."""
    kinds: list[CaseKind]


def value_of(row: RecordRow, name: str, label: int) -> float | None:
    """Return a value of one class from the row of a record, None if it has none.

    Args:
        row: Row of records.parquet.
        name: epg, iou, teacher_epg or map_cosine.
        label: The class.
    """
    places = row["classes"]
    return row[name][places.index(label)] if label in places else None


def choose_cases(
    baseline: Sequence[RecordRow],
    candidate: Sequence[RecordRow],
    names: tuple[str, str],
    num_cases: int,
    *,
    many: bool,
) -> CaseChoice:
    """Select cases in which the candidate is better, worse, and (for one label per record) in agreement.

    Each kind starts with the largest difference of the maps in its direction, with ties ordered by key.

    Args:
        baseline: Rows of the baseline.
        candidate: Rows of the candidate; records that only one of them has are left out.
        names: Names of baseline and candidate, for the titles.
        num_cases: Largest number of cases of each kind.
        many: Records have many labels, so better and worse are by EPG instead of correctness.
    """
    baseline_rows = {row["key"]: row for row in baseline}
    pairs = [
        Case(label=label, baseline=baseline_rows[row["key"]], candidate=row)
        for row in candidate
        if row["key"] in baseline_rows and row["correct"] is not None
        for label in row["labels"]
    ]
    pairs.sort(key=lambda case: (case.key, case.label))
    choose = _choose_by_maps if many else _choose_by_predictions
    return choose(pairs, names, num_cases)


def _choose_by_predictions(pairs: list[Case], names: tuple[str, str], num_cases: int) -> CaseChoice:
    measure = _measure(pairs, ("map_cosine", "epg"))
    better = [case for case in pairs if case.candidate["correct"] and not case.baseline["correct"]]
    worse = [case for case in pairs if case.baseline["correct"] and not case.candidate["correct"]]
    same = [case for case in pairs if case.baseline["predictions"] == case.candidate["predictions"]]
    same = [case for case in same if measure is not None and case.margin(measure) is not None]
    num_worse, num_same = (num_cases + 2) // 4, num_cases // 4
    baseline, candidate = names
    kinds = [
        _kind(f"{candidate} right, {baseline} wrong", better, measure, num_cases - num_worse - num_same),
        _kind(f"{baseline} right, {candidate} wrong", worse, measure, num_worse, sign=-1),
        _kind(f"{candidate} and {baseline} agree", same, measure, num_same, sign=0),
    ]  # fmt: skip
    return CaseChoice(len(pairs), measure, kinds)


def _choose_by_maps(pairs: list[Case], names: tuple[str, str], num_cases: int) -> CaseChoice:
    if (measure := _measure(pairs, ("epg", "map_cosine"))) is None:
        return CaseChoice(len(pairs), None, [])
    margins = [(case, case.margin(measure)) for case in pairs]
    total = sum(margin is not None for _, margin in margins)
    better = [case for case, margin in margins if margin is not None and margin > 0]
    worse = [case for case, margin in margins if margin is not None and margin < 0]
    baseline, candidate = names
    what = {"epg": "EPG", "map_cosine": "cosine with the teacher's map"}[measure]
    kinds = [
        _kind(f"{what}: {candidate} above {baseline}", better, measure, -(-num_cases // 2)),
        _kind(f"{what}: {baseline} above {candidate}", worse, measure, num_cases // 2, sign=-1),
    ]
    return CaseChoice(total, measure, kinds)


def _measure(pairs: Sequence[Case], choices: tuple[Measure, ...]) -> Measure | None:
    """Return the first measure for which any case has a value."""
    return next(
        (measure for measure in choices if any(case.margin(measure) is not None for case in pairs)),
        None,
    )


def _kind(
    title: str, cases: list[Case], measure: Measure | None, num_cases: int, *, sign: int = 1
) -> CaseKind:
    """Order cases and take the first.

    A `sign` of 1 starts with the candidate's largest lead, -1 with the baseline's, 0 with either's.
    """

    def order(case: Case) -> tuple[bool, float]:
        margin = None if measure is None else case.margin(measure)
        lead = 0.0 if margin is None else sign * margin if sign else abs(margin)
        return margin is None, -lead

    return CaseKind(title, len(cases), sorted(cases, key=order)[:num_cases])


# ---- case pair -------------------------------------------------------------------------------------


_EVALUATION_OPTIONS = ("store", "splits", "frame", "region", "iou_threshold")
"""Options of evaluate that must be the same for both students."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A student of the pair."""

    name: str
    seed: int
    model: EvaluatedModel
    rows: dict[str, list[RecordRow]]
    """Rows by split, as written by evaluate."""


@dataclass(frozen=True, kw_only=True)
class CasePair:
    """Two students with the same seed that were evaluated on the same records in the same way."""

    baseline: Variant
    candidate: Variant
    evaluation: EvaluateOptions
    datasets: dict[str, StoreDataset]
    """Evaluated records by split."""
    classes: tuple[str, ...]

    @cached_property
    def class_names(self) -> list[str]:
        """Names of the classes on the page."""
        return readable_classes(self.classes)

    @property
    def variants(self) -> tuple[Variant, Variant]:
        """Pair of baseline and candidate."""
        return self.baseline, self.candidate


def open_pair(config: ReportConfig, results: Sequence[StudentResult]) -> CasePair | None:
    """Open report.baseline and report.candidate of the first seed that both have.

    If a requirement is missing, the reason is logged and None returned.
    """
    pair = _find(results, config.report)
    if pair is None or not all(_is_there(result) for result in pair):
        return None
    other, candidate_evaluation = (read_evaluation(result) for result in pair)
    evaluation = candidate_evaluation.options
    store = candidate_evaluation.open_store(config.store.folder)
    store = store.part_with(candidate_evaluation.inputs["store"])
    passes = candidate_evaluation.open_passes(store)
    if (
        candidate_evaluation.inputs != other.inputs
        or any(
            getattr(evaluation, name) != getattr(other.options, name)
            for name in _EVALUATION_OPTIONS
        )
        or candidate_evaluation.inputs["store"] != store.manifest.fingerprint
        or len(passes) != len(candidate_evaluation.teachers)
    ):
        logger.info(
            "no cases: %s and %s were not evaluated in the same way on the records of %s; delete both folders and run "
            "permafrost sweep again",
            *(result.evaluation for result in pair),
            store.path,
        )
        return None
    trained = SavedNetwork(pair[1].training_folder).describe().in_frame(evaluation.frame, store)
    baseline, candidate = (_open(result, store.manifest.classes, passes) for result in pair)
    return CasePair(
        baseline=baseline,
        candidate=candidate,
        evaluation=evaluation,
        datasets={split: open_split(store, passes, split, trained) for split in evaluation.splits},
        classes=tuple(store.manifest.classes),
    )


def _find(
    results: Sequence[StudentResult], options: ReportOptions
) -> tuple[StudentResult, StudentResult] | None:
    by_label = {(result.label, result.seed): result for result in results}
    for result in results:
        baseline = by_label.get((options.baseline, result.seed))
        candidate = by_label.get((options.candidate, result.seed))
        if baseline is not None and candidate is not None and baseline is not candidate:
            return baseline, candidate
    names = (options.baseline, options.candidate)
    if set(names) <= {result.label for result in results}:
        logger.info("no cases: %s and %s have no seed in common", *names)
    return None


def _is_there(result: StudentResult) -> bool:
    table = result.evaluation / RECORDS_NAME
    weights = result.training_folder / MODEL_NAME
    if not table.exists():
        logger.info(
            "no cases: %s does not exist; delete the folder %s and run permafrost sweep again",
            table,
            table.parent,
        )
    elif not weights.exists():
        logger.info("no cases: %s does not exist; run permafrost sweep again", weights)
    return table.exists() and weights.exists()


def _open(result: StudentResult, classes: Sequence[str], passes: Sequence[TeacherPass]) -> Variant:
    assert result.seed is not None  # cases are of students
    network, trained = SavedNetwork(result.training_folder).load(classes)
    rows = group_pairs(
        (row["split"], row)
        for row in read_table(
            check_written(result.evaluation, RECORDS_NAME), RECORDS_SCHEMA, most=None
        ).to_pylist()
    )
    model = explained_as(EvaluatedModel(network=network, input_size=trained.input_size), passes)
    return Variant(name=result.label, seed=result.seed, model=model, rows=rows)
