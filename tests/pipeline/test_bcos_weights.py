"""The weights of a B-cos network: they add up to the logit, and a loss on them has the true gradient."""

from __future__ import annotations

import copy
import gc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.annotation.payloads.explanation_map import MapPayload
from pipeline.annotation.payloads.payload import BatchInfo
from pipeline.config.explainers import BcosWeightsConfig
from pipeline.config.methods import E2KDConfig, KDConfig, MethodConfig
from pipeline.config.models import BcosModelConfig, CifarModelConfig
from pipeline.config.store import PassOptions
from pipeline.config.training import OptimizerOptions
from pipeline.core.errors import ConfigError
from pipeline.core.records import Batch, StoredTargets
from pipeline.losses.build import build_loss
from pipeline.models.bcos import layers, vit
from pipeline.models.bcos.classifier import BcosClassifier
from pipeline.models.bcos.layers import (
    BcosConv2d,
    BcosSettings,
    ExplanationMode,
    LogitLayer,
    UncenteredBatchNorm2d,
    add_inverse,
)
from pipeline.models.explainers.bcos_weights import bcos_weights, color_picture, contribution_map
from pipeline.models.explainers.explain import forward_to_explain
from pipeline.models.explainers.gradcam import gradcam
from pipeline.models.providers import build_model, freeze
from pipeline.training.live_targets import LiveTeacher
from pipeline.training.state import ComputeSettings, Training, build_optimizer
from pipeline.training.step import batch_loss, train_step
from tests.pipeline.test_numerics import HostReads

NUM_CLASSES = 3
FRAME = (16, 16)
RESNET = BcosModelConfig(name="resnet8", width=4)
FAMILIES = [
    RESNET,
    BcosModelConfig(name="resnet50", width=4, stem="small", logit_temperature=0.5),
    BcosModelConfig(name="densenet121", width=4, stem="small"),
]
VITS = [
    BcosModelConfig(name="simple_vit_ti", width=64),
    BcosModelConfig(name="vitc_ti", width=64),
]


def named(value: object) -> str | None:
    return value.name if isinstance(value, BcosModelConfig) else None


def network(config: BcosModelConfig, seed: int = 0) -> BcosClassifier:
    """In float64 and eval mode, with norms that have seen data and weights that are not all alike."""
    torch.manual_seed(seed)
    model = build_model(config, NUM_CLASSES).double().eval()
    for name, tensor in model.network.state_dict().items():
        if name.endswith(("running_var", "bn1.weight", "norm.weight", "norm1.weight")):
            tensor.uniform_(0.5, 2.0)
    return model


