"""Small B-cos networks."""

from __future__ import annotations

import torch
from torch import Tensor

from permafrost.models.providers import build_model
from permafrost_papers.bcos.options import BcosModelConfig
from permafrost_papers.bcos.provider import BcosClassifier

NUM_CLASSES = 3


FRAME = (16, 16)


RESNET = BcosModelConfig(name="resnet8", width=4)


def named(value: object) -> str | None:
    return value.name if isinstance(value, BcosModelConfig) else None


def network(config: BcosModelConfig, seed: int = 0) -> BcosClassifier:
    """Network in float64 and eval mode, with random running variances and norm weights."""
    torch.manual_seed(seed)
    model = build_model(config, NUM_CLASSES).double().eval()
    for name, tensor in model.network.state_dict().items():
        if name.endswith(("running_var", "bn1.weight", "norm.weight", "norm1.weight")):
            tensor.uniform_(0.5, 2.0)
    return model


def double_images(side: int = 16, records: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(records, 3, side, side, generator=generator, dtype=torch.float64)
