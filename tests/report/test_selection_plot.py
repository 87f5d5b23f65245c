"""Plots over the options of a grid: the choice of the x axis, and one figure for each numeric option."""

import base64
from dataclasses import replace
from pathlib import Path

import pytest

from permafrost_report import grid_figures
from permafrost_report.grid_figures import grid_plots, numeric_options, option_plots
from permafrost_report.main_table import Column
from permafrost_report.model_selection import Candidate, ModelSelection
from permafrost_report.student_results import StudentResult


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
