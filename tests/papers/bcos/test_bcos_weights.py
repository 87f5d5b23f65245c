"""Weights of a B-cos network: with the input they sum to the logit, and a loss on them has the true gradient."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from permafrost.config.models import CifarModelConfig
from permafrost.core.errors import ConfigError
from permafrost.models.explanations import forward_to_explain, gradcam
from permafrost.models.providers import build_model, freeze
from permafrost_papers.bcos import architectures as vit
from permafrost_papers.bcos import layers
from permafrost_papers.bcos.layers import (
    BcosConv2d,
    BcosSettings,
    ExplanationMode,
    LogitLayer,
    UncenteredBatchNorm2d,
    add_inverse,
)
from permafrost_papers.bcos.options import BcosModelConfig
from permafrost_papers.bcos.provider import BcosClassifier
from permafrost_papers.bcos.weight_maps import bcos_weights, contribution_map
from tests.support.bcos import FRAME, NUM_CLASSES, RESNET, double_images, named, network

FAMILIES = [
    RESNET,
    BcosModelConfig(name="resnet50", width=4, stem="small", logit_temperature=0.5),
    BcosModelConfig(name="densenet121", width=4, stem="small"),
]


VITS = [BcosModelConfig(name="simple_vit_ti", width=64), BcosModelConfig(name="vitc_ti", width=64)]


class ThreeLayers(nn.Module):
    """Smallest network with every kind of layer of a convolutional B-cos network."""

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


def detach_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Detach factors in the forward pass, as libraries for inference implement the explanation mode."""
    for module in (layers, vit):
        monkeypatch.setattr(module, "hold_factor", lambda factor, mode: factor.detach())


# ---- values of the weights -----------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("config", FAMILIES, ids=named)
def test_weights_times_input_are_the_logit_without_its_bias(config, training):
    model = network(config).train(training)
    output = model(double_images(records=3))
    bias = model.network.logit_layer.bias

    for label in range(NUM_CLASSES):
        maps = bcos_weights(model, output, torch.full((3, 1), label))
        total = contribution_map(maps, output.features).sum(dim=(1, 2, 3, 4))
        wanted = output.logits[:, label] - bias
        assert (total - wanted).abs().max() < 1e-10 * max(1.0, float(wanted.detach().abs().max()))
    assert (output.logits - bias).abs().max() > 1e-6  # the comparison is not 0 = 0


@pytest.mark.parametrize("config", VITS, ids=named)
def test_weights_of_a_vit_lack_what_the_position_embedding_adds(config):
    model = network(config)
    inner, logit_layer = model.network
    features = add_inverse(double_images(48)).requires_grad_()
    positions = inner.positions(features).requires_grad_()

    raw = inner.classify(inner.to_patch_embedding(features) + positions)
    with model.explanation_mode():
        of_input, of_positions = torch.autograd.grad(raw[:, 1].sum(), (features, positions))
    maps = bcos_weights(model, model(double_images(48)), torch.tensor([[1], [1]]))[:, 0]

    from_pixels = (of_input * features).sum()
    from_positions = (of_positions * positions).sum()
    assert torch.allclose(maps, of_input, atol=1e-12)
    assert torch.allclose(logit_layer(raw), model(double_images(48)).logits, atol=1e-12)
    assert (from_pixels + from_positions - raw[:, 1].sum()).abs() < 1e-8
    assert (from_pixels - raw[:, 1].sum()).abs() > 0.1 * raw[:, 1].sum().abs()


@pytest.mark.parametrize("config", [RESNET, VITS[1]], ids=named)
def test_weights_are_those_of_a_network_whose_factors_are_detached(config, monkeypatch):
    images, classes = double_images(48), torch.tensor([[0, 2], [1, 1]])
    model = network(config)
    maps = bcos_weights(model, model(images), classes)
    detach_factors(monkeypatch)

    expected = bcos_weights(model, model(images), classes)

    assert torch.allclose(maps, expected, rtol=0, atol=1e-12 * float(expected.detach().abs().max()))


def test_weights_are_not_the_plain_gradient():
    model = network(RESNET)
    output = model(double_images())
    maps = bcos_weights(model, output, torch.zeros(2, 1, dtype=torch.long))[:, 0]

    (gradient,) = torch.autograd.grad(output.logits[:, 0].sum(), output.features)

    assert (maps - gradient).norm() > 0.1 * gradient.norm()


@pytest.mark.parametrize("config", [RESNET, VITS[0]], ids=named)
def test_the_mode_changes_no_logit(config):
    model = network(config)
    outside = model(double_images(48)).logits

    with model.explanation_mode():
        inside = model(double_images(48)).logits

    assert torch.equal(inside, outside)