def random_images(side: int = 16, records: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(records, 3, side, side, generator=generator, dtype=torch.float64)


class ThreeLayers(nn.Module):
    """The smallest network with everything that a convolutional one has."""

    def __init__(self, shared: BcosSettings) -> None:
        super().__init__()
        self.conv1 = BcosConv2d(shared, 6, 8, 3, padding=1)
        self.bn1 = UncenteredBatchNorm2d(shared, 8)
        self.conv2 = BcosConv2d(shared, 8, 8, 3, stride=2, padding=1)
        self.fc = BcosConv2d(shared, 8, NUM_CLASSES, 1)
        self.logit_layer = LogitLayer(1.0, -1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.logit_layer(self.fc(self.conv2(self.bn1(self.conv1(x)))).mean(dim=(2, 3)))


def three_layers() -> BcosClassifier:
    torch.manual_seed(0)
    mode = ExplanationMode()
    return BcosClassifier(ThreeLayers(BcosSettings(mode)), mode).double().eval()


def detached_scale(factor: Tensor, x: Tensor, mode: ExplanationMode) -> Tensor:
    """What a library for inference does in its explanation mode."""
    return factor.detach() * x


def detached_attend(attention: Tensor, values: Tensor, mode: ExplanationMode) -> Tensor:
    return attention.detach() @ values


def detach_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "scale", detached_scale)
    monkeypatch.setattr(vit, "attend", detached_attend)


# ---- what the weights are ------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("config", FAMILIES, ids=named)
def test_weights_times_input_are_the_logit_without_its_bias(config, training):
    model = network(config).train(training)
    output = model(random_images(records=3))
    bias = model.network.logit_layer.bias

    for label in range(NUM_CLASSES):
        maps = bcos_weights(model, output, torch.full((3, 1), label))
        total = contribution_map(maps, output.features).sum(dim=(1, 2, 3, 4))
        wanted = output.logits[:, label] - bias
        assert (total - wanted).abs().max() < 1e-10 * max(1.0, float(wanted.detach().abs().max()))
    assert (output.logits - bias).abs().max() > 1e-6  # the claim is not 0 = 0


@pytest.mark.parametrize("config", VITS, ids=named)
def test_weights_of_a_vit_lack_what_the_position_embedding_adds(config):
    model = network(config)
    inner, logit_layer = model.network
    features = add_inverse(random_images(48)).requires_grad_()
    positions = inner.positions(features).requires_grad_()

    raw = inner.classify(inner.to_patch_embedding(features) + positions)
    with model.mode():
        of_input, of_positions = torch.autograd.grad(raw[:, 1].sum(), (features, positions))
    maps = bcos_weights(model, model(random_images(48)), torch.tensor([[1], [1]]))[:, 0]

    from_pixels = (of_input * features).sum()
    from_positions = (of_positions * positions).sum()
    assert torch.allclose(maps, of_input, atol=1e-12)
    assert torch.allclose(logit_layer(raw), model(random_images(48)).logits, atol=1e-12)
    assert (from_pixels + from_positions - raw[:, 1].sum()).abs() < 1e-8
    assert (from_pixels - raw[:, 1].sum()).abs() > 0.1 * raw[:, 1].sum().abs()


@pytest.mark.parametrize("config", [RESNET, VITS[1]], ids=named)
def test_weights_are_those_of_a_network_whose_factors_are_detached(config, monkeypatch):
    images, classes = random_images(48), torch.tensor([[0, 2], [1, 1]])
    model = network(config)
    maps = bcos_weights(model, model(images), classes)
    detach_factors(monkeypatch)

    expected = bcos_weights(model, model(images), classes)

    assert torch.allclose(maps, expected, rtol=0, atol=1e-12 * float(expected.detach().abs().max()))


def test_weights_are_not_the_plain_gradient():
    model = network(RESNET)
    output = model(random_images())
    maps = bcos_weights(model, output, torch.zeros(2, 1, dtype=torch.long))[:, 0]

    (gradient,) = torch.autograd.grad(output.logits[:, 0].sum(), output.features)

    assert (maps - gradient).norm() > 0.1 * gradient.norm()


@pytest.mark.parametrize("config", [RESNET, VITS[0]], ids=named)
def test_the_mode_changes_no_logit(config):
    model = network(config)
    outside = model(random_images(48)).logits

    with model.mode():
        inside = model(random_images(48)).logits

    assert torch.equal(inside, outside)


def test_weights_of_a_record_do_not_depend_on_the_others_in_eval_mode():
    model = network(RESNET)
    classes = torch.zeros(2, 1, dtype=torch.long)
    one = random_images(records=2)
    other = torch.cat([one[:1], random_images(records=1, seed=5)])

    maps = [bcos_weights(model, model(images), classes)[0] for images in (one, other)]

    assert torch.allclose(*maps, atol=1e-10)
    assert not torch.equal(one[1], other[1])


def test_weights_in_training_mode_are_those_of_a_record_with_the_batchs_variances(monkeypatch):
    """Without the mode a record's logit would also be explained by the others' pixels."""
    model = network(RESNET).train()
    images = random_images(records=3)
    classes = torch.tensor([[0], [1], [2]])
    variances = []
    for norm in model.modules():
        if isinstance(norm, UncenteredBatchNorm2d):
            norm.register_forward_pre_hook(
                lambda n, x: variances.append((n, x[0].detach().var((0, 2, 3), correction=0)))
            )
    output = model(images)
    maps = bcos_weights(model, output, classes)
    with model.mode():
        (of_one,) = torch.autograd.grad(output.logits[0, 0], output.features, retain_graph=True)
    leaking = torch.autograd.grad(output.logits[0, 0], output.features)[0]

    for norm, variance in variances:
        norm.running_var.copy_(variance)
    alone = bcos_weights(model.eval(), model(images[:1]), classes[:1])

    assert torch.allclose(maps[0], alone[0], atol=1e-10)
    assert not of_one[1:].any()
    assert leaking[1:].abs().max() > 0


def test_a_negative_class_has_a_zero_map_and_others_theirs():
    model = network(RESNET)
    output = model(random_images())

    maps = bcos_weights(model, output, torch.tensor([[0, -1], [-1, 2]]))

    expected = bcos_weights(model, output, torch.tensor([[0], [2]]))[:, 0]
    assert maps.shape == (2, 2, 6, *FRAME)
    assert not maps[0, 1].any()
    assert not maps[1, 0].any()
    assert torch.equal(torch.stack([maps[0, 0], maps[1, 1]]), expected)


# ---- a loss on the weights -----------------------------------------------------------------------


def map_loss(model: BcosClassifier, images: Tensor) -> Tensor:
    """1 - cosine of the weights to fixed ones."""
    classes = torch.arange(len(images))[:, None] % NUM_CLASSES
    maps = bcos_weights(model, model(images), classes).flatten(1)
    generator = torch.Generator().manual_seed(1)
    wanted = torch.randn(maps.shape, generator=generator, dtype=maps.dtype)
    return (1 - F.cosine_similarity(maps, wanted)).mean()


def relative_error_of_the_gradient(model: BcosClassifier, images: Tensor, step: float) -> float:
    """Of its product with a direction, against central differences along it."""
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(
        map_loss(model, images), parameters, allow_unused=True, materialize_grads=True
    )
    generator = torch.Generator().manual_seed(2)
    direction = [
        torch.randn(p.shape, generator=generator, dtype=p.dtype) * p.detach().std().clamp(min=0.1)
        for p in parameters
    ]
    analytic = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))

    def moved(by: float) -> float:
        other = copy.deepcopy(model)
        with torch.no_grad():
            for parameter, along in zip(other.parameters(), direction, strict=True):
                parameter += by * along
        return float(map_loss(other, images).detach())

    numeric = (moved(step) - moved(-step)) / (2 * step)
    return abs(analytic - numeric) / abs(numeric)


