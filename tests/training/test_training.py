"""Training steps, their log and their checkpoints."""

from __future__ import annotations

import copy
import gc
import io
import math
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from permafrost.annotation.annotator import TeacherAnnotator
from permafrost.config.explainers import GradCamConfig
from permafrost.config.methods import E2KDConfig, KDConfig, LabelsConfig
from permafrost.config.store import PassOptions
from permafrost.config.training import OptimizerOptions
from permafrost.core.batches import StoredTargets
from permafrost.core.distributed import DistributedContext
from permafrost.losses.base import LossTerms, build_loss
from permafrost.models.explanations import gradcam
from permafrost.models.providers import freeze
from permafrost.store.frames import FrameBatch
from permafrost.training.checkpoint import load_checkpoint, save_checkpoint
from permafrost.training.metric_log import DivergedError, StepLog
from permafrost.training.optim import build_optimizer
from permafrost.training.state import Training
from permafrost.training.step import batch_loss, train_step
from tests.support.batches import (
    FLIP,
    FRAME,
    MODEL,
    NUM_CLASSES,
    build_batch,
    random_batch,
    random_frames,
    random_targets,
    tiny_model,
)
from tests.support.trainings import assert_same_state, build_training, take_steps


def tensors_of(targets: StoredTargets) -> dict[str, Tensor]:
    values = {spec.name: getattr(targets, spec.name) for spec in fields(targets)}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def live_tensors() -> int:
    return sum(issubclass(type(candidate), torch.Tensor) for candidate in gc.get_objects())


def test_train_step_sends_no_gradient_to_stored_targets_and_leaves_them_unchanged():
    targets = random_targets(0)
    before = {name: tensor.clone() for name, tensor in tensors_of(targets).items()}
    targets.logits.requires_grad_()
    targets.maps.requires_grad_()
    training = build_training(0, E2KDConfig(lambda_ce=1.0))
    batch = build_batch(random_frames(0), targets, FLIP)

    terms = train_step(training, batch, FRAME, clip_norm=1.0)

    assert terms.terms["map"] > 0
    assert list(before) == ["logits", "target_class", "maps", "map_from_canonical"]
    for name, tensor in tensors_of(targets).items():
        assert tensor.grad is None, name
        assert torch.equal(tensor, before[name]), name


def test_teacher_has_nothing_to_train_and_annotating_leaves_its_buffers_unchanged():
    torch.manual_seed(0)
    annotator = TeacherAnnotator(MODEL, NUM_CLASSES, GradCamConfig(), PassOptions(), FRAME)
    teacher = annotator.model
    before = copy.deepcopy(teacher.state_dict())

    frames = random_frames(0)
    sides = torch.full((len(frames),), 8.0)
    labels = torch.zeros(len(frames), dtype=torch.long)
    annotator.annotate([FrameBatch(frames, sides, sides, labels)], ["a", "b", "c", "d"])

    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not any(module.training for module in teacher.modules())
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("view", [None, torch.eye(3)], ids=["whole_frame", "identity_matrix"])
def test_frozen_e2kd_with_the_identity_view_equals_a_live_teacher(view):
    tau, lambda_map = 4.0, 5.0
    teacher, student = freeze(tiny_model(1)), tiny_model(2).eval()
    inputs = random_frames(0)
    parameters = dict(student.named_parameters())

    images = inputs.float() / 255
    taught = teacher(images)
    top1 = taught.logits.argmax(dim=1, keepdim=True)
    teacher_maps = gradcam(teacher, taught, top1)
    learned = student(images)
    teacher_pixels, student_pixels = (
        F.interpolate(maps[:, 0], FRAME, mode="bilinear", align_corners=False).flatten(1)
        for maps in (teacher_maps, gradcam(student, learned, top1))
    )
    kl = F.kl_div(
        F.log_softmax(learned.logits / tau, dim=1),
        F.softmax(taught.logits / tau, dim=1),
        reduction="batchmean",
    )
    map_distance = 1 - F.cosine_similarity(student_pixels, teacher_pixels)
    live_loss = tau**2 * kl + lambda_map * map_distance.mean()
    live_gradients = torch.autograd.grad(live_loss, list(parameters.values()))

    targets = StoredTargets(
        teacher="teacher",
        logits=taught.logits,
        target_class=top1,
        maps=teacher_maps / teacher_maps.amax(dim=(2, 3, 4), keepdim=True),
        map_from_canonical=torch.eye(3).repeat(4, 1, 1),
    )
    training = Training(
        model=student,
        loss=build_loss(E2KDConfig(tau=tau, lambda_map=lambda_map)),
        optimizer=build_optimizer(OptimizerOptions(), list(parameters.values())),
    )
    terms = batch_loss(training, build_batch(inputs, targets, view), FRAME)
    gradients = torch.autograd.grad(terms.total, list(parameters.values()))

    assert terms.statistics["valid_map_fraction"].item() == 1
    assert map_distance.min() > 0.01
    assert terms.total.item() == pytest.approx(live_loss.item(), rel=1e-5)
    for name, found, wanted in zip(parameters, gradients, live_gradients, strict=True):
        assert (found - wanted).norm() <= 1e-5 * wanted.norm(), name


