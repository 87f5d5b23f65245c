"""Evaluations of one student on several splits, frames and passes, kept beside each other, and their report."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from permafrost.config.augment import AugmentOptions
from permafrost.config.distillation import DistillConfig
from permafrost.config.evaluation import EvaluateOptions
from permafrost.config.methods import KDConfig
from permafrost.config.models import CifarModelConfig
from permafrost.config.store import StoreOptions, SubsetOptions
from permafrost.config.training import OptimizerOptions, TrainerOptions
from permafrost.config.verbs import EvaluateConfig
from permafrost.core.errors import ConfigError
from permafrost.evaluation.results import evaluations_beside
from permafrost.models.providers import build_model
from permafrost.runs.mirrors import RUNS
from permafrost.store.entries import StoreMismatchError
from permafrost.sweeps.plan import plan_students
from permafrost_report.student_results import load_results, load_teacher, split_by_evaluation
from tests.support.composition import config_of
from tests.support.papers import needs_papers
from tests.support.runs import TRAINER, distill_config, evaluate_config, report_config
from tests.support.sweeps import TWO_VARIANTS, read_sweep, run_sweep, sweep_arguments
from tests.support.verbs import distill, evaluate, report

ASSISTANT = CifarModelConfig(name="resnet8", width=4, weights="random")
FIRST = CifarModelConfig(name="resnet14", width=4, weights="random")


def student_config(store, named="resnet8", **options):
    return DistillConfig(
        store=StoreOptions(path=str(store.path), teacher=(named,)),
        student=replace(ASSISTANT, weights=None),
        method=KDConfig(),
        augment=AugmentOptions(),
        optimizer=OptimizerOptions(),
        trainer=TrainerOptions(epochs=1, batch_size=8, num_threads=1),
        **{"subset": SubsetOptions(), "run": "student", **options},
    )


def train_student(store):
    distill.run(student_config(store))


def evaluation(store, against=None, teacher=(), run="student", splits=("test",)):
    config = EvaluateConfig(
        store=StoreOptions(path=str(store.path), teacher=teacher),
        evaluate=EvaluateOptions(against=against, num_pictures=2, splits=splits),
        run=run,
    )
    return evaluate.run(config).splits[splits[0]]


def test_a_student_is_compared_with_its_assistant_and_with_the_first_teacher(two_teachers):
    train_student(two_teachers)

    own = evaluation(two_teachers)
    first = evaluation(two_teachers, against="resnet14")

    assert first["accuracy"] == own["accuracy"]
    assert first["kl_to_teacher"] != own["kl_to_teacher"]
    folders = {path.parent.name for path in (RUNS / "student").glob("evaluate*/metrics.json")}
    assert folders == {"evaluate", "evaluate-against-resnet14"}
    # The same student in another run, evaluated on the first teacher's pass alone, has the same numbers.
    shutil.copytree(RUNS / "student" / "distill", RUNS / "alone" / "distill")
    assert evaluation(two_teachers, teacher=("resnet14",), run="alone") == first


@pytest.mark.slow
def test_a_report_shows_both_evaluations(two_teachers):
    train_student(two_teachers)
    own = evaluation(two_teachers)
    first = evaluation(two_teachers, against="resnet14")

    columns = {"own": "test.agreement", "far": "test.kl_to_teacher@resnet14"}
    shown = {"columns": columns, "contact_records": 2, "cases": 2}
    store = StoreOptions(path=str(two_teachers.path))
    report.run(report_config(None, "student", store=store, **shown))

    (row,) = json.loads((RUNS / "student" / "report.json").read_text())["runs"]
    assert (row["own"], row["far"]) == (own["agreement"], first["kl_to_teacher"])
    results = load_results("student")
    assert [one.label for one in split_by_evaluation(results)] == [
        "student",
        "student against resnet14",
    ]
    assert results[0].find("all.accuracy@resnet14") == own["accuracy"]


def test_a_student_that_was_compared_with_another_pass_only_is_shown_with_its_records(
    two_teachers,
):
    train_student(two_teachers)
    evaluation(two_teachers, against="resnet14")

    (result,) = load_results("student")

    assert (result.metrics, result.is_evaluated) == ({}, True)
    assert (result.evaluation / "records.parquet").exists()


def test_the_mean_over_splits_is_that_of_the_evaluation_that_is_named(two_teachers):
    train_student(two_teachers)
    own = evaluation(two_teachers)
    evaluation(two_teachers, against="resnet14", splits=("train",))

    (result,) = load_results("student")

    assert result.find("all.accuracy") == own["accuracy"]
    agreement = result.against["resnet14"]["train"]["agreement"]
    assert result.find("all.agreement@resnet14") == agreement
    assert result.find("test.agreement@resnet14") is None
    assert replace(result, metrics={}, against={}).find("all.accuracy") is None


def test_a_named_pass_is_for_students_on_records_of_its_own_store(two_teachers):
    config = EvaluateConfig(
        store=StoreOptions(path=str(two_teachers.path)),
        evaluate=EvaluateOptions(
            against="resnet14", store=str(two_teachers.path), splits=("holdout",)
        ),
        run="student",
    )
    train_student(two_teachers)

    with pytest.raises(ConfigError, match=r"splits=holdout selects .* is a different store"):
        evaluate.run(config)
    for model in ("teacher", "network"):
        with pytest.raises(ConfigError, match=rf"set evaluate\.against=null for model={model}"):
            replace(config, model=model)


def test_a_sweep_checks_the_named_pass_before_it_trains(two_teachers):
    words = [
        *("student=cifar", "student.name=resnet8", "student.width=4", "method=kd"),
        *(f"store.path={two_teachers.path}", "store.teacher=[resnet8]", "variants={kd: []}"),
        *("evaluate.against=resnet50", "executor=serial"),
    ]
    config = config_of("sweep", *words)

    with pytest.raises(ConfigError, match=r"against=resnet50 is not one pass"):
        plan_students(config, words)


def test_a_live_student_is_selected_by_the_pass_that_is_named(two_teachers):
    config = student_config(
        two_teachers,
        named="resnet14",
        subset=SubsetOptions(holdout=1),
        mode="live",
        teacher=FIRST,
        select_epoch="holdout.agreement",
        run="live",
    )

    distill.run(config)

    assert (RUNS / "live" / "distill" / "epochs.json").exists()
    unnamed = replace(config, store=replace(config.store, teacher=()), run="unnamed")
    with pytest.raises(ConfigError, match=r"name one of resnet14-.*, resnet8-.* with store\.teach"):
        distill.run(unnamed)


@needs_papers
def test_a_given_network_is_compared_with_the_pass_of_the_teacher_that_is_named(
    two_teachers, tmp_path
):
    torch.manual_seed(0)
    weights = tmp_path / "given.safetensors"
    save_file(build_model(ASSISTANT, 10).network.state_dict(), weights)
    config = EvaluateConfig(
        store=StoreOptions(path=str(two_teachers.path)),
        evaluate=EvaluateOptions(num_pictures=2),
        model="network",
        student=replace(ASSISTANT, weights=str(weights)),
        teacher=FIRST,
        evaluators=("accuracy",),
        run="given",
    )

    first = evaluate.run(config).splits["test"]
    again = replace(config, evaluators=("accuracy", "class_similarity"))

    assert evaluate.run(again).splits["test"]["agreement"] == first["agreement"]
    other = replace(config, store=replace(config.store, teacher=("resnet8",)), run="other")
    with pytest.raises(StoreMismatchError, match=r"teacher= is not the network that made resnet8-"):
        evaluate.run(other)


def test_a_pass_that_the_store_does_not_have_is_refused_with_those_it_has(two_teachers):
    train_student(two_teachers)

    with pytest.raises(
        ConfigError, match=r"against=resnet50 is not one pass .*resnet14-.*, resnet8-"
    ):
        evaluation(two_teachers, against="resnet50")


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
