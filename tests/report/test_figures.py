"""Plots of the report: one color per variant, nothing drawn without being seen, and one figure per option of a grid."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from pathlib import Path

import pytest

from permafrost_report import grid_figures
from permafrost_report.figures import (
    colors_of,
    epoch_plots,
    training_curves,
    variant_plot,
)
from permafrost_report.grid_figures import grid_plots, numeric_options, option_plots
from permafrost_report.main_table import Column
from permafrost_report.model_selection import Candidate, ModelSelection
from permafrost_report.student_results import StudentResult

BLUE, ORANGE, GREEN = "#1f77b4", "#ff7f0e", "#2ca02c"


def svg_of(source):
    return base64.b64decode(source.removeprefix("data:image/svg+xml;base64,")).decode()


def lines_of(**terms):
    """Logged lines of one student of a variant, one per step."""
    steps = max(map(len, terms.values()))
    return [[{"step": n, **{name: v[n] for name, v in terms.items()}} for n in range(steps)]]


def test_a_variant_has_the_same_color_in_all_plots_of_a_page():
    colors = colors_of(["labels", "kd", "e2kd"], "teacher")
    lines = {
        "labels": lines_of(total=[3, 2]),
        "kd": lines_of(total=[3, 2], kd=[2, 1]),
        "e2kd": lines_of(total=[3, 2], kd=[2, 1], map=[2, 1]),
    }

    total, kd, of_map = (svg_of(plot.source) for plot in training_curves(lines, colors))
    others = [
        svg_of(variant_plot(["a", "b"], {"e2kd": [1, 2]}, colors=colors)),
        svg_of(variant_plot(["a", "b"], {"e2kd": [1, 2]}, colors=colors, kind="bar")),
    ]

    assert all(color in total for color in (BLUE, ORANGE, GREEN))
    assert BLUE not in kd  # labels has no such term
    assert ORANGE in kd
    for svg in (of_map, *others):
        assert GREEN in svg
        assert BLUE not in svg
    assert len(set(colors.values())) == 4


def test_a_curve_of_one_logged_step_is_a_marker_and_a_longer_one_a_line():
    def markers(values):
        (plot,) = training_curves({"kd": lines_of(total=values)})
        axes = svg_of(plot.source).partition('id="line2d_')[2]
        return len(re.findall(rf'<use [^>]*style="fill: {BLUE}', axes))

    assert markers([0.5]) >= 1
    assert markers([0.5, 0.4]) == 0


def test_the_last_label_of_the_x_axis_is_inside_the_picture():
    (plot,) = training_curves({"kd": lines_of(total=[1.0] * 176)})

    svg = svg_of(plot.source)

    width = float(re.search(r'viewBox="0 0 ([\d.]+) ', svg).group(1))
    places = [float(x) for x in re.findall(r'<use xlink:href="#m\w+" x="([\d.]+)"', svg)]
    texts = [float(x) for x in re.findall(r'transform="translate\(([\d.]+) [\d.]+\) scale', svg)]
    digit = 0.09 * 65  # width in points of a digit of 9 points
    assert max(texts) + 3 * digit <= width
    assert max(places) < width


def test_curves_over_epochs_have_the_mean_and_the_range_of_the_epochs_that_all_seeds_have():
    seeds = [{3: 0.2, 6: 0.5, 9: 0.9}, {3: 0.4, 6: 0.7}]

    (plot,) = epoch_plots({"test.accuracy": {"kd": seeds, "e2kd": [{3: 0.1, 6: 0.2}]}}, {})

    svg = svg_of(plot.source)
    assert len(re.findall(r'id="(?:FillBetween)?PolyCollection', svg)) == 1  # one seed has no range
    lines = re.findall(r'id="line2d_\d+">\s*<path d="([^"]*)" clip-path', svg)
    assert [line.count("M") + line.count("L") for line in lines] == [2, 2]


@pytest.mark.parametrize("taus", [(1, 4), (0.5, 100)])
def test_one_numeric_option_is_the_axis_beside_a_variant_that_has_none(taus):
    points = [("labels", {}), *(("kd", {"method.tau": tau}) for tau in taus)]
    selection = ModelSelection(
        select="holdout.accuracy",
        candidates=[
            Candidate(variant=variant, point=point, values=[0.5, 0.6], chosen=False)
            for variant, point in points
        ],
    )

    (plot,) = option_plots(selection, "holdout.accuracy, %", "holdout.accuracy")

    # Matplotlib adds every drawn text as a comment.
    svg = base64.b64decode(plot.source.partition(",")[2]).decode()
    assert "<!-- method.tau -->" in svg
    assert all(f"<!-- {tau:g} -->" in svg for tau in taus)
    assert "<!-- labels -->" in svg
    assert "<!-- holdout.accuracy, % -->" in svg


ACCURACY = Column(name="accuracy", source="test.accuracy")


def students(variant, point, *values):
    """Students of one point, one for each value of the accuracy."""
    label = " ".join([variant, *(f"{o.rpartition('.')[2]}={v}" for o, v in point.items())])
    return [
        StudentResult(
            variant=variant,
            label=label,
            point=point,
            seed=seed,
            folder=Path(),
            metrics={"test": {"records": 10} | ({} if value is None else {"accuracy": value})},
        )
        for seed, value in enumerate(values)
    ]


@pytest.fixture
def drawn(monkeypatch):
    """Curves of every figure: name -> places, means and ends of the bars."""
    figures = []

    def keep(figure, axis):
        curves = {}
        for bars in axis.containers:
            line, _, (ends,) = bars.lines
            segments = [segment[:, 1].tolist() for segment in ends.get_segments()]
            curves[bars.get_label()] = [*map(list, line.get_data()), segments]
        lines = [line.get_label() for line in axis.lines if not line.get_label().startswith("_")]
        figures.append((axis.get_xlabel(), axis.get_ylabel(), curves, lines))
        return "data:"

    monkeypatch.setattr(grid_figures, "finish", keep)
    return figures


def test_an_option_has_a_figure_of_means_and_standard_deviations_per_variant(drawn):
    results = [
        *students("labels", {}, 0.1, 0.2),
        *students("kd", {"student.superfeatures": 8}, 0.5, 0.7),
        *students("kd", {"student.superfeatures": 2}, 0.4),
        *students("ked", {"student.superfeatures": 2}, 0.6, 0.6),
        *students("ked", {"student.superfeatures": 8}, 0.8, None),  # left out
    ]

    (plot,) = grid_plots(results, [ACCURACY])

    ((xlabel, ylabel, curves, lines),) = drawn
    assert (xlabel, ylabel) == ("student.superfeatures", "accuracy, %")
    assert set(curves) == {"kd", "ked"}
    places, means, bars = curves["kd"]
    assert (places, means) == ([2, 8], pytest.approx([40, 60]))
    assert bars[0] == pytest.approx([40, 40])
    assert bars[1] == pytest.approx([60 - 2**0.5 * 10, 60 + 2**0.5 * 10])
    assert curves["ked"][0] == [2]
    assert "labels" in lines
    assert plot.alt == "accuracy over student.superfeatures, one curve per variant"


def test_each_numeric_option_of_a_grid_has_a_figure_with_a_curve_for_the_others(drawn):
    results = [
        student
        for mu in (0, 0.5)
        for tau in (1, 4)
        for student in students("ked", {"method.mu": mu, "method.tau": tau}, 0.5, 0.6)
    ]

    plots = grid_plots(results, [ACCURACY])

    assert [xlabel for xlabel, *_ in drawn] == ["method.mu", "method.tau"]
    assert set(drawn[0][2]) == {"ked tau=1", "ked tau=4"}
    assert set(drawn[1][2]) == {"ked mu=0", "ked mu=0.5"}
    assert len(plots) == 2


def test_every_plotted_column_has_its_figures(drawn):
    results = [s for m in (1, 2) for s in students("ked", {"m.a": m}, 0.5)]
    records = Column(name="records", source="test.records")

    assert len(grid_plots(results, [ACCURACY, records])) == 2
    assert drawn[0][1] == "accuracy, %"


def test_points_without_numbers_and_single_points_have_no_figure(drawn):
    named = [s for kind in ("adam", "sgd") for s in students("kd", {"optimizer": kind}, 0.5)]

    assert grid_plots(named, [ACCURACY]) == []
    assert grid_plots(students("kd", {"m.a": 1}, 0.5), [ACCURACY]) == []
    assert (
        numeric_options([Candidate(variant="a", point={"b": True}, values=[1.0], chosen=False)])
        == []
    )


def test_two_runs_with_one_variant_have_a_curve_each(drawn):
    own = [s for m in (1, 2) for s in students("found", {"m.a": m}, 0.5)]
    other = [replace(student, label=f"teachers: {student.label}") for student in own]

    grid_plots([*own, *other], [ACCURACY])

    assert set(drawn[0][2]) == {"found", "teachers: found"}
