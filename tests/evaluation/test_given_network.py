"""Evaluation of given networks (model=network): a pair without a run, and without a pass of its teacher."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from permafrost.config.augment import AugmentOptions
from permafrost.config.store import StoreOptions
from permafrost.core.errors import ConfigError
from permafrost.models.providers import build_model
from permafrost.runs.mirrors import RUNS
from permafrost.store.reader import Store
from permafrost_papers.unicam.options import DistanceCorrelationOptions, UnicamOptions
from permafrost_report.options import ReportConfig, ReportOptions
from tests.support.composition import config_of
from tests.support.runs import distill_config, evaluation_of
from tests.support.verbs import distill, evaluate, report

FEATURES = ("distance_correlation", "unicam")
SMALL = {
    "distance_correlation": DistanceCorrelationOptions(permutations=19),
    "unicam": UnicamOptions(records=2, bank_records=12),
}


@pytest.fixture
def unpassed(own, tmp_path):
    """The store of `own` without the teacher's pass."""
    path = shutil.copytree(own.store.path, tmp_path / "unpassed")
    for folder in Store(path).pass_folders():
        shutil.rmtree(str(folder))
    return replace(own, store=Store(path))


def evaluated(own, student, evaluators=FEATURES, run="pair", teacher=True, **options):
    config = evaluation_of(
        own,
        evaluators,
        run=run,
        splits=("train",),
        model="network",
        **({"teacher": own.config.teacher} if teacher is True else {}),
        **({"teacher": teacher} if teacher not in (True, False) else {}),
        **SMALL,
        **options,
    )
    return evaluate.run(replace(config, student=student))


def network_of(own, path, outputs=10, seed=3):
    """Config of a network whose random weights are in a file."""
    config = replace(own.config.teacher, weights=None)
    torch.manual_seed(seed)
    save_file(build_model(config, outputs).network.state_dict(), path)
    return replace(config, weights=str(path), classes=None if outputs == 10 else outputs)


def test_a_given_network_has_the_numbers_of_a_student_with_its_weights(own, tmp_path):
    weights = RUNS / "one" / "distill" / "model.safetensors"
    given = evaluated(
        own, replace(own.config.teacher, weights=str(weights)), ("accuracy", *FEATURES)
    )
    config = evaluation_of(
        own, ("accuracy", *FEATURES), splits=("train",), teacher=own.config.teacher, **SMALL
    )
    of_run = evaluate.run(config)

    found, expected = given.splits["train"], of_run.splits["train"]
    assert "pair/evaluate-network" in given.metrics
    for name in ("accuracy", "agreement"):
        assert found[name] == expected[name]
    for name in ("fss", "rs", "relevance", "teacher_relevance"):
        assert found["distance_correlation"][name] == expected["distance_correlation"][name]
    assert found["unicam"]["objective"] == expected["unicam"]["objective"]


def test_a_pair_needs_neither_a_run_nor_a_pass(unpassed, tmp_path):
    student = network_of(unpassed, tmp_path / "student.safetensors")

    found = evaluated(unpassed, student, run="new").splits["train"]

    assert not (RUNS / "new" / "distill").exists()
    assert set(found["distance_correlation"]["rs"]) == {
        "teacher_given_student",
        "student_given_teacher",
    }
    assert -1 <= found["distance_correlation"]["fss"]["pooled"] < 1
    other = network_of(unpassed, tmp_path / "other.safetensors", seed=4)
    with pytest.raises(ConfigError, match=r"evaluate-network contains a run with .*another run="):
        evaluated(unpassed, student, run="new", teacher=other)
    with pytest.raises(ConfigError, match=r"evaluate-network contains a run with .*another run="):
        evaluated(unpassed, other, run="new")
    with pytest.raises(ConfigError, match="needs the teacher network"):
        evaluated(unpassed, student, run="alone", teacher=False)


def test_a_network_of_other_classes_is_compared_by_its_features_only(own, tmp_path):
    student = network_of(own, tmp_path / "student.safetensors", outputs=7)

    same_trunk = network_of(own, tmp_path / "ten.safetensors")
    trunk = {n: t for n, t in load_file(student.weights).items() if "linear" not in n}
    save_file(load_file(same_trunk.weights) | trunk, same_trunk.weights)

    found, expected = (
        evaluated(own, network, run=run).splits["train"]["distance_correlation"]
        for network, run in ((student, "seven"), (same_trunk, "ten"))
    )

    assert (found["records"], found["classes"]) == (40, 10)
    assert (found["fss"], found["relevance"]) == (expected["fss"], expected["relevance"])
    with pytest.raises(
        ConfigError,
        match=r"student\.classes=7 are not the 10 classes of .*evaluators=\[accuracy\] reads",
    ):
        evaluated(own, student, ("accuracy", *FEATURES), run="more")


def test_both_networks_may_have_other_classes(unpassed, tmp_path):
    student = network_of(unpassed, tmp_path / "student.safetensors", outputs=7)
    teacher = network_of(unpassed, tmp_path / "teacher.safetensors", outputs=5, seed=4)

    found = evaluated(unpassed, student, teacher=teacher).splits["train"]

    assert found["distance_correlation"]["classes"] == 10
    assert found["unicam"]["objective"]["teacher_given_student"]["depth1"] != 0


def test_a_report_shows_a_pair_without_a_student(unpassed, tmp_path):
    student = network_of(unpassed, tmp_path / "student.safetensors")
    found = evaluated(unpassed, student, ("accuracy", *FEATURES), run="pair")
    assert found.next.startswith("permafrost report ")

    config = report_of(unpassed.store, "pair")
    written = report.run(config)

    page = Path(written.html).read_text()
    values = json.loads(Path(written.json).read_text())
    fss = found.splits["train"]["distance_correlation"]["fss"]["pooled"]
    assert values["network"]["train"]["distance_correlation.fss.pooled"] == fss
    assert [row["method"] for row in values["runs"]] == ["given network"]
    assert written.summary == ""  # which speaks of variants and seeds
    for text in (f"{fss:.3f}", 'id="distance_correlation"', "given network: only teacher"):
        assert text in page
    assert "beyond teacher, depth" not in page
    assert report.run(config).html == written.html


@pytest.mark.slow
def test_a_report_of_a_student_shows_a_given_network_beside_it(own, tmp_path):
    distill.run(distill_config(own, run="taught"))
    config = evaluation_of(
        own, FEATURES, run="taught", splits=("train",), teacher=own.config.teacher, **SMALL
    )
    evaluate.run(config)
    evaluated(own, network_of(own, tmp_path / "student.safetensors"), run=config.run)

    written = report.run(report_of(own.store, config.run))

    page = Path(written.html).read_text()
    values = json.loads(Path(written.json).read_text())
    assert all(row["method"] != "given network" for row in values.get("runs", []))
    assert set(values["network"]) == {"train"}
    for text in ("own map of the true class", "given network: only teacher"):
        assert text in page


def report_of(store, run):
    return ReportConfig(
        store=StoreOptions(path=str(store.path)),
        run=run,
        augment=AugmentOptions(),
        report=ReportOptions(contact_records=0),
    )


def test_a_network_that_is_not_given_or_not_read_is_refused(own):
    with pytest.raises(ConfigError, match=r"model=network needs the network.*student\.weights="):
        evaluated(own, replace(own.config.teacher, weights=None))
    words = ("student=timm", "student.name=resnet10t", "student.weights=w.pth")

    given = config_of("evaluate", "model=network", *words)
    unread = config_of("evaluate", *words)

    assert (given.student.kind, given.student.weights) == ("timm", "w.pth")
    assert unread.student.kind == "none"
