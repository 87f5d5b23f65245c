"""Variants of the study on a store: pooled features, and students of FT, CRD and SSKD."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from permafrost.config.augment import (
    AugmentOptions,
    MixConfig,
    OperationConfig,
    PolicyConfig,
    RandomViewsConfig,
)
from permafrost.config.methods import KDConfig
from permafrost.config.store import PassOptions
from permafrost.config.training import OptimizerOptions, TrainerOptions
from permafrost.core.batches import Targets
from permafrost.core.errors import ConfigError
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.geometry import (
    TargetRequest,
    decode_intermediates,
    view_images,
    view_targets,
)
from permafrost.loading.loader import TrainLoader
from permafrost.loading.random_views import ViewSchedule
from permafrost.losses.base import build_loss
from permafrost.models.classifier import Intermediates
from permafrost.models.explanations import gradcam
from permafrost.models.providers import build_model, freeze
from permafrost.models.saved import SavedNetwork
from permafrost.runs.mirrors import RUNS
from permafrost.store.entries import StoreMismatchError
from permafrost.store.verification import verify_store
from permafrost.training import loop
from permafrost.training import loop as auxiliary_phase
from permafrost.training.checkpoint import CHECKPOINT_NAME
from permafrost.training.metric_log import read_metrics
from permafrost.training.optim import build_optimizer
from permafrost.training.state import Training
from permafrost.training.step import batch_loss
from permafrost.training.targets import LiveTeacher
from permafrost_papers.interpretability.options import (
    CRDConfig,
    FTConfig,
    RotationsViewsConfig,
    SSKDConfig,
)
from permafrost_papers.interpretability.rotations import turn_views
from tests.support.kills import killed_at
from tests.support.outputs import student_output
from tests.support.runs import assert_equal_states, distill_config, weights_of
from tests.support.slow import slow
from tests.support.stores import frozen_store, train_dataset
from tests.support.verbs import distill

PASS = PassOptions(batch_size=8, outputs=("logits", "pooled"))
SIZE = (16, 16)
TRAINER = TrainerOptions(
    epochs=2, batch_size=16, num_threads=1, log_every_steps=1, keep_checkpoint=True
)
ROTATIONS = RotationsViewsConfig(per_step=4)
FT = FTConfig(paraphraser_epochs=1)
CRD = CRDConfig(negatives=20, embedding_size=16)
SSKD = SSKDConfig(head_epochs=3)


store_with = partial(frozen_store, annotate=PASS)


@pytest.fixture(scope="module")
def featured(tmp_path_factory, tiny_teacher):
    """Store with a canonical pass of logits and features."""
    return store_with(tmp_path_factory.mktemp("featured") / "store", tiny_teacher)


@pytest.fixture(scope="module")
def rotated(tmp_path_factory, tiny_teacher):
    """Store with the same pass and one of the four rotations."""
    path = tmp_path_factory.mktemp("rotated") / "store"
    return store_with(path, tiny_teacher, views=RotationsViewsConfig())


def variant_config(frozen, method, **options):
    """Options of a student of `method`, in the mode that the method requires."""
    fitting = {"mode": "replay", "views": ROTATIONS} if method.kind == "sskd" else {}
    if method.kind == "ft" or options.get("mode") == "live":
        fitting = {"mode": "live", "teacher": frozen.config.teacher}
    options = {"method": method, "trainer": TRAINER, **fitting, **options}
    return distill_config(frozen, **options)


def saved_loss(run):
    return torch.load(RUNS / run / "distill" / CHECKPOINT_NAME, weights_only=True)["loss"]


# ---- contents of a pass --------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["zarr", "webdataset"])
def test_a_pass_holds_the_teachers_pooled_features(featured, tmp_path, tiny_teacher, backend):
    store = featured
    if backend == "webdataset":
        store = store_with(tmp_path / "store", tiny_teacher, backend=backend)
    (teacher,) = store.store.open_passes()
    (spec,) = [s for s in teacher.manifest.fields if s.name == "pooled"]
    batch = train_dataset(store).__getitems__([0, 5, 30])
    model = freeze(build_model(store.config.teacher, 10))

    wanted = model(batch.inputs.float() / 255, Intermediates(pooled=True)).pooled
    found = decode_intermediates(batch.targets[0])["pooled"]

    assert (spec.shape, spec.dtype, spec.codec) == ((16,), "float16", "raw")
    assert (spec.when_moved, spec.frame) == ("keep", None)
    assert teacher.manifest.fidelity["pooled"] > 0.99999
    assert found.dtype == torch.float32
    assert (found - wanted).abs().max() < 1e-3 * wanted.abs().max()
    assert list(verify_store(store.store.path)) == []


def test_a_pooled_feature_is_kept_where_the_image_moves(featured):
    flip = AugmentOptions(operations=(OperationConfig(kind="horizontal_flip", p=1.0),))
    views = ViewSchedule(flip, featured.store.size, seed=0)
    batch = next(TrainLoader(train_dataset(featured), views, batch_size=8, seed=0).epoch(0))

    (targets,) = view_targets(batch, TargetRequest((4, 4)))

    assert batch.canonical_from_view is not None
    assert torch.equal(
        targets.intermediates["pooled"], decode_intermediates(batch.targets[0])["pooled"]
    )


# ---- students ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "terms"),
    [
        (FT, {"ce", "ft"}),
        slow(replace(FT, lambda_kd=0.5), {"ce", "kd", "ft"}),
        (CRD, {"ce", "crd"}),
        slow(replace(CRD, lambda_ce=0.0, lambda_crd=1.0), {"crd"}),
        (SSKD, {"ce", "kd", "ss", "tf"}),
        slow(replace(SSKD, lambda_kd=0.0), {"ce", "ss", "tf"}),
    ],
    ids=["ft", "ft_kd", "crd", "crd_alone", "sskd", "sskd_feature"],
)
def test_students_train_and_leave_what_the_loss_brings_behind(rotated, method, terms):
    distill.run(variant_config(rotated, method))

    lines = list(read_metrics(RUNS / "one" / "distill"))
    student, _ = SavedNetwork(RUNS / "one" / "distill").load()
    assert all(line[term] > 0 for line in lines for term in terms)
    assert not {"ce", "kd", "ft", "crd", "ss", "tf"} - terms & set(lines[0])
    assert (
        student.state_dict().keys() == build_model(rotated.config.teacher, 10).state_dict().keys()
    )
    assert saved_loss("one")


@pytest.mark.parametrize("mode", ["replay", "live"])
def test_crd_learns_from_replayed_and_live_teachers(featured, tmp_path, tiny_teacher, mode):
    store, options = featured, {"mode": mode}
    if mode == "replay":
        views = RandomViewsConfig(count=2, seed=1)
        flip = AugmentOptions(operations=(OperationConfig(kind="horizontal_flip"),))
        store = store_with(tmp_path / "store", tiny_teacher, views=views, augment=flip)
        options["views"] = views

    distill.run(variant_config(store, CRD, trainer=replace(TRAINER, epochs=1), **options))

    assert next(read_metrics(RUNS / "one" / "distill"))["crd"] > 0


def built_loss(method):
    """Loss with the layers that it builds for pooled features of 16 channels."""
    torch.manual_seed(2)
    loss, pooled = build_loss(method), torch.zeros(1, 16)
    example = Targets(teacher="t", logits=torch.zeros(1, 10), intermediates={"pooled": pooled})
    loss.build(student_output(logits=torch.zeros(1, 10), pooled=pooled), example)
    return loss


def gradient_of(loss, student, of_loss, targets, batch, term=None):
    """Gradient of a term, or of the whole loss, with respect to the student and layers of the loss."""
    parameters = [*student.parameters(), *of_loss.parameters()]
    optimizer = build_optimizer(OptimizerOptions(), parameters)
    training = Training(model=student, loss=loss, optimizer=optimizer, targets=targets)
    torch.manual_seed(3)
    found = batch_loss(training, batch, SIZE)
    value = found.terms[term] if term else found.total
    parts = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
    return torch.nn.utils.parameters_to_vector(parts)


def test_the_teachers_bank_starts_from_its_stored_features(featured):
    dataset = train_dataset(featured)
    loss = built_loss(CRD)
    loss.on_train_start(dataset)
    batch = dataset.__getitems__([7, 31])

    wanted = F.normalize(
        loss.embed_teacher(decode_intermediates(batch.targets[0])["pooled"]), dim=1
    )

    assert torch.allclose(loss.teacher_bank[[7, 31]], wanted, atol=1e-6)
    assert not torch.allclose(loss.student_bank[[7, 31]], wanted, atol=0.1)


def test_a_frozen_and_a_live_crd_step_on_still_images_have_the_same_gradient(featured):
    torch.manual_seed(1)
    student = build_model(replace(featured.config.teacher, weights=None), 10).eval()
    dataset = train_dataset(featured)
    views = ViewSchedule(AugmentOptions(), featured.store.size, seed=0)
    batch = next(TrainLoader(dataset, views, batch_size=16, seed=0).epoch(0))
    model = freeze(build_model(featured.config.teacher, 10))
    gradients = []
    for targets in (
        view_targets,
        LiveTeacher("t", model, gradcam, SIZE, needs=build_loss(CRD).needs),
    ):
        loss = built_loss(CRD)
        loss.on_train_start(dataset)
        gradients.append(gradient_of(loss, student, loss, targets, batch, "crd"))

    assert gradients[1].norm() > 0
    assert (gradients[0] - gradients[1]).norm() < 5e-3 * gradients[1].norm()


def rotated_batches(rotated, augment=AugmentOptions()):  # noqa: B008, frozen
    """First batch of four records in their rotations, replayed from the store and made of new views."""
    store, views = rotated.store, ViewSchedule(augment, rotated.store.size, seed=0)
    stored = train_dataset(rotated, stored_views=True)
    alone = StoreDataset(store, stored.rows, num_classes=10)
    options = {"batch_size": 16, "seed": 0, "views_per_step": 4}
    live = TrainLoader(alone, views, expand=turn_views, **options)
    loaders = (TrainLoader(stored, None, **options), live)
    return tuple(next(loader.epoch(0)) for loader in loaders)


def test_new_views_are_rotated_as_the_stored_ones_are(rotated):
    replayed, live = rotated_batches(rotated)
    order = replayed.view_index.view(-1, 4).argsort(dim=1) + 4 * torch.arange(4)[:, None]

    assert live.view_index.tolist() == 4 * [0, 1, 2, 3]
    assert [live.keys[row] for row in range(16)] == [replayed.keys[row] for row in order.flatten()]
    assert torch.equal(live.labels, replayed.labels[order.flatten()])
    assert torch.equal(view_images(live, SIZE), view_images(replayed, SIZE)[order.flatten()])


def test_a_crop_and_a_flip_come_before_the_rotation(rotated):
    crops = AugmentOptions(
        operations=(
            OperationConfig(kind="resized_crop", scale=(0.3, 0.5)),
            OperationConfig(kind="horizontal_flip"),
        )
    )
    _, live = rotated_batches(rotated, crops)
    upright, *turned = view_images(live, SIZE).view(4, 4, 3, *SIZE).unbind(dim=1)

    for quarter, images in enumerate(turned, start=1):
        wanted = torch.rot90(upright, quarter, dims=(2, 3))
        assert (images - wanted).abs().max() < 1e-4
        assert (
            images - torch.rot90(upright, -quarter, dims=(2, 3))
        ).abs().max() > 0.1 or quarter == 2


@pytest.mark.parametrize("lambda_kd", [0.0, 0.9])
def test_a_live_and_a_replayed_sskd_step_on_still_images_have_the_same_gradient(rotated, lambda_kd):
    torch.manual_seed(1)
    student = build_model(replace(rotated.config.teacher, weights=None), 10).eval()
    teacher = freeze(build_model(rotated.config.teacher, 10))
    method = replace(SSKD, lambda_kd=lambda_kd)
    replayed, live = rotated_batches(rotated)
    needs = build_loss(method).needs
    exact = LiveTeacher("t", teacher, gradcam, SIZE, needs=needs)
    gradients = []
    for batch, targets in ((live, exact), (replayed, exact), (replayed, view_targets)):
        loss = built_loss(method)
        gradients.append(gradient_of(loss, student, loss.student_head, targets, batch))

    of_live, of_order, of_store = gradients
    assert of_live.norm() > 0
    assert (of_order - of_live).norm() < 1e-5 * of_live.norm()
    assert (of_store - of_live).norm() < 5e-3 * of_live.norm()  # the store has float16


def test_a_live_sskd_student_trains_on_moved_views_of_a_store_without_rotations(featured):
    result = distill.run(variant_config(featured, SSKD, mode="live"))

    lines = list(read_metrics(RUNS / "one" / "distill"))
    assert result.trained_epochs == 2
    assert all(line[term] > 0 for line in lines for term in ("ce", "kd", "ss", "tf"))


@pytest.mark.parametrize(
    "method", [FT, CRD, pytest.param(SSKD, marks=pytest.mark.slow)], ids=lambda method: method.kind
)
def test_a_killed_student_resumes_to_the_same_one(rotated, monkeypatch, method):
    distill.run(variant_config(rotated, method, run="whole"))
    steps = sum(1 for _ in read_metrics(RUNS / "whole" / "distill")) // 2
    kills = [(loop, "train_step", steps + 2)]
    if method.kind != "crd":
        kills.insert(0, (auxiliary_phase, "derive_seed", 2))
    for module, name, call in kills:
        with killed_at(module, name, call):
            distill.run(variant_config(rotated, method, run="killed"))
    monkeypatch.setattr(auxiliary_phase, "derive_seed", None)  # the phase must not begin again
    distill.run(variant_config(rotated, method, run="killed"))

    assert_equal_states(weights_of("killed"), weights_of("whole"))
    assert_equal_states(saved_loss("killed"), saved_loss("whole"))


@pytest.mark.parametrize(
    ("method", "names"),
    [
        (FT, ("paraphraser.0.weight", "reconstruction.0.weight")),
        slow(SSKD, ("teacher_head.0.weight", "teacher_head.2.bias")),
    ],
    ids=["ft", "sskd"],
)
def test_the_teachers_part_is_trained_before_the_student_and_stands_still_after(
    rotated, method, names
):
    first = {"paraphraser_epochs": 0} if method.kind == "ft" else {"head_epochs": 0}
    one_epoch = replace(TRAINER, epochs=1)
    distill.run(variant_config(rotated, method, run="long"))
    distill.run(variant_config(rotated, method, run="short", trainer=one_epoch))
    distill.run(variant_config(rotated, replace(method, **first), run="random", trainer=one_epoch))

    long, short, random = (saved_loss(run) for run in ("long", "short", "random"))

    for name in names:
        assert torch.equal(long[name], short[name])
        assert not torch.equal(long[name], random[name])


# ---- mismatches ----------------------------------------------------------------------------------


def test_modes_that_do_not_fit_are_refused(featured, rotated):
    for options in (
        {},
        {"mode": "replay"},
        {"mode": "replay", "views": RandomViewsConfig(count=4, per_step=4)},
        {"mode": "replay", "views": RotationsViewsConfig()},
    ):
        with pytest.raises(ConfigError, match=r"mode=replay views=rotations views.per_step=4"):
            distill_config(rotated, method=SSKD, **options)
    live = variant_config(featured, SSKD, mode="live")
    assert (live.views.kind, live.views.per_step) == ("rotations", 4)
    with pytest.raises(ConfigError, match=r"batch_size=18 is not a multiple of views.per_step=4"):
        replace(live, trainer=replace(TRAINER, batch_size=18))
    policies = (PolicyConfig(kind="randaugment"),)
    for options in ({"mix": (MixConfig(kind="mixup"),)}, {"operations": policies}):
        with pytest.raises(ConfigError, match=r"would be different images; set method=kd, or"):
            replace(live, augment=AugmentOptions(**options))
    with pytest.raises(ConfigError, match=r"method=sskd needs several to distinguish"):
        variant_config(rotated, SSKD, trainer=replace(TRAINER, batch_size=4))
    with pytest.raises(ConfigError, match=r"views.per_step=1"):
        distill_config(rotated, method=CRD, mode="replay", views=ROTATIONS)
    mixed = AugmentOptions(mix=(MixConfig(kind="cutmix"),))
    live = variant_config(featured, CRD, mode="live")
    with pytest.raises(
        ConfigError, match=r"a mixed image has two: set method=kd, or augment.mix=\[\]"
    ):
        replace(live, augment=mixed)


def test_a_pass_without_features_or_without_rotations_is_refused(frozen, tmp_path, tiny_teacher):
    with pytest.raises(StoreMismatchError, match=r"no output pooled, but method=crd"):
        distill.run(variant_config(frozen, CRD))
    flip = AugmentOptions(operations=(OperationConfig(kind="horizontal_flip"),))
    views = RandomViewsConfig(count=4)
    random = store_with(tmp_path / "store", tiny_teacher, views=views, augment=flip)
    with pytest.raises(ConfigError, match=r"has views=random.*views=rotations"):
        distill.run(variant_config(random, SSKD))


def test_without_their_term_students_need_no_output(frozen):
    for run, method in (
        ("kd", KDConfig(lambda_ce=1.0)),
        ("crd", CRDConfig(lambda_kd=1.0, lambda_crd=0.0)),
        ("ft", FTConfig(lambda_kd=1.0, lambda_ft=0.0)),
    ):
        trainer = replace(TRAINER, epochs=1)
        distill.run(distill_config(frozen, run=run, method=method, trainer=trainer))

    assert_equal_states(weights_of("crd"), weights_of("kd"))
    assert_equal_states(weights_of("ft"), weights_of("kd"))
