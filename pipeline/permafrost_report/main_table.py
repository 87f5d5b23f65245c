"""The main table of a page: its columns, their meanings, and one row for each variant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from permafrost.config.evaluation import EVALUATORS
from permafrost.config.points import point_label
from permafrost.core.errors import ConfigError
from permafrost.evaluation.evaluator import Metric, align_columns, evaluator_named, metric_of
from permafrost_report.comparison import (
    ONE_SEED,
    accuracy_interval,
    group_pairs,
    leading_variants,
    right_images,
    summarize,
)
from permafrost_report.model_selection import load_selection, reservations
from permafrost_report.student_results import StudentResult, load_results, untrained_results

DEFAULT_METRICS = ("accuracy", "f1", "agreement", "epg", "iou")
"""Metrics that a report and the summary of a sweep show without being asked."""
_LEAST_P = 0.001
"""Smallest p-value that is shown as a number."""
_MIN_DIFFERENCE = 0.005
"""Difference from accuracy from which on the mean over classes is shown without being asked."""
_PROBES = ("knn.accuracy", "linear_probe.accuracy")
"""Metrics of features, which they show if they were measured."""
_OF_OWN_PASS = ("agreement", "kl_to_teacher", "map_cosine")
"""Metrics of a student and the pass that it is compared with."""
CHANCE = {"accuracy": "majority_accuracy", "epg": "epg_uniform", "iou": "epg_uniform"}
"""Metric that is the chance level of another one: of a constant prediction, or of a uniform map."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of report.columns."""

    name: str
    source: str
    """Source <split>.<metric> or <split>.<evaluator>.<metric>, where the split may be `all`."""
    known: Metric | None = None
    """Metric of the column, if the source does not determine it."""

    @property
    def metric(self) -> Metric:
        """Metric of the column, by default a fraction for which higher is better."""
        return self.known or metric_of(self.source.partition(".")[2]) or Metric()

    @property
    def measure(self) -> str:
        """Name of what is measured, without the split and the pass."""
        return self.source.partition(".")[2].partition("@")[0]

    @property
    def words(self) -> str:
        """Name as text."""
        return self.name.replace("_", " ")

    @property
    def title(self) -> str:
        """Name with unit, and with an arrow if lower is better."""
        unit = ", %" if self.metric.scale == 100 else ""
        return self.words + unit + (" ↓" if self.metric.higher_is_better is False else "")

    def text(self, value: float | None) -> str:
        """Format a value, with a dash for None."""
        if value is None:
            return "–"  # noqa: RUF001, a dash
        metric = self.metric
        if "_p." in f"{self.measure}." and value < _LEAST_P:
            return f"< {_LEAST_P}"
        return f"{metric.scale * value:.{1 if metric.scale == 100 else metric.digits}f}"

    def value(self, value: float) -> str:
        """Format a value with its unit."""
        return self.text(value) + (" %" if self.metric.scale == 100 else "")

    def spread(self, summary: Mapping[str, Any]) -> str:
        """Format mean and standard deviation, or the mean alone for one seed."""
        text = self.text(summary["mean"])
        return text if summary["sd"] is None else f"{text} ± {self.text(summary['sd'])}"

    def difference(self, value: float, *, unit: bool = True) -> str:
        """Format a difference of two values, with its sign.

        Args:
            value: The difference.
            unit: Whether a difference in per cent ends with "points".
        """
        if self.metric.scale != 100:
            return f"{value:+.3f}"
        return f"{100 * value:+.1f}" + (" points" if unit else "")


def columns_of(sources: Mapping[str, str], results: Sequence[StudentResult]) -> list[Column]:
    """Build one column for each source, or the default ones.

    Args:
        sources: Source of each column by its name, as report.columns; empty takes the default ones.
        results: Results of the students.

    Raises:
        ConfigError: If no student has a value for a source.
    """
    if not sources:
        return default_columns(results)
    columns = [Column(name=name, source=source) for name, source in sources.items()]
    for column in columns:
        if all(result.find(column.source) is None for result in results):
            known = sorted({source for result in results for source in result.sources})
            raise ConfigError(
                f"report.columns: no student has {column.source}; name existing metrics, as in "
                "report.columns={f1: test.f1} report.compared_column=f1, among: " + ", ".join(known)
            )
    return columns


