"""Explainers at the pixels against Captum's, and the properties that a student's training needs of them."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from permafrost.config.explainers import explainer_line, explainer_of_line
from permafrost.core.errors import ConfigError
from permafrost.models.classifier import Classifier
from permafrost.models.explanations import explainer_named, forward_to_explain
from permafrost.models.module import ModuleClassifier
from tests.support.gradcam import (
    NUM_CLASSES,
    largest_relative_difference,
    timm_vit,
    torchvision_model,
)
from tests.support.tensors import random_images

LINES = (
    "gradient",
    "input_x_gradient",
    "integrated_gradients steps=4",
    "integrated_gradients steps=3 baseline=0.5",
    "smoothgrad samples=3 noise=0.1",
)
NETWORKS = ("resnet18", "vgg11_bn", "convnext_tiny", "vit")


@cache
def network(name: str) -> Classifier:
    torch.manual_seed(0)
    model = timm_vit() if name == "vit" else torchvision_model(name)
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                nn.init.normal_(norm.running_mean, std=0.1)
                nn.init.uniform_(norm.running_var, 0.5, 2)
    return model.eval()


def explain(model: Classifier, line: str, images: Tensor, classes: Tensor) -> Tensor:
    return explainer_named(line)(model, forward_to_explain(model, images), classes)


def captum_maps(model: Classifier, line: str, images: Tensor, classes: Tensor) -> Tensor:
    """Compute the maps [B, H, W] of Captum's own code."""
    captum = pytest.importorskip("captum.attr", reason="captum is not installed")
    options = explainer_of_line(line)

    def logits(images: Tensor) -> Tensor:
        return model(images).logits

    images, target = images.clone().requires_grad_(), classes[:, 0]
    match options.kind:
        case "gradient":
            maps = captum.Saliency(logits).attribute(images, target=target, abs=False)
        case "input_x_gradient":
            maps = captum.InputXGradient(logits).attribute(images, target=target)
        case "integrated_gradients":
            maps = captum.IntegratedGradients(logits).attribute(
                images, baselines=options.baseline, target=target, n_steps=options.steps
            )
        case "smoothgrad":  # Captum draws noise of its own for each image, so it is given ours
            generator = torch.Generator().manual_seed(options.noise_seed)
            noise = torch.randn((options.samples, *images.shape[1:]), generator=generator)
            parts = [
                captum.Saliency(logits).attribute(
                    (images + options.noise * each).detach().requires_grad_(),
                    target=target,
                    abs=False,
                )
                for each in noise
            ]
            maps = torch.stack(parts).mean(dim=0)
    return maps.sum(dim=1).detach()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("line", LINES)
