"""All stages on a tiny set: outputs, repetition, resumption and errors."""

import json
import logging
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from permafrost import cli
from permafrost.cli import _print_result
from permafrost.config.compose import compose
from permafrost.config.evaluation import EvaluateOptions
from permafrost.config.methods import E2KDConfig, KDConfig, LabelsConfig
from permafrost.config.models import CifarModelConfig, NoModelConfig
from permafrost.config.store import PassOptions, StoreOptions
from permafrost.config.teaching import LabelTeachingConfig, TeachConfig
from permafrost.config.verbs import SweepConfig, build_verb_config
from permafrost.core.errors import ConfigError
from permafrost.loading.random_views import ViewSchedule
from permafrost.models.classifier import WeightsError
from permafrost.models.providers import build_model
from permafrost.models.saved import TrainedModel, save_model
from permafrost.models.weights import load_weights
from permafrost.runs.folder import read_cost
from permafrost.runs.mirrors import RUNS
from permafrost.storage.files import file_at
from permafrost.store.entries import StoreMismatchError
from permafrost.store.reader import Store
from permafrost.training import loop
from permafrost.training.build import worst_downscale
from permafrost.training.metric_log import read_metrics
from tests.support.index_table import index_table
from tests.support.kills import killed_at
from tests.support.runs import (
    PAD_CROP,
    TRAINER,
    assert_equal_states,
    distill_config,
    evaluate_config,
    report_config,
    weights_of,
)
from tests.support.stores import TINY_DATA, precompute_config
from tests.support.trees import tree_bytes
from tests.support.verbs import distill, evaluate, precompute, report, sweep, teach

# ---- precompute ----------------------------------------------------------------------------------


def test_a_second_precompute_computes_nothing(frozen):
    again = precompute.run(frozen.config)

    assert (again.packed_records, again.teacher_records) == (0, 0)


def test_a_second_teacher_adds_a_folder_and_touches_no_image(tmp_path, tiny_teacher):
    store = tmp_path / "store"
    precompute.run(precompute_config(store, tiny_teacher))
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*.tar")}
    other = tmp_path / "other.safetensors"
    torch.manual_seed(99)  # another network than that of the fixture
    save_file(build_model(replace(tiny_teacher, weights=None), 10).state_dict(), other)

    result = precompute.run(precompute_config(store, replace(tiny_teacher, weights=str(other))))

    assert (result.packed_records, result.teacher_records) == (0, 72)
    assert len(Store(store).pass_folders()) == 2
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*.tar")} == before
    with pytest.raises(
        StoreMismatchError,
        match=r"several teacher passes; set store\.teacher \(in Python, the argument teacher=\) to one or more of",
    ):
        Store(store).open_passes()


@pytest.mark.parametrize(
    ("section", "option", "message"),
    [
        ("data", {"seed": 1}, r"choose another store\.path"),
        ("store", {"shard_size": 17}, r"store\.shard_size=16"),
    ],
)
def test_other_data_and_another_plan_in_the_same_store_are_refused(
    frozen, section, option, message
):
    changed = replace(getattr(frozen.config, section), **option)

    with pytest.raises(StoreMismatchError, match=message):
        precompute.run(replace(frozen.config, **{section: changed}))


def test_an_unfinished_store_of_other_data_is_never_mixed(tmp_path):
    config = precompute_config(tmp_path / "store")
    precompute.run(config)
    (tmp_path / "store" / "manifest.json").unlink()

    with pytest.raises(StoreMismatchError, match="unfinished store with other data"):
        precompute.run(replace(config, data=replace(TINY_DATA, seed=1)))


def test_a_teacher_without_weights_is_refused_with_the_way_out(frozen):
    config = replace(frozen.config, teacher=replace(frozen.config.teacher, weights=None))
    with pytest.raises(ConfigError, match=r"teacher\.weights is not set.*permafrost teach"):
        precompute.run(config)

    config = replace(frozen.config, teacher=replace(frozen.config.teacher, weights="gone.pt"))
    with pytest.raises(ConfigError, match=r"teacher\.weights=gone\.pt does not exist"):
        precompute.run(config)


def test_weights_that_do_not_fit_list_the_keys(frozen):
    wider = replace(frozen.config.teacher, width=5, name="resnet14", weights=None)

    with pytest.raises(
        WeightsError, match=r"missing: layer1\.1.*wrong shape: bn1\.bias \(4,\) instead of \(5,\)"
    ):
        load_weights(build_model(wider, 10), Path(frozen.config.teacher.weights))


