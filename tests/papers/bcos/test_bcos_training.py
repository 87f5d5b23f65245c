"""B-cos teachers and students: stored weights, training steps and pictures."""

from __future__ import annotations

import copy
import gc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from permafrost.annotation.outputs import BatchInfo, MapsOutput
from permafrost.config.methods import E2KDConfig, KDConfig, MethodConfig
from permafrost.config.store import PassOptions
from permafrost.config.training import OptimizerOptions
from permafrost.core.batches import StoredTargets
from permafrost.core.errors import ConfigError
from permafrost.losses.base import build_loss
from permafrost.models.compute import ComputeSettings
from permafrost.models.providers import build_model, freeze
from permafrost.training.optim import build_optimizer
from permafrost.training.state import Training
from permafrost.training.step import batch_loss, train_step
from permafrost.training.targets import LiveTeacher
from permafrost_papers.bcos.layers import add_inverse
from permafrost_papers.bcos.options import BcosModelConfig, BcosWeightsConfig
from permafrost_papers.bcos.provider import BcosClassifier
from permafrost_papers.bcos.weight_maps import bcos_weights, color_picture, contribution_map
from tests.support.batches import build_batch
from tests.support.bcos import FRAME, NUM_CLASSES, RESNET, double_images, named, network
from tests.support.trainings import HostReads

# ---- teachers and students -----------------------------------------------------------------------


def bcos_frames(seed: int, records: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (records, 3, *FRAME), generator=generator, dtype=torch.uint8)


def unlabeled(count: int) -> BatchInfo:
    return BatchInfo([str(n) for n in range(count)], torch.full((count,), -1))


def annotated_targets(teacher: BcosClassifier, frames: Tensor) -> StoredTargets:
    """Targets with the values that a pass would store."""
    output_kind = MapsOutput(PassOptions(), BcosWeightsConfig())
    with torch.no_grad():
        output = teacher(frames.float() / 255)
        values = output_kind.encode(teacher, output, unlabeled(len(frames))).values
    return StoredTargets(
        teacher="teacher",
        logits=output.logits,
        target_class=values["target_class"].long(),
        maps=values["map"].float(),
        map_from_canonical=torch.eye(3).repeat(len(frames), 1, 1),
    )


def training_of(
    config: BcosModelConfig, method: MethodConfig, seed: int = 0, **compute_settings
) -> Training:
    torch.manual_seed(seed)
    model = build_model(config, NUM_CLASSES)
    return Training(
        model=model,
        loss=build_loss(method),
        optimizer=build_optimizer(OptimizerOptions(lr=1e-3), list(model.parameters())),
        explain=bcos_weights,
        compute_settings=ComputeSettings(**compute_settings),
    )


E2KD = E2KDConfig(tau=2.0, lambda_map=3.0)


def test_a_pass_stores_six_channels_at_the_inputs_resolution():
    teacher = freeze(build_model(RESNET, NUM_CLASSES))
    output_kind = MapsOutput(PassOptions(), BcosWeightsConfig())
    with torch.no_grad():
        output = teacher(double_images(16).float())

    fields = {spec.name: spec for spec in output_kind.fields(teacher, output)}
    encoded = output_kind.encode(teacher, output, unlabeled(2))

    assert fields["map"].shape == (1, 6, *FRAME)
    assert encoded.values["map"].shape == (2, 1, 6, *FRAME)
    assert (encoded.values["map"] < 0).any()
    assert encoded.fidelity["map"] > 0.99999


def test_a_pass_explains_every_label_of_a_record_and_none_where_there_is_none():
    teacher = freeze(build_model(RESNET, NUM_CLASSES))
    output_kind = MapsOutput(
        PassOptions(), BcosWeightsConfig(target_classes="all_gt", max_classes=2)
    )
    labels = torch.zeros(2, NUM_CLASSES)
    labels[0, [0, 2]] = 1
    with torch.no_grad():
        output = teacher(double_images(16).float())

    encoded = output_kind.encode(teacher, output, BatchInfo(["a", "b"], labels))

    classes = encoded.values["target_class"].long()
    assert sorted(classes[0].tolist()) == [0, 2]
    assert classes[1].tolist() == [-1, -1]
    assert not encoded.values["map"][1].any()
    expected = bcos_weights(teacher, output, classes)[0]
    for stored, weights in zip(encoded.values["map"][0], expected.detach(), strict=True):
        assert np.allclose(stored, weights / weights.abs().max(), atol=1e-3)


