"""A student's weights in the networks of torchvision and timm, built and loaded without this project."""

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
from permafrost.config.models import TorchvisionModelConfig
from permafrost.models.providers import build_model
from permafrost.models.saved import TrainedModel, save_model
from permafrost_timm.options import TimmModelConfig

MEAN, STD = (0.2, 0.3, 0.4), (0.5, 0.6, 0.7)
LAYERS = ("layer1", "layer2", "layer3", "layer4")


def save(folder, config):
    """Save a network whose statistics of batch norm are not those of a new one; return it as loaded."""
    torch.manual_seed(0)
    model = build_model(config, 3)
    for name, buffer in model.network.named_buffers():
        if name.endswith("running_var"):
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    folder.mkdir(parents=True)
    save_model(folder, model, TrainedModel(config=config, num_classes=3, input_size=(64, 64)))
    return permafrost.load_student(folder)


def stages_of(student, images):
    """Outputs of the student's stages for images in [0, 1], the last one being its features."""
    stages, features, _ = student.forward_stages(images)
    assert torch.equal(stages[-1].output, features)
    return [stage.output for stage in stages]


def normalized(folder, images):
    """Images as the description of the weights normalizes them."""
    options = json.loads((folder / "model.json").read_text())["model"]
    mean, std = (torch.tensor(options[name]).view(3, 1, 1) for name in ("mean", "std"))
    return (images - mean) / std


@pytest.fixture
def images():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("way", ["getter", "extractor"])
@torch.no_grad()
def test_torchvision_computes_every_level_of_a_student_bit_by_bit(tmp_path, images, way):
    folder = tmp_path / "distill"
    student = save(folder, TorchvisionModelConfig(name="resnet18", mean=MEAN, std=STD))
    network = torchvision.models.resnet18(num_classes=3)
    network.load_state_dict(load_file(folder / "model.safetensors"))
    network.eval()
    trunk = {
        "getter": lambda: IntermediateLayerGetter(network, {name: name for name in LAYERS}),
        "extractor": lambda: create_feature_extractor(network, list(LAYERS)),
    }[way]()

    levels = trunk(normalized(folder, images))

    expected = stages_of(student, images)
    assert all(map(torch.equal, (levels[name] for name in LAYERS), expected))
    assert torch.equal(network(normalized(folder, images)), student(images).logits)
    assert not torch.equal(trunk(images)["layer4"], expected[-1])  # without the normalization


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto"])
@torch.no_grad()
def test_timm_computes_every_level_of_a_student_bit_by_bit(tmp_path, images, name):
    folder = tmp_path / "distill"
    student = save(folder, TimmModelConfig(name=name, mean=MEAN, std=STD))
    weights = folder / "model.safetensors"
    network = timm.create_model(name, num_classes=3, checkpoint_path=str(weights)).eval()
    trunk = timm.create_model(
        name, features_only=True, pretrained=True, pretrained_cfg_overlay={"file": str(weights)}
    ).eval()

    levels = trunk(normalized(folder, images))[-4:]

    expected = stages_of(student, images)
    assert all(map(torch.equal, levels, expected))
    assert torch.equal(network(normalized(folder, images)), student(images).logits)
    assert isinstance(network.get_classifier(), nn.Linear)
    assert not torch.equal(trunk(images)[-1], expected[-1])
