"""Plot of a hyperparameter search: the choice of its x axis."""

import base64

import pytest

from pipeline.report.figures import selection_plot
from pipeline.report.results import Candidate, ModelSelection

LABELS = ("labels", {})


def svg_of(*candidates, select="holdout.accuracy"):
    """SVG of the plot, in which Matplotlib adds every drawn text as a comment."""
    selection = ModelSelection(
        select=select,
        candidates=[
            Candidate(arm=arm, point=point, values=[0.5, 0.6], chosen=False)
            for arm, point in candidates
        ],
    )
    return base64.b64decode(selection_plot(selection).partition(",")[2]).decode()


@pytest.mark.parametrize("taus", [(4,), (1, 4), (0.5, 100)])
def test_one_numeric_option_is_the_axis_beside_an_arm_that_has_none(taus):
    svg = svg_of(LABELS, *(("kd", {"method.tau": tau}) for tau in taus))

    assert "<!-- method.tau -->" in svg
    assert all(f"<!-- {tau:g} -->" in svg for tau in taus)
    assert "<!-- labels -->" in svg
    assert "<!-- holdout.accuracy, % -->" in svg


@pytest.mark.parametrize(
    ("points", "names"),
    [
        ([{"split": "a"}, {"split": "b"}], ["split=a", "split=b"]),
        ([{"m.a": 1, "m.b": 2}, {"m.a": 1}], ["a=1 b=2", "a=1"]),
    ],
)
def test_other_points_have_a_place_each(points, names):
    svg = svg_of(*(("kd", point) for point in points), select="holdout.kl_to_teacher")

    assert all(f"<!-- {name} -->" in svg for name in names)
    assert "<!-- holdout.kl_to_teacher -->" in svg


def test_arms_without_a_grid_are_still_shown():
    assert "<!-- labels -->" in svg_of(LABELS, ("kd", {}))
