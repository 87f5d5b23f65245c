"""Sections of the page for the evaluators' results: tables and figures for each evaluator that was run.

A table has one row per variant (and one for the teacher and for untrained networks, if they were evaluated) and one
column for each number of a quantity of the evaluator, such as a value for each layer.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from permafrost.config.evaluation import EVALUATORS
from permafrost.evaluation.evaluator import (
    Page,
    Quantity,
    evaluator_named,
    interval_of,
    numbers_of,
)
from permafrost.store.reader import Store
from permafrost_report.comparison import group_pairs
from permafrost_report.figures import Plot, variant_plot
from permafrost_report.main_table import Column, student_rows, variant_summary
from permafrost_report.pictures import TileRow
from permafrost_report.student_results import StudentResult, untrained_results


class Table(NamedTuple):
    """Table of one quantity on one split."""

    caption: str
    meaning: str
    """One sentence about the numbers."""
    columns: list[Column]
    rows: list[dict[str, Any]]
    is_main: bool = True


class PictureFigure(NamedTuple):
    """A grid of pictures."""

    grid: list[TileRow]
    caption: str


class Section(NamedTuple):
    """Section of one evaluator."""

    anchor: str
    short: str
    title: str
    introduction: str
    tables: list[Table]
    plots: list[Plot]
    pictures: list[PictureFigure]


def evaluator_sections(
    results: list[StudentResult],
    teacher: StudentResult | None,
    store: Store,
    colors: Mapping[str, str] = MappingProxyType({}),
) -> list[Section]:
    """Build the sections of evaluators with results for any network on any split.

    Args:
        results: Results of the students.
        teacher: Results of the teacher, None if it was not evaluated.
        store: Store of the records, for pictures.
        colors: Colors of the networks in plots.
    """
    everyone = [*results, *([teacher] if teacher else [])]
    splits = list(dict.fromkeys(split for result in everyone for split in result.metrics))
    sections = []
    for evaluator in EVALUATORS:
        looked = [
            split
            for split in splits
            if any(evaluator in result.metrics.get(split, {}) for result in everyone)
        ]
        page = evaluator_named(evaluator).page if looked else None
        if page is not None:
            looked = looked if page.per_split else looked[:1]
            section = _section(evaluator, page, looked, results, teacher, colors)
            if page.pictures:
                section = section._replace(
                    pictures=pkgutil.resolve_name(page.pictures)(results, teacher, store)
                )
            sections.append(section)
    return sections


def _section(
    evaluator: str,
    page: Page,
    splits: Sequence[str],
    results: list[StudentResult],
    teacher: StudentResult | None,
    colors: Mapping[str, str],
) -> Section:
    tables, plots = [], []
    for split in splits:
        for quantity in page.quantities:
            columns = _columns(
                split, evaluator, quantity, [*results, *([teacher] if teacher else [])]
            )
            if not columns:
                continue
            untrained = untrained_results([*results, *([teacher] if teacher else [])])
            rows = [
                row
                for members in ([teacher] if teacher else [], results, untrained)
                for row in _summary(members, columns)
                if members is results or any(row[column.name] for column in columns)
            ]
            caption = quantity.caption + (f"; split {split}" if page.per_split else "")
            meaning = quantity.meaning + (" " + _UNTRAINED) * (not untrained and quantity.is_main)
            tables.append(Table(caption, meaning, columns, rows, quantity.is_main))
            if quantity.plot and (len(columns) > 1 or quantity.plot == "bar"):
                plots.append(_plot(quantity, caption, columns, rows, colors))
    remarks = [
        f"{result.label}: {sentence}."
        for result in results
        for split in splits
        if page.remarks and evaluator in result.metrics.get(split, {})
        for sentence in pkgutil.resolve_name(page.remarks)(result.metrics[split][evaluator])
    ]
    introduction = " ".join([page.introduction, *dict.fromkeys(remarks)])
    return Section(evaluator, page.short, page.title, introduction, tables, plots, [])


_UNTRAINED = "What untrained networks have was not measured (evaluate.random_networks=5)."


def _summary(members: Sequence[StudentResult], columns: Sequence[Column]) -> list[dict[str, Any]]:
    """Build one row per variant; a variant of one network has intervals over records."""
    rows = variant_summary(student_rows(members, columns), columns)
    by_label = group_pairs((member.label, member) for member in members)
    for row in rows:
        if len(alone := by_label[row["method"]]) == 1:
            for column in columns:
                split, _, name = column.source.partition(".")
                interval = interval_of(alone[0].numbers.get(split, {}), name)
                if row[column.name] and interval:
                    row[column.name]["interval"] = interval
    return rows


def _columns(
    split: str, evaluator: str, quantity: Quantity, results: Sequence[StudentResult]
) -> list[Column]:
    """Build one column for each number of the quantity, in the order of their first occurrence."""
    names: dict[str, None] = {}
    for result in results:
        value: Any = result.metrics.get(split, {}).get(evaluator, {})
        for part in quantity.name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if isinstance(value, Mapping):
            names |= dict.fromkeys(numbers_of(value, f"{quantity.name}."))
        elif value is not None:
            names[quantity.name] = None
    return [
        Column(
            name=name.removeprefix(f"{quantity.name}."),
            source=f"{split}.{evaluator}.{name}",
            known=quantity.metric,
        )
        for name in names
    ]


def _plot(
    quantity: Quantity,
    caption: str,
    columns: list[Column],
    rows: list[dict[str, Any]],
    colors: Mapping[str, str],
) -> Plot:
    scale = quantity.metric.scale
    values = {
        row["method"]: [
            scale * row[column.name]["mean"] if row[column.name] else float("nan")
            for column in columns
        ]
        for row in rows
    }
    unit = "%" if scale == 100 else ""
    return Plot(
        variant_plot([column.name for column in columns], values, unit, colors, quantity.plot),
        f"{caption}, one color per method",
        caption,
    )
