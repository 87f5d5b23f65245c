"""GradCAM: closed forms against autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from permafrost.models.classifier import Classifier
from permafrost.models.explanations import gradcam, gradcam_from_head
from permafrost.models.providers import build_model
from permafrost_timm.classifiers import TimmVit
from permafrost_timm.options import TimmModelConfig
from tests.support.gradcam import (
    NUM_CLASSES,
    autograd_gradcam,
    largest_relative_difference,
    timm_vit,
    torchvision_model,
)
from tests.support.slow import slow
from tests.support.tensors import random_images


def timm_model(name: str) -> Classifier:
    return build_model(TimmModelConfig(name=name, weights="random"), NUM_CLASSES)


def resnet18_features(network: nn.Module, x: Tensor) -> Tensor:
    x = network.maxpool(network.relu(network.bn1(network.conv1(x))))
    return network.layer4(network.layer3(network.layer2(network.layer1(x))))


def densenet121_features(network: nn.Module, x: Tensor) -> Tensor:
    return F.relu(network.features(x))


def convnext_features(network: nn.Module, x: Tensor) -> Tensor:
    return network.features(x)


def parameter_gradients(maps: Tensor, weights: Tensor, model: nn.Module) -> list[Tensor]:
    return torch.autograd.grad(
        (weights * maps).sum() + maps.square().sum(),
        list(model.parameters()),
        retain_graph=True,
        materialize_grads=True,
    )


def assert_same_maps_and_parameter_gradients(
    maps: Tensor, expected: Tensor, model: nn.Module, tolerance: float
) -> list[str]:
    """Compare maps and their gradients, and return the names of the parameters without a gradient in both."""
    assert expected.count_nonzero() > 0
    assert largest_relative_difference(maps, expected) <= tolerance
    weights = torch.randn(maps.shape, generator=torch.Generator().manual_seed(0)).to(maps)
    gradients = parameter_gradients(maps, weights, model)
    expected_gradients = parameter_gradients(expected, weights, model)
    without_gradient = []
    names = [name for name, _ in model.named_parameters()]
    largest = max(float(gradient.abs().max()) for gradient in expected_gradients)
    for name, found, wanted in zip(names, gradients, expected_gradients, strict=True):
        # Up to rounding, a bias before a norm has no gradient.
        if wanted.abs().max() <= largest * tolerance:
            without_gradient.append(name)
            assert found.abs().max() <= largest * tolerance, name
        else:
            assert largest_relative_difference(found, wanted) <= tolerance, name
    return without_gradient


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["fp64", "fp32"]
)
@pytest.mark.parametrize(
    ("name", "forward_features", "head_layers", "blind"),
    [
        ("resnet18", resnet18_features, lambda net: net.fc, ["fc.bias"]),
        slow("densenet121", densenet121_features, lambda net: net.classifier, ["classifier.bias"]),
        pytest.param(
            "convnext_tiny",
            convnext_features,
            lambda net: nn.Sequential(nn.Unflatten(1, (-1, 1, 1)), net.classifier),
            ["classifier.0.bias", "classifier.2.bias"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["resnet18", "densenet121", "convnext_tiny"],
)
def test_closed_form_equals_autograd_gradcam_in_map_and_all_parameter_gradients(
    name, forward_features, head_layers, blind, dtype, tolerance
):
    model = torchvision_model(name).to(dtype).eval()
    images = random_images(64).to(dtype)
    target_class = torch.tensor([[3, 7], [1, 9]])
    network = model.network
    features = forward_features(network, model.normalize(images))
    logits = head_layers(network)(features.mean(dim=(2, 3)))
    expected = autograd_gradcam(features, logits, target_class)

    maps = gradcam(model, model(images), target_class)

    assert model.head is not None
    assert largest_relative_difference(logits, network(model.normalize(images))) <= tolerance
    without_gradient = assert_same_maps_and_parameter_gradients(maps, expected, model, tolerance)
    assert without_gradient[-len(blind) :] == [f"inner.{name}" for name in blind]


@pytest.mark.parametrize(
    "build",
    [
        *(
            lambda name=name: torchvision_model(name)
            for name in ("mobilenet_v2", "shufflenet_v2_x0_5")
        ),
        *(
            slow(lambda name=name: torchvision_model(name))
            for name in ("efficientnet_b0", "googlenet", "mnasnet0_5", "regnet_y_400mf")
        ),
        lambda: timm_model("resnet10t"),
        *(
            slow(lambda name=name: timm_model(name))
            for name in ("convnext_atto", "efficientnet_lite0")
        ),
        lambda: timm_vit("avg"),
        lambda: timm_vit("avg", fc_norm=False),
        lambda: timm_vit("avg", class_token=False),
    ],
)
def test_closed_form_equals_autograd_gradcam_for_every_averaged_head(build):
    model = build().double().eval()
    side = 32 if isinstance(model, TimmVit) else 64
    images = random_images(side).double()
    target_class = torch.tensor([[3, 7], [1, 9]])
    output = model(images)
    expected = autograd_gradcam(output.features, output.logits, target_class)

    maps = gradcam(model, output, target_class)

    assert model.head is not None
    assert_same_maps_and_parameter_gradients(maps, expected, model, 1e-10)


def test_the_plain_class_weight_is_not_the_gradient_of_a_head_with_a_norm():
    model = torchvision_model("convnext_tiny").eval()
    with torch.no_grad():
        output = model(random_images(64))
        target_class = torch.tensor([[3], [1]])
        maps = gradcam(model, output, target_class).flatten(1)

        naive = gradcam_from_head(output.features, model.head.linear.weight, target_class)

    assert (F.cosine_similarity(maps, naive.flatten(1)) < 1 - 1e-3).any()
