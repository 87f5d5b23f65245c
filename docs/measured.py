"""Committed results of the experiments, from which tables and claims are written."""

from __future__ import annotations

import json
from pathlib import Path, PurePath
from statistics import fmean
from typing import TYPE_CHECKING, Any

from permafrost.config.plugins import experiment_folders

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from docs.cells import Run

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = ROOT / "conf" / "experiment"


def path_of(experiment: str, ending: str = "results.json") -> Path:
    """File with the results of an experiment, or with another ending its own."""
    paper, _, name = experiment.partition("/")
    folder = experiment_folders().get(paper)
    if folder is not None:
        return folder / f"{name}.{ending}"
    return EXPERIMENTS / f"{experiment}.{ending}"


def committed_results() -> dict[str, Path]:
    """Files with the results of all experiments, by the experiments' names."""
    folders = {"": EXPERIMENTS, **experiment_folders()}
    return {
        (PurePath(paper) / path.relative_to(folder)).as_posix().removesuffix(".results.json"): path
        for paper, folder in folders.items()
        for path in sorted(folder.rglob("*.results.json"))
    }


def results_of(experiment: str) -> dict[str, Any]:
    """Read the committed results of an experiment."""
    values: dict[str, Any] = json.loads(path_of(experiment).read_text())
    return values


def runs_of(experiment: str, variant: str) -> list[Run]:
    """Runs of one variant, in the order of their seeds. Raises KeyError if the results do not have the variant."""
    runs = [run for run in results_of(experiment)["runs"] if run["method"] == variant]
    if not runs:
        raise KeyError(f"{experiment} has no variant {variant}")
    return sorted(runs, key=lambda run: run["seed"])


def mean_of_variants(experiment: str, variants: Sequence[str], metric: str) -> list[Run]:
    """Mean of a metric over several variants, seed by seed."""
    by_seed = zip(*(runs_of(experiment, variant) for variant in variants), strict=True)
    return [
        {"seed": runs[0]["seed"], metric: fmean(run[metric] for run in runs)} for runs in by_seed
    ]


def means_by_variant(experiment: str, variants: Sequence[str], metric: str) -> list[Run]:
    """Mean of a metric over the seeds of each variant, with the variant's number in place of the seed."""
    return [
        {"seed": number, metric: fmean(run[metric] for run in runs_of(experiment, variant))}
        for number, variant in enumerate(variants)
    ]


def measured_variants(experiment: str, variants: Mapping[str, str]) -> dict[str, str]:
    """Labels of the variants that the committed results have. New variants of a recipe await a measurement."""
    known = {run["method"].partition(" ")[0] for run in results_of(experiment)["runs"]}
    return {variant: label for variant, label in variants.items() if variant in known}


def measured_values(experiment: str, option: str, variant: str) -> list[str]:
    """Values of a grid's option that the committed results have of one variant, in the order of the grid."""
    start = f"{variant} {option}="
    names = [run["method"] for run in results_of(experiment)["runs"]]
    return list(dict.fromkeys(n.removeprefix(start) for n in names if n.startswith(start)))
