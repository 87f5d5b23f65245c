"""Gather a store, and the sweep over it if there is one, into one self-contained HTML page and one JSON file.

    python -m stages.report experiment=demo
    python -m stages.report store.path=stores/photos run=photos augment=resized_crop_flip
    python -m stages.report store.path=stores/demo run=taus report.baseline=t1 report.candidate=t4

Reads   <store.path>; runs/<run>/sweep.json, where there is one, and the runs it lists; for the cases
        two students' weights and records.parquet
Writes  runs/<run>/report.html and runs/<run>/report.json
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from pipeline.commandline import main
from pipeline.grid import point_label
from pipeline.report.passes import describe_passes
from pipeline.report.results import (
    arm_summary,
    load_results,
    load_selection,
    paired_difference,
    student_rows,
    teacher_row,
)
from pipeline.runs import RUNS, read_cost, read_description
from pipeline.store.files import write_atomically
from pipeline.store.reader import Store

if TYPE_CHECKING:
    from pipeline.config import ReportConfig, ReportOptions
    from pipeline.report.case_pictures import SplitCases
    from pipeline.report.results import Selection, StudentResult
    from pipeline.store.reader import TeacherPass

logger = logging.getLogger("permafrost.report")


@dataclass(frozen=True, kw_only=True)
class ReportResult:
    """Where the report is, and its headline."""

    html: str
    json: str
    paired_difference: str
    next: str
    """What to try now; empty where the config names nothing."""


def run(config: ReportConfig) -> ReportResult:
    """Write both files from what is finished; nothing is trained or judged here."""
    results = load_results(config.run)
    store = Store(Path(config.store.path))
    options = config.report
    values: dict[str, Any] = {"passes": describe_passes(store)}
    headline = ""
    if results:
        rows = student_rows(results, options.columns)
        values |= {"teacher": teacher_row(results, options.columns), "runs": rows}
        if _has_one_point_an_arm(results, options):
            paired = paired_difference(
                rows, options.candidate, options.baseline, options.paired_column
            )
            values["paired_difference"] = paired
            headline = (
                f"{options.candidate} - {options.baseline} in {options.paired_column}: "
                f"{100 * paired['mean']:+.1f} points (sd {100 * paired['sd']:.1f})"
            )
    cases = _cases(config, results)
    if cases:
        values["cases"] = [case for split in cases for case in split.chosen]
    selection = load_selection(config.run)
    if selection is not None:
        values["selection"] = _selection_values(selection)
    folder = RUNS / config.run
    write_atomically(folder / "report.json", json.dumps(values, indent=1).encode())
    html = _page(config, store, results, selection, cases, values)
    write_atomically(folder / "report.html", html.encode())
    return ReportResult(
        html=str(folder / "report.html"),
        json=str(folder / "report.json"),
        paired_difference=headline,
        next=options.next_command,
    )


def _has_one_point_an_arm(results: list[StudentResult], options: ReportOptions) -> bool:
    """Whether candidate and baseline can be compared: an arm with many points is not one method."""
    several = {result.arm for result in results if result.label != result.arm}
    if not several & {options.candidate, options.baseline}:
        return True
    logger.info(
        "no paired difference: %s has several points of the grid; sweep with select=, or name one "
        "point of each arm, as in report.candidate='%s'",
        ", ".join(sorted(several)),
        next(result.label for result in results if result.label != result.arm),
    )
    return False


def _page(
    config: ReportConfig,
    store: Store,
    results: list[StudentResult],
    selection: Selection | None,
    cases: list[SplitCases],
    values: dict[str, Any],
) -> str:
    import jinja2

    from pipeline.report.contact_sheet import contact_sheet

    options = config.report
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline", "report"), autoescape=True, trim_blocks=True
    )
    environment.filters["words"] = lambda name: name.replace("_", " ")
    environment.filters["points"] = lambda value: f"{100 * value:+.1f}"
    passes = _open_passes(config, store)
    sheet = ""
    if options.contact_records and not store.is_table:
        sheet = contact_sheet(
            store,
            passes,
            config.augment,
            num_records=options.contact_records,
            num_views=options.contact_views,
        )
    return environment.get_template("page.html.j2").render(
        title=options.title,
        store=config.store.path,
        passes=values["passes"],
        contact_sheet=sheet,
        table=store.manifest.columns,
        ledger=_ledger(config.run, store, passes, results),
        **(_students(config, store, results, values) if results else {}),
        cases=cases,
        selection=values.get("selection"),
        **(_selection_figure(selection) if selection else {}),
    )


def _students(
    config: ReportConfig, store: Store, results: list[StudentResult], values: dict[str, Any]
) -> dict[str, Any]:
    from pipeline.report.figures import shift_plot, training_curves
    from pipeline.report.pictures import map_grid

    options = config.report
    seeds = list(dict.fromkeys(result.seed for result in results))
    pictures = _pictures([result for result in results if result.seed == seeds[0]])
    return {
        "seeds": seeds,
        "candidate": options.candidate,
        "baseline": options.baseline,
        "paired": values.get("paired_difference"),
        "paired_column": options.paired_column,
        "columns": list(options.columns),
        "teacher": values["teacher"],
        "summary": arm_summary(values["runs"], list(options.columns)),
        "rows": values["runs"],
        "maps": map_grid(pictures, store.manifest.classes) if pictures else "",
        "in_colors": any("colors" in tensors for tensors in pictures.values()),
        "curves": training_curves(_metric_lines(results)),
        "shifts": {split: shift_plot(curves) for split, curves in _shift_curves(results).items()},
    }


def _cases(config: ReportConfig, results: list[StudentResult]) -> list[SplitCases]:
    """None where none are wanted or can be had."""
    if not results or not config.report.cases or Store(Path(config.store.path)).is_table:
        return []
    from pipeline.report.case_pair import open_pair
    from pipeline.report.case_pictures import show_cases

    pair = open_pair(config, results)
    return show_cases(pair, config.report) if pair else []


def _selection_values(selection: Selection) -> dict[str, Any]:
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


def _selection_figure(selection: Selection) -> dict[str, Any]:
    from pipeline.report.figures import selection_plot

    return {"selection_scale": selection.metric.scale, "selection_plot": selection_plot(selection)}


def _open_passes(config: ReportConfig, store: Store) -> list[TeacherPass]:
    """Those that store.teacher names, all of the store's otherwise."""
    names = config.store.teacher or [folder.name for folder in store.pass_folders()]
    return store.open_passes(names) if names else []


