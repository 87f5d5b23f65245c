"""Summarize a store, and a sweep or a student on it if there is one, in one self-contained HTML page.

    permafrost report experiment=demo
    permafrost report store.path=stores/photos run=photos augment=resized_crop_flip
    permafrost report store.path=stores/demo run=taus report.baseline=t1 report.candidate=t4

Reads   <store.path>; runs/<run>/sweep.json and the runs it lists, or runs/<run>/distill and evaluate of one student;
        runs/<run>/evaluate-teacher and evaluate-network;
        for the cases, the weights and records.parquet of two students
Writes  runs/<run>/report.html, report.json with its numbers, and report.csv with one row per student
Rerun   the same command writes the same files while options, store and runs are the same
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from permafrost.cli import main
from permafrost.config.page_options import ReportOptions
from permafrost.config.points import point_label
from permafrost.config.runs import RUNS
from permafrost.core.files import write_atomically
from permafrost.report.comparison import (
    ONE_SEED,
    differences_by_column,
    differences_from,
    paired_difference,
    seeds_in_words,
)
from permafrost.report.conclusions import conclusions
from permafrost.report.main_table import (
    chance_row,
    columns_of,
    paired_column,
    student_rows,
    teacher_row,
)
from permafrost.report.model_selection import load_selection
from permafrost.report.passes import check_named_passes, describe_passes, used_passes
from permafrost.report.student_results import (
    SWEEP_NAME,
    epoch_curves,
    load_network,
    load_results,
    load_teacher,
)
from permafrost.store.reader import Store

if TYPE_CHECKING:
    from permafrost.config.verbs import ReportConfig
    from permafrost.report.case_pictures import SplitCases
    from permafrost.report.main_table import Column
    from permafrost.report.model_selection import ModelSelection
    from permafrost.report.page import PageContent
    from permafrost.report.student_results import StudentResult

logger = logging.getLogger("permafrost.report")


@dataclass(frozen=True, kw_only=True)
class ReportResult:
    """Files of the report, and its headline."""

    html: str
    json: str
    csv: str
    """Numbers of every student, empty if none was evaluated."""
    paired_difference: str
    summary: str
    """Sentences at the top of the page."""
    next: str
    """Suggested next command: the evaluation of a student without results, or the one that the config names."""


def run(config: ReportConfig) -> ReportResult:
    """Write the files from finished runs, without training or evaluating anything."""
    results = load_results(config.run, config.report.runs)
    from permafrost.report.main_table import student_csv  # these import torch and matplotlib
    from permafrost.report.page import render_page

    page = _gather_page(config, results)
    values, paired = page.values, page.paired
    contents = {"html": render_page(page), "json": json.dumps(values, indent=1)}
    if paired:
        contents["csv"] = student_csv(values["runs"], page.columns)
    files = {kind: RUNS / config.run / f"report.{kind}" for kind in contents}
    for kind, content in contents.items():
        # A name with a lone surrogate, as of a file that is not UTF-8, has no encoding.
        write_atomically(files[kind], content.encode(errors="backslashreplace"))
    logger.info("%s written on %s UTC", files["html"], f"{datetime.now(UTC):%Y-%m-%d %H:%M}")
    return ReportResult(
        html=str(files["html"]),
        json=str(files["json"]),
        csv=str(files.get("csv", "")),
        paired_difference=_headline(config.report, values, paired) if paired else "",
        summary=" ".join(values.get("summary", [])),
        next=values.get("unevaluated", {}).get("command", config.report.next_command),
    )


def _gather_page(config: ReportConfig, results: list[StudentResult]) -> PageContent:
    """Gather what the page shows: the store, students, teacher, given network, selection and cases."""
    from permafrost.report.page import PageContent

    students = [result for result in results if result.is_evaluated]
    teacher, network = load_teacher(config.run), load_network(config.run)
    logger.info(
        "report of %s and of run %s: %d students, %d of them evaluated%s",
        config.store.path,
        config.run,
        len(results),
        len(students),
        ", and a given network" if network else "",
    )
    evaluated = students or ([network] if network else [])
    store = Store(config.store.folder)
    used = used_passes(results, store)
    check_named_passes(config.store.teacher, used, store)
    selection = load_selection(config.run)
    config = replace(config, report=_without_unknown_columns(config, evaluated))
    columns = columns_of(config.report.columns, evaluated) if evaluated else []
    if evaluated:
        config.report.check_names([column.name for column in columns])
    paired = paired_column(config.report.paired_column, columns)
    cases = _cases(config, students)
    values: dict[str, Any] = {
        "passes": describe_passes(store),
        **(_student_values(config, results, store) if results else {}),
        **(_result_values(config.report, evaluated, columns, paired, teacher) if paired else {}),
        **({"network": network.numbers} if network else {}),
        **({"cases": [case for split in cases for case in split.chosen]} if cases else {}),
        **({"selection": _selection_values(selection)} if selection else {}),
    }
    return PageContent(
        config=config,
        store=store,
        results=results,
        values=values,
        columns=columns,
        paired=paired,
        teacher=teacher,
        network=network,
        selection=selection,
        cases=cases,
        used_passes=used,
    )


def _without_unknown_columns(config: ReportConfig, results: list[StudentResult]) -> ReportOptions:
    """Return the options without the columns that a student outside a sweep does not have.

    An experiment names the columns of its sweep, whose evaluators a single student may not have been given.
    """
    options = config.report
    if (RUNS / config.run / SWEEP_NAME).exists() or len(results) != 1:
        return options
    kept = {name: s for name, s in options.columns.items() if results[0].find(s) is not None}
    if missing := [source for name, source in options.columns.items() if name not in kept]:
        logger.info("without the columns %s, which were not evaluated", ", ".join(missing))
    is_missing = options.paired_column in options.columns and options.paired_column not in kept
    paired = None if is_missing else options.paired_column
    plotted = tuple(n for n in options.plotted if n in kept or n not in options.columns)
    return replace(options, columns=kept, paired_column=paired, plotted=plotted)


def _student_values(
    config: ReportConfig, results: list[StudentResult], store: Store
) -> dict[str, Any]:
    """Networks of the students, and the command that evaluates one without results."""
    from permafrost.commands import evaluate_command
    from permafrost.report.provenance import network_rows

    values: dict[str, Any] = {"networks": network_rows(results)}
    if curves := epoch_curves(results):
        values["curves"] = curves
    missing = next((result for result in results if not result.is_evaluated), None)
    if missing is not None:
        command = evaluate_command(config.run, store, missing.folder / "distill")
        logger.info("%s was not evaluated yet; run: %s", missing.folder, command)
        values["unevaluated"] = {"label": missing.label, "command": command}
    return values


def _result_values(
    options: ReportOptions,
    results: list[StudentResult],
    columns: list[Column],
    paired: Column,
    teacher: StudentResult | None,
) -> dict[str, Any]:
    """Rows of teacher, chance and students, and their comparison."""
    rows = student_rows(results, columns)
    values: dict[str, Any] = {
        "teacher": teacher_row(results, columns, teacher),
        "chance": chance_row(results, columns),
        "runs": rows,
    }
    if _has_a_pair(results, options):
        values["paired_difference"] = paired_difference(
            rows, options.candidate, options.baseline, paired.name
        )
    values["differences"] = differences_from(rows, options.baseline, paired.name)
    values["differences_by_column"] = differences_by_column(
        rows, options.baseline, [column.name for column in columns]
    )
    values["summary"] = (
        conclusions(
            rows,
            paired,
            (options.candidate, options.baseline),
            teacher=values["teacher"],
            chance=values["chance"],
        )
        if results[0].seed is not None  # a given network alone is no arm
        else []
    )
    return values


def _headline(options: ReportOptions, values: dict[str, Any], column: Column) -> str:
    """Paired difference in one line, empty if there is none."""
    if "paired_difference" not in values:
        return ""
    found = values["paired_difference"]
    opening = f"{options.candidate} - {options.baseline} in {column.name}: {column.difference(found['mean'])}"
    if found["interval"] is None:
        return f"{opening} ({ONE_SEED})"
    low, high = (column.difference(bound, unit=False) for bound in found["interval"])
    return (
        f"{opening} (sd {column.text(found['sd'])}, 95 % interval {low} to {high}, "
        f"{seeds_in_words(len(found['per_seed']))})"
    )


def _has_a_pair(results: list[StudentResult], options: ReportOptions) -> bool:
    """Return whether candidate and baseline can be compared, because an arm with several points is not one method."""
    several = {result.arm for result in results if result.label != result.arm}
    pair = {options.candidate, options.baseline}
    if not pair & several:
        is_default = pair == {ReportOptions.candidate, ReportOptions.baseline}
        return not is_default or pair <= {result.label for result in results}
    logger.info(
        "no paired difference, because %s has several points of the grid; sweep with select=, or name one "
        "point of each arm, as in report.candidate='%s'",
        ", ".join(sorted(several)),
        next(result.label for result in results if result.label != result.arm),
    )
    return False


def _cases(config: ReportConfig, results: list[StudentResult]) -> list[SplitCases]:
    """Cases by split, empty if none are requested or possible."""
    if not results or not config.report.cases or Store(config.store.folder).is_table:
        return []
    from permafrost.report.case_pictures import show_cases
    from permafrost.report.cases import open_pair

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
