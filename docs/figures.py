"""Draw the figures of the pages from the committed results.

python -m docs.figures       writes docs/figures/*.svg

overview.svg and files.svg there are drawn by hand, and docs/demo_pictures.py makes the pictures of the demo.
"""

from __future__ import annotations

from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from docs.cells import difference_interval
from docs.claims import e2kd, interpretability, ked, unicam
from docs.claims.sections import CONTRADICTS, OPEN, SUPPORTS, verdicts_of
from docs.measured import ROOT, results_of, runs_of
from docs.tables.e2kd import EQUAL_TERMS
from docs.tables.frontier import steps
from docs.tables.unicam import DEPTHS, UNICAM, UNICAM_VARIANTS
from tests.benchmarks.table import RESULTS, load

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from matplotlib.axes import Axes

    from docs.cells import Run
    from docs.claims.sections import Claim

FIGURES = ROOT / "docs" / "figures"
_STYLE = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.hashsalt": "permafrost",  # the same figure has the same bytes
}
_GRAY = "0.45"


def percent(runs: Sequence[Run], metric: str = "accuracy") -> list[float]:
    """Values of a metric in per cent."""
    return [100 * run[metric] for run in runs]


def _points(axis: Axes, x: float, values: Sequence[float], color: str) -> None:
    """Draw a mean as a bar across the points of its seeds."""
    axis.plot([x] * len(values), values, "o", color=color, ms=4, alpha=0.6, mew=0)
    axis.plot([x - 0.25, x + 0.25], [fmean(values)] * 2, color=color, lw=2)


def _columns(axis: Axes, columns: Mapping[str, Sequence[float]]) -> None:
    """Draw a column of points with its mean for each name."""
    for x, (number, values) in enumerate(enumerate(columns.values())):
        _points(axis, x, values, f"C{number % 10}")
    axis.set_xticks(range(len(columns)), list(columns), rotation=30, ha="right")


def training_length() -> Figure:
    """Accuracy on the demo's swapped photographs over the length of the training."""
    figure, axis = _axes(4.2, 2.8)
    for variant, label in (("kd", "KD"), ("e2kd", "e2KD")):
        runs = {30: runs_of("demo", variant)}
        runs |= {n: runs_of("demo_length", f"{variant} epochs={n}") for n in (90, 270)}
        (line,) = axis.plot(
            list(runs),
            [fmean(percent(of, "accuracy_swapped")) for of in runs.values()],
            label=label,
        )
        for epochs, of in runs.items():
            values = percent(of, "accuracy_swapped")
            axis.plot([epochs] * len(values), values, "o", color=line.get_color(), ms=4, alpha=0.6)
    axis.set_xscale("log")
    axis.set_xticks([30, 90, 270], ["30", "90", "270"])
    axis.minorticks_off()
    axis.set_xlabel("epochs of the student")
    axis.set_ylabel("accuracy, photographs swapped, %")
    axis.legend()
    return figure


_METHODS = {
    "KD": "kd_logits",
    "e2KD, one map per record": "e2kd_logits",
    "AT": "at_logits",
    "CAT-KD": "cat_kd_logits",
    "e2KD, maps of all classes": "e2kd_logits_all",
    "ReviewKD, live, with labels": "review_kd_both",
}


def methods() -> Figure:
    """Accuracy of the methods on few images, at equal terms."""
    figure, axis = _axes(4.6, 3.2)
    _columns(
        axis, {name: percent(runs_of(EQUAL_TERMS, variant)) for name, variant in _METHODS.items()}
    )
    axis.set_ylabel("test accuracy, %")
    axis.set_title("CIFAR-10, 50 images per class, tau = 1")
    return figure


_MODES = (
    # label, experiment, variant, bytes per record
    ("frozen", "cifar10_live", "e2kd", "1 canonical"),
    ("V = 1", "cifar10_replay", "e2kd_v1", "1 random"),
    ("V = 4", "cifar10_replay", "e2kd_v4", "4 random"),
    ("V = 16", "cifar10_replay", "e2kd_v16", "16 random"),
    ("live", "cifar10_live", "e2kd_live", None),
)


def modes() -> Figure:
    """Accuracy of e2KD over the bytes of a record, and over the seconds of a student."""
    size = {p["views"]: p["bytes"] for p in reversed(results_of("cifar10_replay")["passes"])}
    figure = Figure(figsize=(6.8, 2.8), layout="constrained")
    bytes_axis, seconds_axis = figure.subplots(1, 2, sharey=True)
    for number, (label, experiment, variant, views) in enumerate(_MODES):
        runs = runs_of(experiment, variant)
        values = percent(runs)
        seconds = fmean(run["seconds"] for run in runs)
        places = [(seconds_axis, seconds)]
        if views is None:
            bytes_axis.axhline(fmean(values), color=f"C{number}", lw=1, ls="--", label=label)
        else:
            places.append((bytes_axis, size[views]))
        for axis, x in places:
            axis.plot([x] * len(values), values, "o", color=f"C{number}", ms=4, alpha=0.6, mew=0)
            axis.plot([x], [fmean(values)], "_", color=f"C{number}", ms=14, mew=2)
            axis.annotate(label, (x, max(values)), (0, 4), textcoords="offset points", ha="center")
    bytes_axis.set_xscale("log")
    bytes_axis.set_xlabel("bytes per record")
    bytes_axis.set_ylabel("test accuracy, %")
    bytes_axis.legend(loc="lower right")
    bytes_axis.margins(x=0.15, y=0.12)
    seconds_axis.set_xlabel("seconds per student")
    seconds_axis.margins(x=0.15)
    return figure


