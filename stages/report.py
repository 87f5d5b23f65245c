"""Summarize a store, and a sweep on it if there is one, in one self-contained HTML page and one JSON file.

    permafrost report experiment=demo
    permafrost report store.path=stores/photos run=photos augment=resized_crop_flip
    permafrost report store.path=stores/demo run=taus report.baseline=t1 report.candidate=t4

Reads   <store.path>; runs/<run>/sweep.json if it exists, and the runs it lists; for the cases, the weights and
        records.parquet of two students
Writes  runs/<run>/report.html and runs/<run>/report.json
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.cli import main
from pipeline.config.points import point_label
from pipeline.config.runs import RUNS
from pipeline.core.files import write_atomically
from pipeline.report.columns import columns_of, student_rows, teacher_row
from pipeline.report.passes import describe_passes
from pipeline.report.results import (
    load_results,
    load_selection,
    load_teacher,
    paired_difference,
)
from pipeline.store.reader import Store

if TYPE_CHECKING:
    from pipeline.config.report import ReportOptions
    from pipeline.config.verbs import ReportConfig
    from pipeline.report.case_pictures import SplitCases
    from pipeline.report.columns import Column
    from pipeline.report.results import ModelSelection, StudentResult

logger = logging.getLogger("permafrost.report")


@dataclass(frozen=True, kw_only=True)
class ReportResult:
    """Files of the report, and its headline."""

    html: str
    json: str
    paired_difference: str
    next: str
    """Suggested next command, empty if the config names none."""


def run(config: ReportConfig) -> ReportResult:
    """Write both files from finished runs, without training or evaluating anything."""
    from pipeline.report.networks import network_rows
    from pipeline.report.page import render_page

    results = load_results(config.run, config.report.runs)
    teacher = load_teacher(config.run)
    store = Store(Path(config.store.path))
    options = config.report
    values: dict[str, Any] = {"passes": describe_passes(store)}
    headline = ""
    columns: list[Column] = []
    if results:
        columns = columns_of(options.columns, results)
        rows = student_rows(results, columns)
        values |= {
            "teacher": teacher_row(results, columns, teacher),
            "runs": rows,
            "networks": network_rows(results),
        }
        if _has_one_point_an_arm(results, options):
            paired = paired_difference(
                rows, options.candidate, options.baseline, options.paired_column
            )
            values["paired_difference"] = paired
            column = next(column for column in columns if column.name == options.paired_column)
            headline = (
                f"{options.candidate} - {options.baseline} in {options.paired_column}: "
                f"{column.difference(paired['mean'])} (sd {column.text(paired['sd'])})"
            )
    cases = _cases(config, results)
    if cases:
        values["cases"] = [case for split in cases for case in split.chosen]
    selection = load_selection(config.run)
    if selection is not None:
        values["selection"] = _selection_values(selection)
    folder = RUNS / config.run
    write_atomically(folder / "report.json", json.dumps(values, indent=1).encode())
    html = render_page(
        config,
        store,
        results,
        values,
        columns=columns,
        teacher=teacher,
        selection=selection,
        cases=cases,
    )
    write_atomically(folder / "report.html", html.encode())
    return ReportResult(
        html=str(folder / "report.html"),
        json=str(folder / "report.json"),
        paired_difference=headline,
        next=options.next_command,
    )


def _has_one_point_an_arm(results: list[StudentResult], options: ReportOptions) -> bool:
    """Return whether candidate and baseline can be compared, because an arm with several points is not one method."""
    several = {result.arm for result in results if result.label != result.arm}
    if not several & {options.candidate, options.baseline}:
        return True
    logger.info(
        "no paired difference, because %s has several points of the grid; sweep with select=, or name one "
        "point of each arm, as in report.candidate='%s'",
        ", ".join(sorted(several)),
        next(result.label for result in results if result.label != result.arm),
    )
    return False


def _cases(config: ReportConfig, results: list[StudentResult]) -> list[SplitCases]:
    """Cases by split, empty if none are requested or possible."""
    if not results or not config.report.cases or Store(Path(config.store.path)).is_table:
        return []
    from pipeline.report.case_pair import open_pair
    from pipeline.report.case_pictures import show_cases

    pair = open_pair(config, results)
    return show_cases(pair, config.report) if pair else []


def _selection_values(selection: ModelSelection) -> dict[str, Any]:
    return {
        "select": selection.select,
        "candidates": [
            {
                "arm": candidate.arm,
                "point": candidate.point,
                "label": point_label(candidate.point),
                "seeds": len(candidate.values),
                "chosen": candidate.chosen,
                **candidate.summary,
            }
            for candidate in selection.candidates
        ],
    }


if __name__ == "__main__":
    main("report", run, __doc__)
