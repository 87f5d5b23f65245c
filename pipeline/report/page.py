"""The page: all sections of a report in one self-contained HTML file."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import mean
from typing import Any

from pipeline.config.runs import RUNS, read_cost
from pipeline.config.verbs import ReportConfig
from pipeline.models.saved import read_description
from pipeline.report.case_pictures import SplitCases
from pipeline.report.columns import Column, arm_summary
from pipeline.report.evaluator_sections import Figure, evaluator_sections
from pipeline.report.results import ModelSelection, StudentResult, over_the_grid
from pipeline.store.reader import Store, TeacherPass


def render_page(
    config: ReportConfig,
    store: Store,
    results: list[StudentResult],
    values: dict[str, Any],
    *,
    columns: Sequence[Column],
    teacher: StudentResult | None,
    selection: ModelSelection | None,
    cases: list[SplitCases],
) -> str:
    """Render the HTML page.

    values  content of report.json
    """
    import jinja2

    from pipeline.report.contact_sheet import contact_sheet
    from pipeline.report.superfeatures import partition_rows

    options = config.report
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline", "report"),
        autoescape=True,
        trim_blocks=True,
    )
    environment.filters["words"] = lambda name: name.replace("_", " ")
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
        **(_students(config, store, results, values, columns) if results else {}),
        evaluator_sections=evaluator_sections(
            results, teacher, _evaluator_pictures(results, teacher, store)
        ),
        cases=cases,
        partitions=partition_rows(store),
        selection=values.get("selection"),
        **(_selection_figure(selection) if selection else {}),
        grid_plot=_grid_plot(config, results, columns),
    )


def _students(
    config: ReportConfig,
    store: Store,
    results: list[StudentResult],
    values: dict[str, Any],
    columns: Sequence[Column],
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
        "paired_column": next(c for c in columns if c.name == options.paired_column),
        "columns": columns,
        "teacher": values["teacher"],
        "summary": arm_summary(values["runs"], columns),
        "rows": values["runs"],
        "networks": values["networks"],
        "maps": map_grid(pictures, store.manifest.classes) if pictures else "",
        "in_colors": any("colors" in tensors for tensors in pictures.values()),
        "curves": training_curves(_metric_lines(results)),
        "shifts": {split: shift_plot(curves) for split, curves in _shift_curves(results).items()},
    }


def _evaluator_pictures(
    results: list[StudentResult], teacher: StudentResult | None, store: Store
) -> dict[str, list[Figure]]:
    """Picture figures by evaluator, for evaluators that write pictures."""
    from pipeline.report.dissection_pictures import dissection_figures
    from pipeline.report.unicam_pictures import unicam_figures

    return {
        "unicam": unicam_figures(results, store),
        "dissection": dissection_figures(results, teacher),
    }


def _selection_figure(selection: ModelSelection) -> dict[str, Any]:
    from pipeline.report.figures import selection_plot

    return {"selection_scale": selection.metric.scale, "selection_plot": selection_plot(selection)}


def _grid_plot(
    config: ReportConfig, results: list[StudentResult], columns: Sequence[Column]
) -> str:
    """Plot report.paired_column over the options of the grid, empty if every arm has a single point."""
    from pipeline.report.figures import selection_plot

    paired = [column for column in columns if column.name == config.report.paired_column]
    grid = over_the_grid(results, paired[0].source) if paired else None
    return selection_plot(grid) if grid is not None else ""


def _open_passes(config: ReportConfig, store: Store) -> list[TeacherPass]:
    """Open the passes that store.teacher names, or all passes of the store."""
    names = config.store.teacher or [folder.name for folder in store.pass_folders()]
    return store.open_passes(names) if names else []


def _pictures(results: list[StudentResult]) -> dict[str, Any]:
    from safetensors.torch import load_file

    paths = {
        result.label: result.folder / "evaluate" / "pictures.safetensors" for result in results
    }
    return {label: load_file(path) for label, path in paths.items() if path.exists()}


def _metric_lines(results: list[StudentResult]) -> dict[str, list[list[dict[str, float]]]]:
    from pipeline.training.metric_log import read_metrics

    lines = defaultdict(list)
    for result in results:
        lines[result.label].append(list(read_metrics(result.folder / "distill")))
    return lines


def _shift_curves(
    results: list[StudentResult],
) -> dict[str, dict[str, dict[str, list[list[float]]]]]:
    """Shift curves: split -> kind of map -> arm -> one curve per student. Splits without curves are left out."""
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
    folders = [result.folder / "distill" for result in results]
    costs = {folder: cost for folder in folders if (cost := read_cost(folder))}
    noun, failed = ("rows", "stored") if store.is_table else ("images", "decoded")
    ledger = {f"Bytes of {noun}": f"{inputs:,} ({inputs / records:,.0f} per record)"}
    if store.manifest.skipped:
        ledger[f"{noun.capitalize()} that could not be {failed}"] = (
            f"{len(store.manifest.skipped):,}"
        )
    if costs:
        seconds = mean(cost["seconds"] for cost in costs.values())
        ledger["Mean seconds per student"] = f"{seconds:.1f}"
    if passes:
        stored = sum(e.bytes for t in passes for shard in t.manifest.shards for e in shard.files)
        taught = [folder for folder in costs if read_description(folder).teachers]
        live = sum(costs[folder]["records"] for folder in taught)
        forwards = records * len(passes)
        ledger["Bytes of teacher fields"] = f"{stored:,} ({stored / records:,.0f} per record)"
        ledger["Teacher forward passes, computed once"] = f"{forwards:,}"
        ledger["Teacher forward passes with mode=live instead"] = f"{live:,.0f}"
    if (pass_cost := read_cost(RUNS / run / "precompute")) is not None:
        ledger["Seconds of teacher annotation, summed over shards"] = f"{pass_cost['seconds']:.1f}"
    return ledger
