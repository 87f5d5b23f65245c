"""The page: all sections of a report in one self-contained HTML file.

Its content security policy loads nothing, and lets no script or style run but the page's own.
"""

from __future__ import annotations

import base64
import hashlib
import pkgutil
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import jinja2

from permafrost.config.store import STORE_SECTIONS
from permafrost.config.version import __version__
from permafrost.evaluation.results import load_written
from permafrost.evaluation.saved_records import PICTURES_NAME, RECORDS_NAME
from permafrost.models.saved import SavedNetwork
from permafrost.runs.folder import RunFolder, read_cost
from permafrost.storage.rooted_paths import name_of_path
from permafrost.store.facts import read_data_facts, read_sheets
from permafrost.store.reader import Store, TeacherPass
from permafrost.training.metric_log import read_metrics
from permafrost_report.class_results import label_section, pictured_keys
from permafrost_report.comparison import ONE_SEED, excludes_zero, group_pairs
from permafrost_report.evaluator_sections import evaluator_sections
from permafrost_report.figures import epoch_plots, shift_plot, training_curves
from permafrost_report.grid_figures import grid_plots, option_plots
from permafrost_report.main_table import (
    meanings,
    passes_of_variants,
    pictures_in_words,
)
from permafrost_report.model_selection import optimistic_results
from permafrost_report.page_content import PageContent
from permafrost_report.pictures import (
    TileRow,
    contact_sheet,
    feature_rows,
    map_rows,
    readable_classes,
    shown_name,
)
from permafrost_report.provenance import describe_teachers
from permafrost_report.run_commands import commands_of, shown_command
from permafrost_report.student_results import StudentResult, split_by_evaluation
from permafrost_report.training_facts import describe_data, describe_variants, training_facts


