"""Evaluators of an evaluation: alone, together, added later, and rejected."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from permafrost.cli import stage_main
from permafrost.config.augment import AugmentOptions
from permafrost.config.builder import to_plain_dict
from permafrost.config.evaluation import EVALUATORS, EvaluateOptions
from permafrost.config.store import PassOptions, StoreOptions
from permafrost.config.verbs import EvaluateConfig, EvaluationRun
from permafrost.core.errors import ConfigError
from permafrost.evaluation import evaluate as evaluation
from permafrost.evaluation import forward as evaluator
from permafrost.evaluation.context import EvaluationContext
from permafrost.evaluation.evaluator import (
    METRICS,
    Evaluator,
    evaluator_named,
    evaluators_of,
    metric_of,
    numbers_of,
)
from permafrost.evaluation.inputs import without_unknown_variants
from permafrost.models.providers import build_model
from permafrost.runs.folder import identity
from permafrost.runs.mirrors import RUNS
from permafrost.store.entries import StoreMismatchError
from permafrost.store.reader import Store
from permafrost_evaluators.options import ShiftOptions
from permafrost_report.main_table import columns_of
from permafrost_report.options import ReportConfig, ReportOptions
from permafrost_report.student_results import load_results
from tests.support.composition import NAMED, config_of
from tests.support.papers import needs_papers
from tests.support.runs import TRAINER, distill_config, evaluation_of, save_student
from tests.support.stores import precompute_config
from tests.support.sweeps import read_sweep, run_sweep
from tests.support.verbs import distill, precompute, report


@pytest.fixture
def student(frozen):
    """Finished run `one`: an untrained student of the frozen pass."""
    return save_student(frozen, "one")


def evaluated(frozen, evaluators=None, folder=None, **options):
    """Results by split."""
    return evaluation.evaluate_student(evaluation_of(frozen, evaluators, **options), folder).splits


def test_the_family_and_the_names_that_the_option_takes_agree():
    for name in EVALUATORS:
        assert isinstance(evaluator_named(name), Evaluator)


def test_an_unknown_evaluator_is_refused_with_those_that_there_are():
    with pytest.raises(ConfigError, match=r"evaluators must be among .*\baccuracy\b.*; got beauty"):
        config_of("evaluate", "evaluators=[beauty]")
    with pytest.raises(
        ConfigError, match="evaluators lists an evaluator twice: accuracy, accuracy"
    ):
        EvaluateConfig(
            store=StoreOptions(path="s"),
            evaluate=EvaluateOptions(),
            evaluators=("accuracy", "accuracy"),
        )


def test_the_two_first_evaluators_part_what_one_pass_finds(frozen, student):
    both = evaluated(frozen)
    parts = [evaluated(frozen, (name,), f"only-{name}") for name in ("accuracy", "localization")]

    for split, metrics in both.items():
        assert parts[0][split] | parts[1][split] == metrics
        assert set(parts[0][split]) & set(parts[1][split]) == {"records"}
        assert {"epg", "iou", "map_cosine"} <= set(parts[1][split])


def test_accuracy_alone_computes_no_map(frozen, student, monkeypatch):
    monkeypatch.setattr(
        evaluator.EvaluatedModel, "maps", lambda *_: pytest.fail("a map was computed")
    )

    evaluated(frozen, ("accuracy",))

    table = pd.read_parquet(RUNS / "one" / "evaluate" / "records.parquet")
    assert table.correct.notna().all()
    assert table.epg.str[0].isna().all()


def test_numbers_that_are_none_are_null_in_the_files_of_a_run(frozen, monkeypatch):
    distill.run(distill_config(frozen, trainer=replace(TRAINER, epochs=1)))
    monkeypatch.setattr(
        evaluator.EvaluatedModel,
        "maps",
        lambda self, output, classes: torch.zeros(*classes.shape, 1, 2, 2),
    )
    shift = ShiftOptions(pixels=2, records=4)
    splits = evaluated(frozen, ("localization", "shift"), shift=shift)
    store = StoreOptions(path=str(frozen.store.path))
    report.run(
        ReportConfig(store=store, augment=AugmentOptions(), report=ReportOptions(), run="one")
    )

    assert splits["test"]["map_cosine"] is None
    assert splits["test"]["shift"] == {"map": [None] * 3}
    written = [*(RUNS / "one").rglob("*.json")]
    assert {"metrics.json", "report.json"} <= {path.name for path in written}
    for path in written:
        json.loads(path.read_text(), parse_constant=lambda name, path=path: pytest.fail(str(path)))


def test_a_younger_evaluator_lies_below_its_name_and_is_done_once(frozen, student, monkeypatch):
    options = {"shift": ShiftOptions(pixels=2, records=4)}
    first = evaluated(frozen, ("accuracy",), **options)
    assert set(first["test"]["shift"]) == {"map"}
    path = RUNS / "one" / "evaluate" / "metrics.json"
    assert list(json.loads(path.read_text())["evaluators"]) == ["accuracy", "shift"]

    monkeypatch.setattr(
        "permafrost_evaluators.shift.shift_curves", lambda *_, **__: pytest.fail("evaluated again")
    )
    second = evaluated(frozen, ("localization", "shift"), **options)

    for split, metrics in second.items():
        assert metrics.items() >= first[split].items()
        assert "epg" in metrics


def test_an_evaluator_that_lacks_something_says_so_before_any_evaluator_begins(
    frozen, student, monkeypatch
):
    monkeypatch.setattr(evaluator, "_predict_batch", lambda *_, **__: pytest.fail("it began"))
    with pytest.raises(ConfigError, match=r"evaluators=shift needs evaluate\.shift\.pixels"):
        evaluated(frozen, ("accuracy", "shift"))


def test_localization_with_nothing_to_look_at_is_refused_by_name_and_silent_by_default(
    tmp_path, tiny_teacher, frozen, monkeypatch
):
    store = tmp_path / "store"
    annotate = PassOptions(outputs=("logits",))
    precompute.run(precompute_config(store, tiny_teacher, annotate=annotate))
    bare = replace(frozen, store=Store(store))
    save_student(bare, "one")
    # The boxes suffice.
    assert "epg" in evaluated(bare, ("localization",))["test"]
    with monkeypatch.context() as patch:
        patch.setattr(EvaluationContext, "has_regions", False)
        with pytest.raises(
            ConfigError, match=r"=localization, but test has no boxes \(evalu.*and no"
        ):
            evaluated(bare, ("localization",), "again")
        assert "accuracy" in evaluated(bare, folder="again")["test"]


# ---- the teacher network -------------------------------------------------------------------------


def test_the_teacher_evaluated_agrees_with_its_own_pass_beside_any_student(frozen, student):
    evaluated(frozen)
    result = evaluation.evaluate_student(
        evaluation_of(frozen, model="teacher", teacher=frozen.config.teacher)
    )

    assert "evaluate-teacher" in result.metrics
    for metrics in result.splits.values():
        assert metrics["agreement"] == 1
        assert metrics["kl_to_teacher"] == pytest.approx(0, abs=1e-5)
        assert metrics["map_cosine"] == pytest.approx(1, abs=1e-5)
        assert metrics["accuracy"] == metrics["teacher_accuracy"]


def test_a_teacher_that_did_not_make_the_pass_is_refused(frozen, student, tmp_path):
    from safetensors.torch import save_file

    other = tmp_path / "other.safetensors"
    torch.manual_seed(9)
    save_file(build_model(replace(frozen.config.teacher, weights=None), 10).state_dict(), other)
    teacher = replace(frozen.config.teacher, weights=str(other))

    with pytest.raises(
        StoreMismatchError, match=r"not the network that made resnet8-.*weights_sha256"
    ):
        evaluated(frozen, model="teacher", teacher=teacher)
    with pytest.raises(ConfigError, match=r"model=teacher needs the network.*teacher\.weights="):
        evaluated(frozen, model="teacher")


# ---- names and identities ------------------------------------------------------------------------


def test_evaluators_and_their_network_make_no_other_run(frozen):
    one = evaluation_of(frozen)
    other = evaluation_of(frozen, ("shift",), teacher=frozen.config.teacher)

    assert identity(to_plain_dict(one.shared), EvaluationRun) == identity(
        to_plain_dict(other.shared), EvaluationRun
    )
    assert set(to_plain_dict(one.shared)) == {"store", "evaluate", "run", "command"}


@needs_papers
def test_options_of_evaluators_come_through_words():
    words = [
        "evaluators=[distance_correlation,unicam]",
        "evaluate.distance_correlation.layers={layer3: layer4}",
        "evaluate.unicam.pairs=[[student,baseline]]",
        "evaluate.unicam.baseline=kd",
        "teacher=cifar",
        "teacher.weights=w.pth",
    ]
    config = config_of("evaluate", *words)

    assert config.evaluate.distance_correlation.layers == {"layer3": "layer4"}
    assert config.evaluate.unicam.pairs == (("student", "baseline"),)
    assert config.teacher.weights == "w.pth"
    only = config_of("evaluate", *words[1:])
    assert only.teacher.kind == "none"  # no evaluator reads it


def test_shifts_may_be_asked_for_later_and_are_then_of_one_width(frozen, student):
    evaluated(frozen, splits=("test",))

    shift = ShiftOptions(pixels=2, records=4)
    found = evaluated(frozen, splits=("test",), shift=shift)["test"]

    assert len(found["shift"]["map"]) == 3
    assert "accuracy" in found
    with pytest.raises(ConfigError, match=r"shift\.pixels=2, but this one has 3"):
        evaluated(frozen, splits=("test",), shift=replace(shift, pixels=3))


@pytest.mark.parametrize(
    ("words", "readers"),
    [
        ([*NAMED[:2], "student.weights=w.pth"], "student.weights=w.pth with model=network only"),
        (
            [*NAMED[:2], "evaluators=[accuracy]", "augment=pad_crop_flip"],
            "augment=pad_crop_flip with evaluators=[equivariance] only",
        ),
    ],
    ids=["student", "augment"],
)
def test_an_option_that_is_typed_although_nothing_reads_it_is_refused(
    monkeypatch, capsys, words, readers
):
    monkeypatch.setattr("sys.argv", ["evaluate", *words])

    with pytest.raises(SystemExit) as ended:
        stage_main("evaluate")

    assert ended.value.code == 2
    assert f"reads {readers}" in capsys.readouterr().err


def many_student_arguments(frozen, store):
    return [
        f"store.path={store}", "student.name=resnet8", "student.width=4", "teacher=cifar",
        "teacher.name=resnet8", "teacher.width=4", f"teacher.weights={frozen.config.teacher.weights}",
        "augment.operations=[]", "trainer.epochs=1", "trainer.batch_size=8", "variants={kd: ['method=kd']}",
        "seeds=[0]", "executor=serial", "evaluate.splits=[train]", "run=many",
    ]  # fmt: skip


@needs_papers
def test_a_single_student_is_not_compared_with_a_variant_of_its_experiments_sweep(caplog):
    words = ["experiment=demo", "run=my-student"]
    config = config_of("evaluate", *words)
    assert config.evaluate.distance_correlation.baseline == "labels"

    with caplog.at_level("INFO"):
        alone = without_unknown_variants(config, words)
    typed = without_unknown_variants(config, ["evaluate.distance_correlation.baseline=labels"])

    assert alone.evaluate.distance_correlation.baseline is None
    assert "baseline=labels is left out" in caplog.text
    assert typed is config


@pytest.mark.slow
def test_a_baseline_that_names_a_variant_is_its_student_of_the_same_seed(frozen, tmp_path):
    store = shutil.copytree(frozen.store.path, tmp_path / "store")
    words = [
        *many_student_arguments(frozen, store), "variants={kd: ['method=kd'], labels: ['method=labels']}",
        "seeds=[0,1]", "evaluators=[distance_correlation]", "evaluate.distance_correlation.baseline=labels",
    ]  # fmt: skip

    run_sweep(words)

    rows = {(row["variant"], row["seed"]): row["run"] for row in read_sweep("many")["runs"]}
    for (variant, seed), run in rows.items():
        found = json.loads((RUNS / run / "evaluate" / "metrics.json").read_text())
        (weights,) = found["evaluators"]["distance_correlation"]["files"] or [None]
        pairs = found["splits"]["train"]["distance_correlation"]["rs"]
        assert ("student_given_baseline" in pairs) == (variant == "kd")
        if variant == "kd":
            assert Path(weights) == RUNS / rows["labels", seed] / "distill" / "model.safetensors"
    with pytest.raises(ConfigError, match="baseline=labels names a variant with 2 students"):
        run_sweep([*words, "grid={method.label_smoothing: [0.0, 0.1]}"])


@needs_papers
def test_one_more_evaluator_of_a_sweep_trains_nobody_again_and_is_reported(frozen, tmp_path):
    store = shutil.copytree(frozen.store.path, tmp_path / "store")
    words = many_student_arguments(frozen, store)
    one = run_sweep(words)
    students = [row["run"] for row in read_sweep("many")["runs"]]
    more = [*words, "evaluators=[accuracy,distance_correlation]"]

    two, three = run_sweep(more), run_sweep(more)

    assert [result.finished_now for result in (one, two, three)] == [1, 1, 0]
    assert [row["run"] for row in read_sweep("many")["runs"]] == students
    (result,) = load_results("many")
    source = "train.distance_correlation.fss.layer3"
    found = result.metrics["train"]["distance_correlation"]["fss"]["layer3"]
    assert result.find(source) == result.find(source.replace("train", "all")) == found
    assert result.find("train.unicam.objective") is None
    with pytest.raises(
        ConfigError, match=r"no student has train\.unicam\.objective.*train\.accuracy"
    ):
        columns_of({"unicam": "train.unicam.objective"}, [result])
    with pytest.raises(ConfigError, match=r"distance_correlation\.seed=0, but this one has 1"):
        run_sweep([*more, "evaluate.distance_correlation.seed=1"])


@needs_papers
def test_a_point_is_chosen_by_an_evaluator_that_is_asked_for_it_alone():
    assert evaluators_of("distance_correlation.fss.layer3") == ("distance_correlation",)
    assert evaluators_of("accuracy") is None
    assert metric_of("distance_correlation.fss.layer3").higher_is_better
    assert not metric_of("distance_correlation.rs.teacher_given_student.pooled").higher_is_better
    assert metric_of("distance_correlation.rs.student_given_teacher.pooled") is None
    assert metric_of("accuracy") is METRICS["accuracy"]


@needs_papers
def test_a_quantity_is_read_alike_alone_and_by_part():
    for name in ("superfeatures.kl", "five_band.fpr", "five_band.fpr.best"):
        assert metric_of(name).higher_is_better is False
    assert metric_of("class_similarity.spearman.teacher").higher_is_better
    assert metric_of("superfeatures.klaus") is None


def test_nested_numbers_have_dotted_names():
    metrics = {"accuracy": 0.5, "fss": {"a": {"layer1": 1, "ok": True}, "curve": [1, 2]}}

    assert numbers_of(metrics) == {"accuracy": 0.5, "fss.a.layer1": 1}