def test_published_names_are_understood(tmp_path, frozen):
    model = build_model(frozen.config.teacher, 10)
    nested = {"state_dict": {f"module.{name}": t for name, t in model.state_dict().items()}}
    torch.save(nested, tmp_path / "weights.th")

    loaded = build_model(replace(frozen.config.teacher, weights=str(tmp_path / "weights.th")), 10)

    assert_equal_states(loaded.state_dict(), model.state_dict())


def test_a_teacher_whose_logits_overflow_the_store_is_refused_with_the_record(
    tmp_path, tiny_teacher
):
    state = load_file(tiny_teacher.weights)
    state["linear.bias"][3] = 1e6
    save_file(state, tmp_path / "loud.safetensors")
    loud = replace(tiny_teacher, weights=str(tmp_path / "loud.safetensors"))

    config = precompute_config(tmp_path / "store", loud)
    narrow = replace(config, annotate=replace(config.annotate, logits_dtype="float16"))
    with pytest.raises(
        ValueError, match=r"logits of record \w+ are not finite, or exceed the range of float16"
    ):
        precompute.run(narrow)
    name = precompute.run(config).passes[0]
    specs = Store(tmp_path / "store").open_pass(name).manifest.fields
    assert {spec.name: spec.dtype for spec in specs}["logits"] == "float32"


@pytest.mark.parametrize(
    ("lost", "rows"),
    [("images/train-000000.tar", 16), ("fields.zarr/map/c/1/0/0/0/0/0", 10)],  # the second shard
)
def test_a_lost_file_is_written_again_once_its_manifest_is_gone(tmp_path, frozen, lost, rows):
    config = precompute_config(tmp_path / "store", frozen.config.teacher)
    precompute.run(config)
    store = Store(tmp_path / "store")
    folder = store.folder if lost.startswith("images") else store.pass_folders()[0]
    file_at(folder / lost).remove()
    file_at(folder / "manifest.json").remove()

    result = precompute.run(config)

    assert result.packed_records + result.teacher_records == rows
    assert tree_bytes(store.path) == tree_bytes(frozen.store.path)


def test_a_pass_over_other_shards_of_the_same_data_is_never_read(tmp_path, tiny_teacher):
    config = precompute_config(tmp_path / "store", tiny_teacher)
    precompute.run(config)
    for name in ("images", "commits"):
        shutil.rmtree(tmp_path / "store" / name)
    (tmp_path / "store" / "manifest.json").unlink()
    replanned = replace(config.store, seed=1)
    precompute.run(replace(config, store=replanned, teacher=NoModelConfig()))

    with pytest.raises(StoreMismatchError, match="other shards of the same data"):
        Store(tmp_path / "store").open_passes()

    assert precompute.run(replace(config, store=replanned)).teacher_records == 72


# ---- teach ---------------------------------------------------------------------------------------


def test_a_teacher_is_trained_from_a_store_that_holds_none(tmp_path):
    store = tmp_path / "store"
    model = CifarModelConfig(name="resnet8", width=4)
    precompute.run(precompute_config(store))
    config = TeachConfig(
        store=StoreOptions(path=str(store)),
        teacher=model,
        teaching=LabelTeachingConfig(
            split="teacher", trainer=replace(TRAINER, epochs=2), augment=PAD_CROP
        ),
        evaluate=EvaluateOptions(splits=("test",)),
        run="t",
    )

    result = teach.run(config)

    assert 0 <= result.accuracy["test"] <= 1
    weights = Path(result.weights).read_bytes()
    again = teach.run(config)
    assert (again.weights, again.accuracy) == (result.weights, result.accuracy)
    assert again.last_epoch == ""
    assert Path(result.weights).read_bytes() == weights
    frozen_config = precompute_config(store, replace(model, weights=result.weights))
    assert precompute.run(frozen_config).teacher_records == 72


# ---- distill -------------------------------------------------------------------------------------