def test_maps_are_those_of_captum(name, line):
    model, images = network(name), random_images(32, 3)
    classes = torch.tensor([[1], [4], [9]])

    maps = explain(model, line, images, classes)

    assert maps.shape == (3, 1, 1, 32, 32)
    assert (
        largest_relative_difference(maps[:, 0, 0], captum_maps(model, line, images, classes)) < 1e-5
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_signed_gradcam_is_that_of_captum(name):
    captum = pytest.importorskip("captum.attr", reason="captum is not installed")
    model, images = network(name), random_images(64 if name != "vit" else 32, 3)
    classes = torch.tensor([[1], [4], [9]])
    trunk = Trunk(model)

    maps = explain(model, "gradcam sign=signed", images, classes)

    expected = captum.LayerGradCam(trunk, trunk.features).attribute(
        images, target=classes[:, 0], relu_attributions=False
    )
    assert maps.min() < 0
    assert largest_relative_difference(maps[:, 0], expected.detach()) < 1e-5
    assert torch.equal(explain(model, "gradcam", images, classes), maps.relu())


class Trunk(nn.Module):
    """Network with a module whose output is the explained features, as Captum needs."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model, self.features = model, nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        features, context = self.model.forward_trunk(images)
        return self.model.forward_head(self.features(features), context)


class Smooth(nn.Module):
    """Network of polynomials, on which a quadrature of enough points is exact."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        features = self.norm(self.conv(images))
        return self.head((features + features.square()).mean(dim=(2, 3)))


def smooth() -> Classifier:
    return ModuleClassifier(Smooth().double(), "norm")


@pytest.mark.parametrize("baseline", [0.0, 0.5])
def test_integrated_gradients_sum_to_the_difference_of_the_logits(baseline):
    model, images = smooth().eval(), random_images(8, 3).double()
    classes = torch.tensor([[2, 5], [0, 1], [3, -1]])

    maps = explain(model, f"integrated_gradients steps=2 baseline={baseline}", images, classes)

    change = model(images).logits - model(torch.full_like(images, baseline)).logits
    expected = change.gather(1, classes.clamp(min=0)) * (classes >= 0)
    assert (maps.sum(dim=(2, 3, 4)) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("line", LINES)
def test_a_map_does_not_depend_on_its_batch_or_on_training(line):
    model, images = copy.deepcopy(network("resnet18")), random_images(32, 4)
    classes = torch.arange(4)[:, None]
    alone = explain(model, line, images[:1], classes[:1])
    model.train()
    before = copy.deepcopy(model.state_dict())
    output = forward_to_explain(copy.deepcopy(model), images)  # moves the statistics of a copy

    maps = explainer_named(line)(model, output, classes)

    assert largest_relative_difference(maps[:1], alone) < 1e-5
    assert model.training
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())


@pytest.mark.parametrize("line", LINES)
def test_a_loss_on_maps_has_the_gradient_of_finite_differences(line):
    model, images = smooth().eval(), random_images(6, 2).double()
    classes, weight = torch.tensor([[2, 5], [1, 0]]), model.network.conv.weight

    def loss() -> Tensor:
        return explain(model, line, images, classes).square().sum()

    (gradient,) = torch.autograd.grad(loss(), weight)

    step = 1e-6
    with torch.no_grad():
        for place in [(0, 0, 1, 1), (3, 2, 0, 2)]:
            weight[place] += step
            above = loss()
            weight[place] -= 2 * step
            below = loss()
            weight[place] += step
            assert torch.isclose(gradient[place], (above - below) / (2 * step), rtol=1e-4)


@pytest.mark.parametrize("line", LINES)
def test_maps_of_a_frozen_network_have_no_graph(line):
    model, images = network("resnet18"), random_images(32, 2)
    classes = torch.zeros(2, 1, dtype=torch.int64)
    with torch.no_grad():
        without = explain(model, line, images, classes)
    frozen = explain(copy.deepcopy(model).requires_grad_(False), line, images, classes)

    assert not without.requires_grad
    assert not frozen.requires_grad
    assert torch.equal(without, frozen)


def test_what_cannot_be_explained_is_refused():
    model, images = network("resnet18"), random_images(32, 1)
    classes = torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(
        ConfigError, match=r"only the teacher can make these maps.*method\.explainer="
    ):
        explain(model, "other", images, classes)
    output = forward_to_explain(model, images)._replace(images=torch.zeros(1, 8))
    with pytest.raises(ConfigError, match="rows of numbers"):
        explainer_named("gradient")(model, output, classes)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"torch\.no_grad"):
        explain(model, "gradient", images, classes)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("lrp", r"explainer=lrp is not among .*integrated_gradients.*plugins="),
        ("gradient steps=3", "steps is not an option of gradient, which has none"),
        ("integrated_gradients step=3", r"step is not an option .* which has steps, baseline"),
        ("integrated_gradients steps=0", "explainer.steps"),
        ("gradcam sign=both", "explainer.sign"),
    ],
)
def test_a_wrong_line_names_the_remedy(line, message):
    with pytest.raises(ConfigError, match=message):
        explainer_of_line(line)


def test_a_line_is_read_as_it_was_written():
    options = explainer_of_line("integrated_gradients steps=3")
    assert options.line == "integrated_gradients steps=3"
    assert explainer_of_line("integrated_gradients steps=16").line == "integrated_gradients"
    stranger = {"kind": "mine", "target_classes": "top1", "depth": 2}
    assert explainer_line(stranger) == "mine depth=2"
