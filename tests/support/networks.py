"""Networks with random weights."""

from __future__ import annotations

from pipeline.config.models import (
    TimmModelConfig,
    TorchvisionModelConfig,
)

NUM_CLASSES = 7


def torchvision_config(name: str, **options) -> TorchvisionModelConfig:
    return TorchvisionModelConfig(name=name, **{"weights": "random", **options})


def timm_config(name: str, **options) -> TimmModelConfig:
    return TimmModelConfig(name=name, **{"weights": "random", **options})