def test_a_run_writes_its_student_config_metrics_and_cost(frozen):
    result = distill.run(distill_config(frozen))

    folder = RUNS / "one" / "distill"
    assert result.trained_epochs == 3
    assert {path.name for path in folder.iterdir()} == {
        *(".lock", "config.yaml", "cost.json", "facts.json", "metrics.jsonl", "model.json"),
        *("model.safetensors", "tensorboard"),
    }
    lines = list(read_metrics(folder))
    assert [line["step"] for line in lines] == [2, 4, 5, 7, 9, 10, 12, 14, 15]
    assert all(
        {"kd", "map", "total", "valid_map_fraction", "lr", "records_per_second"} <= set(line)
        for line in lines
    )
    assert read_cost(folder)["records"] == 3 * 40


def test_a_finished_run_is_left_as_it_is(frozen):
    distill.run(distill_config(frozen))
    before = weights_of("one")

    assert distill.run(distill_config(frozen)).trained_epochs == 0
    assert_equal_states(weights_of("one"), before)


def test_the_same_seed_gives_the_same_student_and_another_another(frozen):
    for run, seed in (("a", 0), ("b", 0), ("c", 1)):
        distill.run(distill_config(frozen, run=run, seed=seed))

    assert_equal_states(weights_of("a"), weights_of("b"))
    assert not torch.equal(weights_of("a")["linear.weight"], weights_of("c")["linear.weight"])


def test_a_killed_run_resumes_to_the_same_student(frozen):
    distill.run(distill_config(frozen, run="whole"))

    with killed_at(loop, "train_step", 8):  # in the middle of the second of three epochs
        distill.run(distill_config(frozen, run="killed"))
    assert not (RUNS / "killed" / "distill" / "model.safetensors").exists()

    result = distill.run(distill_config(frozen, run="killed"))

    assert result.trained_epochs == 2
    assert_equal_states(weights_of("killed"), weights_of("whole"))
    steps_logged = [
        [line["step"] for line in read_metrics(RUNS / run / "distill")]
        for run in ("killed", "whole")
    ]
    assert steps_logged[0] == steps_logged[1]


def test_a_run_folder_of_other_options_is_refused_with_the_difference(frozen):
    distill.run(distill_config(frozen))

    with pytest.raises(ConfigError, match=r"method\.tau 4 -> 2"):
        distill.run(distill_config(frozen, method=E2KDConfig(tau=2.0)))


def test_a_command_that_failed_can_be_corrected(frozen):
    config = distill_config(frozen)
    with pytest.raises(ConfigError, match="no split 'trian'"):
        distill.run(replace(config, split="trian"))

    assert distill.run(config).trained_epochs == 3


def test_options_that_change_nothing_do_not_make_another_run(frozen):
    distill.run(distill_config(frozen))
    logged_more = replace(TRAINER, log_every_steps=1, loader_processes=1)

    assert distill.run(distill_config(frozen, trainer=logged_more)).trained_epochs == 0


def test_a_pass_without_maps_cannot_teach_where_to_look(tmp_path, tiny_teacher, frozen):
    annotate = PassOptions(outputs=("logits",))
    precompute.run(precompute_config(tmp_path / "store", tiny_teacher, annotate=annotate))
    config = replace(distill_config(frozen), store=StoreOptions(path=str(tmp_path / "store")))

    with pytest.raises(StoreMismatchError, match=r"holds no maps.*outputs=\[logits,maps\]"):
        distill.run(config)


def test_labels_need_no_teacher(tmp_path, frozen):
    store = tmp_path / "store"
    precompute.run(precompute_config(store))
    config = distill_config(frozen, method=LabelsConfig())

    assert distill.run(replace(config, store=StoreOptions(path=str(store)))).trained_epochs == 3


@pytest.mark.slow
def test_the_three_map_treatments_are_three_different_students(frozen):
    heads = set()
    for control in ("none", "shuffled", "unaugmented"):
        distill.run(distill_config(frozen, run=control, method=E2KDConfig(map_control=control)))
        heads.add(weights_of(control)["linear.weight"].numpy().tobytes())

    assert len(heads) == 3


def test_a_view_of_half_the_frame_is_known_to_alias():
    views = ViewSchedule(PAD_CROP, (16, 16), seed=0)

    assert worst_downscale(views, (8, 8), torch.ones(9)) == pytest.approx(2)
    assert worst_downscale(views, (16, 16), torch.ones(9)) == pytest.approx(1)


