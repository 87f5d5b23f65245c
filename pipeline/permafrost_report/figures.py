"""Plots as SVG data URIs, so that the page is self-contained.

Each plot has one pair of axes and is shown at its own size (style.css.j2), so text has the size that is set here: 9
points are 12 pixels of the page. Names are shown as they are, never parsed as formulas.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from types import MappingProxyType
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from permafrost.evaluation.evaluator import PLAIN, metric_of

WIDTH, HEIGHT = 3.6, 2.5
"""Size of a plot in inches: 346 by 240 pixels, which fits a phone."""
_STYLE = {
    "text.parse_math": False,
    "svg.hashsalt": "permafrost",  # the same plot has the same bytes
    **dict.fromkeys(("font.size", "axes.labelsize", "legend.fontsize"), 9.0),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize"), 9.0),
    "axes.titlesize": 10.0,
}
_TERMS = ("total", "kd", "map", "ce", "bce")
"""Terms of a loss that are plotted, next to those of method=several, whose names end with their numbers."""
_MAX_POINTS = 300
"""Largest number of points of a curve; of a longer one, evenly spaced points are drawn."""
_MAX_NAME = 40
_MAX_CLASS = 14
_GRAY = "0.45"
_SLANTED: dict[str, Any] = {"rotation": 30, "ha": "right"}
"""Options of tick labels that would overlap if they were level."""
_NO_COLORS: Mapping[str, str] = MappingProxyType({})
P = ParamSpec("P")
R = TypeVar("R")


class Plot(NamedTuple):
    """A plot of the page."""

    source: str
    """SVG as a data URI."""
    alt: str
    caption: str = ""


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Make a function draw with the report's sizes and without formulas, whatever the settings of the process are."""

    @wraps(draw)
    def styled(*args: P.args, **options: P.kwargs) -> R:
        from matplotlib import rc_context

        with rc_context(_STYLE):  # type: ignore[arg-type]
            return draw(*args, **options)

    return styled


def colors_of(variants: Sequence[str], teacher: str | None = None) -> dict[str, str]:
    """Assign each variant of a page the color that it has in all plots; the teacher is gray."""
    colors = {variant: f"C{number % 10}" for number, variant in enumerate(variants)}
    return colors if teacher is None else colors | {teacher: _GRAY}


def training_curves(
    lines: Mapping[str, list[list[dict[str, float]]]], colors: Mapping[str, str] = _NO_COLORS
) -> list[Plot]:
    """Plot each loss term over the steps, with one curve per variant (the mean over its seeds).

    Args:
        lines: By variant, the lines of metrics.jsonl of each of its students.
        colors: Colors of the variants, by default in the order of each plot.
    """
    logged = {
        name for students in lines.values() for run in students for line in run for name in line
    }
    of_several = sorted(name for name in logged if name.rpartition("_")[2].isdigit())
    return [_loss_curve(lines, name, colors) for name in (*_TERMS, *of_several) if name in logged]


@styled
def _loss_curve(
    lines: Mapping[str, list[list[dict[str, float]]]], name: str, colors: Mapping[str, str]
) -> Plot:
    figure, axis = new_axes()
    for variant, students in lines.items():
        runs = [[(line["step"], line[name]) for line in run if name in line] for run in students]
        if runs := [run for run in runs if run]:
            length = min(map(len, runs))
            kept = np.unique(np.linspace(0, length - 1, min(length, _MAX_POINTS)).astype(int))
            values = np.array([[value for _, value in run[:length]] for run in runs])
            axis.plot(
                np.array([step for step, _ in runs[0][:length]])[kept],
                values.mean(axis=0)[kept],
                label=legend_name(variant),
                color=colors.get(variant),
                lw=1,
                marker="o" if len(kept) == 1 else None,
                ms=4,
            )
    axis.set(xlabel="step", title=name)
    return Plot(
        finish(figure, axis), f"Loss term {name} over the training steps, one curve per variant"
    )


def epoch_plots(
    curves: Mapping[str, Mapping[str, list[dict[int, float]]]],
    colors: Mapping[str, str] = _NO_COLORS,
) -> list[Plot]:
    """Plot metrics over the epochs, with one curve per variant (the mean over its seeds) and the range of its seeds.

    Args:
        curves: By <split>.<metric> and variant, the value by epoch of each of its students.
        colors: Colors of the variants, by default in the order of each plot.
    """
    return [_epoch_plot(name, variants, colors) for name, variants in curves.items()]


@styled
def _epoch_plot(
    name: str, variants: Mapping[str, list[dict[int, float]]], colors: Mapping[str, str]
) -> Plot:
    scale = (metric_of(name.partition(".")[2]) or PLAIN).scale
    figure, axis = new_axes()
    for variant, students in variants.items():
        epochs = sorted(set.intersection(*map(set, students)))
        values = np.array([[scale * student[epoch] for epoch in epochs] for student in students])
        label, color = legend_name(variant), colors.get(variant)
        (line,) = axis.plot(
            epochs, values.mean(axis=0), label=label, color=color, lw=1.3, marker=".", ms=5
        )
        if len(students) > 1:
            low, high = values.min(axis=0), values.max(axis=0)
            axis.fill_between(epochs, low, high, color=line.get_color(), alpha=0.15, lw=0)
    axis.set(xlabel="epoch", ylabel="%" if scale == 100 else "", title=name)
    return Plot(
        finish(figure, axis),
        f"{name} over the epochs of the training, one curve per variant with the range of its seeds",
        name,
    )


