"""Arithmetic of the figures."""

import math
from dataclasses import replace

import pytest

from permafrost.core.tasks import SerialExecutor
from tests.benchmarks import __main__ as bench
from tests.benchmarks import scale
from tests.benchmarks.figures import against_best, exact, figure, in_rounds, in_turn, interval
from tests.benchmarks.inputs import TINY
from tests.benchmarks.on_ray import mean_turns, pair_turns, timed_pass
from tests.benchmarks.peer import MissingPeerError
from tests.benchmarks.table import (
    RESULTS,
    TITLES,
    describe_drift,
    load,
    markdown,
    markdown_of_sides,
    record,
)


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


def test_many_sides_take_turns_at_being_first():
    calls = []

    times = in_rounds({side: lambda side=side: calls.append(side) for side in "abc"}, 3, warm_up=0)

    assert "".join(calls) == "abc" + "bca" + "cab"
    assert [len(seconds) for seconds in times.values()] == [3, 3, 3]


def test_the_best_of_several_baselines_is_the_one_with_the_lowest_median():
    times = {"ours": [1.0, 1.0, 2.0], "slow": [9.0, 0.1, 9.0], "quick": [2.0, 3.0, 2.0]}

    best = against_best("stream_equal_32px_1_worker", times, unit="us", scale=1e6, aim=">= 1.0")

    assert (best.ratio, best.ours, best.theirs) == (2.0, 1e6, 2e6)
    assert best.sides == {"ours": 1e6, "slow": 9e6, "quick": 2e6}
    assert "| 1e+06 | 9e+06 | 2e+06 | **2** |" in markdown_of_sides([best])
    assert markdown([best]).count("\n") == 2
    assert markdown_of_sides([measured([(1.0, 2.0)], faster=True)]) == ""


def test_turns_are_measured_from_the_end_of_a_shard_to_that_of_the_next_but_not_the_first():
    quick = [(0.0, 1.0), (10.0, 12.0), (12.5, 14.0)]
    slow = [(0.0, 9.0), (10.0, 14.0), (14.0, 20.0), (20.0, 26.0)]

    assert mean_turns([quick, slow]) == [3.0, 4.0]
    assert pair_turns([[3.0, 4.0]], [[2.0, 2.0, 2.0]]) == [(3.0, 2.0), (4.0, 2.0)]


def test_a_figure_is_worse_only_beyond_both_intervals_and_in_its_own_direction():
    def spread(low, ratio, high, aim):
        return replace(
            measured([(1.0, 1.0)], faster=True, aim=aim), low=low, ratio=ratio, high=high
        )

    speed, cost = spread(1.9, 2.0, 2.1, ">= 1"), spread(1.9, 2.0, 2.1, "<= 1")

    assert spread(1.6, 1.7, 1.8, ">= 1").is_worse_than(speed)
    assert not spread(1.6, 1.7, 1.95, ">= 1").is_worse_than(speed)
    assert not spread(2.5, 2.6, 2.7, ">= 1").is_worse_than(speed)
    assert spread(2.5, 2.6, 2.7, "<= 1").is_worse_than(cost)
    assert spread(2.5, 2.6, 2.7, "").is_worse_than(replace(cost, aim=""))
    assert not spread(1.6, 1.7, 1.8, "<= 1").is_worse_than(cost)
    assert not spread(2.01, 2.01, 2.01, "<= 1").is_worse_than(spread(2.0, 2.0, 2.0, "<= 1"))


def test_the_drift_names_the_figures_that_got_worse():
    before = measured([(1.0, 2.0)] * 3, faster=True, aim=">= 1")
    now = measured([(1.0, 1.5)] * 3, faster=True, aim=">= 1")

    assert describe_drift([now], [before]) == (
        "worse than recorded: stream_vs_webdataset_32px 1.5, was 2\n"
    )
    assert describe_drift([before], [now]).startswith("no figure is worse")
    assert describe_drift([now], []).startswith("no figure is worse")


def test_recording_some_figures_keeps_the_others_and_the_order(tmp_path):
    path = tmp_path / "results.json"
    memory, old, new = (
        exact(name, ours, 1.0, unit="MiB", aim="<= 2")
        for name, ours in (
            ("distill_memory_50k_vs_10k", 1.0),
            ("bytes_vs_values", 1.0),
            ("bytes_vs_values", 1.5),
        )
    )
    record(path, [memory, old])

    record(path, [new])

    assert load(path) == [new, memory]


def test_figures_whose_peers_are_not_installed_are_left_out(monkeypatch, caplog, tmp_path):
    def needs_peers(folder):
        raise MissingPeerError("LitData: not installed")

    monkeypatch.setattr(bench, "GROUPS", {needs_peers: ("stream_equal_32px_1_worker",)})

    with caplog.at_level("INFO", "permafrost.bench"):
        assert bench.measure([], tmp_path / "bench.json") == ([], [])

    assert "left out: LitData: not installed" in caplog.messages


def test_a_figure_that_fails_is_named_and_the_others_go_on(monkeypatch, tmp_path, capsys):
    known = exact("bytes_vs_values", 1.0, 1.0, unit="bytes/record", aim="<= 1.10")

    def fails(folder):
        raise RuntimeError("no Ray")

    groups = {fails: ("ray_vs_serial",), lambda folder: [known]: ("bytes_vs_values",)}
    monkeypatch.setattr(bench, "GROUPS", groups)
    monkeypatch.setattr(bench, "OUT", tmp_path / "bench")
    monkeypatch.setattr(bench, "keep_freed_memory", lambda: None)

    with pytest.raises(SystemExit, match=r"not measured: ray_vs_serial \(RuntimeError: no Ray\)"):
        bench.main([])

    assert load(tmp_path / "bench/bench.json") == [known]
    assert "bytes" in capsys.readouterr().out


def test_a_pass_is_timed_by_the_executor_that_is_given(tmp_path):
    (shards,) = timed_pass(tmp_path, TINY, shards=1).run(SerialExecutor())

    ((start, end),) = shards
    assert end - start > 0


def test_every_figure_has_a_title_and_a_group():
    assert sorted(name for names in bench.GROUPS.values() for name in names) == sorted(TITLES)


def test_an_unknown_figure_is_refused_before_anything_is_measured(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="no figure begins with strem; choose from: precompute"):
        bench.main(["strem"])


def test_the_committed_results_have_every_figure():
    assert {f.name for f in load(RESULTS)} == set(TITLES)


def test_a_table_marks_what_reached_its_aim():
    met = exact("bytes_vs_values", 1.0, 1.0, unit="bytes/record", aim="<= 1.10")
    missed = exact("bytes_vs_values", 3.0, 2.0, unit="bytes/record", aim="<= 1.10")

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
