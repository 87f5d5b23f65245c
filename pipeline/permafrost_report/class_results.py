"""Results of single classes: accuracy and confusions, or the scores of each of many labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from permafrost.evaluation.per_label import MEASURES
from permafrost.evaluation.results import PER_LABEL, check_written
from permafrost.evaluation.saved_records import RECORDS_NAME, RECORDS_SCHEMA
from permafrost.store.arrow_files import read_table
from permafrost_report.comparison import (
    ScoredRow,
    accuracy_interval,
    group_pairs,
    right_images,
    summarize,
)
from permafrost_report.figures import Plot, confusion_plot
from permafrost_report.main_table import Column, passes_of_variants
from permafrost_report.model_selection import read_evaluation
from permafrost_report.pictures import shown_name
from permafrost_report.student_results import ALL_SPLITS, StudentResult

_MAX_CLASSES = 20
"""Largest number of classes that are all shown; of more, the worst ones and the most frequent confusions."""
_MAX_COUNTED_CLASSES = 2_000
"""Largest number of classes whose confusions are counted, as a matrix has the square of it."""
_SHOWN = 10
_ACCURACY = Column(name="accuracy", source="test.accuracy")
Counts = NDArray[np.int64]
"""Records by class and by predicted class, [K, K + 1]; the last column counts predictions that are not a class."""


def score_rows(
    rows: Sequence[Mapping[str, Any]], results: Sequence[StudentResult], columns: Sequence[Column]
) -> list[ScoredRow]:
    """Add to the rows of students which images they got right, and the 95 % intervals of their accuracies.

    Args:
        rows: Rows of the students, from `student_rows`.
        results: Results of the students, in the same order.
        columns: Columns of the rows.
    """
    scored = []
    for values, result in zip(rows, results, strict=True):
        row = ScoredRow(values)
        if result.metrics and (result.evaluation / RECORDS_NAME).exists():
            lines = [
                line
                for line in read_table(
                    check_written(result.evaluation, RECORDS_NAME), RECORDS_SCHEMA, most=None
                )
                .select(["split", "key", "correct"])
                .to_pylist()
                if line["correct"] is not None
            ]
            row.is_unlabeled = not lines
            row.right = {
                column.name: {
                    f"{line['split']} {line['key']}": line["correct"]
                    for line in lines
                    if column.source.partition(".")[0] in (line["split"], ALL_SPLITS)
                }
                for column in columns
                if column.measure == "accuracy" and row[column.name] is not None
            }
        for name in row.right:
            if (right := right_images([row], name)).size:
                row |= zip((f"{name}_low", f"{name}_high"), accuracy_interval(right), strict=True)
        scored.append(row)
    return scored


def pictured_keys(result: StudentResult, count: int) -> list[str]:
    """Return the keys of an evaluation's pictures, which are of the first records of each split."""
    table = read_table(check_written(result.evaluation, RECORDS_NAME), RECORDS_SCHEMA, most=None)
    keys = group_pairs(zip(table["split"].to_pylist(), table["key"].to_pylist(), strict=True))
    first = [
        shown_name(unquote(key))
        for names in keys.values()
        for key in names[: -(-count // len(keys))]
    ]
    return first if len(first) == count else []


class ClassRow(NamedTuple):
    """Accuracy by class of a variant, or of a teacher."""

    name: str
    is_variant: bool
    cells: list[dict[str, Any] | None]
    """Mean and `sd` over seeds for each shown class, None for a class without records."""


class Confusion(NamedTuple):
    """A class that is taken for another one."""

    label: str
    predicted: str
    shares: list[float]
    """Fractions of the records of the class, for each of the networks of the section."""


class ClassSection(NamedTuple):
    """Section of the page on single classes."""

    split: str
    total: int
    """Number of classes that have records."""
    classes: list[str]
    """Names of the shown classes."""
    rows: list[ClassRow]
    networks: list[str]
    """Variant and teacher whose confusions are shown."""
    plots: list[Plot]
    """Confusion matrices of the networks, empty for many classes."""
    confusions: list[Confusion]
    """Most frequent confusions, empty for few classes."""
    values: dict[str, Any]
    """Content of report.json."""
    column: Column = _ACCURACY
    """Format of the numbers."""


def class_section(
    results: Sequence[StudentResult], names: Sequence[str], variant: str
) -> ClassSection | None:
    """Build the section on the split of the main table, None without single labels or for very many classes.

    Args:
        results: Results of the students. Those with a last layer that was not trained, and those on other records than
            the first, are left out.
        names: Names of the classes.
        variant: Variant whose confusions are shown, if it was evaluated; otherwise the most accurate variant.
    """
    results = [
        result
        for result in results
        if result.trains_classifier and (result.evaluation / RECORDS_NAME).exists()
    ]
    stores = [read_evaluation(result).inputs["store"] for result in results]
    results = [result for result, store in zip(results, stores, strict=True) if store == stores[0]]
    metrics = [result.metrics or next(iter(result.against.values()), {}) for result in results]
    splits = {split for by_split in metrics for split in by_split if "accuracy" in by_split[split]}
    if not splits or not 0 < len(names) <= _MAX_COUNTED_CLASSES:
        return None
    split = min(splits, key=lambda name: (name != "test", name))
    variants, teachers, teacher_names, of_variants = _count(results, split, len(names))
    best = max(variants, key=lambda name: variants[name].trace() / variants[name].sum())
    shown_variant = variant if variant in variants else best
    networks = {shown_variant: variants[shown_variant]}
    if teacher_names[shown_variant] in teachers:
        networks[teacher_names[shown_variant]] = teachers[teacher_names[shown_variant]]
    accuracies = {
        name: [np.diagonal(_shares(counts))] for name, counts in teachers.items()
    } | of_variants
    means = {name: np.mean(by_seed, axis=0) for name, by_seed in accuracies.items()}
    present = np.flatnonzero(~np.isnan(means[shown_variant]))
    places = present.tolist()
    if len(names) > _MAX_CLASSES:
        mean = np.mean([means[name] for name in variants], axis=0)
        places = present[np.argsort(mean[present], kind="stable")][:_SHOWN].tolist()
    rows = [
        ClassRow(name, name in variants, [_cell([by[place] for by in by_seed]) for place in places])
        for name, by_seed in accuracies.items()
    ]
    is_small = len(names) <= _MAX_CLASSES
    values: dict[str, Any] = {
        "split": split,
        "classes": list(names),
        "accuracy": {
            name: [None if np.isnan(value) else float(value) for value in mean]
            for name, mean in means.items()
        },
    }
    if is_small:
        values["confusions"] = {name: counts.tolist() for name, counts in networks.items()}
    return ClassSection(
        split=split,
        total=len(present),
        classes=[names[place] for place in places],
        rows=rows,
        networks=list(networks),
        plots=[
            Plot(
                confusion_plot(names, 100 * _shares(counts)[:, :-1]),
                f"Confusion matrix of {name}: per cent of the records of each class, by predicted class",
                f"{name}: per cent of the records of each class (row), by predicted class (column)",
            )
            for name, counts in networks.items()
            if is_small
        ],
        confusions=[] if is_small else _frequent(networks, names),
        values=values,
    )


class LabelRow(NamedTuple):
    """Scores of a label, of a variant or a teacher."""

    label: str
    name: str
    is_variant: bool
    counts: list[str]
    """Numbers of records with the label, without it, and of which that is unknown, and the threshold."""
    cells: list[dict[str, Any] | None]
    """Mean and `sd` over seeds of each of MEASURES, None where it is not defined."""


class LabelSection(NamedTuple):
    """Section of the page on the labels of records that may have many."""

    split: str
    measures: tuple[str, ...]
    rows: list[LabelRow]
    total: int
    """Number of labels, of which the first ones are shown."""
    column: Column = _ACCURACY
    """Format of the numbers."""


def label_section(
    results: Sequence[StudentResult], teacher: StudentResult | None
) -> LabelSection | None:
    """Build the section on single labels of the split of the main table, None without many labels.

    Args:
        results: Results of the students. Those with a last layer that was not trained are left out.
        teacher: Results of the teacher, None if it was not evaluated.
    """
    networks = [result for result in results if result.trains_classifier]
    tables = [
        (result.label, result is not teacher, result.metrics)
        for result in [*networks, *([teacher] if teacher else [])]
    ]
    splits = {split for *_, metrics in tables for split in metrics if PER_LABEL in metrics[split]}
    if not splits:
        return None
    split = min(splits, key=lambda name: (name != "test", name))
    tables = [table for table in tables if PER_LABEL in table[2].get(split, {})]
    by_network = group_pairs((name, metrics[split][PER_LABEL]) for name, _, metrics in tables)
    variants = {name for name, is_variant, _ in tables if is_variant}
    labels = list(next(iter(by_network.values()))[0])
    rows = [
        LabelRow(
            label,
            name,
            name in variants,
            [
                *(
                    f"{of_seeds[0][label][name]:,}"
                    for name in ("positives", "negatives", "unknown")
                ),
                " ".join(dict.fromkeys(f"{table[label]['threshold']:.2f}" for table in of_seeds)),
            ],
            [
                _cell([table[label].get(measure, np.nan) for table in of_seeds])
                for measure in MEASURES
            ],
        )
        for label in labels[:_MAX_CLASSES]
        for name, of_seeds in by_network.items()
    ]
    return LabelSection(split, MEASURES, rows, len(labels))


def _count(
    results: Sequence[StudentResult], split: str, size: int
) -> tuple[
    dict[str, Counts], dict[str, Counts], dict[str, str], dict[str, list[NDArray[np.float64]]]
]:
    """Count the predictions of every variant and of every teacher.

    Returns:
        Counts of each variant over its seeds, counts of each teacher, the teacher of each variant, and the accuracies
        by class of the students of each variant.
    """
    several = len(passes_of_variants(results)) > 1
    variants: dict[str, Counts] = {}
    accuracies: dict[str, list[NDArray[np.float64]]] = {}
    teachers: dict[str, Counts] = {}
    teacher_names: dict[str, str] = {}
    for result in results:
        table = read_table(
            check_written(result.evaluation, RECORDS_NAME), RECORDS_SCHEMA, most=None
        )
        table = table.filter(pc.equal(table["split"], split))
        if not len(table):
            continue
        counts = _confusions(table, "predictions", size)
        variants[result.label] = variants.get(result.label, 0) + counts
        accuracies.setdefault(result.label, []).append(np.diagonal(_shares(counts)))
        teacher = f"teacher {result.compared_pass}" if several else "teacher"
        teacher_names[result.label] = teacher
        if teacher not in teachers and not table["teacher_predictions"].null_count:
            teachers[teacher] = _confusions(table, "teacher_predictions", size)
    return variants, teachers, teacher_names, accuracies


def _confusions(table: pa.Table, name: str, size: int) -> Counts:
    labels, predictions = (
        pc.list_element(table[column], 0).to_numpy().astype(np.int64) for column in ("labels", name)
    )
    known = (labels >= 0) & (labels < size)
    pairs = labels[known] * (size + 1) + np.minimum(predictions[known], size)
    return np.bincount(pairs, minlength=size * (size + 1)).reshape(size, size + 1)


def _shares(counts: Counts) -> NDArray[np.float64]:
    """Fractions of the records of each class, nan for a class without records."""
    with np.errstate(invalid="ignore"):
        return np.asarray(counts / counts.sum(axis=1, keepdims=True))


def _cell(values: Sequence[float]) -> dict[str, Any] | None:
    return None if np.isnan(values).any() else summarize([float(value) for value in values])


def _frequent(networks: Mapping[str, Counts], names: Sequence[str]) -> list[Confusion]:
    """Return the most frequent confusions of the first network, with the shares of all."""
    counts = next(iter(networks.values()))[:, :-1].copy()
    np.fill_diagonal(counts, 0)
    order = np.argsort(-counts, axis=None, kind="stable")[:_SHOWN]
    pairs = [divmod(int(place), len(names)) for place in order if counts.flat[place]]
    shares = [_shares(matrix) for matrix in networks.values()]
    return [
        Confusion(
            names[label], names[predicted], [float(share[label, predicted]) for share in shares]
        )
        for label, predicted in pairs
    ]