def test_a_student_that_is_its_own_teacher_has_no_loss():
    training = training_of(RESNET, E2KD)
    training.model.eval()
    frames = bcos_frames(0)

    terms = batch_loss(
        training, build_batch(frames, annotated_targets(training.model, frames), None), FRAME
    )

    assert terms.total.item() < 1e-4
    assert terms.statistics["valid_map_fraction"] == 1


def test_one_forward_pass_has_the_gradient_of_two():
    """KD and the weights share a forward pass whose explanation mode is on only while the weights are computed."""
    teacher = freeze(training_of(RESNET, KDConfig(), seed=7).model)
    batch = build_batch(bcos_frames(1), annotated_targets(teacher, bcos_frames(1)), None)

    def gradient(method: MethodConfig) -> Tensor:
        training = training_of(RESNET, method)
        training.model.double().eval()
        single = training.model.forward
        training.model.forward = lambda images, inner: single(images.double(), inner)
        loss = batch_loss(training, batch, FRAME).total
        parts = torch.autograd.grad(loss, list(training.model.parameters()))
        return torch.cat([part.flatten() for part in parts])

    both = gradient(E2KD)

    only_kd = gradient(KDConfig(tau=2.0))
    only_map = gradient(E2KDConfig(lambda_kd=0.0, lambda_map=3.0))
    assert (both - only_kd - only_map).norm() < 1e-8 * both.norm()
    assert only_map.norm() > 1e-3 * both.norm()


@pytest.mark.parametrize("config", [RESNET, BcosModelConfig(name="vitc_ti", width=64)], ids=named)
def test_a_live_teacher_in_the_mode_leaves_the_student_out_of_it(config):
    teacher = freeze(training_of(RESNET, KDConfig(), seed=7).model)
    training = training_of(config, E2KD)
    training.targets = LiveTeacher("teacher", teacher, bcos_weights, FRAME)
    seen = []
    training.targets.explain = lambda *given: (
        seen.append((teacher.explanation_mode.is_on, training.model.explanation_mode.is_on))
        or bcos_weights(*given)
    )
    before = copy.deepcopy(training.model.state_dict())

    terms = train_step(training, build_batch(bcos_frames(0), None, None), FRAME, clip_norm=1.0)

    assert seen == [(False, False)]
    assert terms.total.isfinite()
    assert terms.terms["map"] > 0.1
    assert teacher.explanation_mode is not training.model.explanation_mode
    with teacher.explanation_mode():
        assert not training.model.explanation_mode.is_on
    assert any(not torch.equal(before[n], t) for n, t in training.model.state_dict().items())


@pytest.mark.parametrize("config", [RESNET, BcosModelConfig(name="vitc_ti", width=64)], ids=named)
def test_a_step_reads_nothing_back_from_the_device(config):
    teacher = freeze(training_of(RESNET, KDConfig(), seed=7).model)
    batch = build_batch(bcos_frames(0), annotated_targets(teacher, bcos_frames(0)), None)
    training = training_of(config, E2KD)
    train_step(training, batch, FRAME, clip_norm=None, agc=0.01)  # creates the optimizer's moments

    with HostReads(training.optimizer) as reads:
        train_step(training, batch, FRAME, clip_norm=None, agc=0.01)

    assert reads.found == []


