"""Output of a forward pass, and the two kinds of heads for which GradCAM has a closed form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Intermediates(NamedTuple):
    """Intermediates that a forward pass is requested to return in addition. The default requests none."""

    stages: bool = False
    class_maps: bool = False
    pooled: bool = False


NO_INTERMEDIATES = Intermediates()


class Stage(NamedTuple):
    """End of one stage, that is, of the layers that share a resolution."""

    output: Tensor
    """Output [B, C, h, w], after the stage's last activation if it has one."""
    preactivation: Tensor
    """Values [B, C, h, w] before the stage's last ReLU if it is known to end with one (after a residual sum or a
    convolution), otherwise the output."""


_NONE: Mapping[str, Tensor] = {}


class ModelOutput(NamedTuple):
    """Output of a forward pass. Intermediates that were not requested are None or empty."""

    logits: Tensor
    """Logits [B, K], before any softmax."""
    features: Tensor
    """Features [B, C, h, w] at the explained layer."""
    context: Tensor | None = None
    """Input of the head in addition to the features, [B, T, C], such as the other tokens of a transformer."""
    stages: tuple[Stage, ...] = ()
    """Stages from the finest grid to the coarsest."""
    class_maps: Tensor | None = None
    """Class maps [B, K, h, w], whose spatial average is the logits without their bias."""
    pooled: Tensor | None = None
    """Pooled features [B, d] before the classifier, float32 or wider: the spatial average of the features if the head
    starts with it, otherwise the input of its last linear layer."""
    extras: Mapping[str, Tensor] = _NONE
    """Tensors by name that only this kind of network computes."""


@dataclass(frozen=True)
class GapLinear:
    """Head with logits = linear(g), g the spatial average of the features."""

    linear: nn.Linear


@dataclass(frozen=True)
class GapNormLinear:
    """Head with logits = linear(norm(g)), g the spatial average of the features."""

    norm: nn.LayerNorm
    linear: nn.Linear


Head = GapLinear | GapNormLinear


def to_float32(x: Tensor) -> Tensor:
    """Convert half precision to float32. Other tensors are returned as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def match_head(layers: Sequence[nn.Module]) -> Head | None:
    """Return the closed form of a head's layers in their current mode, or None if they have none.

    An active dropout has no closed form, because its mask is part of the gradient.
    """
    active = [
        layer
        for layer in layers
        if not isinstance(layer, nn.Flatten)
        and not (isinstance(layer, nn.Dropout) and (layer.p == 0 or not layer.training))
    ]
    match active:
        case [nn.AdaptiveAvgPool2d(output_size=1 | (1, 1)), nn.Linear() as linear]:
            return GapLinear(linear)
        case [
            nn.AdaptiveAvgPool2d(output_size=1 | (1, 1)),
            nn.LayerNorm() as norm,
            nn.Linear() as linear,
        ]:
            return GapNormLinear(norm, linear)
    return None


def apply_norm(norm: nn.LayerNorm, average: Tensor) -> Tensor:
    """Apply the norm to [B, C], independent of the layout that its own forward expects."""
    return F.layer_norm(average, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


class Normalize(nn.Module):
    """Normalization (images - mean) / std by channel, part of the model so that callers pass pixels in [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        # Not persistent, because published checkpoints have no such entries and the config has the values.
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


_ROUNDING = 1e-12
"""Rounding error of a float64 standard deviation in units of the mean, below that of any values distinct in float32."""


class Standardize(nn.Module):
    """Standardization (rows - mean) / std by column of a table, whose moments are stored with the weights.

    Until `set_moments` is called, and in an untrained network, rows are not changed.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(columns))
        self.register_buffer("std", torch.ones(columns))

    def set_moments(self, mean: Tensor, std: Tensor) -> None:
        """Set the moments [d] of a training split. A constant column is only shifted."""
        varies = std > _ROUNDING * mean.abs()
        self.mean.copy_(mean)
        self.std.copy_(torch.where(varies, std, 1.0))

    def forward(self, rows: Tensor) -> Tensor:
        return (rows - self.mean) / self.std