CASES = {
    "three_layers": (three_layers, 8, False, 1e-5),
    "resnet_eval": (lambda: network(RESNET), 16, False, 1e-4),
    "resnet_train": (lambda: network(RESNET), 16, True, 1e-4),
    "densenet_train": (lambda: network(FAMILIES[2]), 16, True, 1e-4),
    "vit": (lambda: network(VITS[0]), 32, False, 1e-4),
    "vitc": (lambda: network(VITS[1]), 48, False, 1e-4),
}


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_of_a_loss_on_weights_is_that_of_finite_differences(case):
    build, side, training, tolerance = CASES[case]

    error = relative_error_of_the_gradient(build().train(training), random_images(side), 1e-6)

    assert error < tolerance


@pytest.mark.parametrize("case", ["three_layers", "resnet_train", "vit"])
def test_a_network_that_detaches_its_factors_fails_that_test(case, monkeypatch):
    build, side, training, _ = CASES[case]
    detach_factors(monkeypatch)

    error = relative_error_of_the_gradient(build().train(training), random_images(side), 1e-6)

    assert error > 0.1


def test_a_loss_that_is_differentiated_in_the_mode_is_refused():
    model = network(RESNET)
    loss = map_loss(model, random_images())

    with model.mode(), pytest.raises(RuntimeError, match="inside explanation mode"):
        loss.backward()

    map_loss(model, random_images()).backward()
    assert not model.mode.is_on