_LABELS = {
    "logits alone": ("logits (KD)", 0, 9),
    "class maps of 2x2 cells": ("class maps (CAT-KD)", -10, 4),
    "one map of 8x8 cells": ("one map (e2KD)", 0, -22),
    "logits of 16 views": ("logits of 16 views", 12, -4),
    "logits of 16 mixtures": ("logits of 16 mixed images", 0, -22),
    "features of the last stage, 4x4 cells": ("features of the last stage", -10, 6),
    "features of all stages": ("features of all stages", -10, 3),
    "features of all stages, also flipped": ("features, also of the mirrored image", -10, 3),
}
"""Labels of the points in the figure, with their offsets; others are drawn without one."""


def frontier() -> Figure:
    """Accuracy on few images over the bytes that are stored per image; a line joins the highest means so far."""
    figure, axis = _axes(7.2, 3.4)
    best: list[tuple[float, float]] = []
    for point, is_ahead in steps():
        values = percent(point.runs)
        mean = fmean(values)
        leads = not best or mean > best[-1][1]
        color = "C0" if is_ahead or not best else _GRAY
        axis.plot([point.bytes] * len(values), values, "o", color=color, ms=3.5, alpha=0.5, mew=0)
        axis.plot([point.bytes], [mean], "_", color=color, ms=13, mew=2.2)
        if leads:
            best.append((point.bytes, mean))
        if point.stored in _LABELS:
            text, x, y = _LABELS[point.stored]
            axis.annotate(
                f"{text}, {mean:.0f} %", (point.bytes, mean), (x, y), textcoords="offset points", color=color,
                ha="left" if x == 12 else "right" if x < 0 else "center", fontsize=9.5,
            )  # fmt: skip
    axis.plot(*zip(*best, strict=True), color="C0", lw=1, alpha=0.6, drawstyle="steps-post")
    labels = fmean(percent(runs_of(EQUAL_TERMS, "labels")))
    axis.axhline(labels, color=_GRAY, lw=1, ls="--")
    axis.annotate(
        f"labels, {labels:.0f} %", (5, labels), (0, 4), textcoords="offset points", color=_GRAY
    )
    axis.set_xscale("log")
    axis.set_xlim(4, 200_000)
    axis.set_ylim(42, 74)
    axis.set_xticks([20, 200, 2_000, 20_000], ["20 B", "200 B", "2 kB", "20 kB"])
    axis.minorticks_off()
    axis.set_title(
        "ResNet-20 students of a ResNet-56, 500 unlabeled CIFAR-10 images of 1.7 kB\n"
        "(blue: conclusively above the best smaller one)"
    )
    axis.set_xlabel("stored bytes per image (points: seeds, bars: means)")
    axis.set_ylabel("test accuracy, %")
    return figure


def shift_curves() -> Figure:
    """Cosine of the explanations of a shifted image with the shifted explanations, ViT students."""
    curves = results_of("cifar10_vit")["shift_curves"]
    figure, axis = _axes(4.2, 2.8)
    for variant, label, color in (("kd", "KD", "C0"), ("e2kd", "e2KD", "C1")):
        for name, kind, style in (("map", "W", "-"), ("contribution", "contributions", "--")):
            axis.plot(
                curves[variant][name], style, color=color, marker=".", label=f"{label}, {kind}"
            )
    axis.set_xlabel("shift in pixels")
    axis.set_ylabel("cosine")
    axis.set_ylim(0, 1.02)
    axis.legend(ncols=2)
    return figure


def ked_partitions() -> Figure:
    """Accuracy of additive networks over the number of superfeatures, by how they were found."""
    name = "ked/cifar10_teachers"
    counts = (1, 2, 4, 8, 16)
    figure, axis = _axes(4.2, 2.8)
    for variant, label in (
        ("found", "found in a network"),
        ("contiguous", "contiguous blocks"),
        ("random_0", "random, first draw"),
        ("random_1", "random, second draw"),
    ):
        runs = [runs_of(name, f"{variant} superfeatures={count}") for count in counts]
        (line,) = axis.plot(counts, [fmean(percent(of)) for of in runs], marker=".", label=label)
        low, high = ([pick(percent(of)) for of in runs] for pick in (min, max))
        axis.fill_between(counts, low, high, color=line.get_color(), alpha=0.15, lw=0)
    axis.set_xscale("log", base=2)
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.set_xlabel("number of superfeatures, M")
    axis.set_ylabel("test accuracy, %")
    axis.legend()
    return figure


