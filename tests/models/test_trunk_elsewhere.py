"""A student's weights in the networks of torchvision and timm, built and loaded without this project."""

import json

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.feature_extraction import create_feature_extractor

import permafrost
from permafrost.config.models import TorchvisionModelConfig
from permafrost.models.providers import build_model
from permafrost.models.saved import TrainedModel, save_model
from permafrost_timm.options import TimmModelConfig

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