def test_the_mode_is_off_after_weights_that_could_not_be_had():
    model = network(RESNET)
    output = model(random_images())
    broken = output._replace(features=torch.zeros_like(output.features).requires_grad_())

    with pytest.raises(RuntimeError):
        bcos_weights(model, broken, torch.zeros(2, 1, dtype=torch.long))

    assert not model.mode.is_on


# ---- without gradients ---------------------------------------------------------------------------


def test_a_frozen_teachers_weights_need_no_gradients_outside():
    model = network(RESNET)
    classes = torch.tensor([[0], [2]])
    expected = bcos_weights(model, model(random_images()), classes).detach()
    teacher = freeze(model)

    with torch.no_grad():
        maps = bcos_weights(teacher, teacher(random_images()), classes)
    with_grad = bcos_weights(teacher, teacher(random_images()), classes)

    assert torch.allclose(maps, expected, atol=1e-14)
    assert not maps.requires_grad
    assert not with_grad.requires_grad
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_one_forward_pass_serves_a_frozen_network(monkeypatch):
    model = freeze(network(RESNET))
    passes = []
    inner = type(model).forward_head

    def counted(self, features, context):
        passes.append(len(features))
        return inner(self, features, context)

    monkeypatch.setattr(type(model), "forward_head", counted)
    with torch.no_grad():
        output = forward_to_explain(model, random_images())
        maps = bcos_weights(model, output, torch.tensor([[0], [1]]))
        again = bcos_weights(model, model(random_images()), torch.tensor([[0], [1]]))

    assert passes == [2, 2, 2]  # not recorded: a forward pass, and one more for the weights
    assert torch.equal(maps, again)
    assert not maps.requires_grad


def test_inference_mode_is_refused_with_the_way_out():
    model = freeze(network(RESNET))
    with torch.inference_mode():
        output = model(random_images())

    for inside in (True, False):
        with (
            torch.inference_mode(inside),
            pytest.raises(RuntimeError, match=r"inference_mode forbids; use torch\.no_grad"),
        ):
            bcos_weights(model, output, torch.zeros(2, 1, dtype=torch.long))


def test_an_explainer_refuses_the_other_kind_of_network():
    plain = build_model(CifarModelConfig(name="resnet8", width=4, weights="random"), NUM_CLASSES)
    bcos = build_model(RESNET, NUM_CLASSES)
    images, classes = torch.rand(1, 3, *FRAME), torch.zeros(1, 1, dtype=torch.long)

    with pytest.raises(ConfigError, match=r"not CifarResNet; set explainer=gradcam"):
        bcos_weights(plain, plain(images), classes)
    with pytest.raises(ConfigError, match=r"BcosResNet.*set explainer=bcos_weights"):
        gradcam(bcos, bcos(images), classes)


# ---- teachers and students -----------------------------------------------------------------------


def random_frames(seed: int, records: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (records, 3, *FRAME), generator=generator, dtype=torch.uint8)


def build_batch(inputs: Tensor, targets: StoredTargets | None) -> Batch:
    return Batch(
        keys=tuple(f"record-{index}" for index in range(len(inputs))),
        record_index=torch.arange(len(inputs)),
        inputs=inputs,
        canonical_from_view=None,
        view_index=torch.full((len(inputs),), -1),
        original_size=torch.full((len(inputs), 2), 16.0),
        labels=torch.arange(len(inputs)) % NUM_CLASSES,
        groups=torch.full((len(inputs),), -1),
        targets=() if targets is None else (targets,),
    )


def unlabeled(count: int) -> BatchInfo:
    return BatchInfo([str(n) for n in range(count)], torch.full((count,), -1))


