"""Plots as data URIs, so that the page is self-contained."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from pipeline.config.points import point_label
from pipeline.report.results import Candidate, ModelSelection


def training_curves(lines: Mapping[str, list[list[dict[str, float]]]]) -> str:
    """Plot each loss term over the steps as SVG, with one curve per arm (the mean over its seeds).

    lines  arm -> metrics.jsonl lines of each of its students
    """
    from matplotlib.figure import Figure

    names = [name for name in ("total", "kd", "map", "ce", "bce") if _has(lines, name)]
    figure = Figure(figsize=(3.2 * len(names), 2.6), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for arm, students in lines.items():
            runs = [
                [(line["step"], line[name]) for line in run if name in line] for run in students
            ]
            runs = [run for run in runs if run]
            if runs:
                length = min(map(len, runs))
                values = np.array([[value for _, value in run[:length]] for run in runs])
                axis.plot(
                    [step for step, _ in runs[0][:length]], values.mean(axis=0), label=arm, lw=1
                )
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize=8
    )
    return data_uri(figure, "svg")


def shift_plot(curves: Mapping[str, Mapping[str, list[list[float]]]]) -> str:
    """Plot the shift-equivariance cosine over the shift as SVG, with one curve per arm (the mean over its seeds).

    curves  kind of map -> arm -> cosine at 0, 1, 2, ... pixels of each of its students
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(curves), 3), layout="constrained")
    axes = figure.subplots(1, len(curves), squeeze=False)[0]
    for axis, (kind, arms) in zip(axes, curves.items(), strict=True):
        for arm, students in arms.items():
            axis.plot(np.array(students).mean(axis=0), label=arm, lw=1.2, marker=".", ms=4)
        axis.set_title(kind, fontsize=9)
        axis.set_xlabel("shift in pixels", fontsize=8)
        axis.tick_params(labelsize=7)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize=8
    )
    return data_uri(figure, "svg")


def line_plot(names: Sequence[str], values: Mapping[str, Sequence[float]]) -> str:
    """Plot one curve per arm over ordered names, such as layers, as SVG. A nan leaves a gap."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.3 * len(names) + 3.5, 2.8), layout="constrained")
    axis = figure.subplots()
    for arm, of_arm in values.items():
        axis.plot(range(len(names)), of_arm, label=arm, lw=1.3, marker="o", ms=4)
    axis.set_xticks(range(len(names)), names)
    axis.axhline(0, color="gray", lw=0.6)
    axis.tick_params(labelsize=7.5)
    figure.legend(
        *axis.get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize=8
    )
    return data_uri(figure, "svg")


def bar_plot(names: Sequence[str], values: Mapping[str, Sequence[float]]) -> str:
    """Plot bars of all arms for each name, as SVG."""
    from matplotlib.figure import Figure

    width = 0.8 / max(len(values), 1)
    figure = Figure(
        figsize=(max(4.0, 0.22 * len(names) * len(values) + 2.5), 2.8), layout="constrained"
    )
    axis = figure.subplots()
    for number, (arm, of_arm) in enumerate(values.items()):
        places = np.arange(len(names)) + (number - (len(values) - 1) / 2) * width
        axis.bar(places, of_arm, width, label=arm)
    axis.set_xticks(range(len(names)), names)
    axis.tick_params(labelsize=7.5)
    figure.legend(
        *axis.get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize=8
    )
    return data_uri(figure, "svg")


def selection_plot(selection: ModelSelection) -> str:
    """Plot the metric of every candidate over its points as SVG, with one curve per arm and standard deviations.

    A single numeric option is the x axis. Otherwise each point has a separate position.
    """
    from matplotlib.figure import Figure

    candidates, scale = selection.candidates, selection.metric.scale
    x_of, option = _places(candidates)
    figure = Figure(figsize=(7.5, 3.4), layout="constrained")
    axis = figure.subplots()
    for number, arm in enumerate(dict.fromkeys(candidate.arm for candidate in candidates)):
        points = [candidate for candidate in candidates if candidate.arm == arm]
        mean = [scale * candidate.summary["mean"] for candidate in points]
        sd = [scale * candidate.summary["sd"] for candidate in points]
        color = f"C{number % 10}"
        if point_label(points[0].point) not in x_of:  # an arm without options is a horizontal line
            axis.axhline(mean[0], label=arm, color=color, ls="--", lw=1)
            axis.axhspan(mean[0] - sd[0], mean[0] + sd[0], color=color, alpha=0.12, lw=0)
            continue
        places = [x_of[point_label(candidate.point)] for candidate in points]
        axis.errorbar(places, mean, yerr=sd, label=arm, color=color, marker="o", ms=4, capsize=3)
        for place, value, candidate in zip(places, mean, points, strict=True):
            if candidate.chosen:
                axis.plot([place], [value], "o", ms=11, mfc="none", color=color)
    if option is None:
        axis.set_xticks(list(x_of.values()), list(x_of), rotation=30, ha="right")
    else:
        axis.set_xlabel(option, fontsize=8)
        places = sorted(x_of.values())
        if places[0] > 0 and places[-1] > 10 * places[0]:
            axis.set_xscale("log")
        axis.set_xticks(places, [f"{place:g}" for place in places])
        axis.minorticks_off()
    axis.set_ylabel(selection.select + (", %" if scale == 100 else ""), fontsize=8)
    axis.tick_params(labelsize=7)
    figure.legend(loc="outside upper center", ncols=5, fontsize=8)
    return data_uri(figure, "svg")


def _places(candidates: Sequence[Candidate]) -> tuple[dict[str, float], str | None]:
    """Position of each point on the x axis by its label, and the option of this axis, if it is a single one."""
    points = {point_label(c.point): c.point for c in candidates if c.point}
    options = {option for point in points.values() for option in point}
    values = [value for point in points.values() for value in point.values()]
    if len(options) == 1 and all(type(value) in (int, float) for value in values):
        return {label: float(*p.values()) for label, p in points.items()}, options.pop()
    names = points or {"": {}}
    return {label: float(position) for position, label in enumerate(names)}, None


def _has(lines: Mapping[str, list[list[dict[str, float]]]], name: str) -> bool:
    return any(name in line for students in lines.values() for run in students for line in run)


def _show_text_as_it_is(figure: Figure) -> None:
    """Disable TeX for text such as class names with dollar signs, except labels of logarithmic axes, which are TeX."""
    from matplotlib.text import Text

    formulas = {
        label
        for axis in figure.axes
        if axis.get_xscale() == "log"
        for label in axis.get_xticklabels()
    }
    for text in figure.findobj(Text):
        if text not in formulas:
            text.set_parse_math(False)


def data_uri(figure: Figure, kind: str) -> str:
    """Encode a figure as a data URI.

    kind  svg or png
    """
    _show_text_as_it_is(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=110)
    mime = {"svg": "image/svg+xml", "png": "image/png"}[kind]
    return f"data:{mime};base64,{base64.b64encode(buffer.getvalue()).decode()}"
