"""Reports over students of several teachers, and of students whose last layer was not trained."""

from __future__ import annotations

import json
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest

from permafrost.config.evaluation import EvaluateOptions
from permafrost.config.methods import EmbeddingConfig, KDConfig
from permafrost.config.models import CifarModelConfig
from permafrost.config.store import PassOptions, StoreOptions
from permafrost.config.verbs import EvaluateConfig
from permafrost.runs.mirrors import RUNS
from permafrost.store.reader import Store
from permafrost_report.main_table import Column, variant_summary
from permafrost_report.options import ReportConfig, ReportOptions
from permafrost_report.run_commands import commands_of
from permafrost_report.student_results import load_results
from tests.support import run_files
from tests.support.runs import PAD_CROP, TRAINER, distill_config
from tests.support.stores import Frozen, precompute_config
from tests.support.verbs import distill, evaluate, precompute, report

SMALL = CifarModelConfig(name="resnet8", width=4, weights="random")
BIG = CifarModelConfig(name="resnet14", width=4, weights="random")
OUTPUTS = PassOptions(batch_size=8, outputs=("logits", "pooled"))


@pytest.fixture(scope="module")
def two_passes(tmp_path_factory):
    """Store with the passes of two teachers, which tests must not change."""
    path = tmp_path_factory.mktemp("taught") / "store"
    for teacher in (SMALL, BIG):
        config = precompute_config(path, teacher, annotate=OUTPUTS)
        precompute.run(config)
    return Frozen(Store(path), config)


def store_options(frozen, named=""):
    return StoreOptions(path=str(frozen.store.path), teacher=(named,) if named else ())


def train(frozen, run, named, method):
    """Train a student on a pass for one epoch, unless it is trained."""
    student = replace(SMALL, weights=None)
    trainer = replace(TRAINER, epochs=1)
    config = distill_config(frozen, store=store_options(frozen, named), method=method, run=run)
    distill.run(replace(config, student=student, trainer=trainer), on_epoch=lambda *_: None)


def evaluated(frozen, run, evaluators=None):
    options = EvaluateOptions(splits=("test",), num_pictures=1)
    config = EvaluateConfig(store=store_options(frozen), evaluate=options, run=run)
    return evaluate.run(replace(config, evaluators=evaluators))


def page_of(frozen, run, **options):
    """Text of the page, its numbers and the result of `report`."""
    shown = ReportOptions(contact_records=0, cases=0, **options)
    config = ReportConfig(store=store_options(frozen), augment=PAD_CROP, report=shown, run=run)
    result = report.run(config)
    html = unescape(Path(result.html).read_text())
    return html, json.loads(Path(result.json).read_text()), result


def test_a_page_of_two_teachers_has_a_row_of_each_and_says_whose_agreement_it_is(two_passes):
    accuracies = {}
    for run in ("resnet8", "resnet14"):
        train(two_passes, run, run, KDConfig())
        metrics = evaluated(two_passes, run).splits["test"]
        folder = RUNS / run / "evaluate"
        known = run_files.read_signed(folder / "metrics.json")["splits"]["test"]
        accuracies[run] = {"resnet8": 0.25, "resnet14": 0.75}[run]
        run_files.change_signed(
            folder / "metrics.json",
            {"splits": {"test": known | {"teacher_accuracy": accuracies[run]}}},
        )
        assert "teacher_accuracy" in metrics
    names = {folder.name.split("-")[0]: folder.name for folder in two_passes.store.pass_folders()}

    html, values, result = page_of(two_passes, "resnet8", runs=("resnet14",))

    assert {name: row["accuracy"] for name, row in values["teachers"].items()} == {
        f"teacher {names[run]}": accuracies[run] for run in names
    }
    for run, name in names.items():
        assert f'<th scope="row">teacher {name}</th>' in html
        assert f"{run} with {name}" in html
    assert f"The teacher {names['resnet8']} has 25.0 %, the teacher {names['resnet14']} has" in (
        result.summary
    )


def test_agreement_is_compared_among_the_students_of_one_teacher():
    values = {"a": (0.9, 0.91, 0.93), "b": (0.8, 0.8, 0.8), "c": (0.1, 0.11, 0.12)}
    rows = [
        {"method": variant, "seed": seed, "accuracy": value, "agreement": value}
        for variant, by_seed in values.items()
        for seed, value in enumerate(by_seed)
    ]
    columns = [Column(name=name, source=f"test.{name}") for name in ("accuracy", "agreement")]

    def best(column, variants_by_pass=None):
        summary = variant_summary(rows, columns, variants_by_pass)
        return {variant["method"] for variant in summary if variant[column]["best"]}

    assert best("agreement") == {"a"}
    assert best("agreement", {"one": ["a"], "other": ["b", "c"]}) == {"b"}
    assert best("accuracy", {"one": ["a"], "other": ["b", "c"]}) == {"a"}


def test_a_page_of_one_teacher_has_one_row_called_teacher(two_passes):
    train(two_passes, "alone", "resnet8", KDConfig())
    evaluated(two_passes, "alone")

    html, values, _ = page_of(two_passes, "alone")

    assert "teachers" not in values
    assert html.count('<th scope="row">teacher</th>') == 1
    assert "own pass" not in html


def test_the_commands_that_repeat_a_page_have_those_of_the_other_runs():
    for run, verb in (("first", "sweep"), ("second", "sweep"), ("second", "report")):
        (RUNS / run).mkdir(parents=True, exist_ok=True)
        run_files.write_config(RUNS / run / f"{verb}.yaml", f"command: [{verb}, run={run}]\n")

    commands = commands_of("first", (), ("second",))

    assert commands == ["permafrost sweep run=second", "permafrost sweep run=first"]


def test_a_last_layer_that_was_not_trained_has_no_accuracy_in_an_evaluation(two_passes):
    train(two_passes, "features", "resnet8", EmbeddingConfig())

    alone = evaluated(two_passes, "features")
    probed = evaluated(two_passes, "features", ("knn", "linear_probe"))

    printed = alone.printed()
    assert "accuracy" not in printed["results"]
    assert printed["classifier"].startswith("not trained")
    assert printed["next"].endswith("run=features 'evaluators=[knn,linear_probe]'")
    assert "knn.accuracy.1" in probed.printed()["results"]
    assert probed.printed()["next"].startswith("permafrost report ")
    train(two_passes, "with_labels", "resnet8", EmbeddingConfig(lambda_ce=1.0))
    trained = evaluated(two_passes, "with_labels").printed()
    assert "accuracy" in trained["results"]
    assert trained["classifier"] == ""


def test_a_page_shows_the_probes_of_a_student_whose_last_layer_was_not_trained(two_passes):
    train(two_passes, "features", "resnet8", EmbeddingConfig())
    evaluated(two_passes, "features")

    html, values, before = page_of(two_passes, "features")

    assert "runs" not in values
    assert before.next.endswith("evaluators=[knn,linear_probe]'")
    assert "The last layer of features was not trained" in before.summary
    assert "The last layer of features was not trained" in html
    probes = evaluated(two_passes, "features", ("knn", "linear_probe")).splits["test"]
    html, values, after = page_of(two_passes, "features")
    (row,) = values["runs"]
    assert row["knn_1"] == probes["knn"]["accuracy"]["1"]
    assert row["linear_probe"] == probes["linear_probe"]["accuracy"]
    assert "accuracy" not in row
    assert values["remarks"] == {"features": "last layer not trained"}
    assert "classes" not in values
    assert '<span class="remark">last layer not trained</span>' in html
    assert after.next == ""
    (result,) = load_results("features")
    assert result.find("test.accuracy") is None