def test_training_on_weights_brings_them_to_the_teachers():
    teacher = freeze(training_of(RESNET, KDConfig(), seed=7).model)
    batch = build_batch(bcos_frames(0), annotated_targets(teacher, bcos_frames(0)), None)
    training = training_of(RESNET, E2KDConfig(lambda_kd=0.0))

    losses = [
        train_step(training, batch, FRAME, clip_norm=1.0).terms["map"].item() for _ in range(30)
    ]

    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_mixed_precision_has_the_same_gradient_up_to_its_rounding(precision):
    teacher = freeze(training_of(RESNET, KDConfig(), seed=7).model)
    batch = build_batch(bcos_frames(1), annotated_targets(teacher, bcos_frames(1)), None)

    def gradient(**compute_settings) -> Tensor:
        training = training_of(RESNET, E2KD, **compute_settings)
        training.model.eval()
        loss = batch_loss(training, batch, FRAME).total
        parts = torch.autograd.grad(loss, list(training.model.parameters()))
        return torch.cat([part.flatten() for part in parts])

    exact, found = gradient(), gradient(precision=precision)

    assert F.cosine_similarity(found, exact, dim=0) > 0.95
    assert not torch.equal(found, exact)


def test_small_weights_survive_float16():
    """Half of these weights are below the smallest normal number of float16."""
    torch.manual_seed(0)
    config = BcosModelConfig(name="resnet8", width=4, logit_temperature=3000.0)
    model = build_model(config, NUM_CLASSES).train()
    images, classes = double_images(32).float(), torch.tensor([[0], [1]])
    exact = bcos_weights(model, model(images), classes)
    with torch.autocast("cpu", dtype=torch.float16):
        output = model(images)

    maps = bcos_weights(model, output, classes)

    assert maps.dtype == torch.float32
    assert exact.abs().median() < torch.finfo(torch.float16).smallest_normal
    assert (F.cosine_similarity(maps.flatten(1), exact.flatten(1)) > 0.999).all()


def test_a_b_cos_student_of_maps_is_not_compiled():
    with pytest.raises(ConfigError, match=r"trainer\.compile=true"):
        training_of(RESNET, E2KD, compile=True)


def test_twenty_steps_leave_no_tensor_behind():
    teacher = freeze(training_of(RESNET, KDConfig(), seed=7).model)
    batch = build_batch(bcos_frames(0), annotated_targets(teacher, bcos_frames(0)), None)
    training = training_of(RESNET, E2KD)

    def live_tensors() -> int:
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    for _ in range(3):
        train_step(training, batch, FRAME, clip_norm=1.0)
    gc.collect()
    gc.disable()
    try:
        before = live_tensors()
        for _ in range(20):
            train_step(training, batch, FRAME, clip_norm=1.0)
        after = live_tensors()
    finally:
        gc.enable()

    assert after == before


# ---- pictures ------------------------------------------------------------------------------------


def test_a_contribution_is_the_product_summed_over_channels():
    maps = torch.tensor([1.0, 2.0, 0.0, -1.0, 0.0, 0.5]).view(1, 1, 6, 1, 1)
    features = torch.tensor([0.5, 0.25, 1.0, 0.5, 0.75, 0.0]).view(1, 6, 1, 1)

    assert contribution_map(maps, features).item() == 0.5 + 0.5 - 0.5


def test_a_picture_shows_the_color_that_the_weights_look_for_and_nothing_that_speaks_against():
    color = torch.tensor([0.2, 0.7, 1.0], dtype=torch.float64)
    features = add_inverse(color.view(1, 3, 1, 1).expand(1, 3, 4, 4))
    # Proportional to the input, so that the picture shows its color.
    maps = features[:, None].clone()
    maps[..., 0, :] *= -1  # the first row contributes negatively

    picture = color_picture(maps, features)

    assert picture.shape == (1, 1, 4, 4, 4)
    assert (picture[..., 0, :, 3] <= 1e-9).all()
    assert (picture[..., 1:, :, 3] == 1).all()
    assert torch.allclose(picture[0, 0, 1:, :, :3], color.expand(3, 4, 3), atol=1e-6)


def test_a_picture_of_any_weights_is_in_range():
    model = network(RESNET)
    output = model(double_images())
    maps = bcos_weights(model, output, torch.tensor([[0, -1], [1, 2]])).detach()

    picture = color_picture(maps, output.features.detach())

    assert picture.shape == (2, 2, *FRAME, 4)
    assert picture.min() >= 0
    assert picture.max() <= 1
    assert picture[0, 0, ..., 3].max() > 0
    assert not picture[0, 1].any()  # the picture is empty without a target class
