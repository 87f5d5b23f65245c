"""Metrics of passes and trainings: what they count, and that page and dashboard name those that exist."""

import re

import pytest

from permafrost.cluster.ray_metrics import PassMetrics, TrainingMetrics
from permafrost.core.tasks import ShardResult, Subject
from tests.support.paths import ROOT


@pytest.fixture
def values(monkeypatch):
    """Values of metrics by name, with those of counters named as Prometheus has them."""
    metrics = pytest.importorskip("ray.util.metrics")
    numbers = {}

    class Recorded:
        suffix = ""

        def __init__(self, name, description, tag_keys):
            self.name, self.tag_keys = f"ray_{name}{self.suffix}", tag_keys
            numbers[self.name] = 0

        def set_default_tags(self, tags):
            assert tuple(tags) == self.tag_keys

        def set(self, value):
            numbers[self.name] = value

        def inc(self, value):
            assert value > 0
            numbers[self.name] += value

    monkeypatch.setattr(metrics, "Gauge", Recorded)
    monkeypatch.setattr(metrics, "Counter", type("Counted", (Recorded,), {"suffix": "_total"}))
    return numbers


def result(records, seconds, **waits):
    return ShardResult(name="s", records=records, seconds=seconds, waits=waits, report=None)


def test_shards_and_steps_are_counted(values):
    metrics = PassMetrics(Subject("stores/a", "resnet8-1"), 2)
    metrics.add(result(16, 2.0, decode=0.5, write=1.0))
    metrics.add(result(8, 1.0))
    metrics.set_actors(3, 1)
    TrainingMetrics("run", 2, 64)({"step": 20, "total": 1.5, "records_per_second": 128.0})

    assert {name.removeprefix("ray_permafrost_"): value for name, value in values.items()} == {
        "records_total": 24, "shards_done_total": 2, "shard_seconds_total": 3.0, "wait_seconds_total": 0.5,
        "shards": 2, "actors": 3, "restarts": 1, "ranks": 2, "step": 20, "loss": 1.5, "step_seconds": 0.5,
    }  # fmt: skip


@pytest.mark.parametrize("page", ["cluster.md", "grafana.json"])
def test_a_page_names_metrics_that_exist(values, page):
    PassMetrics(Subject("", "")), TrainingMetrics("", 1, 1)
    named = set(re.findall(r"ray_permafrost_\w+", (ROOT / "docs/howto" / page).read_text()))
    assert named <= values.keys()
    assert page != "cluster.md" or named == values.keys()
