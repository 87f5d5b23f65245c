"""Pictures as data URIs, so that the page needs no other file."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.grid import point_label

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from pipeline.report.results import Candidate, Selection


def training_curves(lines: Mapping[str, list[list[dict[str, float]]]]) -> str:
    """Each loss term over the steps, one curve an arm (the mean of its seeds): SVG.

    lines  arm -> a list of metrics.jsonl lines for each of its students
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
    return _data_uri(figure, "svg")


def selection_plot(selection: Selection) -> str:
    """The metric of every candidate over its points, a curve an arm, with standard deviations: SVG.

    One numeric option is the x axis; otherwise each point has its own place.
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
        colour = f"C{number % 10}"
        if point_label(points[0].point) not in x_of:  # without options: a level to compare with
            axis.axhline(mean[0], label=arm, color=colour, ls="--", lw=1)
            axis.axhspan(mean[0] - sd[0], mean[0] + sd[0], color=colour, alpha=0.12, lw=0)
            continue
        places = [x_of[point_label(candidate.point)] for candidate in points]
        axis.errorbar(places, mean, yerr=sd, label=arm, color=colour, marker="o", ms=4, capsize=3)
        for place, value, candidate in zip(places, mean, points, strict=True):
            if candidate.chosen:
                axis.plot([place], [value], "o", ms=11, mfc="none", color=colour)
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
    return _data_uri(figure, "svg")


def _places(candidates: Sequence[Candidate]) -> tuple[dict[str, float], str | None]:
    """Where on the x axis each point lies, by its label; and the option that this axis is, if it is one."""
    points = {point_label(c.point): c.point for c in candidates if c.point}
    options = {option for point in points.values() for option in point}
    values = [value for point in points.values() for value in point.values()]
    if len(options) == 1 and all(type(value) in (int, float) for value in values):
        return {label: float(*p.values()) for label, p in points.items()}, options.pop()
    names = points or {"": {}}
    return {label: float(position) for position, label in enumerate(names)}, None


def map_grid(pictures: Mapping[str, Mapping[str, Any]], classes: Sequence[str]) -> str:
    """Images in columns; rows are the plain image, the teacher's map and one student's map an arm: PNG.

    pictures  arm -> tensors that evaluate kept (frames, labels, predictions, maps, teacher_maps)
    """
    from matplotlib.figure import Figure

    first = next(iter(pictures.values()))
    frames, labels = _numpy(first["frames"]), _numpy(first["labels"])
    rows: list[tuple[str, Any, Any]] = [("image", None, labels)]
    if "teacher_maps" in first:
        rows.append(
            ("teacher", _numpy(first["teacher_maps"]), _numpy(first["teacher_predictions"]))
        )
    rows += [(arm, _numpy(p["maps"]), _numpy(p["predictions"])) for arm, p in pictures.items()]
    figure = Figure(figsize=(1.15 * len(frames) + 1.2, 1.25 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(frames), squeeze=False)
    for axis_row, (title, maps, predictions) in zip(axes, rows, strict=True):
        axis_row[0].set_ylabel(title, fontsize=8)
        for column, axis in enumerate(axis_row):
            image = frames[column].transpose(1, 2, 0)
            axis.imshow(image if maps is None else _overlay(image, maps[column]))
            right = predictions[column] == labels[column]
            axis.set_title(
                classes[predictions[column]]
                if max(predictions) < len(classes)
                else str(predictions[column]),  # the teacher's classes are not the data's
                fontsize=8,
                color="black" if right else "crimson",
                pad=2,
            )
            axis.set_xticks([])
            axis.set_yticks([])
    return _data_uri(figure, "png")


class PictureRow(NamedTuple):
    """One row of a grid of pictures."""

    title: str
    pixels: NDArray[np.uint8]
    """[n, height, width, 3]."""
    maps: NDArray[np.float32] | None
    """[n, height, width], laid over the pixels; None shows these alone."""
    captions: list[str]
    """[n], above the pictures."""
    aspects: list[float]
    """[n]: width / height at which each is shown."""


def picture_grid(rows: Sequence[PictureRow]) -> str:
    """Records in columns: PNG."""
    from matplotlib.figure import Figure

    columns = len(rows[0].pixels)
    figure = Figure(figsize=(1.3 * columns + 1.2, 1.3 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for axis_row, row in zip(axes, rows, strict=True):
        axis_row[0].set_ylabel(row.title, fontsize=8)
        for column, axis in enumerate(axis_row):
            image = row.pixels[column]
            axis.imshow(image if row.maps is None else _overlay(image, row.maps[column]))
            axis.set_aspect(image.shape[1] / image.shape[0] / row.aspects[column])
            axis.set_title(row.captions[column], fontsize=7, pad=2)
            axis.set_xticks([])
            axis.set_yticks([])
    return _data_uri(figure, "png")


def _overlay(image: NDArray[np.uint8], values: NDArray[np.float32]) -> NDArray[np.float64]:
    """The map, scaled to its highest value and upsampled, in red over a pale grey image."""
    import torch

    from pipeline.evaluation.localization import upsample

    size = (image.shape[0], image.shape[1])
    heat = upsample(torch.from_numpy(values)[None], size)[0].clamp(min=0).numpy()
    heat = heat / max(heat.max(), np.finfo(np.float32).tiny)
    grey = 0.5 + 0.5 * image.mean(axis=2, keepdims=True) / 255
    red = np.array([0.85, 0.05, 0.1])
    alpha = 0.8 * heat[:, :, None]
    mixed: NDArray[np.float64] = grey * (1 - alpha) + red * alpha
    return mixed


def _has(lines: Mapping[str, list[list[dict[str, float]]]], name: str) -> bool:
    return any(name in line for students in lines.values() for run in students for line in run)


def _numpy(tensor: Any) -> NDArray[Any]:
    array: NDArray[Any] = tensor.numpy()
    return array


def _data_uri(figure: Figure, kind: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=110)
    mime = {"svg": "image/svg+xml", "png": "image/png"}[kind]
    return f"data:{mime};base64,{base64.b64encode(buffer.getvalue()).decode()}"
