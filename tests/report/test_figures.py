"""Plots of the report: one color per variant on a page, and nothing that is drawn without being seen."""

from __future__ import annotations

import base64
import re

from permafrost_report.figures import (
    colors_of,
    epoch_plots,
    training_curves,
    variant_plot,
)

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
