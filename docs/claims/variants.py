"""Options of the variants of committed results, as their commands compose them, and in which of them two variants
differ."""

from __future__ import annotations

import re
import shlex
from functools import cache
from typing import Any

from docs.measured import results_of
from permafrost.config.compose import compose

_COMPARED = (
    "data", "teacher", "explainer", "views", "subset", "student", "mode", "augment", "method", "optimizer", "trainer",
)  # fmt: skip
"""Sections that decide what a student learns. Of the store only the names of the passes do."""

Options = dict[str, Any]
"""Mapping from dotted options to values."""


@cache
def options_of(experiment: str, variant: str) -> Options:
    """Compose the options of a variant: those of the sweep that its results name, of the variant and of its point of
    the grid.

    Raises KeyError if the sweep has no such variant or no such option in its grid.
    """
    arguments = _sweep_arguments(experiment)
    sweep = compose("sweep", arguments)
    name, *point = variant.split()
    grid = {option.rpartition(".")[2]: option for option in sweep["grid"] or {}}
    values = dict(text.split("=", 1) for text in point)
    chosen = [f"{grid[option]}={value}" for option, value in values.items()]
    composed = compose("sweep", [*arguments, *sweep["variants"][name], *chosen])
    options = _flat({section: composed[section] for section in _COMPARED})
    return options | {"store.teacher": composed["store"]["teacher"]}


def _sweep_arguments(experiment: str) -> list[str]:
    """Arguments of the last sweep in the command of the results, by default those of the experiment alone."""
    sweeps = re.findall(
        r"(?:permafrost|-m stages\.) ?sweep ([^&;(]*)", results_of(experiment)["command"]
    )
    words = shlex.split(sweeps[-1]) if sweeps else [f"experiment={experiment}"]
    return [word for word in words if not word.startswith(("run=", "#"))]


def _flat(values: Any, name: str = "") -> Options:
    if not isinstance(values, dict):
        return {name: values}
    return {
        option: value
        for key, inner in values.items()
        for option, value in _flat(inner, f"{name}.{key}".removeprefix(".")).items()
    }


def differing_options(candidate: Options, baseline: Options) -> set[str]:
    """Options of which both variants have one, with other values. An option of one kind only differs by its kind."""
    return {
        option for option in candidate.keys() & baseline if candidate[option] != baseline[option]
    }


_TERMS = {
    "lambda_ce": "labels",
    "lambda_kd": "logits",
    "lambda_map": "map",
    "lambda_at": "attention",
    "lambda_cat": "class maps",
    "lambda_review": "features",
    "lambda_hint": "hint",
}


def losses_in_words(options: Options) -> str:
    """Terms of a loss with their weights, those of weight 1 without it."""
    method = {
        key.removeprefix("method."): options[key] for key in options if key.startswith("method.")
    }
    if method["kind"] == "labels":
        smoothing = method["label_smoothing"]
        return f"labels, smoothed {smoothing:g}" if smoothing else "labels"
    terms = []
    for name, weight in method.items():
        if not name.startswith("lambda_") or not weight:
            continue
        text = _TERMS.get(name, name.removeprefix("lambda_").replace("_", " "))
        if name == "lambda_map" and _classes(options) != 1:
            text = f"maps of {_classes(options)} classes"
        details = [f"{float(weight):g}"] if weight != 1 else []
        if name == "lambda_kd" or (name == "lambda_ked" and "tau" in method):
            details.append(f"tau {method['tau']:g}")
        if name == "lambda_ked":
            details.append(f"mu {float(method['mu']):g}")
        terms.append(f"{text} ({', '.join(details)})" if details else text)
    return " + ".join(terms)


def _classes(options: Options) -> int:
    """Number of classes whose maps a student of e2KD compares."""
    stored = (
        options["explainer.max_classes"] if options["explainer.target_classes"] == "topk" else 1
    )
    return min(stored, options["method.max_classes"] or stored)