def test_clip_norm_bounds_the_step():
    training = build_training(0, KDConfig(), kind="sgd", lr=1.0, momentum=0.0, weight_decay=0.0)
    before = copy.deepcopy(training.model)

    train_step(training, random_batch(0), FRAME, clip_norm=1e-3)

    moves = [
        (after.detach() - start.detach()).square().sum()
        for after, start in zip(training.model.parameters(), before.parameters(), strict=True)
    ]
    assert torch.stack(moves).sum().sqrt().item() == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.slow
def test_fifty_e2kd_steps_leave_no_tensor_behind():
    training = build_training(0, E2KDConfig(lambda_ce=1.0))
    batches = [random_batch(seed) for seed in range(2)]
    log = StepLog(write=lambda line: None, every_steps=1000)

    def step(index: int) -> None:
        terms = train_step(training, batches[index % 2], FRAME, clip_norm=1.0)
        log.add(training, terms, records=4)

    for index in range(3):  # creates the optimizer's moments and the caches
        step(index)
    gc.collect()
    before = live_tensors()
    gc.disable()  # a tensor that only the collector frees counts as a leak
    try:
        for index in range(50):
            step(index)
        after = live_tensors()
    finally:
        gc.enable()

    assert after == before
    # A retained graph would keep tensors that the collector does not list.
    assert not any(value.requires_grad for value in log.sums.values())
    assert all(parameter.grad.grad_fn is None for parameter in training.model.parameters())


def test_training_from_a_state_continues_bit_for_bit():
    # The computation of a step depends on its number.
    method = E2KDConfig(lambda_ce=1.0, guided_step_interval=2)
    uninterrupted, first = build_training(0, method), build_training(0, method)
    take_steps(uninterrupted, range(6))
    take_steps(first, range(3))
    buffer = io.BytesIO()
    torch.save(first.state(), buffer)
    buffer.seek(0)

    resumed = build_training(1, method)
    resumed.load_state(torch.load(buffer, weights_only=True))
    take_steps(resumed, range(3, 6))

    assert resumed.global_step == 6
    assert_same_state(resumed, uninterrupted)


def test_checkpoint_restores_the_position(tmp_path):
    method = KDConfig()
    saved, resumed = build_training(0, method), build_training(1, method)
    take_steps(saved, range(2))
    saved.epoch = 7
    save_checkpoint(saved, tmp_path)

    load_checkpoint(resumed, tmp_path)

    assert (resumed.epoch, resumed.step, resumed.global_step) == (7, 2, 2)
    assert_same_state(resumed, saved)


