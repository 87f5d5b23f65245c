"""Intermediates of networks: stages, class maps and pooled features, from the same forward pass as the logits."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.vgg import VGG, make_layers

from permafrost.config.models import CifarModelConfig, TorchvisionModelConfig
from permafrost.core.errors import ConfigError
from permafrost.models.classifier import Intermediates
from permafrost.models.providers import build_model, freeze
from permafrost.models.torchvision import TorchvisionClassifier
from permafrost_papers.bcos.options import BcosModelConfig
from permafrost_timm.options import TimmModelConfig
from tests.support.slow import slow_except
from tests.support.tensors import random_images

STAGES, CLASS_MAPS = Intermediates(stages=True), Intermediates(class_maps=True)
BOTH = Intermediates(stages=True, class_maps=True)
NUM_CLASSES = 5

NETWORKS = {
    "cifar": (CifarModelConfig(name="resnet14", width=4), 16, 3),
    "resnet18": (TorchvisionModelConfig(name="resnet18"), 64, 4),
    "resnet50": (TorchvisionModelConfig(name="resnet50"), 64, 4),
    "regnet": (TorchvisionModelConfig(name="regnet_y_400mf"), 64, 4),
    "convnext": (TorchvisionModelConfig(name="convnext_tiny"), 64, 4),
    "densenet": (TorchvisionModelConfig(name="densenet121"), 64, 4),
    "timm": (TimmModelConfig(name="resnet10t"), 64, 4),
    "timm_convnext": (TimmModelConfig(name="convnext_atto"), 64, 4),
    "timm_channels_last": (TimmModelConfig(name="swin_tiny_patch4_window7_224"), 224, 4),
    "bcos": (BcosModelConfig(name="resnet8", width=4), 16, 3),
    "bcos_resnet18": (BcosModelConfig(name="resnet18", width=4), 64, 4),
    "bcos_densenet": (BcosModelConfig(name="densenet121", width=8), 64, 4),
}
HAVE_RELU_AFTER_THEIR_SUM = ("cifar", "resnet18", "resnet50", "regnet")


def frozen_model(config):
    torch.manual_seed(0)
    return freeze(build_model(config, NUM_CLASSES))


@pytest.mark.parametrize(
    "name", slow_except(("resnet18", "densenet", "timm", "bcos_densenet"), NETWORKS)
)
def test_a_pass_that_shows_its_stages_is_the_pass_that_does_not(name):
    config, side, count = NETWORKS[name]
    model = frozen_model(config)
    images = random_images(side)

    with torch.no_grad():
        plain, shown = model(images), model(images, STAGES)

    assert torch.equal(plain.logits, shown.logits)
    assert torch.equal(plain.features, shown.features)
    assert (plain.stages, plain.class_maps) == ((), None)
    assert len(shown.stages) == count
    sides = [stage.output.shape[-1] for stage in shown.stages]
    assert sides == [sides[0] // 2**halvings for halvings in range(count)]
    for stage in shown.stages:
        if name in HAVE_RELU_AFTER_THEIR_SUM:
            assert torch.equal(stage.output, F.relu(stage.preactivation))
            assert stage.preactivation.min() < 0
        else:
            assert stage.output.shape == stage.preactivation.shape
    if name not in ("timm_channels_last", "bcos", "bcos_resnet18", "bcos_densenet"):
        assert torch.equal(shown.stages[-1].output, shown.features)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_stages_of_a_vgg_are_the_last_convolutions_before_its_pools(batch_norm):
    """A VGG of few channels; its explained layer stays the last pool."""
    torch.manual_seed(0)
    layers = make_layers([4, "M", 6, "M", 8, 8, "M", 8, 8, "M", 8, 8, "M"], batch_norm=batch_norm)
    with torch.device("meta"):  # its own classifier has 120 million weights
        network = VGG(nn.Identity(), init_weights=False)
    network.features = layers
    network.classifier = nn.Sequential(nn.Linear(8 * 7 * 7, NUM_CLASSES))
    model = freeze(TorchvisionClassifier(TorchvisionModelConfig(name="vgg11"), network))
    images = random_images(64)
    seen = []
    for layer, following in pairwise(network.features):
        if isinstance(following, nn.MaxPool2d):
            layer.register_forward_hook(lambda *call: seen.append(call[2].clone()))

    with torch.no_grad():
        plain = model(images)
        shown = model(images, STAGES)

    assert torch.equal(plain.features, shown.features)
    assert torch.equal(plain.logits, shown.logits)
    assert [stage.output.shape[-1] for stage in shown.stages] == [64, 32, 16, 8, 4]
    assert shown.features.shape[-1] == 2
    for stage, expected in zip(shown.stages, seen, strict=True):
        assert torch.equal(stage.output, expected)
        assert torch.equal(stage.output, F.relu(stage.preactivation))
        assert stage.preactivation.min() < 0


def test_stages_of_a_bcos_network_have_both_signs():
    model = frozen_model(BcosModelConfig(name="resnet8", width=4))

    for stage in model(random_images(16), STAGES).stages:
        assert stage.output.min() < 0 < stage.output.max()


@pytest.mark.parametrize(
    "name", ["cifar", "resnet18", "densenet", "timm", "bcos", "bcos_resnet18", "bcos_densenet"]
)
def test_class_maps_average_to_the_logits_without_their_bias(name):
    config, side, _ = NETWORKS[name]
    model = frozen_model(config).double()
    images = random_images(side).double()

    output = model(images, CLASS_MAPS)

    bias = output.logits - output.class_maps.mean(dim=(2, 3))
    assert output.stages == () or name.startswith("bcos")
    assert (bias - bias[:1]).abs().max() < 1e-12
    assert output.class_maps.flatten(2).std(dim=2).min() > 0


def test_class_maps_of_a_linear_head_are_its_weights_at_each_place():
    model = frozen_model(CifarModelConfig(name="resnet8", width=2))
    output = model(random_images(16), CLASS_MAPS)

    weight = model.linear.weight

    at_one_place = output.features[:, :, 1, 2] @ weight.T  # [B, K]
    assert torch.allclose(output.class_maps[:, :, 1, 2], at_one_place, atol=1e-6)


def test_class_maps_of_a_bcos_network_have_the_logits_temperature():
    images = random_images(16)
    logits, averages = [], []
    for temperature in (1.0, 4.0):
        config = BcosModelConfig(name="resnet8", width=4, logit_temperature=temperature)
        output = frozen_model(config)(images, CLASS_MAPS)
        averages.append(output.class_maps.mean(dim=(2, 3)))
        logits.append(output.logits)

    assert torch.allclose(averages[0], 4 * averages[1], rtol=1e-5)
    assert torch.allclose(logits[1] - averages[1], logits[0] - averages[0], atol=1e-6)


@pytest.mark.parametrize("name", ["cifar", "resnet18", "bcos"])
def test_stages_and_class_maps_cost_no_second_pass(name):
    config, side, _ = NETWORKS[name]
    model = frozen_model(config)
    passes = []
    model.network.conv1.register_forward_hook(lambda *_: passes.append(None))

    output = model(random_images(side), BOTH)

    assert len(passes) == 1
    assert output.stages
    assert output.class_maps is not None


def test_class_maps_are_float32_in_a_half_precision_pass():
    for name in ("cifar", "bcos"):
        model = frozen_model(NETWORKS[name][0])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(random_images(16), BOTH)

        assert output.stages[0].output.dtype == torch.bfloat16
        assert output.class_maps.dtype == torch.float32


@pytest.mark.parametrize(
    ("config", "side", "intermediates", "message"),
    [
        (
            TorchvisionModelConfig(name="mobilenet_v2"),
            32,
            STAGES,
            r"MobileNetV2 has no known stages.*ResNet.* a timm ViT",
        ),
        (TorchvisionModelConfig(name="convnext_tiny"), 32, CLASS_MAPS, r"ConvNeXt has no class"),
        (
            TorchvisionModelConfig(name="squeezenet1_1"),
            32,
            CLASS_MAPS,
            r"no class maps.*method=cat_kd",
        ),
        (BcosModelConfig(name="simple_vit_ti", width=64), 16, STAGES, r"B-cos ViT has neither"),
    ],
)
def test_networks_without_them_say_who_has_some(config, side, intermediates, message):
    model = frozen_model(config)

    with pytest.raises(ConfigError, match=message):
        model(random_images(side), intermediates)


# ---- pooled features -----------------------------------------------------------------------------

POOLED = Intermediates(pooled=True)


@pytest.mark.parametrize("name", ["cifar", "resnet18", "timm_convnext", "bcos"])
def test_pooled_features_are_the_average_and_leave_the_logits_as_they_are(name):
    config, side, _ = NETWORKS[name]
    model = frozen_model(config)
    images = random_images(side)

    with torch.no_grad():
        plain, shown = model(images), model(images, POOLED)
        last = shown.stages[-1].output if name == "bcos" else shown.features

    assert plain.pooled is None
    assert torch.equal(plain.logits, shown.logits)
    assert torch.allclose(shown.pooled, last.mean(dim=(2, 3)))


@pytest.mark.parametrize(
    ("network", "side", "size"), [("mobilenet_v3_small", 64, 1024), ("efficientnet_b0", 64, 1280)]
)
def test_a_heads_dropout_spoils_no_pooled_feature_before_it(network, side, size):
    torch.manual_seed(0)
    model = build_model(TorchvisionModelConfig(name=network), NUM_CLASSES)
    images = random_images(side)

    with torch.no_grad():
        evaluating = model.eval()(images, POOLED)
        average = evaluating.features.mean(dim=(2, 3))
        training = model.train()(images, POOLED)

    assert evaluating.pooled.shape == (2, size)
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)][-1]
    # Its last layer reads features after another layer and a dropout.
    if network == "mobilenet_v3_small":
        assert torch.allclose(training.logits, linear(training.pooled), atol=1e-6)
        assert torch.allclose(evaluating.logits, linear(evaluating.pooled), atol=1e-6)
    else:
        assert torch.equal(evaluating.pooled, average)
        assert torch.equal(training.pooled, training.features.mean(dim=(2, 3)))


def test_a_network_whose_classifier_reads_something_else_says_so():
    model = frozen_model(TorchvisionModelConfig(name="squeezenet1_1"))

    with pytest.raises(ConfigError, match=r"SqueezeNet has no pooled features.*output pooled"):
        model(random_images(64), POOLED)


def test_pooled_features_are_float32_in_a_half_precision_pass():
    for name in ("cifar", "bcos"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = frozen_model(NETWORKS[name][0])(random_images(16), POOLED)

        assert output.pooled.dtype == torch.float32
