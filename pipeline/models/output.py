"""What one forward pass gives, and the two heads for which GradCAM has a closed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Intermediates(NamedTuple):
    """What a forward pass is asked to give from inside the network; nothing costs nothing."""

    stages: bool = False
    class_maps: bool = False
    superfeatures: bool = False
    pooled: bool = False


NO_INTERMEDIATES = Intermediates()


class Stage(NamedTuple):
    """The end of one stage: of the layers that share a resolution."""

    output: Tensor
    """[B, C, h, w], after the stage's last activation where it has one."""
    preactivation: Tensor
    """[B, C, h, w]: the last residual sum, before its ReLU, where the block is known to end with one; the
    output itself otherwise."""


class Superfeatures(NamedTuple):
    """What each of M superfeatures says alone."""

    logits: Tensor
    """[B, M, K], float32 or wider; their sum is the network's logits."""
    hidden: Tensor
    """[B, M, width]: the subnets' last hidden layer."""


class ModelOutput(NamedTuple):
    """One forward pass."""

    logits: Tensor
    """[B, K], before any softmax."""
    features: Tensor
    """[B, C, h, w] at the explained layer."""
    context: Tensor | None = None
    """What the head needs beside the features, [B, T, C]: a transformer's other tokens."""
    stages: tuple[Stage, ...] = ()
    """From the finest grid to the coarsest, where they were asked for."""
    class_maps: Tensor | None = None
    """[B, K, h, w], where they were asked for: their average over places is the logits without their bias."""
    superfeature_logits: Tensor | None = None
    """[B, M, K], where they were asked for: their sum over superfeatures is the logits."""
    superfeature_hidden: Tensor | None = None
    """[B, M, width], where they were asked for."""
    pooled: Tensor | None = None
    """[B, d] before the classifier, float32 or wider, where it was asked for: the average of the features over
    places where the head begins with it, otherwise what its last linear layer is given."""


@dataclass(frozen=True)
class GapLinear:
    """logits = linear(g), g the spatial average of the features."""

    linear: nn.Linear


@dataclass(frozen=True)
class GapNormLinear:
    """logits = linear(norm(g)), g the spatial average of the features."""

    norm: nn.LayerNorm
    linear: nn.Linear


Head = GapLinear | GapNormLinear


def to_float32(x: Tensor) -> Tensor:
    """Half precision as float32; the same tensor otherwise."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def match_head(layers: Sequence[nn.Module]) -> Head | None:
    """The closed form that a head's layers have as they stand; None where they have none.

    A dropout counts where it is active: its mask belongs to the gradient.
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
    """The norm of [B, C], whichever layout its own forward expects."""
    return F.layer_norm(average, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


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


_ROUNDING = 1e-12
"""Of a standard deviation computed in float64, in means; one of values that differ as float32 is larger."""


class Standardize(nn.Module):
    """(rows - mean) / std by column of a table, which has units of its own: kept with the weights.

    Until `learn` is called, and in a network that was never trained, rows pass as they are.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(columns))
        self.register_buffer("std", torch.ones(columns))

    def set_moments(self, mean: Tensor, std: Tensor) -> None:
        """Take the moments [d] of a training split; a column that does not vary is only shifted."""
        varies = std > _ROUNDING * mean.abs()
        self.mean.copy_(mean)
        self.std.copy_(torch.where(varies, std, 1.0))

    def forward(self, rows: Tensor) -> Tensor:
        return (rows - self.mean) / self.std