def test_what_a_step_draws_is_a_function_of_seed_step_and_rank():
    def drawn(seed: int, step: int, rank: int) -> Tensor:
        training = build_training(0, KDConfig())
        training.seed, training.global_step, training.distributed = (
            seed,
            step,
            DistributedContext(rank),
        )
        torch.rand(step + 3 * rank)  # earlier draws must not matter
        training.seed_step()
        return torch.rand(8)

    first = drawn(0, 5, 0)

    assert torch.equal(drawn(0, 5, 0), first)
    assert not any(torch.equal(drawn(*other), first) for other in [(1, 5, 0), (0, 6, 0), (0, 5, 1)])


def test_loading_from_a_folder_without_a_checkpoint_changes_nothing(tmp_path):
    training, expected = build_training(0, KDConfig()), build_training(0, KDConfig())

    load_checkpoint(training, tmp_path)

    assert_same_state(training, expected)


def test_step_log_writes_the_mean_of_its_steps():
    training = build_training(0, KDConfig(), lr=0.25)
    lines: list[dict[str, float]] = []
    log = StepLog(write=lines.append, every_steps=2)

    for value in (1.0, 4.0, 9.0):
        training.global_step += 1
        terms = LossTerms(total=torch.tensor(value), terms={"kd": torch.tensor(2 * value)})
        log.add(training, terms, records=8)
        if log.is_due:
            log.flush(training)
    log.flush(training)
    log.flush(training)

    assert [(line["step"], line["total"], line["kd"]) for line in lines] == [
        (2, 2.5, 5),
        (3, 9, 18),
    ]
    assert lines[0]["epoch"] == 0
    assert lines[0]["lr"] == 0.25
    assert lines[0]["records_per_second"] > 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_not_a_number_stops_the_training(value):
    training = build_training(0, KDConfig())
    training.global_step, training.epoch = 17, 2
    lines: list[dict[str, float]] = []
    log = StepLog(write=lines.append, every_steps=2)

    log.add(training, LossTerms(total=torch.tensor(1.0)), records=8)
    log.add(training, LossTerms(total=torch.tensor(value)), records=8)
    with pytest.raises(DivergedError, match=rf"the loss is {value} at step 17 \(epoch 2\)"):
        log.flush(training)

    assert lines == []


def gradients_of(method, weights, rows):
    training = build_training(1, method)
    training.model.eval()  # so that records are independent
    training.weights = weights
    names = ("logits", "target_class", "maps", "map_from_canonical")
    targets = random_targets(0)
    targets = replace(targets, **{name: getattr(targets, name)[rows] for name in names})
    batch = build_batch(random_frames(0)[rows], targets, None)
    terms = batch_loss(training, replace(batch, record_index=rows, labels=rows % 3), FRAME)
    gradients = torch.autograd.grad(terms.total, list(training.model.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients]), terms.total.detach()


@pytest.mark.parametrize("method", [LabelsConfig(), KDConfig(tau=4.0), E2KDConfig(tau=4.0)])
def test_the_gradient_is_that_of_the_mean_of_weighted_losses(method):
    weights, rows = torch.tensor([0.5, 2.0, 0.0, 1.5]), torch.arange(4)
    found, value = gradients_of(method, weights, rows)
    plain, unweighted = gradients_of(method, None, rows)
    each = [gradients_of(method, None, rows[row : row + 1])[0] for row in range(4)]
    wanted = sum(weight * gradient for weight, gradient in zip(weights, each, strict=True)) / 4
    assert (found - wanted).norm() <= 1e-6 * wanted.norm()
    assert (found - plain).norm() > 0.1 * plain.norm()
    assert value == unweighted
    without = gradients_of(method, weights, rows[[0, 1, 3]])[0]  # of weight 0 nothing is left
    assert (found - without * 3 / 4).norm() <= 1e-6 * found.norm()
    assert torch.equal(gradients_of(method, torch.ones(4), rows)[0], plain)