@pytest.mark.parametrize(("size", "warns"), [(None, False), (32, False), (40, True)])
def test_views_far_above_the_frame_are_a_warning(frozen, caplog, size, warns):
    augment = replace(PAD_CROP, size=size)
    trainer = replace(TRAINER, epochs=1)

    with caplog.at_level(logging.WARNING, "permafrost"):
        distill.run(distill_config(frozen, method=KDConfig(), augment=augment, trainer=trainer))

    text = "augment.size=40 enlarges frames of 16x16 by a factor of 2.5, and a step costs about 6 times"
    assert (text in caplog.text) == warns


@pytest.mark.parametrize(("side", "warns"), [(16, False), (18, True)])
def test_a_teacher_far_below_the_frame_is_a_warning(tmp_path, tiny_teacher, caplog, side, warns):
    annotate = PassOptions(batch_size=8, outputs=("logits",))
    teacher = replace(tiny_teacher, input_size=8)
    path = tmp_path / "store"

    with caplog.at_level(logging.WARNING, "permafrost"):
        precompute.run(precompute_config(path, teacher, annotate=annotate, image_size=side))

    text = (
        "the teacher receives frames of 18x18 at 8x8, resized bilinearly and without antialiasing"
    )
    assert (text in caplog.text) == warns


# ---- evaluate, sweep, report ---------------------------------------------------------------------


def test_an_evaluation_agrees_with_the_teacher_it_names(frozen):
    distill.run(distill_config(frozen))

    result = evaluate.run(evaluate_config(frozen))

    for metrics in result.splits.values():
        assert metrics["records"] == 10
        assert set(metrics) == {
            "records", "accuracy", "group_accuracy", "worst_group_accuracy", "epg", "iou", "agreement",
            "group_agreement", "kl_to_teacher", "teacher_accuracy", "teacher_epg", "map_cosine",
            "valid_map_fraction", "epg_uniform", "majority_accuracy", "mean_class_accuracy",
            "mean_class_accuracy_low", "mean_class_accuracy_high", "teacher_mean_class_accuracy",
        }  # fmt: skip
    assert evaluate.run(evaluate_config(frozen)) == result


def test_the_table_of_an_evaluation_averages_to_its_metrics(frozen):
    distill.run(distill_config(frozen))

    result = evaluate.run(evaluate_config(frozen))

    table = pd.read_parquet(RUNS / "one" / "evaluate" / "records.parquet")
    assert table.key.tolist() == [
        row["key"]
        for split in result.splits
        for row in index_table(frozen.store).to_pylist()
        if row["split"] == split
    ]
    for split, metrics in result.splits.items():
        rows = table[table.split == split]
        agreeing = rows.predictions.str[0] == rows.teacher_predictions.str[0]
        assert (len(rows), rows.correct.mean()) == (metrics["records"], metrics["accuracy"])
        assert {str(g): v for g, v in rows.groupby("group").correct.mean().items()} == metrics[
            "group_accuracy"
        ]
        assert agreeing.mean() == metrics["agreement"]
        for name in ("epg", "iou", "teacher_epg", "map_cosine"):
            assert rows[name].explode().astype(float).mean() == pytest.approx(
                metrics[name], abs=1e-12
            )


@pytest.mark.parametrize("region", ["boxes", "masks"])
def test_the_teacher_evaluated_as_its_own_student_agrees_with_itself(frozen, region):
    teacher = build_model(frozen.config.teacher, 10)
    name = frozen.store.open_passes()[0].name
    trained = TrainedModel(
        config=frozen.config.teacher, num_classes=10, input_size=(16, 16), teachers=(name,)
    )
    save_model(RUNS / "self" / "distill", teacher, trained)

    splits = ("test", "test_swapped", "train", "teacher")
    config = evaluate_config(frozen, run="self", region=region, splits=splits)
    splits = evaluate.run(config).splits

    for metrics in splits.values():
        assert metrics["agreement"] == 1
        assert metrics["accuracy"] == metrics["teacher_accuracy"]
        assert metrics["kl_to_teacher"] < 1e-5  # the store rounds logits to float16
        assert metrics["map_cosine"] > 0.9999
    # The same network has two EPGs: of the true class, and of the predicted class, which its stored maps explain.
    rows = pd.read_parquet(RUNS / "self" / "evaluate" / "records.parquet")
    own, stored = (rows[name].explode().dropna().to_numpy() for name in ("epg", "teacher_epg"))
    is_right = (rows.target_classes.str[0] == rows.labels.str[0]).to_numpy()
    assert is_right.any()
    assert np.abs(own - stored)[is_right].max() < 2e-3
    assert np.abs(own - stored)[~is_right].max() > 2e-3


