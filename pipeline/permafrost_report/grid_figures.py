"""Plots of a quantity over the options of a grid: one curve per variant, mean and standard deviation over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from permafrost.config.points import point_label
from permafrost_report.comparison import group_pairs
from permafrost_report.figures import HEIGHT, WIDTH, Plot, finish, legend_name, new_axes, styled
from permafrost_report.main_table import Column
from permafrost_report.model_selection import Candidate, ModelSelection, over_the_grid
from permafrost_report.student_results import StudentResult

_WIDEST = 10
"""Largest ratio of the values of an axis with a linear scale, if all are positive."""


def grid_plots(results: Sequence[StudentResult], columns: Sequence[Column]) -> list[Plot]:
    """Plot each column over each numeric option of the grid.

    Variants without a value of the column are left out. The list is empty if every variant has a single point.
    """
    grids = [(over_the_grid(results, column.source), column) for column in columns]
    return [
        plot
        for grid, column in grids
        if grid is not None
        for plot in option_plots(grid, column.title, column.words)
    ]


def option_plots(grid: ModelSelection, title: str, words: str) -> list[Plot]:
    """Plot a quantity over each numeric option of its candidates.

    Args:
        grid: Candidates with their values.
        title: Name of the quantity with its unit.
        words: Name of the quantity.
    """
    return [
        Plot(
            option_plot(grid, option, title),
            f"{words} over {option}, one curve per variant",
            f"{title} over {option}, mean and standard deviation over seeds",
        )
        for option in numeric_options(grid.candidates)
    ]


def numeric_options(candidates: Sequence[Candidate]) -> list[str]:
    """Return the options of the grid that have several values, all of which are numbers."""
    values = group_pairs(pair for candidate in candidates for pair in candidate.point.items())
    return [
        option
        for option, choices in values.items()
        if len({str(value) for value in choices}) > 1
        and all(type(value) in (int, float) for value in choices)
    ]


@styled
def option_plot(grid: ModelSelection, option: str, ylabel: str) -> str:
    """Plot the quantity over one numeric option, with one curve per variant and per point of the other options.

    A variant without the option is a horizontal line.

    Args:
        grid: Candidates with their values.
        option: Name of the option.
        ylabel: Label of the y axis.

    Returns:
        The plot as a data URI.
    """
    curves: dict[tuple[str, bool], list[Candidate]] = {}
    for candidate in grid.candidates:
        others = {name: value for name, value in candidate.point.items() if name != option}
        name = f"{candidate.variant} {_label_of(others, grid)}".strip()
        curves.setdefault((name, option in candidate.point), []).append(candidate)
    places = {
        float(candidate.point[option]) for candidate in grid.candidates if option in candidate.point
    }
    figure, axis = new_axes(1.6 * WIDTH, 1.25 * HEIGHT)
    for number, ((name, has_option), points) in enumerate(curves.items()):
        at = [float(point.point[option]) for point in points] if has_option else []
        _draw_curve(axis, name, points, at, grid.metric.scale, f"C{number % 10}")
    _scale(axis, option, sorted(places))
    axis.set_ylabel(ylabel)
    return finish(figure, axis)


def _label_of(point: Mapping[str, object], grid: ModelSelection) -> str:
    """Label of the options in which candidates differ."""
    varied = {
        name: value
        for name, value in point.items()
        if any(candidate.point.get(name, value) != value for candidate in grid.candidates)
    }
    return point_label(varied)


def _draw_curve(
    axis: Axes,
    name: str,
    points: Sequence[Candidate],
    positions: Sequence[float],
    scale: float,
    color: str,
) -> None:
    """Draw the points of one curve, circled where chosen, or without places a horizontal line."""
    mean = [scale * candidate.summary["mean"] for candidate in points]
    sd = [scale * (candidate.summary["sd"] or 0) for candidate in points]
    name = legend_name(name)
    if not positions:
        axis.axhline(mean[0], label=name, color=color, ls="--", lw=1)
        axis.axhspan(mean[0] - sd[0], mean[0] + sd[0], color=color, alpha=0.12, lw=0)
        return
    order = sorted(range(len(positions)), key=positions.__getitem__)
    axis.errorbar(
        [positions[number] for number in order],
        [mean[number] for number in order],
        yerr=[sd[number] for number in order],
        label=name,
        color=color,
        marker="o",
        ms=4,
        capsize=3,
    )
    for place, value, candidate in zip(positions, mean, points, strict=True):
        if candidate.chosen:
            axis.plot([place], [value], "o", ms=11, mfc="none", color=color)


def _scale(axis: Axes, option: str, positions: Sequence[float]) -> None:
    """Label the x axis with the values of an option, on a logarithmic scale if they are far apart."""
    axis.set_xlabel(option)
    if positions[0] > 0 and positions[-1] > _WIDEST * positions[0]:
        axis.set_xscale("log")
    axis.set_xticks(positions, [f"{place:g}" for place in positions])
    axis.minorticks_off()