def default_columns(results: Sequence[StudentResult]) -> list[Column]:
    """Build the columns of everything in DEFAULT_METRICS that was measured, split by split.

    The columns of the first split (test, if it was evaluated) have the names of their metrics, those of the others
    end with the name of their split. Metrics against a named pass are shown if they depend on the pass, or if there is
    no other evaluation.
    """
    splits = list(dict.fromkeys(split for result in results for split in result.numbers))
    splits.sort(key=lambda split: split != "test")
    columns = {}
    for split in splits:
        for at in dict.fromkeys(["", *(f"@{name}" for one in results for name in one.against)]):
            for metric, title in _shown_metrics(results, split):
                name = title if split == splits[0] else f"{title}_{split}"
                if (at and metric != "agreement" and name in columns) or all(
                    result.find(f"{split}.{metric}{at}") is None for result in results
                ):
                    continue
                name = name + at if metric == "agreement" else name
                columns[name] = Column(name=name, source=f"{split}.{metric}{at}")
    return list(columns.values())


def _shown_metrics(results: Sequence[StudentResult], split: str) -> list[tuple[str, str]]:
    """Return the metrics of a split that are shown by default, and the beginnings of their columns' names."""
    probes = {
        name: name.replace(".accuracy", "").replace(".", "_")
        for result in results
        for name in result.numbers.get(split, {})
        if f"{name}.".startswith(tuple(f"{probe}." for probe in _PROBES))
    }
    numbers = [result.numbers.get(split, {}) for result in results]
    differs = any(
        abs(each["mean_class_accuracy"] - each["accuracy"]) >= _MIN_DIFFERENCE
        for each in numbers
        if "mean_class_accuracy" in each
    )
    shown = ["accuracy", *["mean_class_accuracy"] * differs, *DEFAULT_METRICS[1:]]
    return [*zip(shown, shown, strict=True), *probes.items()]


def compared_column(name: str | None, columns: Sequence[Column]) -> Column | None:
    """Return the column by which variants are compared, None if there are no columns.

    Args:
        name: report.compared_column; None is accuracy if it is a column, and otherwise the first column.
        columns: Columns of the report.
    """
    return next(
        (column for column in columns if column.name == (name or "accuracy")),
        next(iter(columns), None),
    )


def pictures_in_words(results: Sequence[StudentResult]) -> list[str]:
    """Return what students were shown of an image, and which variants were shown it if there are several pictures.

    Comparisons of maps by different explainers follow.
    """
    compared = {
        result.label: f"{result.label}: {result.pictures[2]}"
        for result in results
        if result.pictures[2]
    }
    pairs = dict.fromkeys((result.pictures[0], result.label) for result in results)
    shown = group_pairs(pair for pair in pairs if pair[0])
    if len(shown) == 1:
        return [f"Images were shown as: {next(iter(shown))}", *compared.values()]
    lines = [f"Images of {', '.join(names)} were shown as: {text}" for text, names in shown.items()]
    return [*lines, *compared.values()]


def student_rows(
    results: Sequence[StudentResult], columns: Sequence[Column]
) -> list[dict[str, Any]]:
    """Build one row per student: method, seed and the columns, None if it has no value."""
    return [
        {"method": result.label, "seed": result.seed}
        | ({"picture": result.pictures[0]} if result.pictures[0] else {})
        | {column.name: result.find(column.source) for column in columns}
        for result in results
    ]


def passes_of_variants(results: Sequence[StudentResult]) -> dict[str, list[str]]:
    """Return the variants by the pass that their students are compared with, without those that have none."""
    return {
        name: list(dict.fromkeys(labels))
        for name, labels in group_pairs(
            (result.compared_pass, result.label)
            for result in results
            if result.compared_pass is not None
        ).items()
    }


def teacher_rows(
    results: Sequence[StudentResult],
    columns: Sequence[Column],
    teacher_result: StudentResult | None = None,
) -> dict[str, dict[str, float]]:
    """Collect the values of the teachers: "teacher", or "teacher <pass>" for each of several passes.

    Args:
        results: Results of the students.
        columns: Columns of the report.
        teacher_result: As in `teacher_row`.
    """
    passes = passes_of_variants(results)
    if len(passes) < 2:
        row = teacher_row(results, columns, teacher_result)
        return {_teacher_name("teacher", results): row} if row else {}
    rows = {}
    if teacher_result is not None and teacher_result.compared_pass not in passes:
        rows["teacher"] = teacher_row([], columns, teacher_result)
    for name in passes:
        learners = [result for result in results if result.compared_pass == name]
        is_evaluated = teacher_result is not None and teacher_result.compared_pass == name
        rows[_teacher_name(f"teacher {name}", learners)] = teacher_row(
            learners, columns, teacher_result if is_evaluated else None
        )
    return rows


def _teacher_name(name: str, learners: Sequence[StudentResult]) -> str:
    """Return the name of a teacher's row, with what it was shown of an image if that is not what students were."""
    pictures = {learner.pictures for learner in learners}
    shown = sorted({teacher for student, teacher, _ in pictures if teacher not in (student, "")})
    return f"{name} ({', '.join(shown)})" if shown else name