def _pictures(results: list[StudentResult]) -> dict[str, Any]:
    from safetensors.torch import load_file

    paths = {
        result.label: result.folder / "evaluate" / "pictures.safetensors" for result in results
    }
    return {label: load_file(path) for label, path in paths.items() if path.exists()}


def _metric_lines(results: list[StudentResult]) -> dict[str, list[list[dict[str, float]]]]:
    from pipeline.metric_log import read_metrics

    lines = defaultdict(list)
    for result in results:
        lines[result.label].append(list(read_metrics(result.folder / "distill")))
    return lines


def _shift_curves(
    results: list[StudentResult],
) -> dict[str, dict[str, dict[str, list[list[float]]]]]:
    """split -> kind of map -> arm -> a curve a student; no split where none was measured."""
    curves: dict[str, dict[str, dict[str, list[list[float]]]]] = {}
    for result in results:
        for split, metrics in result.metrics.items():
            for kind, curve in metrics.get("shift", {}).items():
                arms = curves.setdefault(split, {}).setdefault(kind, {})
                arms.setdefault(result.label, []).append(curve)
    return curves


def _ledger(
    run: str, store: Store, passes: list[TeacherPass], results: list[StudentResult]
) -> dict[str, str]:
    records = store.index.num_rows
    inputs = sum(shard.bytes for shard in store.manifest.shards)
    noun, failed = ("rows", "stored") if store.is_table else ("images", "decoded")
    folders = [result.folder / "distill" for result in results]
    costs = {folder: cost for folder in folders if (cost := read_cost(folder))}
    ledger = {f"Bytes of {noun}": f"{inputs:,} ({inputs / records:,.0f} a record)"}
    if store.manifest.skipped:
        ledger[f"{noun.capitalize()} that could not be {failed}"] = (
            f"{len(store.manifest.skipped):,}"
        )
    if costs:
        seconds = mean(cost["seconds"] for cost in costs.values())
        ledger["Seconds a student, mean"] = f"{seconds:.1f}"
    if passes:
        columns = sum(e.bytes for t in passes for shard in t.manifest.shards for e in shard.files)
        taught = [folder for folder in costs if read_description(folder).teachers]
        live = sum(costs[folder]["records"] for folder in taught)
        forwards = records * len(passes)
        ledger["Bytes of teacher columns"] = f"{columns:,} ({columns / records:,.0f} a record)"
        ledger["Teacher forward passes, paid once"] = f"{forwards:,}"
        ledger["Teacher forward passes that live teaching would have cost"] = f"{live:,.0f}"
    if (pass_cost := read_cost(RUNS / run / "precompute")) is not None:
        ledger["Seconds in the teacher's shards"] = f"{pass_cost['seconds']:.1f}"
    return ledger


if __name__ == "__main__":
    main("report", run, __doc__)