def test_weights_of_a_record_do_not_depend_on_the_others_in_eval_mode():
    model = network(RESNET)
    classes = torch.zeros(2, 1, dtype=torch.long)
    one = double_images(records=2)
    other = torch.cat([one[:1], double_images(records=1, seed=5)])

    maps = [bcos_weights(model, model(images), classes)[0] for images in (one, other)]

    assert torch.allclose(*maps, atol=1e-10)
    assert not torch.equal(one[1], other[1])


def test_weights_in_training_mode_are_those_of_a_record_with_the_batchs_variances(monkeypatch):
    """Outside the mode, a record's logit would also be attributed to the pixels of other records."""
    model = network(RESNET).train()
    images = double_images(records=3)
    classes = torch.tensor([[0], [1], [2]])
    variances = []
    for norm in model.modules():
        if isinstance(norm, UncenteredBatchNorm2d):
            norm.register_forward_pre_hook(
                lambda n, x: variances.append((n, x[0].detach().var((0, 2, 3), correction=0)))
            )
    output = model(images)
    maps = bcos_weights(model, output, classes)
    with model.explanation_mode():
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
    output = model(double_images())

    maps = bcos_weights(model, output, torch.tensor([[0, -1], [-1, 2]]))

    expected = bcos_weights(model, output, torch.tensor([[0], [2]]))[:, 0]
    assert maps.shape == (2, 2, 6, *FRAME)
    assert not maps[0, 1].any()
    assert not maps[1, 0].any()
    assert torch.equal(torch.stack([maps[0, 0], maps[1, 1]]), expected)


# ---- a loss on the weights -----------------------------------------------------------------------


def map_loss(model: BcosClassifier, images: Tensor) -> Tensor:
    """Map loss: 1 - cosine of the weights to fixed random weights."""
    classes = torch.arange(len(images))[:, None] % NUM_CLASSES
    maps = bcos_weights(model, model(images), classes).flatten(1)
    generator = torch.Generator().manual_seed(1)
    wanted = torch.randn(maps.shape, generator=generator, dtype=maps.dtype)
    return (1 - F.cosine_similarity(maps, wanted)).mean()


def relative_error_of_the_gradient(model: BcosClassifier, images: Tensor, step: float) -> float:
    """Relative error of the directional derivative against central differences along a random direction."""
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


@pytest.mark.parametrize(
    ("case", "detached"),
    [(case, False) for case in CASES]
    + [(c, True) for c in ("three_layers", "resnet_train", "vit")],
)
def test_the_gradient_of_a_loss_on_weights_is_that_of_finite_differences(
    case, detached, monkeypatch
):
    """A network that detaches its factors, the control, fails."""
    build, side, training, tolerance = CASES[case]
    if detached:
        detach_factors(monkeypatch)

    error = relative_error_of_the_gradient(build().train(training), double_images(side), 1e-6)

    assert error > 0.1 if detached else error < tolerance


def test_a_loss_that_is_differentiated_in_the_mode_is_refused():
    model = network(RESNET)
    loss = map_loss(model, double_images())

    with model.explanation_mode(), pytest.raises(RuntimeError, match="inside explanation mode"):
        loss.backward()

    map_loss(model, double_images()).backward()
    assert not model.explanation_mode.is_on


def test_the_mode_is_off_after_weights_that_could_not_be_had():
    model = network(RESNET)
    output = model(double_images())
    broken = output._replace(features=torch.zeros_like(output.features).requires_grad_())

    with pytest.raises(RuntimeError):
        bcos_weights(model, broken, torch.zeros(2, 1, dtype=torch.long))

    assert not model.explanation_mode.is_on


# ---- without gradients ---------------------------------------------------------------------------


def test_a_frozen_teachers_weights_need_no_gradients_outside():
    model = network(RESNET)
    classes = torch.tensor([[0], [2]])
    expected = bcos_weights(model, model(double_images()), classes).detach()
    teacher = freeze(model)

    with torch.no_grad():
        maps = bcos_weights(teacher, teacher(double_images()), classes)
    with_grad = bcos_weights(teacher, teacher(double_images()), classes)

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
        output = forward_to_explain(model, double_images())
        maps = bcos_weights(model, output, torch.tensor([[0], [1]]))
        again = bcos_weights(model, model(double_images()), torch.tensor([[0], [1]]))

    # One pass with forward_to_explain, two passes without it.
    assert passes == [2, 2, 2]
    assert torch.equal(maps, again)
    assert not maps.requires_grad


def test_inference_mode_is_refused_with_the_way_out():
    model = freeze(network(RESNET))
    with torch.inference_mode():
        output = model(double_images())

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
