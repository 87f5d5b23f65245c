"""Networks with random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from permafrost.config.models import CifarModelConfig, TorchvisionModelConfig
from permafrost.models.providers import build_model
from permafrost_timm.options import TimmModelConfig

NUM_CLASSES = 7


def torchvision_config(name: str, **options) -> TorchvisionModelConfig:
    return TorchvisionModelConfig(name=name, **{"weights": "random", **options})


def timm_config(name: str, **options) -> TimmModelConfig:
    return TimmModelConfig(name=name, **{"weights": "random", **options})


def save_tiny_teacher(folder: Path, seed: int = 0) -> CifarModelConfig:
    """ResNet-8 of width 4 for ten classes, with random weights in a file of the folder."""
    config = CifarModelConfig(name="resnet8", width=4)
    torch.manual_seed(seed)
    folder.mkdir(exist_ok=True)
    path = folder / "model.safetensors"
    save_file(build_model(config, 10).state_dict(), path)
    return replace(config, weights=str(path))
