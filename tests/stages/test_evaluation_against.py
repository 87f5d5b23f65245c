"""Evaluations of one student against several passes, and the report that shows them side by side."""

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
from permafrost.models.providers import build_model
from permafrost.runs.mirrors import RUNS
from permafrost.store.entries import StoreMismatchError
from permafrost.sweeps.plan import plan_students
from permafrost_report.student_results import load_results, split_by_evaluation
from tests.support.composition import config_of
from tests.support.papers import needs_papers
from tests.support.runs import report_config
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