@styled
def shift_plot(
    split: str, kind: str, variants: Mapping[str, list[list[float]]], colors: Mapping[str, str]
) -> Plot:
    """Plot the shift-equivariance cosine over the shift, with one curve per variant (the mean over its seeds).

    Args:
        split: Split of the records, for the captions.
        kind: Kind of map.
        variants: By variant, the cosine at 0, 1, 2, ... pixels of each of its students.
        colors: Colors of the variants.
    """
    figure, axis = new_axes()
    for variant, students in variants.items():
        axis.plot(
            np.array(students, dtype=float).mean(axis=0),  # null becomes nan, a gap
            label=legend_name(variant),
            color=colors.get(variant),
            lw=1.2,
            marker=".",
            ms=4,
        )
    axis.set(xlabel="shift in pixels", ylabel="cosine", title=kind)
    return Plot(
        finish(figure, axis),
        f"Cosine of {kind} over the shift in pixels, one curve per variant, on split {split}",
        f"{kind}, split {split}",
    )


@styled
def variant_plot(
    names: Sequence[str],
    values: Mapping[str, Sequence[float]],
    ylabel: str = "",
    colors: Mapping[str, str] = _NO_COLORS,
    kind: str = "line",
) -> str:
    """Plot the values of all variants for each name: bars, or curves over ordered names, such as layers.

    Args:
        names: Names along the x axis.
        values: Values of each variant, one per name; a nan leaves a gap.
        ylabel: Label of the y axis.
        colors: Colors of the variants, by default in their order.
        kind: "line" or "bar".

    Returns:
        The plot as a data URI.
    """
    width = 0.8 / max(len(values), 1)
    each = 0.6 if kind == "line" else 0.16 * len(values)
    figure, axis = new_axes(max(WIDTH, each * len(names) + 1.2))
    axis.axhline(0, color="gray", lw=0.6)
    for number, (variant, of_variant) in enumerate(values.items()):
        look: Any = {"label": legend_name(variant), "color": colors.get(variant)}
        if kind == "line":
            axis.plot(range(len(names)), of_variant, lw=1.3, marker="o", ms=4, **look)
        else:
            places = np.arange(len(names)) + (number - (len(values) - 1) / 2) * width
            axis.bar(places, of_variant, width, **look)
    is_long = max(map(len, names), default=0) > 8
    axis.set_xticks(range(len(names)), names, **_SLANTED if is_long else {})
    axis.set_ylabel(ylabel)
    return finish(figure, axis)


@styled
def confusion_plot(names: Sequence[str], shares: NDArray[np.float64]) -> str:
    """Plot a confusion matrix as a heat map with its numbers, leaving out those below 0.5.

    Args:
        names: Names of the classes.
        shares: Per cent of the records of each class by predicted class, [K, K], nan for a class without records.

    Returns:
        The plot as a data URI.
    """
    size = max(WIDTH, 1.2 + 0.24 * len(names))
    figure, axis = new_axes(size, size)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    for (row, column), share in np.ndenumerate(shares):
        if share >= 0.5:
            color = "white" if share > 60 else "black"
            axis.text(column, row, f"{share:.0f}", ha="center", va="center", color=color, size=7.5)
    labels = [legend_name(name, _MAX_CLASS) for name in names]
    axis.set_xticks(range(len(names)), labels, rotation=90)
    axis.set_yticks(range(len(names)), labels)
    axis.set(xlabel="predicted class", ylabel="class")
    return finish(figure, axis)


def legend_name(name: str, longest: int = _MAX_NAME) -> str:
    """Shorten a name to one line of a legend, which would leave out a name with a leading underscore."""
    line = " ".join(name.split())
    line = line if len(line) <= longest else f"{line[: longest - 2]}.."
    return f" {line}" if line.startswith("_") else line


def new_axes(width: float = WIDTH, height: float = HEIGHT) -> tuple[Figure, Axes]:
    """Open a figure with one pair of axes, of a size in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def finish(figure: Figure, axis: Axes) -> str:
    """Add the legend above the axes, in as many columns as fit, and encode the plot as a data URI."""
    handles, labels = axis.get_legend_handles_labels()
    width, height = figure.get_size_inches()
    columns = max(1, int(width / (0.45 + 0.085 * max(map(len, labels), default=1))))
    if labels:
        figure.set_size_inches(width, height + 0.2 * -(-len(labels) // columns))
        figure.legend(handles, labels, loc="outside upper left", ncols=columns, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"
