"""Summarize a store, and a sweep or a student on it if there is one, in one self-contained HTML page.

    permafrost report experiment=demo
    permafrost report run=photos augment=resized_crop_flip
    permafrost report store.path=stores/demo run=taus report.baseline=t1 report.candidate=t4

Reads   <store.path>; runs/<run>/sweep.json and the runs it lists, or runs/<run>/distill and evaluate of one student;
        runs/<run>/evaluate-teacher and evaluate-network;
        for the cases, the weights and records.parquet of two students
Writes  runs/<run>/report.html, report.json with its numbers, report.csv with one row per student and split, and
        report.variants.csv with one per variant, split and metric; report.tex with format=latex; a report on another
        store than that of the training is report-in-<store>.html
Rerun   the same command writes the same files while options, store and runs are the same
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from datetime import UTC, datetime

from permafrost.core.digests import plain_values
from permafrost.core.errors import require
from permafrost.runs.folder import RunFolder
from permafrost.storage.files import file_at, remove_old_partial_files
from permafrost_report.options import ReportConfig

logger = logging.getLogger("permafrost.report")


@dataclass(frozen=True, kw_only=True)
class ReportResult:
    """Files of the report, and its headline."""

    html: str
    json: str
    csv: str
    """Numbers of every student, empty if none was evaluated."""
    variants: str
    """Mean, deviation and interval of every variant, as CSV."""
    candidate_minus_baseline: str
    summary: str
    """Sentences at the top of the page."""
    next: str
    """Suggested next command, `PageContent.next_command`."""
    latex: str = ""
    """Table of the variants with report.format=latex."""


def report_run(config: ReportConfig) -> ReportResult:
    """Write the files from finished runs, without training or evaluating anything."""
    from permafrost_report.number_files import (  # these import torch and matplotlib
        latex_table,
        number_tables,
    )
    from permafrost_report.page import render_page
    from permafrost_report.page_content import gather_page
    from permafrost_report.student_results import untrained_results

    page = gather_page(config)
    values = page.values
    contents = {"html": render_page(page), "json": json.dumps(plain_values(values), indent=1)}
    require(
        bool(page.compared) or config.report.format == "page",
        f"report.format=latex prints evaluated students, and run={config.run} has none; run permafrost evaluate first",
    )
    if page.compared:
        students = [result for result in page.results if result.is_evaluated]
        evaluated = students or list(filter(None, [page.network]))
        contents["csv"], contents["variants.csv"] = number_tables(
            [*evaluated, *untrained_results(evaluated)], values.get("networks", [])
        )
        if config.report.format == "latex":
            rows = [*values["variants"], *values["random_networks"]]
            contents["tex"] = latex_table(evaluated, rows, page.columns, config.run)
    place = next(
        (result.place for result in [*page.results, *filter(None, [page.network])] if result.place),
        "",
    )
    folder = RunFolder(config.run).path
    remove_old_partial_files(folder, "report")
    files = {kind: folder / f"report{place}.{kind}" for kind in contents}
    for kind, content in contents.items():
        # A name with a lone surrogate, as of a file that is not UTF-8, has no encoding.
        file_at(files[kind]).write(content.encode(errors="backslashreplace"))
    logger.info("%s written on %s UTC", files["html"], f"{datetime.now(UTC):%Y-%m-%d %H:%M}")
    return ReportResult(
        html=str(files["html"]),
        json=str(files["json"]),
        csv=str(files.get("csv", "")),
        variants=str(files.get("variants.csv", "")),
        candidate_minus_baseline=page.headline,
        summary=" ".join(values.get("summary", [])),
        next=page.next_command,
        latex="\n" * ("tex" in contents) + contents.get("tex", ""),
    )