def teacher_row(
    results: Sequence[StudentResult],
    columns: Sequence[Column],
    teacher_result: StudentResult | None = None,
) -> dict[str, float]:
    """Collect a teacher's value of each column for which it has one.

    Args:
        results: Results of the students.
        columns: Columns of the report.
        teacher_result: Evaluation of the teacher itself; None uses the teacher's values in the students' evaluations.
    """
    row = {}
    for column in columns:
        if column.measure == "agreement":
            continue
        split, _, metric = column.source.partition(".")
        value = None if teacher_result is None else teacher_result.find(column.source)
        if value is None:
            source = f"{split}.teacher_{metric}"
            value = next((v for one in results if (v := one.find(source)) is not None), None)
        if value is not None:
            row[column.name] = value
    return row


def chance_row(results: Sequence[StudentResult], columns: Sequence[Column]) -> dict[str, float]:
    """Collect the chance level of each column that has one, as the students' evaluations contain it."""
    row = {}
    for column in columns:
        split, _, metric = column.source.partition(".")
        metric, at, teacher = metric.partition("@")
        levels = [
            result.find(f"{split}.{CHANCE[metric]}{at}{teacher}")
            for result in results
            if metric in CHANCE
        ]
        if known := [level for level in levels if level is not None]:
            row[column.name] = known[0]
    return row


class ChanceLimit(NamedTuple):
    """Accuracy of a constant prediction."""

    level: float
    highest: float
    """Level and two standard errors of an accuracy on as many records, up to which an accuracy may be chance."""


def accuracy_limit(
    results: Sequence[StudentResult], columns: Sequence[Column]
) -> tuple[Column, ChanceLimit] | None:
    """Return the first column of an accuracy whose chance level is known, and that level."""
    chance = chance_row(results, columns)
    for column in columns:
        if column.measure == "accuracy" and column.name in chance:
            level = chance[column.name]
            records = column.source.replace(".accuracy", ".records", 1)
            counts = [n for result in results if (n := result.find(records)) is not None]
            return column, ChanceLimit(
                level, level + 2 * ((level * (1 - level) / min(counts)) ** 0.5 if counts else 0.0)
            )
    return None


def variant_summary(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[Column],
    variants_by_pass: Mapping[str, Sequence[str]] | None = None,
) -> list[dict[str, Any]]:
    """Build one row per variant: mean and standard deviation of each column over seeds, and whether it is `best`.

    The best variants of a column are those that are not conclusively below the best mean (`leading_variants`); without
    any conclusive difference, or while a variant has fewer than three seeds, there are none. Where the variants
    have different teachers, a number that depends on the teacher is compared among those of the same one.

    Args:
        rows: One row per student, from `student_rows`.
        columns: Columns of the report.
        variants_by_pass: Variants by the pass that they are compared with, from `passes_of_variants`.

    Returns:
        Rows with method, seeds (their number), and for each column `mean`, `sd`, `best`, and the `interval` over images
        and seeds of an accuracy whose images are known, or None if a student of the variant has no value.
    """
    by_variant = group_pairs((row["method"], row) for row in rows)
    summary: list[dict[str, Any]] = [
        {"method": variant, "seeds": len(members)} for variant, members in by_variant.items()
    ]
    for column in columns:
        for variant in summary:
            values = [row[column.name] for row in by_variant[variant["method"]]]
            variant[column.name] = None if None in values else summarize(values)
        compared = [variant for variant in summary if variant[column.name]]
        direction = column.metric.higher_is_better
        leading = set()
        if direction is not None and all(variant["seeds"] > 2 for variant in compared):
            labels = [str(variant["method"]) for variant in compared]
            # Of a student and its own teacher, which need not be that of another student.
            is_of_own = column.measure in _OF_OWN_PASS and "@" not in column.source
            groups = list((variants_by_pass or {}).values()) if is_of_own else []
            for group in groups if len(groups) > 1 else [labels]:
                members = [row for label in labels if label in group for row in by_variant[label]]
                leading |= leading_variants(members, column.name, higher_is_better=direction)
        for variant in compared:
            variant[column.name]["best"] = variant["method"] in leading
            if (right := right_images(by_variant[variant["method"]], column.name)).size:
                variant[column.name]["interval"] = accuracy_interval(right)
    return summary


# ---- meanings --------------------------------------------------------------------------------------


