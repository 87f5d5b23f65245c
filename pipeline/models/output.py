"""What every model takes and gives, whatever its provider."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Sequence


class ModelOutput(NamedTuple):
    """One forward pass."""

    logits: Tensor
    """[B, K], before any softmax."""
    features: Tensor
    """[B, C, h, w] at the explained layer."""


class GapLinearModel(Protocol):
    """A model whose logits are a linear layer on the spatial average of its features."""

    @property
    def gap_linear_head(self) -> nn.Linear:
        """The linear layer."""

    def __call__(self, images: Tensor) -> ModelOutput:
        """Images in [0, 1], f32 [B, 3, H, W]."""


class Normalize(nn.Module):
    """(images - mean) / std by channel; part of the model, so that every caller feeds pixels in [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        # Not persistent: published checkpoints know no such entry, the config does.
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std
