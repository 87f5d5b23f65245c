"""B-cos layers (Boehle et al. 2022, 2024), with explanations that can be trained on.

Every layer is a linear map with a factor that depends on its input, y = s(x) * (W x). The explanation of a logit is
its gradient with all factors s held constant (e2KD, section 4: "dynamic weights"). Holding them constant with
`detach` results in the same explanation, but in a wrong gradient of a loss on it. The factor therefore stays in the
graph, and its operation omits it in one backward pass only: the one inside `ExplanationMode`.

Norms and variances are computed in float32 or wider in any precision, because squares overflow float16. Submodules
have the names of the published B-cos v2 checkpoints (`linear` contains a layer's weight).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from permafrost.core.errors import require
from permafrost.models.classifier import to_float32

_CONV_EPS = 1e-6
"""Constant added to a patch's squared norm."""
_LINEAR_EPS = 1e-12
"""Constant added to a token's norm, outside the root."""
_COSINE_EPS = 1e-6
"""Constant added to |cos| before it is raised to B - 1, not needed for B = 2."""
_NORM_EPS = 1e-5
"""Constant added to variances."""


class ExplanationMode:
    """Switch of a model, shared by all its layers and read by its operations when they are differentiated."""

    def __init__(self) -> None:
        self.is_on = False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Treat factors as constants in gradients computed inside the context."""
        require(not self.is_on, "explanation mode is already on and cannot be nested", RuntimeError)
        self.is_on = True
        try:
            yield
        finally:
            self.is_on = False

    def guard(self, network: nn.Module) -> None:
        """Raise an error if a gradient reaches a parameter inside the mode, because it would be wrong."""
        for parameter in network.parameters():
            parameter.register_hook(self._refuse)  # type: ignore[no-untyped-call]

    def _refuse(self, gradient: Tensor) -> Tensor:
        require(
            not self.is_on,
            "a loss was back-propagated inside explanation mode, in which the factors of B-cos layers have no "
            "gradient; leave the mode before loss.backward()",
            RuntimeError,
        )
        return gradient


@dataclass(frozen=True)
class BcosSettings:
    """Settings shared by all layers of a network."""

    mode: ExplanationMode = field(default_factory=ExplanationMode)
    b: float = 2.0
    """Exponent B >= 1, which controls how strongly an output is suppressed if weight and input are not aligned."""


# ---- operations ----------------------------------------------------------------------------------


class _Factor(torch.autograd.Function):
    """Factor of a product, which has no gradient inside explanation mode."""

    @staticmethod
    def forward(ctx: Any, factor: Tensor, mode: ExplanationMode) -> Tensor:
        ctx.mode = mode
        return factor.view_as(factor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        return None if ctx.mode.is_on else gradients[0], None


def hold_factor(factor: Tensor, mode: ExplanationMode) -> Tensor:
    """Return a factor of a product, differentiable twice outside explanation mode and a constant inside."""
    return _Factor.apply(factor, mode)  # type: ignore[no-any-return]


def add_inverse(images: Tensor) -> Tensor:
    """Encode images in [0, 1] as [r, g, b, 1 - r, 1 - g, 1 - b]: [B, 3, H, W] -> [B, 6, H, W]."""
    return torch.cat([images, 1 - images], dim=1)


def _align(out: Tensor, norm: Tensor, shared: BcosSettings) -> Tensor:
    """Compute |cos|^(B - 1) * out, where cos = out / norm is the cosine of a unit weight and the input (section 3.1).

    Args:
        out: w_hat x, of any floating dtype, which the result also has.
        norm: ||x||, float32 or wider, broadcastable to `out`.
    """
    if shared.b == 1:
        return out
    cosine = out.abs() / norm
    factor = cosine if shared.b == 2 else (cosine + _COSINE_EPS).pow(shared.b - 1)
    return hold_factor(factor.to(out.dtype), shared.mode) * out


# ---- layers --------------------------------------------------------------------------------------


class BcosConv2d(nn.Module):
    """Convolution with unit-norm kernels, each output scaled by its cosine with the patch.

    [B, in_channels, H, W] -> [B, out_channels, h, w], without a bias. The norm of a patch includes the zeros of the
    padding.
    """

    def __init__(
        self,
        shared: BcosSettings,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
    ) -> None:
        super().__init__()
        self.shared, self.padding = shared, padding
        self.linear = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        nn.init.kaiming_normal_(self.linear.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        conv = self.linear
        unit = conv.weight / conv.weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        out = F.conv2d(x, unit, None, conv.stride, self.padding)
        return _align(out, self._patch_norm(x), self.shared)

    def _patch_norm(self, x: Tensor) -> Tensor:
        """Norms of the patches, [B, 1, h, w]."""
        conv = self.linear
        squares = to_float32(x).square().sum(dim=1, keepdim=True)
        if torch.compiler.is_exporting():  # torch.onnx leaves the divisor out
            area = conv.kernel_size[0] * conv.kernel_size[1]
            sums = area * F.avg_pool2d(squares, conv.kernel_size, conv.stride, self.padding)
        else:
            sums = F.avg_pool2d(
                squares, conv.kernel_size, conv.stride, self.padding, divisor_override=1
            )
        return (sums + _CONV_EPS).sqrt()


class BcosLinear(nn.Module):
    """B-cos linear layer on the last dimension, [..., in_features] -> [..., out_features], without a bias."""

    def __init__(self, shared: BcosSettings, in_features: int, out_features: int) -> None:
        super().__init__()
        self.shared = shared
        self.linear = nn.Linear(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.linear.weight
        out = F.linear(x, weight / weight.norm(dim=1, keepdim=True))
        squares = to_float32(x).square().sum(dim=-1, keepdim=True)
        # A square root has no gradient at zero, where the output is 0 for any divisor.
        norm = torch.where(squares > 0, squares, 1.0).sqrt() + _LINEAR_EPS
        return _align(out, norm, self.shared)


class UncenteredBatchNorm2d(nn.Module):
    """Batch norm y = weight * x / sqrt(var + eps) with the biased variance about the mean, which is not subtracted.

    In training mode the variance is that over the batch and all positions, and the running variance is updated with
    momentum 0.1. `running_mean` stays 0 and exists only for the names of published checkpoints.
    """

    momentum = 0.1
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, shared: BcosSettings, channels: int) -> None:
        super().__init__()
        self.mode = shared.mode
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = None
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize [B, C, H, W], keeping the shape."""
        if self.training:
            var = to_float32(x).var(dim=(0, 2, 3), correction=0)
            with torch.no_grad():
                self.running_var.lerp_(var.to(self.running_var.dtype), self.momentum)
                self.num_batches_tracked += 1
        else:
            var = self.running_var
        factor = self.weight * (var + _NORM_EPS).rsqrt()
        return hold_factor(factor.to(x.dtype), self.mode).view(1, -1, 1, 1) * x