def unicam_depths() -> Figure:
    """Parts of the features that distillation added and lost through five depths, and a control."""
    figure = Figure(figsize=(6.8, 2.8), layout="constrained")
    for axis, name in zip(figure.subplots(1, 2, sharey=True), ("distilled", "lost"), strict=True):
        for number, (variant, label) in enumerate(list(UNICAM_VARIANTS.items())[1:]):
            runs = runs_of(UNICAM, variant)
            values = [[run[f"{name}_{depth}"] for run in runs] for depth in DEPTHS]
            color, style = (_GRAY, "--") if variant == "other_seed" else (f"C{number}", "-")
            depths = range(1, len(DEPTHS) + 1)
            axis.plot(depths, [fmean(of) for of in values], style, color=color, label=label)
            axis.fill_between(
                depths, [min(of) for of in values], [max(of) for of in values], color=color,
                alpha=0.15, lw=0,
            )  # fmt: skip
        axis.set_title(name)
        axis.set_xticks(depths)
        axis.set_xlabel("depth")
    figure.axes[0].set_ylabel("relevance score")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def detectors() -> Figure:
    """Units of each variant's students that detect a concept, seed by seed."""
    name = "interpretability/cifar10_variants"
    variants = list(dict.fromkeys(run["method"] for run in results_of(name)["runs"]))
    figure, axis = _axes(6.8, 3.2)
    _columns(
        axis,
        {variant: [run["detectors"] for run in runs_of(name, variant)] for variant in variants},
    )
    axis.set_ylabel("concept detectors")
    return figure


def readers() -> Figure:
    """Time per record of this store's reader and of others, each with its best number of workers."""
    sides = {row.name: row.sides for row in load(RESULTS) if row.sides}
    figure = Figure(figsize=(9.2, 2.8), layout="constrained")
    images = {
        "_32px_": "32 pixels",
        "_224px_": "224 pixels",
        "_warm_photographs_": "photographs at full size",
    }
    for axis, (part, title) in zip(figure.subplots(1, 3), images.items(), strict=True):
        rows = [of for name, of in sides.items() if part in name]
        best = {side: min(row[side] for row in rows) for side in rows[0]}
        labels = ["permafrost" if side == "ours" else side for side in best]
        axis.barh(labels, list(best.values()), color=["C0"] + [_GRAY] * (len(best) - 1))
        axis.invert_yaxis()
        axis.set_title(title)
        axis.set_xlabel("microseconds per record")
    return figure


_VERDICT_COLORS = {SUPPORTS: "C2", CONTRADICTS: "C3", OPEN: _GRAY}


def _forest(claims: Sequence[Claim]) -> Figure:
    """Draw the comparisons of a page with a claim of the paper, by unit, against the sign that the paper states."""
    verdicts = verdicts_of(claims)
    units = {(one.of.unit.strip() or one.of.name): one.of.scale for one in verdicts}
    groups = {
        unit: [one for one in verdicts if (one.of.unit.strip() or one.of.name) == unit]
        for unit in units
    }
    rows = sum(map(len, groups.values()))
    heights = [len(group) for group in groups.values()]
    figure = Figure(figsize=(7.2, 0.24 * rows + 0.75 * len(groups)), layout="constrained")
    grid = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)
    for axis, (unit, group) in zip(grid[:, 0], groups.items(), strict=True):
        for place, one in enumerate(group):
            mean, low, high = difference_interval(
                *one.pair, one.of.name, one.of.scale, paired=one.over_teachers
            )
            color = _VERDICT_COLORS[verdicts[one][0]]
            axis.plot([low, high], [place, place], color=color, lw=1.5)
            marker = ">" if one.paper > 0 else "<"
            axis.plot([mean], [place], marker, color=color, ms=6)
        axis.set_yticks(range(len(group)), [_shortened(one.what) for one in group], fontsize=7)
        axis.invert_yaxis()
        axis.axvline(0, color="black", lw=0.6)
        axis.set_xlabel(unit)
    handles = [Line2D([], [], color=color, label=name) for name, color in _VERDICT_COLORS.items()]
    handles.append(
        Line2D([], [], color="none", marker=">", mfc=_GRAY, mec=_GRAY, label="sign of the paper")
    )
    figure.legend(handles=handles, loc="outside upper center", ncols=4)
    return figure


def _shortened(text: str) -> str:
    return text if len(text) <= 70 else f"{text[:67]}..."


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


DRAWN: tuple[Callable[[], Figure], ...] = (
    training_length,
    methods,
    modes,
    frontier,
    shift_curves,
    ked_partitions,
    unicam_depths,
    detectors,
    readers,
)
"""Figures that are drawn, each in a file of its function's name with hyphens."""


def write_figures() -> None:
    """Write every figure as SVG."""
    figures = {draw.__name__.replace("_", "-"): draw for draw in DRAWN}
    for paper in (e2kd, ked, unicam, interpretability):
        figures[f"forest-{paper.__name__.rpartition('.')[2]}"] = partial(_forest, paper.CLAIMS)
    for name, draw in figures.items():
        with rc_context(_STYLE):  # type: ignore[arg-type]
            draw().savefig(FIGURES / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    write_figures()
