"""Baselines on a store: their fields in a pass, warping of these fields, and students that train on them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from permafrost.annotation.pass_identity import describe_pass
from permafrost.config.augment import AugmentOptions, OperationConfig, RandomViewsConfig
from permafrost.config.methods import ATConfig, CatKDConfig, LabelsConfig
from permafrost.config.store import PassOptions
from permafrost.config.training import OptimizerOptions
from permafrost.core.errors import ConfigError
from permafrost.loading.geometry import TargetRequest, decode_intermediates, view_targets, warp
from permafrost.loading.loader import TrainLoader
from permafrost.loading.random_views import ViewSchedule
from permafrost.loading.transfer import move_batch
from permafrost.losses.base import build_loss
from permafrost.models.classifier import Intermediates
from permafrost.models.explanations import gradcam
from permafrost.models.providers import build_model, freeze
from permafrost.models.saved import SavedNetwork
from permafrost.runs.mirrors import RUNS
from permafrost.store.entries import StoreMismatchError
from permafrost.store.verification import verify_store
from permafrost.store.zarr_fields import ZarrFields
from permafrost.training import loop
from permafrost.training.checkpoint import CHECKPOINT_NAME
from permafrost.training.metric_log import read_metrics
from permafrost.training.optim import build_optimizer
from permafrost.training.state import Training
from permafrost.training.step import batch_loss
from permafrost.training.targets import LiveTeacher
from permafrost_papers.e2kd.options import ReviewKDConfig
from tests.support.kills import killed_at
from tests.support.runs import TRAINER, assert_equal_states, distill_config, weights_of
from tests.support.slow import slow
from tests.support.stores import frozen_store, train_dataset
from tests.support.verbs import distill

PASS = PassOptions(
    batch_size=8, outputs=("logits", "maps", "attention", "class_maps"), class_map_size=4
)
PAD_CROP = OperationConfig(kind="pad_crop", padding=3)
VIEWS = {
    "views": RandomViewsConfig(count=2, seed=1),
    "augment": AugmentOptions(operations=(PAD_CROP, OperationConfig(kind="horizontal_flip"))),
}
SIZE = (16, 16)
ATTENTION = [f"attention_{stage}{end}" for stage in (1, 2, 3) for end in ("", "_scale")]


@pytest.fixture(scope="module")
def inner(tmp_path_factory, tiny_teacher):
    """Store with a canonical pass of every output and a pass of two stored views."""
    path = tmp_path_factory.mktemp("inner") / "store"
    return frozen_store(path, tiny_teacher, annotate=PASS, **VIEWS)


def live_teacher_of(frozen, needs):
    model = freeze(build_model(frozen.config.teacher, 10))
    return LiveTeacher("teacher", model, gradcam, SIZE, needs=needs)


def viewed_batch(frozen, name, operations=()):
    views = ViewSchedule(AugmentOptions(operations=operations), frozen.store.size, seed=0)
    return next(TrainLoader(train_dataset(frozen, name), views, batch_size=16, seed=0).epoch(0))


def teacher_output(frozen, images):
    model = freeze(build_model(frozen.config.teacher, 10))
    return model(images, Intermediates(stages=True, class_maps=True))


# ---- contents of a pass --------------------------------------------------------------------------


def test_a_pass_declares_its_fields_and_verifies(inner):
    (teacher,) = inner.store.open_passes()

    specs = {spec.name: spec for spec in teacher.manifest.fields}

    assert list(specs)[4:] == [*ATTENTION, "class_maps", "class_maps_scale"]
    assert [specs[f"attention_{n}"].shape for n in (1, 2, 3)] == [(16, 16), (8, 8), (4, 4)]
    assert (specs["class_maps"].shape, specs["class_maps_scale"].shape) == ((10, 4, 4), (10,))
    for name in ("attention_1", "class_maps"):
        spec = specs[name]
        assert (spec.dtype, spec.codec, spec.when_moved) == ("float16", "maxabs", "warp")
        assert spec.frame == "full"
        assert teacher.manifest.fidelity[name] > 0.99999
    assert specs["attention_1_scale"].shape == (1,)
    assert teacher.fields_of("attention") == ["attention_1", "attention_2", "attention_3"]
    assert list(verify_store(inner.store.path)) == []


@pytest.mark.parametrize("backend", ["zarr", "webdataset"])
def test_what_is_read_is_what_the_teacher_said(inner, tmp_path, tiny_teacher, backend):
    store = inner
    if backend == "webdataset":
        store = frozen_store(tmp_path / "store", tiny_teacher, annotate=PASS, backend=backend)
    at, cat = (
        train_dataset(store, output_name).__getitems__([0, 5, 30])
        for output_name in ("attention", "class_maps")
    )

    output = teacher_output(store, at.inputs.float() / 255)

    assert list(at.targets[0].intermediates) == ["attention_1", "attention_2", "attention_3"]
    assert list(cat.targets[0].intermediates) == ["class_maps"]
    for stage, values in zip(
        output.stages, decode_intermediates(at.targets[0]).values(), strict=True
    ):
        wanted = stage.output.square().mean(dim=1)
        assert (values - wanted).abs().max() < 1e-3 * wanted.max()
    found = decode_intermediates(cat.targets[0])["class_maps"]
    assert (found - output.class_maps).abs().max() < 1e-3 * output.class_maps.abs().max()


def test_class_maps_are_pooled_to_its_size(inner, tmp_path, tiny_teacher):
    annotate = replace(PASS, class_map_size=2)
    small = frozen_store(tmp_path / "store", tiny_teacher, annotate=annotate)

    pooled, full = (train_dataset(store, "class_maps") for store in (small, inner))

    assert torch.allclose(
        decode_intermediates(pooled[0].targets[0])["class_maps"],
        F.adaptive_avg_pool2d(decode_intermediates(full[0].targets[0])["class_maps"], 2),
        atol=1e-3,
    )


def test_fields_that_nobody_asked_for_stay_on_disk(inner, monkeypatch):
    read = []

    def reading(self, spec, *place, original=ZarrFields._read):
        read.append(spec.name)
        return original(self, spec, *place)

    monkeypatch.setattr(ZarrFields, "_read", reading)

    names = {}
    for output_name in (None, "attention", "class_maps"):
        read.clear()
        batch = train_dataset(inner, output_name)[0]
        names[output_name] = {
            name for name in read if name not in ("logits", "map", "target_class")
        }
        assert set(batch.targets[0].intermediates) == {
            n for n in names[output_name] if not n.endswith("scale")
        }

    assert names[None] == set()
    assert names["attention"] == set(ATTENTION)
    assert names["class_maps"] == {"class_maps", "class_maps_scale"}


def test_the_fingerprint_of_older_passes_stays_and_others_have_their_own(inner):
    def describe(*outputs, **options):
        config = PassOptions(outputs=("logits", *outputs), **options)
        return describe_pass(
            inner.store.manifest, {}, inner.config.explainer, config, backend="zarr"
        )

    assert set(describe("maps")) == {
        *("dataset_fingerprint", "store_fingerprint", "selection", "teacher", "views"),
        *("explainer", "outputs", "map_dtype", "backend"),
    }
    assert describe("maps") == describe("maps", class_map_size=7)
    assert describe("maps", "attention") == describe("maps", "attention", class_map_size=7)
    assert describe("maps", "class_maps") != describe("maps", "class_maps", class_map_size=7)
    assert describe("maps") != describe("maps", "attention") != describe("maps", "class_maps")


# ---- frozen, replayed and live -------------------------------------------------------------------


@pytest.mark.parametrize("method", [ATConfig(), CatKDConfig(), CatKDConfig(normalize=True)])
def test_a_frozen_and_a_live_step_without_views_have_the_same_gradient(inner, method):
    torch.manual_seed(1)
    student = build_model(replace(inner.config.teacher, weights=None), 10).eval()
    parameters = list(student.parameters())
    loss = build_loss(method)
    batch = viewed_batch(inner, *loss.needs.outputs)
    gradients, values = [], []
    for targets in (view_targets, live_teacher_of(inner, loss.needs)):
        part = Training(
            model=student,
            loss=loss,
            optimizer=build_optimizer(OptimizerOptions(), parameters),
            targets=targets,
        )
        term = batch_loss(part, batch, SIZE).terms[loss.term]
        values.append(term.item())
        parts = torch.autograd.grad(term, parameters, allow_unused=True, materialize_grads=True)
        gradients.append(torch.nn.utils.parameters_to_vector(parts))

    assert values[0] == pytest.approx(values[1], rel=2e-3)
    assert (gradients[0] - gradients[1]).norm() < 5e-3 * gradients[1].norm()


@pytest.mark.parametrize("output_name", ["attention", "class_maps"])
def test_intermediates_move_with_the_image(inner, output_name):
    still = viewed_batch(inner, output_name)
    mirrored = viewed_batch(inner, output_name, (OperationConfig(kind="horizontal_flip", p=1.0),))
    moved = viewed_batch(inner, output_name, (PAD_CROP,))

    (kept,), (flipped,), (shifted,) = (
        view_targets(b, TargetRequest((4, 4))) for b in (still, mirrored, moved)
    )

    for name, values in decode_intermediates(still.targets[0]).items():
        assert torch.allclose(kept.intermediates[name], values, rtol=1e-5, atol=1e-5)
        assert torch.allclose(flipped.intermediates[name], values.flip(-1), rtol=1e-5, atol=1e-4)
        fetched = warp(
            values.view(len(values), -1, *values.shape[-2:]),
            moved.canonical_from_view,
            values.shape[-2:],
        )
        assert torch.equal(shifted.intermediates[name], fetched.view_as(values))
        assert not torch.allclose(shifted.intermediates[name], values, atol=1e-2)


def test_intermediates_of_a_stored_view_are_that_views_own(inner):
    dataset = train_dataset(inner, "attention", stored_views=True)
    batch = dataset.__getitems__([(0, 0), (0, 1), (7, 1)])

    (targets,) = view_targets(batch, TargetRequest((4, 4)))
    images = warp(batch.inputs, batch.canonical_from_view, SIZE) / 255
    output = teacher_output(inner, images)

    for stage, values in zip(output.stages, targets.intermediates.values(), strict=True):
        wanted = stage.output.square().mean(dim=1)
        assert (values - wanted).abs().max() < 1e-3 * wanted.max()


def test_intermediates_go_to_the_device_with_their_batch(inner):
    moved = move_batch(viewed_batch(inner, "attention"), torch.device("meta"))

    assert {values.device.type for values in moved.targets[0].intermediates.values()} == {"meta"}


@pytest.mark.parametrize("mode", ["frozen", "replay", "live"])
@pytest.mark.parametrize(
    "method", [ATConfig(lambda_kd=1.0), slow(CatKDConfig())], ids=lambda m: m.kind
)
def test_students_train_on_frozen_replayed_and_live_targets(inner, method, mode):
    options = {"teacher": inner.config.teacher} if mode == "live" else {}
    config = distill_config(
        inner, method=method, mode=mode, trainer=replace(TRAINER, epochs=2), **options
    )

    distill.run(config)

    lines = list(read_metrics(RUNS / "one" / "distill"))
    term = build_loss(method).term
    assert all(line[term] > 0 and line["ce"] > 0 for line in lines)
    assert ("kd" in lines[0]) == (method.lambda_kd > 0)
    assert SavedNetwork(RUNS / "one" / "distill").load()[1].num_classes == 10


def test_a_pass_without_the_output_is_refused_with_the_way_out(frozen):
    for method, output_name in ((ATConfig(), "attention"), (CatKDConfig(), "class_maps")):
        with pytest.raises(
            StoreMismatchError,
            match=rf"no output {output_name}, but method={method.kind}.*outputs=\[logits,maps,{output_name}\]",
        ):
            distill.run(distill_config(frozen, method=method))


def test_a_term_of_weight_zero_needs_no_output_and_is_the_labels_student(frozen):
    trainer = replace(TRAINER, epochs=1)
    for run, method in (("labels", LabelsConfig()), ("at", ATConfig(lambda_at=0.0))):
        distill.run(distill_config(frozen, run=run, method=method, trainer=trainer))

    assert_equal_states(weights_of("at"), weights_of("labels"))


# ---- ReviewKD ------------------------------------------------------------------------------------


def review_config(frozen, method=ReviewKDConfig(), *, run="one", seed=0, **trainer):  # noqa: B008
    return distill_config(
        frozen,
        run=run,
        seed=seed,
        method=method,
        mode="live",
        teacher=frozen.config.teacher,
        trainer=replace(TRAINER, **trainer),
    )


def test_review_needs_two_records_a_rank(frozen):
    with pytest.raises(ConfigError, match=r"batch_size=2 leaves each of 2 ranks one record"):
        review_config(frozen, batch_size=2, ranks=2)


@pytest.mark.slow
def test_a_killed_review_student_resumes_to_the_same_one_and_leaves_its_fusions_behind(frozen):
    distill.run(review_config(frozen, run="whole", keep_checkpoint=True))
    killed = review_config(frozen, run="killed", keep_checkpoint=True)
    with killed_at(loop, "train_step", 8):
        distill.run(killed)
    distill.run(killed)

    whole, killed = (
        torch.load(RUNS / run / "distill" / CHECKPOINT_NAME, weights_only=True)
        for run in ("whole", "killed")
    )
    assert_equal_states(weights_of("killed"), weights_of("whole"))
    assert_equal_states(killed["loss"], whole["loss"])
    assert any(name.startswith("fusions.0.mix") for name in whole["loss"])
    trained = len(whole["optimizer"]["param_groups"][0]["params"])
    student, _ = SavedNetwork(RUNS / "whole" / "distill").load()
    fusions = sum(
        not name.endswith(("running_mean", "running_var", "num_batches_tracked"))
        for name in whole["loss"]
    )
    assert trained == len(list(student.parameters())) + fusions
    assert not any("fusion" in name for name in student.state_dict())


def test_fusions_are_drawn_from_the_seed(frozen):
    method = ReviewKDConfig(lambda_review=1e-30)
    drawn = []
    for run, seed in (("a", 0), ("b", 0), ("c", 1)):
        named = {"run": run, "seed": seed}
        distill.run(review_config(frozen, method, **named, epochs=1, keep_checkpoint=True))
        state = torch.load(RUNS / run / "distill" / CHECKPOINT_NAME, weights_only=True)["loss"]
        drawn.append(state["fusions.0.reduce.0.weight"])

    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_run_says_what_it_was_asked(inner):
    distill.run(
        distill_config(
            inner,
            method=CatKDConfig(resolution=4, normalize=True),
            trainer=replace(TRAINER, epochs=1),
        )
    )

    asked = yaml.safe_load(Path(RUNS / "one" / "distill" / "config.yaml").read_text())["method"]

    assert (asked["kind"], asked["resolution"], asked["normalize"]) == ("cat_kd", 4, True)
    assert np.isfinite(next(read_metrics(RUNS / "one" / "distill"))["cat"])
