"""Arithmetic of the figures."""

import math

import pytest

from tests.benchmarks import __main__ as bench
from tests.benchmarks import scale
from tests.benchmarks.figures import exact, figure, in_turn, interval
from tests.benchmarks.table import RESULTS, TITLES, load, markdown


def measured(pairs, *, faster, aim=""):
    return figure("stream_vs_webdataset_32px", pairs, faster=faster, unit="ms", scale=1e3, aim=aim)


def test_a_ratio_is_the_median_over_rounds_not_the_ratio_of_medians():
    pairs = [(1.0, 2.0), (2.0, 8.0), (10.0, 10.0)]

    assert measured(pairs, faster=True).ratio == 2.0
    assert measured(pairs, faster=False).ratio == 0.5
    assert (measured(pairs, faster=True).ours, measured(pairs, faster=True).theirs) == (2e3, 8e3)


def test_an_aim_is_met_from_its_own_side():
    pairs = [(1.0, 2.0)] * 3

    assert measured(pairs, faster=True, aim=">= 2").is_met
    assert not measured(pairs, faster=True, aim=">= 2.01").is_met
    assert measured(pairs, faster=False, aim="<= 0.5").is_met
    assert not measured(pairs, faster=False, aim="<= 0.49").is_met


def test_the_interval_holds_the_median_and_shrinks_with_rounds():
    few, many = [1.0, 2.0, 3.0], [1.0, 2.0, 3.0] * 30

    assert interval(few)[0] <= 2.0 <= interval(few)[1]
    assert interval(many)[1] - interval(many)[0] < interval(few)[1] - interval(few)[0]
    assert interval([5.0, 5.0]) == (5.0, 5.0)


def test_sides_take_turns_and_so_does_who_is_first():
    calls = []

    pairs = in_turn(lambda: calls.append("o"), lambda: calls.append("t"), 3, warm_up=1)

    assert "".join(calls) == "ot" + "ot" + "to" + "ot"
    assert len(pairs) == 3


def test_every_figure_has_a_title_and_a_group():
    assert sorted(name for names in bench.GROUPS.values() for name in names) == sorted(TITLES)


def test_an_unknown_figure_is_refused_before_anything_is_measured(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="no figure begins with strem; choose from: precompute"):
        bench.main(["strem"])


def test_the_committed_results_have_every_figure():
    assert {f.name for f in load(RESULTS)} == set(TITLES)


def test_a_table_marks_what_reached_its_aim():
    met = exact("bytes_vs_payload", 1.0, 1.0, unit="bytes/record", aim="<= 1.10")
    missed = exact("bytes_vs_payload", 3.0, 2.0, unit="bytes/record", aim="<= 1.10")

    assert "| **1** |" in markdown([met])
    assert "| 1.5 |" in markdown([missed])


def scale_figure(**values):
    known = {"name": "scale_loader", "num_few": 10, "num_many": 1000, "unit": "MiB"}
    return scale.ScaleFigure(**known | values)


def test_a_figure_of_scale_compares_by_difference_or_rate_or_alone():
    grows = scale_figure(few=100.0, many=140.0, limit="<= 50")
    rate = scale_figure(few=100.0, many=90.0, unit="records/s", limit=">= 0.95")
    alone = scale_figure(few=math.nan, many=2.5, unit="s", limit="<= 3")

    assert [f.compared for f in (grows, rate, alone)] == [40.0, 0.9, 2.5]
    assert [f.is_met for f in (grows, rate, alone)] == [True, False, True]
    table = scale.markdown([grows, rate, alone])
    assert "| **+40** | <= 50 |" in table
    assert "| 0.9 | >= 0.95 |" in table
    assert "|  | 2.5 s (1,000) | **2.5** |" in table


def test_every_figure_of_scale_has_a_title_and_a_group_and_was_measured():
    names = [name for names in scale.GROUPS.values() for name in names]

    assert sorted(names) == sorted(scale.TITLES)
    assert {figure.name for figure in scale.load(scale.RESULTS)} == set(names)
