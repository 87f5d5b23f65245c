"""Evaluations of one student on several splits and frames, which are kept beside each other, and what reads them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from permafrost.config.evaluation import EvaluateOptions
from permafrost.config.store import StoreOptions
from permafrost.config.verbs import EvaluateConfig
from permafrost.core.errors import ConfigError
from permafrost.evaluation.results import evaluations_beside
from permafrost.runs.mirrors import RUNS
from permafrost_report.student_results import load_results, load_teacher
from tests.support.runs import TRAINER, distill_config, evaluate_config, report_config
from tests.support.sweeps import TWO_VARIANTS, read_sweep, run_sweep, sweep_arguments
from tests.support.verbs import distill, evaluate, report

ONE_VARIANT = "variants={kd: ['method=kd']}"


def metrics_of(run, folder):
    return json.loads((RUNS / run / folder / "metrics.json").read_text())


def evaluated(store, run="one", **options):
    return evaluate.run(evaluate_config(store, run, **options))


def test_evaluations_of_other_splits_and_frames_are_kept_beside_the_first(own):
    first = evaluated(own, splits=("test",))
    before = metrics_of("one", "evaluate")
    of_train = evaluated(own, splits=("train",))
    cropped = evaluated(own, splits=("test",), frame="center_crop")

    folders = sorted(path.parent.name for path in (RUNS / "one").glob("*/metrics.json"))
    assert folders == ["evaluate", "evaluate-on-test-center_crop", "evaluate-on-train"]
    assert metrics_of("one", "evaluate") == before
    assert list(of_train.splits) == ["train"]
    assert cropped.splits["test"]["kl_to_teacher"] != first.splits["test"]["kl_to_teacher"]
    # The same commands again compute nothing, and read their own results.
    assert evaluated(own, splits=("test",)) == first
    assert evaluated(own, splits=("train",)) == of_train


def test_a_student_s_results_are_those_of_all_its_evaluations_by_split(own):
    shutil.rmtree(RUNS / "one")
    distill.run(distill_config(own, trainer=replace(TRAINER, epochs=1)))
    first = evaluated(own, splits=("test",))
    of_train = evaluated(own, splits=("train",))
    cropped = evaluated(own, splits=("test",), frame="center_crop")
    evaluated(own, splits=("test", "train"))  # nothing new

    (result,) = load_results("one")

    assert result.find("test.kl_to_teacher") == first.splits["test"]["kl_to_teacher"]
    assert result.find("train.accuracy") == of_train.splits["train"]["accuracy"]
    cropped_kl = cropped.splits["test"]["kl_to_teacher"]
    assert result.find("test-center_crop.kl_to_teacher") == cropped_kl
    # A mean over all splits is one of the first evaluation.
    assert result.find("all.accuracy") == first.splits["test"]["accuracy"]
    page = report.run(report_config(own))
    (row,) = json.loads((RUNS / "one" / "report.json").read_text())["runs"]
    assert row["accuracy"] == first.splits["test"]["accuracy"]
    assert row["accuracy_train"] == of_train.splits["train"]["accuracy"]
    assert "accuracy_test-center_crop" in row
    assert page.next == "permafrost export run=one"


def test_a_teacher_has_evaluations_beside_each_other(own):
    teacher = own.config.teacher
    config = replace(evaluate_config(own, splits=("test",)), model="teacher", teacher=teacher)
    evaluate.run(config)
    evaluate.run(replace(config, evaluate=replace(config.evaluate, splits=("train",))))

    assert (RUNS / "one" / "evaluate-teacher-on-train" / "metrics.json").exists()
    assert load_teacher("one").find("train.accuracy") is not None


def test_another_given_network_is_refused_on_another_split_too(own):
    weights = [str(RUNS / run / "distill" / "model.safetensors") for run in ("one", "two")]
    one, two = (replace(own.config.teacher, weights=path, sha256=None) for path in weights)
    config = replace(evaluate_config(own, "pair", splits=("test",)), model="network", student=one)
    evaluate.run(config)
    of_train = replace(config, evaluate=replace(config.evaluate, splits=("train",)))

    with pytest.raises(ConfigError, match=r"evaluate-network contains a run with .*another run="):
        evaluate.run(replace(of_train, student=two))

    assert evaluate.run(of_train).metrics.endswith("evaluate-network-on-train/metrics.json")


def test_other_options_of_the_same_splits_are_still_refused(own):
    evaluated(own, splits=("test",))
    evaluated(own, splits=("train",))

    for splits in (("test",), ("train",)):
        with pytest.raises(ConfigError, match=r"contains a run with .*: evaluate\.iou_threshold"):
            evaluated(own, splits=splits, iou_threshold=0.5)


def test_an_evaluation_of_another_network_is_not_read_as_one_beside(own):
    evaluated(own, splits=("test",))
    evaluated(own, splits=("train",))
    evaluated(own, "two", splits=("train",))
    folder = RUNS / "one" / "evaluate-on-train"
    assert [each.folder for each in evaluations_beside(RUNS / "one", "evaluate")] == [
        "evaluate",
        "evaluate-on-train",
    ]

    (RUNS / "two" / "evaluate" / "config.yaml").replace(folder / "config.yaml")

    assert [each.folder for each in evaluations_beside(RUNS / "one", "evaluate")] == ["evaluate"]


def test_a_sweep_reads_its_splits_of_a_student_that_was_evaluated_on_others_before(frozen):
    words = sweep_arguments(frozen, ONE_VARIANT, "evaluate.splits=[test]")
    run_sweep(words)
    (row,) = read_sweep()["runs"]
    of_sweep = metrics_of(row["run"], "evaluate")["splits"]
    for path in sorted((RUNS / row["run"] / "evaluate").iterdir()):
        path.unlink()
    evaluate.run(evaluate_config(frozen, row["run"], splits=("train",)))

    run_sweep(words)

    assert list(metrics_of(row["run"], "evaluate")["splits"]) == ["train"]
    assert metrics_of(row["run"], "evaluate-on-test")["splits"] == of_sweep
    (result,) = load_results("grid")
    assert result.find("test.accuracy") == of_sweep["test"]["accuracy"]


@pytest.mark.slow
def test_a_selection_is_of_its_own_split_after_other_evaluations(frozen):
    words = sweep_arguments(
        frozen, TWO_VARIANTS, "evaluate.splits=[test]", "select=test_swapped.accuracy"
    )
    run_sweep(words)
    before = read_sweep()
    evaluate.run(evaluate_config(frozen, before["runs"][0]["run"], splits=("test_swapped",)))

    run_sweep(words)

    assert read_sweep() == before


def test_a_command_line_evaluates_another_split_without_deleting_anything(own):
    options = EvaluateOptions(splits=("test",))
    config = EvaluateConfig(
        store=StoreOptions(path=str(own.store.path)), evaluate=options, run="one"
    )
    evaluate.run(config)

    found = evaluate.run(
        replace(config, evaluate=replace(options, splits=("train", "test_swapped")))
    )

    assert found.metrics.endswith("evaluate-on-train-and-test_swapped/metrics.json")