_MEANINGS = {
    "accuracy": "Accuracy is the fraction of records whose label is predicted",
    "f1": "F1 is the harmonic mean of precision and recall over all pairs of a record and a class",
    "mean_class_accuracy": "Mean class accuracy is the mean over classes of each class's accuracy",
    "worst_group_accuracy": "Worst-group accuracy is the accuracy in the group where it is lowest",
    "agreement": "Agreement is the fraction of records for which student and teacher predict the same",
    "kl_to_teacher": "KL is the divergence of the predicted probabilities from the teacher's, in nats",
    "epg": "EPG is the fraction of a map's positive energy inside the object's region",
    "iou": "IoU is the overlap of the object's region with the part of a map above a threshold, over their union",
    "map_cosine": "Map cosine is the cosine of a student's map with the teacher's map of the same class",
}
_CONSTANT = {
    "accuracy": "always predicting the most frequent class",
    "epg": "a uniform map",
    "iou": "a uniform map",
}
"""Prediction or map that has the chance level."""
_NO_LIMIT = (
    "That is the fraction of the frame that the regions cover, as all of a uniform map is above any threshold; a map "
    "that marks a part of a large object has less, which is not worse than chance."
)


def meanings(
    columns: Sequence[Column],
    chance: Mapping[str, float],
    passes: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> list[str]:
    """Write one sentence for each metric of the columns.

    Args:
        columns: Columns of the report.
        chance: Chance level of each column that has one.
        passes: Variants by the pass that they are compared with.
    """
    return [
        sentence
        for metric, same in group_pairs((column.measure, column) for column in columns).items()
        if (sentence := _sentence(metric, same, chance) + _agreement_sentence(metric, passes))
    ]


def _agreement_sentence(metric: str, passes: Mapping[str, Sequence[str]]) -> str:
    """Say with which of several passes each variant agrees."""
    if metric != "agreement" or len(passes) < 2:
        return ""
    told = (f"{', '.join(variants)} with {name}" for name, variants in passes.items())
    return f" Each student's is with its own pass, and marks compare those of one pass: {'; '.join(told)}."


def _sentence(metric: str, columns: Sequence[Column], chance: Mapping[str, float]) -> str:
    if metric not in _MEANINGS:
        return _evaluator_sentence(metric, columns[0])
    levels = dict.fromkeys(
        columns[0].value(chance[column.name]) for column in columns if column.name in chance
    )
    if metric not in CHANCE or not levels:
        return f"{_MEANINGS[metric]}."
    sentence = f"{_MEANINGS[metric]}; {_CONSTANT[metric]} would have {' or '.join(levels)}."
    return f"{sentence} {_NO_LIMIT}" if metric == "iou" else sentence


def _evaluator_sentence(metric: str, column: Column) -> str:
    """Return the sentence of an evaluator's quantity, empty if it has none."""
    evaluator, _, name = metric.partition(".")
    page = evaluator_named(evaluator).page if evaluator in EVALUATORS else None
    return next(
        (
            f"Column {column.words}: {quantity.meaning}"
            for quantity in (page.quantities if page else ())
            if f"{name}.".startswith(f"{quantity.name}.")
        ),
        "",
    )


# ---- summary ---------------------------------------------------------------------------------------


def summary_table(run: str) -> str:
    """Format one row per variant (and point), mean +- standard deviation over seeds in per cent, and chance levels."""
    results = load_results(run)
    columns = [
        Column(name=column.source, source=column.source) for column in default_columns(results)
    ]
    points = {result.label: result.variant for result in results}
    selection = load_selection(run)
    chosen = (
        {candidate.variant: candidate for candidate in selection.candidates if candidate.chosen}
        if selection
        else {}
    )
    selected = [selection.select] if selection else []
    table = [["variant", "seeds", *selected, *(column.name for column in columns)]]
    variants = variant_summary(student_rows(results, columns), columns)
    untrained = variant_summary(student_rows(untrained_results(results), columns), columns)
    for variant in [*variants, *untrained]:
        row = [variant["method"], str(variant["seeds"])]
        if variant in untrained:
            row += [""] * len(selected)
        elif selection is not None:
            candidate = chosen[points[variant["method"]]]
            row[0] = f"{row[0]} {point_label(candidate.point)}".strip()
            known = Column(name="", source=f"all.{selection.select}", known=selection.metric)
            row.append(_spread(known, summarize(candidate.values)))
        row += [
            "-" if variant[column.name] is None else _spread(column, variant[column.name])
            for column in columns
        ]
        table.append(row)
    if chance := chance_row(results, columns):
        table.append(
            [
                "constant",
                "",
                *("" for _ in selected),
                *[
                    column.text(chance[c]) if (c := column.name) in chance else "-"
                    for column in columns
                ],
            ]
        )
    return "\n".join(
        [
            align_columns(table),
            *pictures_in_words(results),
            *(
                ["+- is the standard deviation over seeds"]
                if any(variant["seeds"] > 1 for variant in variants)
                else []
            ),
            *([f"({ONE_SEED})"] if any(variant["seeds"] == 1 for variant in variants) else []),
            *reservations(run, results, selection),
        ]
    )


def _spread(column: Column, summary: dict[str, float | None]) -> str:
    return column.spread(summary).replace("±", "+-")