def test_a_sweep_finishes_every_student_once_and_a_report_gathers_them(frozen, capsys):
    base = [
        f"store.path={frozen.store.path}", "run=grid", "student.name=resnet8", "student.width=4",
        "trainer.epochs=1", "trainer.batch_size=8", "evaluate.splits=[test,test_swapped]",
        "variants={kd: ['method=kd'], e2kd: ['method=e2kd', 'method.tau=2']}", "seeds=[3,4]",
        "executor=serial",
    ]  # fmt: skip
    config: SweepConfig = build_verb_config("sweep", compose("sweep", base))

    first = sweep.run(config, base)
    again = sweep.run(config, base)
    more = sweep.run(replace(config, seeds=(3, 4, 5)), base)

    assert (first.students, first.trained_now, first.finished_now) == (4, 4, 4)
    assert (again.students, again.trained_now, again.finished_now) == (4, 0, 0)
    assert (more.students, more.trained_now, more.finished_now) == (6, 2, 2)
    columns = {"accuracy": "test.accuracy", "epg": "all.epg"}
    shown = {"columns": columns, "next_command": "make next", "contact_records": 2}
    result = report.run(report_config(frozen, "grid", **shown))
    values = json.loads(Path(result.json).read_text())
    runs = {(row["method"], row["seed"]): row["accuracy"] for row in values["runs"]}
    assert set(runs) == {(variant, seed) for variant in ("kd", "e2kd") for seed in (3, 4, 5)}
    pair = values["candidate_minus_baseline"]
    gains = [runs["e2kd", s] - runs["kd", s] for s in (3, 4, 5)]
    assert (pair["seeds"], pair["mean"]) == ([3, 3], pytest.approx(sum(gains) / 3))
    html = Path(result.html).read_text()
    assert "http:" not in html.replace("http://www.w3.org", "")  # self-contained
    regions = re.findall(r'class="scroll tiles" role="region" aria-label="([^"]*)"', html)
    assert [name.partition(",")[0] for name in regions] == ["Explanation maps", "Images and maps"]
    _print_result(result)
    assert capsys.readouterr().out.splitlines()[-1] == "next: make next"


def test_a_failing_student_does_not_stop_the_others(frozen):
    base = [
        f"store.path={frozen.store.path}", "run=grid", "student.name=resnet8", "student.width=4",
        "trainer.epochs=1", "trainer.batch_size=8", "seeds=[0]", "executor=serial",
        "variants={good: ['method=labels'], bad: ['method=kd', trainer.warmup_epochs=0, trainer.warmup_steps=4096]}",
    ]  # fmt: skip

    with pytest.raises(
        sweep.SweepError, match=r"1 of 2 students failed.*bad-seed0.*trainer\.warmup_steps=4096"
    ):
        sweep.run(build_verb_config("sweep", compose("sweep", base)), base)

    listed = json.loads((RUNS / "grid" / "sweep.json").read_text())["runs"]
    assert [row["variant"] for row in listed] == ["good"]


def test_a_stage_that_is_interrupted_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(verb, words):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run_typed_command", interrupted)
    monkeypatch.setattr("sys.argv", ["distill"])
    with pytest.raises(SystemExit) as exit_:
        cli.stage_main("distill")

    assert exit_.value.code == 130
    assert "the same command resumes" in capsys.readouterr().err


def test_a_checkpoint_that_a_killed_process_left_in_a_finished_run_is_removed_unless_it_is_kept(
    frozen,
):
    for run, is_kept in (("usual", False), ("kept", True)):
        trainer = replace(TRAINER, keep_checkpoint=is_kept)
        distill.run(distill_config(frozen, run=run, trainer=trainer))
        checkpoint = RUNS / run / "distill/checkpoint.pt"
        assert checkpoint.exists() == is_kept
        checkpoint.touch()
        distill.run(distill_config(frozen, run=run, trainer=replace(TRAINER, keep_checkpoint=True)))
        assert checkpoint.exists()
        distill.run(distill_config(frozen, run=run))
        assert checkpoint.exists() == is_kept
