"""Accuracy by class and confusions, against numbers that were counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from permafrost_report.class_results import class_section
from permafrost_report.student_results import StudentResult
from tests.support import run_files

NAMES = ("cat", "dog", "eel", "fox")


def evaluated(variant, seed, labels, predictions, teacher=None, *, store="s", named="big"):
    """Result of a student whose table of records has these labels and predictions."""
    folder = Path(f"runs/{variant}-{seed}")
    (folder / "evaluate").mkdir(parents=True)
    right = [a == b for a, b in zip(labels, predictions, strict=True)]
    metrics = {"test": {"records": len(labels), "accuracy": sum(right) / len(right)}}
    run_files.write_metrics(folder / "evaluate", metrics)
    run_files.write_config(
        folder / "evaluate/config.yaml",
        f"inputs: {{store: {store}, teacher {named}: digest}}\nevaluate: {{}}\n",
    )
    rows = zip(labels, predictions, teacher or [None] * len(labels), strict=True)
    run_files.write_records(folder / "evaluate", "test", rows)
    return StudentResult(variant=variant, label=variant, seed=seed, folder=folder, metrics=metrics)


def test_accuracies_and_confusions_are_those_that_a_reader_would_count():
    labels = [0, 0, 0, 0, 1, 1, 3, -1]
    teacher = [0, 0, 0, 1, 1, 1, 3, 0]
    kd = [
        evaluated("kd", 0, labels, [0, 0, 1, 1, 1, 0, 3, 2], teacher),
        evaluated("kd", 1, labels, [0, 0, 0, 2, 1, 1, 0, 2], teacher),
    ]
    other = evaluated("e2kd", 0, labels, [0] * 8, teacher)

    section = class_section([*kd, other], NAMES, "kd")

    assert (section.split, section.total, section.classes) == ("test", 3, ["cat", "dog", "fox"])
    rows = {row.name: [cell["mean"] for cell in row.cells] for row in section.rows}
    assert rows == {
        "teacher": [0.75, 1.0, 1.0],
        "kd": [(0.5 + 0.75) / 2, 0.75, 0.5],
        "e2kd": [1.0, 0.0, 0.0],
    }
    assert [row.is_variant for row in section.rows] == [False, True, True]
    assert section.rows[1].cells[0]["sd"] == pytest.approx(0.25 / 2**0.5)
    assert section.rows[2].cells[0]["sd"] is None
    assert section.values["confusions"] == {
        "kd": [[5, 2, 1, 0, 0], [1, 3, 0, 0, 0], [0, 0, 0, 0, 0], [1, 0, 0, 1, 0]],
        "teacher": [[3, 1, 0, 0, 0], [0, 2, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 1, 0]],
    }
    assert section.values["accuracy"]["kd"] == [0.625, 0.75, None, 0.5]
    assert len(section.plots) == 2
    assert section.confusions == []


def test_of_many_classes_the_worst_ones_and_the_most_frequent_confusions_are_shown():
    names = [f"class {number}" for number in range(30)]
    labels = [label for label in range(30) for _ in range(4)]
    predictions = list(labels)
    predictions[4 * 7 : 4 * 8] = [9, 9, 9, 7]
    predictions[4 * 5 : 4 * 6] = [5, 5, 6, 6]
    teacher = list(labels)
    teacher[4 * 7] = 9

    section = class_section([evaluated("kd", 0, labels, predictions, teacher)], names, "kd")

    assert section.plots == []
    assert (section.total, len(section.classes)) == (30, 10)
    assert section.classes[:3] == ["class 7", "class 5", "class 0"]
    assert section.networks == ["kd", "teacher"]
    assert section.confusions == [
        ("class 7", "class 9", [0.75, 0.25]),
        ("class 5", "class 6", [0.5, 0.0]),
    ]
    assert "confusions" not in section.values
    assert len(section.values["accuracy"]["teacher"]) == 30


def test_teachers_are_told_apart_by_their_passes_and_the_most_accurate_variant_has_a_matrix():
    labels = [0, 0, 1, 1]
    small = evaluated("kd", 0, labels, [0, 1, 1, 0], [0, 1, 1, 1], named="small")
    big = evaluated("e2kd", 0, labels, [0, 0, 1, 0], labels, named="big")
    elsewhere = evaluated("labels", 0, labels, labels, store="another")

    section = class_section([small, big, elsewhere], NAMES, "nobody")

    assert [row.name for row in section.rows] == ["teacher small", "teacher big", "kd", "e2kd"]
    assert section.networks == ["e2kd", "teacher big"]


def test_records_with_many_labels_have_no_section():
    one = evaluated("kd", 0, [0, 1], [0, 1])
    many = StudentResult(
        variant="kd",
        label="kd",
        seed=0,
        folder=one.folder,
        metrics={"test": {"records": 2, "f1": 0.5}},
    )

    assert class_section([many], NAMES, "kd") is None
    assert class_section([], NAMES, "kd") is None
    assert class_section([one], (), "kd") is None