def stored_targets(teacher: BcosClassifier, frames: Tensor) -> StoredTargets:
    """As a pass stores them."""
    payload = MapPayload(PassOptions(), BcosWeightsConfig())
    with torch.no_grad():
        output = teacher(frames.float() / 255)
        values = payload.encode(teacher, output, unlabeled(len(frames))).values
    return StoredTargets(
        teacher="teacher",
        logits=output.logits,
        explained_class=torch.from_numpy(values["explained_class"]).long(),
        maps=torch.from_numpy(values["map"]).float(),
        map_from_canonical=torch.eye(3).repeat(len(frames), 1, 1),
    )


def student_of(
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
    payload = MapPayload(PassOptions(), BcosWeightsConfig())
    with torch.no_grad():
        output = teacher(random_images(16).float())

    fields = {spec.name: spec for spec in payload.fields(teacher, output)}
    encoded = payload.encode(teacher, output, unlabeled(2))

    assert fields["map"].shape == (1, 6, *FRAME)
    assert encoded.values["map"].shape == (2, 1, 6, *FRAME)
    assert (encoded.values["map"] < 0).any()
    assert encoded.fidelity["map"] > 0.99999


def test_a_pass_explains_every_label_of_a_record_and_none_where_there_is_none():
    teacher = freeze(build_model(RESNET, NUM_CLASSES))
    payload = MapPayload(
        PassOptions(), BcosWeightsConfig(explained_classes="all_gt", max_classes=2)
    )
    labels = torch.zeros(2, NUM_CLASSES)
    labels[0, [0, 2]] = 1
    with torch.no_grad():
        output = teacher(random_images(16).float())

    encoded = payload.encode(teacher, output, BatchInfo(["a", "b"], labels))

    classes = torch.from_numpy(encoded.values["explained_class"]).long()
    assert sorted(classes[0].tolist()) == [0, 2]
    assert classes[1].tolist() == [-1, -1]
    assert not encoded.values["map"][1].any()
    expected = bcos_weights(teacher, output, classes)[0]
    for stored, weights in zip(encoded.values["map"][0], expected.detach(), strict=True):
        assert np.allclose(stored, weights / weights.abs().max(), atol=1e-3)


def test_a_student_that_is_its_own_teacher_has_no_loss():
    training = student_of(RESNET, E2KD)
    training.model.eval()
    frames = random_frames(0)

    terms = batch_loss(training, build_batch(frames, stored_targets(training.model, frames)), FRAME)

    assert terms.total.item() < 1e-4
    assert terms.statistics["valid_map_fraction"] == 1


def test_one_forward_pass_has_the_gradient_of_two():
    """KD and the weights share a pass whose mode is on only while the weights are taken."""
    teacher = freeze(student_of(RESNET, KDConfig(), seed=7).model)
    batch = build_batch(random_frames(1), stored_targets(teacher, random_frames(1)))

    def gradient(method: MethodConfig) -> Tensor:
        training = student_of(RESNET, method)
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
    teacher = freeze(student_of(RESNET, KDConfig(), seed=7).model)
    training = student_of(config, E2KD)
    training.targets = LiveTeacher("teacher", teacher, bcos_weights, FRAME)
    seen = []
    training.targets.explain = lambda *given: (
        seen.append((teacher.mode.is_on, training.model.mode.is_on)) or bcos_weights(*given)
    )
    before = copy.deepcopy(training.model.state_dict())

    terms = train_step(training, build_batch(random_frames(0), None), FRAME, clip_norm=1.0)

    assert seen == [(False, False)]
    assert terms.total.isfinite()
    assert terms.terms["map"] > 0.1
    assert teacher.mode is not training.model.mode
    with teacher.mode():
        assert not training.model.mode.is_on
    assert any(not torch.equal(before[n], t) for n, t in training.model.state_dict().items())


@pytest.mark.parametrize("config", [RESNET, BcosModelConfig(name="vitc_ti", width=64)], ids=named)
def test_a_step_reads_nothing_back_from_the_device(config):
    teacher = freeze(student_of(RESNET, KDConfig(), seed=7).model)
    batch = build_batch(random_frames(0), stored_targets(teacher, random_frames(0)))
    training = student_of(config, E2KD)
    train_step(training, batch, FRAME, clip_norm=None, agc=0.01)  # moments come into being

    with HostReads(training.optimizer) as reads:
        train_step(training, batch, FRAME, clip_norm=None, agc=0.01)

    assert reads.found == []


def test_training_on_weights_brings_them_to_the_teachers():
    teacher = freeze(student_of(RESNET, KDConfig(), seed=7).model)
    batch = build_batch(random_frames(0), stored_targets(teacher, random_frames(0)))
    training = student_of(RESNET, E2KDConfig(lambda_kd=0.0))

    losses = [
        train_step(training, batch, FRAME, clip_norm=1.0).terms["map"].item() for _ in range(30)
    ]

    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_mixed_precision_has_the_same_gradient_up_to_its_rounding(precision):
    teacher = freeze(student_of(RESNET, KDConfig(), seed=7).model)
    batch = build_batch(random_frames(1), stored_targets(teacher, random_frames(1)))

    def gradient(**compute_settings) -> Tensor:
        training = student_of(RESNET, E2KD, **compute_settings)
        training.model.eval()
        loss = batch_loss(training, batch, FRAME).total
        parts = torch.autograd.grad(loss, list(training.model.parameters()))
        return torch.cat([part.flatten() for part in parts])

    exact, found = gradient(), gradient(precision=precision)

    assert F.cosine_similarity(found, exact, dim=0) > 0.95
    assert not torch.equal(found, exact)


def test_small_weights_survive_float16():
    """Half of these are below what float16 holds in full."""
    torch.manual_seed(0)
    config = BcosModelConfig(name="resnet8", width=4, logit_temperature=3000.0)
    model = build_model(config, NUM_CLASSES).train()
    images, classes = random_images(32).float(), torch.tensor([[0], [1]])
    exact = bcos_weights(model, model(images), classes)
    with torch.autocast("cpu", dtype=torch.float16):
        output = model(images)

    maps = bcos_weights(model, output, classes)

    assert maps.dtype == torch.float32
    assert exact.abs().median() < torch.finfo(torch.float16).smallest_normal
    assert (F.cosine_similarity(maps.flatten(1), exact.flatten(1)) > 0.999).all()


def test_a_b_cos_student_of_maps_is_not_compiled():
    with pytest.raises(ConfigError, match=r"trainer\.compile=true"):
        student_of(RESNET, E2KD, compile=True)


def test_twenty_steps_leave_no_tensor_behind():
    teacher = freeze(student_of(RESNET, KDConfig(), seed=7).model)
    batch = build_batch(random_frames(0), stored_targets(teacher, random_frames(0)))
    training = student_of(RESNET, E2KD)

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
    maps = features[:, None].clone()  # in proportion to the input: the color itself
    maps[..., 0, :] *= -1  # the first row speaks against the class

    picture = color_picture(maps, features)

    assert picture.shape == (1, 1, 4, 4, 4)
    assert (picture[..., 0, :, 3] <= 1e-9).all()
    assert (picture[..., 1:, :, 3] == 1).all()
    assert torch.allclose(picture[0, 0, 1:, :, :3], color.expand(3, 4, 3), atol=1e-6)


@pytest.mark.parametrize("smooth", [0, 3])
def test_a_picture_of_any_weights_is_in_range(smooth):
    model = network(RESNET)
    output = model(random_images())
    maps = bcos_weights(model, output, torch.tensor([[0, -1], [1, 2]])).detach()

    picture = color_picture(maps, output.features.detach(), smooth)

    assert picture.shape == (2, 2, *FRAME, 4)
    assert picture.min() >= 0
    assert picture.max() <= 1
    assert picture[0, 0, ..., 3].max() > 0
    assert not picture[0, 1].any()  # no class, no picture
