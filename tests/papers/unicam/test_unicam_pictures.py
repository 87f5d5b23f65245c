"""Pictures of UniCAM maps in a report: one figure of all pairs, and one through several depths."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from permafrost.runs.mirrors import RUNS
from permafrost.store.reader import Store
from permafrost_papers.unicam.options import UnicamOptions
from permafrost_papers.unicam.unicam_pictures import unicam_figures
from permafrost_report.student_results import load_results
from tests.support.run_files import write_config
from tests.support.runs import evaluation_of, save_student
from tests.support.verbs import evaluate


@pytest.fixture
def own(frozen, tmp_path):
    """Writable copy of the frozen store with two untrained students, the second of which is a baseline."""
    copied = replace(frozen, store=Store(shutil.copytree(frozen.store.path, tmp_path / "store")))
    save_student(copied, "one")
    save_student(copied, "two", seed=6)
    return copied


def titles(own, **options):
    """Row titles of each figure of the student `one`."""
    config = evaluation_of(
        own,
        ("unicam",),
        run="one",
        splits=("train",),
        unicam=UnicamOptions(records=2, bank_records=12, baseline="two", **options),
        teacher=own.config.teacher,
    )
    evaluate.run(config)
    write_config(RUNS / "one" / "distill" / "config.yaml", "seed: 0\n")
    figures = unicam_figures(load_results("one"), None, own.store)
    return [[row.title for row in figure.grid] for figure in figures], figures


def test_one_depth_is_shown_as_it_is(own):
    ((rows,), (figure,)) = titles(own)

    assert rows[0] == "image"
    assert rows[-5:] == ["one", "  distilled", "  beyond teacher", "  only teacher", "  lost"]
    assert "mean over depths" not in figure.caption


def test_several_depths_are_shown_as_their_mean_and_one_by_one(own):
    (rows, by_depth), (figure, _) = titles(own, depths=(3, 1, 2))

    assert rows[-5:] == ["one", "  distilled", "  beyond teacher", "  only teacher", "  lost"]
    assert "each as the mean over depths" in figure.caption
    assert by_depth == [
        "image",
        *(f"one: distilled, depth {depth}" for depth in (1, 2, 3)),
        *(f"one: only teacher, depth {depth}" for depth in (1, 2, 3)),
    ]


def evaluated(own, run, store=None, records=2):
    config = evaluation_of(
        own,
        ("unicam",),
        run=run,
        splits=("train",),
        unicam=UnicamOptions(records=records, bank_records=12, baseline=None),
        teacher=own.config.teacher,
    )
    options = replace(config.evaluate, store=None if store is None else str(store))
    evaluate.run(replace(config, evaluate=options))
    write_config(RUNS / run / "distill" / "config.yaml", "seed: 0\n")
    return load_results(run)


def test_records_of_another_store_are_shown_from_that_store(own, tmp_path):
    other = shutil.copytree(own.store.path, tmp_path / "other")
    results = evaluated(own, "one", store=other)
    shutil.rmtree(tmp_path / "store" / "index")  # nothing is read from the store of the training

    (figure,) = unicam_figures(results, None, own.store)

    assert [row.title for row in figure.grid][-3:] == ["one", "  beyond teacher", "  only teacher"]


def test_a_network_with_maps_of_other_records_is_left_out(own):
    results = [*evaluated(own, "one"), *evaluated(own, "two", records=3)]

    (figure,) = unicam_figures(results, None, own.store)

    titles = [row.title for row in figure.grid]
    assert "one" in titles
    assert "two" not in titles


def test_a_student_without_results_hides_nobodys_pictures(own):
    results = evaluated(own, "one")
    unevaluated = replace(results[0], metrics={}, label="unevaluated", folder=RUNS / "none")

    assert len(unicam_figures([unevaluated, *results], None, own.store)) == 1
