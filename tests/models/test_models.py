"""Networks of every provider: logits, names and sizes."""

from __future__ import annotations

import json

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.feature_extraction import create_feature_extractor

import permafrost
from permafrost.config.models import CifarModelConfig, TorchvisionModelConfig
from permafrost.core.errors import ConfigError
from permafrost.models.cifar import BasicBlock
from permafrost.models.classifier import Classifier
from permafrost.models.explanations import gradcam
from permafrost.models.providers import build_model, freeze, model_normalization, teacher_input_size
from permafrost.models.saved import TrainedModel, save_model
from permafrost_timm.options import TimmModelConfig
from tests.support.networks import NUM_CLASSES, timm_config, torchvision_config
from tests.support.runs import assert_equal_states
from tests.support.tensors import random_images

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def randomize_logits(model: Classifier) -> None:
    """Randomize heads that are initialized with zeros, whose logits would always be equal."""
    for name, parameter in model.network.named_parameters():
        if "head" in name and parameter.count_nonzero() == 0:
            nn.init.normal_(parameter)


TORCHVISION_NAMES = (
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "mnasnet0_5"),
    *("mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5"),
    *("squeezenet1_1", "swin_t", "swin_v2_t", "vit_b_32", "inception_v3"),
)


TIMM_NAMES = (
    *("resnet10t", "densenet121", "convnext_atto", "mobilenetv3_small_050", "resnetv2_18"),
    *("swin_tiny_patch4_window7_224", "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"),
)


LARGE = (
    *("swin_v2_t", "swin_tiny_patch4_window7_224", "inception_v3", "vit_b_32", "convnext_tiny"),
    *("alexnet", "densenet121"),
)
"""Networks that take long and are slow tests."""


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(config, marks=[pytest.mark.slow] * (config.name in LARGE))
        for config in (
            *(
                torchvision_config(name, input_size=64 if name == "vit_b_32" else None)
                for name in TORCHVISION_NAMES
            ),
            *(
                timm_config(name, input_size=64 if "vit" in name or "deit" in name else None)
                for name in TIMM_NAMES
            ),
        )
    ],
    ids=lambda config: f"{config.kind}-{config.name}",
)
def test_logits_are_the_untouched_networks_and_features_survive_the_head(config):
    model = build_model(config, NUM_CLASSES).eval()
    randomize_logits(model)
    mean, std = model_normalization(config)
    side = {"inception_v3": 96, "swin_tiny_patch4_window7_224": 224}.get(config.name, 64)
    images = random_images(side)
    with torch.no_grad():
        normalized = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        expected = model.network(normalized)

        logits, features, *_ = model(images)

        again, _ = model.forward_trunk(images)
        maps = gradcam(model, model(images), torch.tensor([[0, -1], [1, 2]]))
    assert logits.shape == (2, NUM_CLASSES)
    assert features.ndim == 4
    assert expected.count_nonzero() > 0
    assert torch.allclose(logits, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert torch.equal(features, again)
    assert maps.shape == (2, 2, 1, *features.shape[-2:])
    assert (maps >= 0).all()


def test_features_of_a_densenet_are_those_after_the_last_relu():
    model = build_model(torchvision_config("densenet121"), NUM_CLASSES).eval()
    with torch.no_grad():
        output = model(random_images(64))
        before = model.network.features(model.normalize(random_images(64)))

    assert (before < 0).any()
    assert torch.equal(output.features, before.relu())


def test_a_step_on_a_student_leaves_a_frozen_teacher_alone():
    teacher = freeze(build_model(torchvision_config("resnet18"), NUM_CLASSES))
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student = build_model(torchvision_config("resnet18", weights=None), NUM_CLASSES).train()
    images, target_class = random_images(64), torch.tensor([[0], [1]])

    teacher_maps = gradcam(teacher, teacher(images), target_class)
    student_maps = gradcam(student, student(images), target_class)
    (teacher_maps - student_maps).square().sum().backward()

    assert not teacher_maps.requires_grad
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert any(parameter.grad is not None for parameter in student.parameters())
    assert_equal_states(teacher.state_dict(), before)


def test_an_unknown_name_lists_close_ones():
    with pytest.raises(ConfigError, match=r"torchvision has no classifier 'resnet19'.*resnet18"):
        build_model(TorchvisionModelConfig(name="resnet19"), NUM_CLASSES)
    with pytest.raises(ConfigError, match=r"timm has no model 'resnet_18'.*resnet18"):
        build_model(TimmModelConfig(name="resnet_18"), NUM_CLASSES)
    with pytest.raises(ConfigError, match=r"timm has no weights 'resnet18\.no'.*resnet18\.a1_in1k"):
        build_model(TimmModelConfig(name="resnet18.no"), NUM_CLASSES)


def test_a_detector_of_torchvision_is_no_classifier():
    with pytest.raises(ConfigError, match="no classifier 'fasterrcnn_resnet50_fpn'"):
        build_model(TorchvisionModelConfig(name="fasterrcnn_resnet50_fpn"), NUM_CLASSES)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("mixer_s32_224", "norm"),
        ("cait_xxs24_224", "blocks_token_only.1.norm1"),
        ("mvitv2_tiny", "norm"),
    ],
)
def test_networks_of_tokens_are_explained_at_their_last_grid(name, layer):
    model = build_model(timm_config(name), NUM_CLASSES).eval()
    with torch.no_grad():
        images = random_images(224)
        output = model(images)
        expected = model.network(model.normalize(images))
    assert model.layer == layer
    torch.testing.assert_close(output.logits, expected, rtol=1e-5, atol=1e-6)