class CenteredNorm(nn.Module):
    """Norm y = weight * (x - mean) / sqrt(var + eps) of each example, without a bias, where 1 / sqrt is the factor.

    It normalizes tokens [..., C] over their last dimension (LayerNorm), or feature maps [B, C, H, W] over the last
    three dimensions (GroupNorm with one group).
    """

    def __init__(self, shared: BcosSettings, channels: int, *, is_spatial: bool = False) -> None:
        super().__init__()
        self.mode = shared.mode
        self.weight = nn.Parameter(torch.ones(channels))
        self.is_spatial = is_spatial

    def forward(self, x: Tensor) -> Tensor:
        dims = (1, 2, 3) if self.is_spatial else (-1,)
        weight = self.weight.to(x.dtype)
        if self.is_spatial:
            weight = weight.view(-1, 1, 1)
        var, mean = torch.var_mean(to_float32(x), dim=dims, correction=0, keepdim=True)
        factor = (var + _NORM_EPS).rsqrt().to(x.dtype)
        return hold_factor(factor, self.mode) * (x - mean.to(x.dtype)) * weight


class ClassMapOutput(NamedTuple):
    """Output of a network whose classifier comes before the global pool."""

    logits: Tensor
    """Logits [B, K]."""
    stages: list[Tensor]
    """Stages [B, C, h, w], which have no activation function at their end."""
    class_maps: Tensor
    """Class maps [B, K, h, w], whose spatial average is the logits without the bias."""


class LogitLayer(nn.Module):
    """Logits = raw / temperature + bias, with the same bias for all classes, in float32 or wider.

    The raw logits of a new network are much smaller than the bias, so their sum in bfloat16 would lose them.
    """

    def __init__(self, temperature: float, bias: float) -> None:
        super().__init__()
        self.temperature, self.bias = temperature, bias

    def forward(self, raw: Tensor) -> Tensor:
        return to_float32(raw) / self.temperature + self.bias

    def inside(self, stages: list[Tensor], raw_maps: Tensor) -> ClassMapOutput:
        """Build the output from the stages and the classifier's maps `raw_maps` [B, K, h, w]."""
        logits = self.forward(raw_maps.mean(dim=(2, 3)))
        return ClassMapOutput(logits, stages, to_float32(raw_maps) / self.temperature)