def content_policy(style: str, script: str) -> str:
    """Return the policy that allows exactly this style and this script, and pictures inside the page.

    The page contains file names, class names and titles that others may have chosen.

    Args:
        style: Text of the style element.
        script: Text of the script element.
    """
    return "; ".join(
        [
            "default-src 'none'",
            f"style-src {_source(style)}",
            f"script-src {_source(script)}",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )


def _source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


# ---- page ------------------------------------------------------------------------------------------


_MEAN_AND_SPREAD = (
    "Mean and standard deviation over seeds. In each column in which a variant is conclusively below the best mean, "
    "those above it are marked (green), from three seeds on."
)
_MEAN = f"Mean over seeds, with the standard deviation of variants with several ({ONE_SEED})."


_SHOWN_CLASSES = 200
"""Largest number of classes whose records are listed."""


class SectionPart(NamedTuple):
    """Paragraph and pictures of a section that a paper adds."""

    name: str
    facts: str
    picture: list[TileRow]
    caption: str


class StoreSection(NamedTuple):
    """Section about a store that a paper adds to the page."""

    anchor: str
    title: str
    introduction: str
    parts: list[SectionPart]


def render_page(page: PageContent) -> str:
    """Render the HTML page, without control characters, which names may have and a terminal would execute."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
    )
    environment.tests["conclusive"] = excludes_zero
    environment.filters["words"] = lambda name: name.replace("_", " ")
    style, script = (
        environment.get_template(name).render() for name in ("style.css.j2", "script.js.j2")
    )
    text = environment.get_template("page.html.j2").render(
        title=page.options.title,
        note=page.options.note,
        run=name_of_path(page.config.run) if page.results else "",
        policy=content_policy(style, script),
        style=style,
        script=script,
        **_store_sections(page),
        **_result_tables(page),
        classes=page.classes,
        labels=label_section(page.results, page.teacher),
        evaluator_sections=evaluator_sections(
            split_by_evaluation([*page.results, *([page.network] if page.network else [])]),
            page.teacher,
            page.store,
            page.colors,
        ),
        **(_student_sections(page) if page.results else {}),
    )
    return _CONTROLS.sub(lambda control: f"\\x{ord(control[0]):02x}", text)


_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def _store_sections(page: PageContent) -> dict[str, Any]:
    """Sections of the store and its passes."""
    config, store = page.config, page.store
    names = config.store.teacher or [folder.name for folder in store.pass_folders()]
    passes = store.open_passes(names) if names else []
    pictures = store.form.pictures(page.options.contact_records)
    sheet = (
        contact_sheet(
            store,
            passes,
            config.augment,
            num_records=pictures,
            num_views=page.options.contact_views,
        )
        if pictures
        else None
    )
    return {
        "store": name_of_path(config.store.path),
        # When it is written is in the log, as the same inputs give the same page.
        "written": f"by permafrost {__version__}",
        "passes": page.values["passes"],
        "data": _describe_data(store),
        "contact_sheet": sheet,
        "columns_of_table": [shown_name(name) for name in store.manifest.columns or ()],
        # Sections that papers add, without those that have nothing to show.
        "store_sections": list(
            filter(None, (pkgutil.resolve_name(name)(store) for name in STORE_SECTIONS.values()))
        ),
        "ledger": _ledger(
            config.run, store, [one.teacher for one in page.used_passes] or passes, page.results
        ),
    }


def _describe_data(store: Store) -> dict[str, Any]:
    """Describe the data of a store as they were understood; empty for a store without its facts."""
    if (kept := read_data_facts(store.folder)) is None:
        return {}
    names = readable_classes(store.manifest.classes)
    rows = [
        {
            "class": name,
            "records": [counts[label] for counts in kept.records_of_classes.values()],
        }
        for label, name in enumerate(names)
        if all(len(counts) == len(names) for counts in kept.records_of_classes.values())
    ]
    return {
        "facts": kept.sheet.rows(),
        "splits": list(kept.records_of_classes),
        "rows": rows if len(rows) <= _SHOWN_CLASSES else [],
        "findings": kept.findings,
    }


def _student_sections(page: PageContent) -> dict[str, Any]:
    """Sections of the students; those with results are empty if none was evaluated."""
    results, values = page.results, page.values
    seeds = list(dict.fromkeys(result.seed for result in results))
    pictures: dict[str, Any] = {
        result.label: load_written(result.evaluation, PICTURES_NAME)
        for result in results
        if result.seed == seeds[0]
        and result.trains_classifier
        and (result.evaluation / PICTURES_NAME).exists()
    }
    colored = {name: tensors for name, tensors in pictures.items() if "features" in tensors}
    names_and_keys = (
        readable_classes(page.store.manifest.classes),
        next(
            (
                pictured_keys(result, len(pictures[result.label]["frames"]))
                for result in results
                if result.label in pictures and (result.evaluation / RECORDS_NAME).exists()
            ),
            [],
        ),
    )
    return {
        **_setup(page),
        "seeds": seeds,
        "candidate": page.options.candidate,
        "unevaluated": values.get("unevaluated"),
        "conclusions": values.get("summary", []),
        "networks": values["networks"],
        "maps": map_rows(pictures, *names_and_keys) if pictures else None,
        "features": feature_rows(colored, *names_and_keys) if colored else None,
        "in_colors": any("colors" in tensors for tensors in pictures.values()),
        "cases": page.cases,
        "export": values.get("export"),
        "curves": training_curves(_metric_lines(results), page.colors),
        "epochs": epoch_plots(values.get("curves", {}), page.colors),
        "shifts": [
            shift_plot(split, kind, variants, page.colors)
            for split, curves in _shift_curves(results).items()
            for kind, variants in curves.items()
        ],
        "selection": values.get("selection"),
        "selection_scale": page.selection and page.selection.metric.scale,
        "selection_plots": option_plots(
            page.selection,
            page.selection.select + (", %" if page.selection.metric.scale == 100 else ""),
            page.selection.select,
        )
        if page.selection
        else [],
    }


def _result_tables(page: PageContent) -> dict[str, Any]:
    """Main table, its sentences and the plots below it."""
    values = page.values
    if page.compared is None:
        return {}
    summary = values["variants"]
    plotted = [
        column
        for column in page.columns
        if column.name in (page.options.plotted or [page.compared.name])
    ]
    return {
        "differences": values["differences_by_column"],
        "variants": describe_variants(page.results),
        "compared_column": page.compared,
        "baseline": page.options.baseline,
        "baselines": page.options.baselines,
        "columns": page.columns,
        "meanings": [
            *meanings(page.columns, values["chance"], passes_of_variants(page.results)),
            *pictures_in_words(page.results),
        ],
        "optimistic": optimistic_results(page.results),
        "over_seeds": "Mean and standard deviation over seeds"
        if any(variant["seeds"] > 1 for variant in summary)
        else "One seed",
        "mean_caption": _mean_caption([variant["seeds"] for variant in summary]),
        "levels_of_teachers": values.get("teachers") or {"teacher": values["teacher"]},
        "chance": values["chance"],
        "untrained": values["random_networks"],
        "remarks": values.get("remarks", {}),
        "summary": summary,
        "rows": values["runs"],
        "result_plots": grid_plots(page.results, plotted),
    }


def _mean_caption(seeds: Sequence[int]) -> str:
    """Say what the cells of the main table are, given the number of seeds of each variant."""
    if max(seeds) == 1:
        return f"Values of a single seed ({ONE_SEED})."
    return _MEAN_AND_SPREAD if min(seeds) > 1 else _MEAN


def _setup(page: PageContent) -> dict[str, Any]:
    """Section on what was trained on what."""
    facts = training_facts(page.results, page.store)
    this_call = page.config.command
    return {
        "setup": facts._replace(shared=_describe_stores(page) | facts.shared),
        "teachers": describe_teachers(page.used_passes),
        "trainings": {
            result.label: read_sheets(result.training_folder)["student"].rows()
            for result in reversed(page.results)  # the first student of each variant
            if "student" in read_sheets(result.training_folder)
        },
        "commands": [
            *commands_of(
                page.config.run, [used.teacher for used in page.used_passes], page.options.runs
            ),
            *([shown_command(this_call)] if this_call else []),
        ],
    }


def _describe_stores(page: PageContent) -> dict[str, str]:
    """Describe the records of the page's store, and name those on which students were trained or evaluated apart."""
    facts = describe_data(page.store)
    if trained := {
        name_of_path(str(result.training["store"]["path"]))
        for result in page.results
        if result.place
    }:
        facts = {
            "Trained on": f"{', '.join(sorted(trained))}, another store",
            **{
                f"{name} of {name_of_path(page.config.store.path)}": text
                for name, text in facts.items()
            },
        }
    evaluated = {name_of_path(result.other_store) for result in page.results if result.other_store}
    if evaluated and not trained:
        facts["Evaluated on"] = f"{', '.join(sorted(evaluated))}, another store (evaluate.store)"
    return facts


def _metric_lines(results: list[StudentResult]) -> dict[str, list[list[dict[str, float]]]]:
    lines = defaultdict(list)
    for result in results:
        folder = result.training_folder
        steps = SavedNetwork(folder).describe().steps if SavedNetwork(folder).is_finished else None
        lines[result.label].append(list(read_metrics(folder, steps)))
    return lines


def _shift_curves(
    results: list[StudentResult],
) -> dict[str, dict[str, dict[str, list[list[float]]]]]:
    """Shift curves: split -> kind of map -> variant -> one curve per student. Splits without curves are left out."""
    by_split = group_pairs(
        (split, (kind, (result.label, curve)))
        for result in results
        for split, metrics in result.metrics.items()
        for kind, curve in metrics.get("shift", {}).items()
    )
    return {
        split: {kind: group_pairs(curves) for kind, curves in group_pairs(of_split).items()}
        for split, of_split in by_split.items()
    }


def _ledger(
    run: str, store: Store, passes: list[TeacherPass], results: list[StudentResult]
) -> dict[str, str]:
    records = store.num_records()
    inputs = store.shards.total_bytes
    costs = {
        result.training_folder: cost
        for result in results
        if (cost := read_cost(result.training_folder))
    }
    noun, failed = store.form.noun, store.form.failed
    ledger = {f"Bytes of {noun}": f"{inputs:,} ({inputs / records:,.0f} per record)"}
    if store.manifest.skipped:
        ledger[f"{noun.capitalize()} that could not be {failed}"] = (
            f"{len(store.manifest.skipped):,}"
        )
    if costs:
        seconds = mean(cost["seconds"] for cost in costs.values())
        ledger["Mean seconds per student"] = f"{seconds:.1f}"
    if passes:
        stored = sum(teacher.shards.total_bytes for teacher in passes)
        live = sum(
            cost["records"]
            for folder, cost in costs.items()
            if SavedNetwork(folder).describe().teachers
        )
        ledger["Bytes of teacher fields"] = f"{stored:,} ({stored / records:,.0f} per record)"
        ledger["Teacher forward passes, computed once"] = f"{records * len(passes):,}"
        ledger["Teacher forward passes with mode=live instead"] = f"{live:,.0f}"
    if (pass_cost := read_cost(RunFolder(run).path / "precompute")) is not None:
        ledger["Seconds of teacher annotation, summed over shards"] = f"{pass_cost['seconds']:.1f}"
    return ledger