def test_images_of_a_size_that_a_transformer_does_not_take_are_refused():
    model = build_model(timm_config("vit_tiny_patch16_224", input_size=64), NUM_CLASSES)

    with pytest.raises(
        ConfigError, match=r"takes images of 64x64 pixels, got 32x32.*augment\.size"
    ):
        model(random_images(32))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (CifarModelConfig(weights="some.th"), None),
        (CifarModelConfig(weights="some.th", input_size=32), 32),
        (TorchvisionModelConfig(name="resnet18", weights="some.pth"), None),
        (TorchvisionModelConfig(name="resnet18", weights="pretrained"), 224),
        (TorchvisionModelConfig(name="resnet18", weights="pretrained", input_size=96), 96),
        (TorchvisionModelConfig(name="inception_v3", weights="pretrained"), 299),
        (TorchvisionModelConfig(name="vit_b_16", weights="some.pth"), 224),
        (TimmModelConfig(name="resnet18", weights="random"), None),
        (TimmModelConfig(name="resnet18.a1_in1k", weights="pretrained"), 224),
        (TimmModelConfig(name="vit_medium_patch16_gap_240", weights="random"), 240),
    ],
)
def test_a_teachers_input_size_is_its_providers_where_that_decides(config, expected):
    assert teacher_input_size(config) == expected


def test_null_mean_and_std_of_timm_are_the_models_own():
    config = TimmModelConfig(name="inception_v3")

    assert model_normalization(config) == ((0.5,) * 3, (0.5,) * 3)
    assert model_normalization(TorchvisionModelConfig()) == tuple(IMAGENET.values())


def test_classes_of_the_config_come_before_those_of_the_data():
    model = build_model(torchvision_config("resnet18", classes=3), NUM_CLASSES)

    assert model.network.fc.out_features == 3


def test_a_shortcut_drops_pixels_pads_channels_and_keeps_its_gradient_channels_last():
    block = BasicBlock(3, 8, stride=2)
    x = random_images(7).contiguous(memory_format=torch.channels_last).requires_grad_()

    kept = block._shortcut(x)

    expected = torch.zeros(2, 8, 4, 4)
    expected[:, 2:5] = x.detach()[:, :, ::2, ::2]
    assert torch.equal(kept, expected)
    upstream = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    (gradient,) = torch.autograd.grad(kept, x, upstream)
    assert gradient.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(gradient[:, :, ::2, ::2], upstream[:, 2:5])
    assert gradient.count_nonzero() == upstream[:, 2:5].numel()


NORMALIZED = {"mean": (0.2, 0.3, 0.4), "std": (0.5, 0.6, 0.7)}


def torchvision_trunks(name, weights):
    network = torchvision.models.get_model(name, num_classes=3).eval()
    network.load_state_dict(load_file(weights))
    layers = [f"layer{number}" for number in range(1, 5)]
    yield IntermediateLayerGetter(network, dict(zip(layers, layers, strict=True)))
    yield create_feature_extractor(network, layers)


def timm_trunks(name, weights):
    options = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(weights)}}
    yield timm.create_model(name, features_only=True, **options).eval()
    network = timm.create_model(name, num_classes=3, checkpoint_path=str(weights)).eval()
    yield lambda images: network.forward_intermediates(images, intermediates_only=True)


@pytest.mark.parametrize(
    ("config", "trunks"),
    [
        (TorchvisionModelConfig(name="resnet18", **NORMALIZED), torchvision_trunks),
        (TimmModelConfig(name="resnet10t", **NORMALIZED), timm_trunks),
        (TimmModelConfig(name="convnext_atto", **NORMALIZED), timm_trunks),
    ],
)
@torch.no_grad()
def test_every_level_of_a_student_is_the_same_bit_by_bit(tmp_path, config, trunks):
    model = build_model(config, 3)
    for name, buffer in model.network.named_buffers():
        if name.endswith("running_var"):
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    save_model(tmp_path, model, TrainedModel(config=config, num_classes=3, input_size=(64, 64)))
    images = torch.rand(2, 3, 64, 64)
    stages, features, _ = permafrost.load_student(tmp_path).forward_stages(images)
    assert torch.equal(stages[-1].output, features)
    options = json.loads((tmp_path / "model.json").read_text())["model"]
    mean, std = (torch.tensor(options[name]).view(3, 1, 1) for name in ("mean", "std"))

    for trunk in trunks(config.name, tmp_path / "model.safetensors"):
        levels, unnormalized = (
            [*(out.values() if isinstance(out, dict) else out)][-4:]
            for out in (trunk((images - mean) / std), trunk(images))
        )

        for level, stage, other in zip(levels, stages, unnormalized, strict=True):
            assert torch.equal(level, stage.output)
            assert not torch.equal(other, stage.output)
