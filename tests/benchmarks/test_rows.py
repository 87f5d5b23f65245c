"""Figures of `make bench` are measured on a few records, so that what their options are refused for shows here."""

import pytest
import torch

from tests.benchmarks import __main__ as bench
from tests.benchmarks import (
    allocator,
    arrays,
    bcos,
    crops,
    figures,
    inputs,
    memory,
    on_ray,
    precomputing,
    reading,
    replaying,
    settings,
    sleeping,
    steps,
    streams,
    strong_views,
    students,
)
from tests.benchmarks.peer import MissingPeerError
from tests.support.slow import slow_except

FEW = {
    allocator: {"RECORDS": 50, "ROUNDS": 1},
    arrays: {"PASS_SHARDS": 2, "MANY_SHARDS": 5, "ROUNDS": 1},
    bcos: {"PASS_RECORDS": 50, "PASS_ROUNDS": 1, "STEP_ROUNDS": 1},
    crops: {"PHOTOGRAPHS": 2 * crops.BATCH, "ROUNDS": 1},
    inputs: {"SHARD_RECORDS": 50},
    memory: {"FEW": 200, "MANY": 400},
    precomputing: {"RECORDS": 50, "ROUNDS": 1},
    reading: {
        "STREAMED": {32: 100, 224: 50}, "CHECKED": {32: 100, 224: 50}, "LOADED": 100, "ROUNDS": 1,
        "CHECKED_ROUNDS": 1,
    },
    replaying: {"RECORDS": 100, "ROUNDS": 1},
    settings: {
        "PASS_RECORDS": 2, "LARGE_BATCH": 2, "PASS_ROUNDS": 1,
        "STEP_ROUNDS": dict.fromkeys(settings.STEP_ROUNDS, 1),
    },
    sleeping: {
        "OUTPUTS": {
            name: (fields, rate, 2 * sleeping.BATCH, sleeping.BATCH)
            for name, (fields, rate, *_) in sleeping.OUTPUTS.items()
        },
        "ROUNDS": 1,
    },
    steps: {"RECORDS": 3 * steps.BATCH, "FEATURES_BATCH": 2, "ROUNDS": 6},
    streams: {"RECORDS": {32: 100, 224: 50}, "PHOTOGRAPHS": 50, "DECODED": 2, "ROUNDS": 1, "PHOTOGRAPH_ROUNDS": 1},
    strong_views: {"IMAGES": {32: 4, 224: 2}, "RECORDS": 100, "ROUNDS": 1},
    students: {"RECORDS": students.BATCH, "STUDENTS": 2, "ROUNDS": 1},
}  # fmt: skip
"""Numbers of records and rounds by module."""
QUICK = (replaying.replay_figure, strong_views.strong_replay_figure, reading.stream_32_figure)
"""Functions that take less than a second with few records; the others start processes or run deep networks."""


@pytest.fixture
def few(monkeypatch):
    """Measure each figure in few rounds of few records."""
    for module, numbers in FEW.items():
        for name, number in numbers.items():
            assert hasattr(module, name), f"{module.__name__} has no {name}"
            monkeypatch.setattr(module, name, number)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


HERE = [function for function in bench.GROUPS if function.__module__ != on_ray.__name__]
"""Functions of figures of this process; those on Ray start and stop it, which `make bench` alone does."""


@pytest.mark.parametrize(
    "measure",
    slow_except(QUICK, HERE),
    ids=lambda function: function.__name__,
)
def test_a_figure_is_measured_on_a_few_records(measure, few, tmp_path):
    try:
        measured = measure(tmp_path)
    except MissingPeerError as error:
        pytest.skip(str(error))

    assert {figure.name for figure in measured} <= set(bench.GROUPS[measure])
    assert all(isinstance(figure, figures.Figure) and figure.ratio > 0 for figure in measured)
