"""B-cos layers (Boehle et al. 2022, 2024), with explanations that can be trained on.

Every layer is a linear map whose factor depends on its input, y = s(x) * (W x). The explanation of a
logit is its gradient with all factors s held still (e2KD, section 4: "dynamic weights"). Holding them by
`detach` gives the same explanation and a wrong gradient of a loss on it, so here the factor stays in the
graph and its operation leaves it out of one backward pass: the one inside `ExplanationMode`.

Norms and variances are float32 at least, whatever the precision of the pass: squares overflow float16.
Submodules carry the names of the published B-cos v2 checkpoints (`linear` holds a layer's weight).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.output import to_float32

_CONV_EPS = 1e-6
"""Added to a patch's squared norm."""
_LINEAR_EPS = 1e-12
"""Added to a token's norm, outside the root."""
_COSINE_EPS = 1e-6
"""Added to |cos| before it is raised to B - 1; none is needed for B = 2."""
_NORM_EPS = 1e-5
"""Added to variances."""


class ExplanationMode:
    """A model's switch, read by its operations when they are differentiated; shared by all its layers."""

    def __init__(self) -> None:
        self.is_on = False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Factors are constants of the gradients taken inside; off again whatever happens."""
        if self.is_on:
            raise RuntimeError("explanation mode is on already; it does not nest")
        self.is_on = True
        try:
            yield
        finally:
            self.is_on = False

    def guard(self, network: nn.Module) -> None:
        """Make a gradient that reaches a parameter inside the mode an error: it would be a wrong one."""
        for parameter in network.parameters():
            parameter.register_hook(self._refuse)  # type: ignore[no-untyped-call]

    def _refuse(self, gradient: Tensor) -> Tensor:
        if self.is_on:
            raise RuntimeError(
                "a loss was back-propagated inside explanation mode, where the factors of B-cos layers have no "
                "gradient; leave the mode before loss.backward()"
            )
        return gradient


@dataclass(frozen=True)
class BcosSettings:
    """What all layers of one network have in common."""

    mode: ExplanationMode = field(default_factory=ExplanationMode)
    b: float = 2.0
    """The exponent B: how much a layer's output is suppressed where weight and input disagree; >= 1."""


# ---- operations ----------------------------------------------------------------------------------


class _Scale(torch.autograd.Function):
    """factor * x; inside explanation mode the factor has no gradient."""

    @staticmethod
    def forward(ctx: Any, factor: Tensor, x: Tensor, mode: ExplanationMode) -> Tensor:
        ctx.save_for_backward(factor, x)
        ctx.mode = mode
        return factor * x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (gradient,) = gradients
        factor, x = ctx.saved_tensors
        of_factor = None
        if ctx.needs_input_grad[0] and not ctx.mode.is_on:
            of_factor = (gradient * x).sum_to_size(factor.shape)
        of_x = (gradient * factor).sum_to_size(x.shape) if ctx.needs_input_grad[1] else None
        return of_factor, of_x, None


class _AttentionProduct(torch.autograd.Function):
    """attention @ values; inside explanation mode the attention has no gradient."""

    @staticmethod
    def forward(ctx: Any, attention: Tensor, values: Tensor, mode: ExplanationMode) -> Tensor:
        ctx.save_for_backward(attention, values)
        ctx.mode = mode
        return attention @ values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (gradient,) = gradients
        attention, values = ctx.saved_tensors
        of_attention = None
        if ctx.needs_input_grad[0] and not ctx.mode.is_on:
            of_attention = gradient @ values.transpose(-2, -1)
        of_values = attention.transpose(-2, -1) @ gradient if ctx.needs_input_grad[1] else None
        return of_attention, of_values, None


def scale(factor: Tensor, x: Tensor, mode: ExplanationMode) -> Tensor:
    """factor * x, broadcast; differentiable twice."""
    scaled: Tensor = _Scale.apply(factor, x, mode)
    return scaled


def attend(attention: Tensor, values: Tensor, mode: ExplanationMode) -> Tensor:
    """attention [..., n, n] @ values [..., n, d]; differentiable twice, with no n * n * d tensor."""
    attended: Tensor = _AttentionProduct.apply(attention, values, mode)
    return attended


def add_inverse(images: Tensor) -> Tensor:
    """[r, g, b, 1 - r, 1 - g, 1 - b] of images in [0, 1]: [B, 3, H, W] -> [B, 6, H, W]."""
    return torch.cat([images, 1 - images], dim=1)


def _align(out: Tensor, norm: Tensor, shared: BcosSettings) -> Tensor:
    """|cos|^(B - 1) * out, cos = out / norm the cosine between a unit weight and the input (section 3.1).

    out   w_hat x, of any floating type; the result's too
    norm  ||x||, float32 at least; broadcasts to `out`
    """
    if shared.b == 1:
        return out
    cosine = out.abs() / norm
    factor = cosine if shared.b == 2 else (cosine + _COSINE_EPS).pow(shared.b - 1)
    return scale(factor.to(out.dtype), out, shared.mode)


# ---- layers --------------------------------------------------------------------------------------


class BcosConv2d(nn.Module):
    """Convolution with unit-norm kernels, each output scaled by its cosine with the patch.

    [B, in_channels, H, W] -> [B, out_channels, h, w]; no bias. The norm of a patch is that of the
    group's channels and counts the zeros that padding adds.
    """

    def __init__(
        self,
        shared: BcosSettings,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.shared = shared
        self.padding = padding
        self.linear = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False
        )
        nn.init.kaiming_normal_(self.linear.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        conv = self.linear
        unit = conv.weight / conv.weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        out = F.conv2d(x, unit, None, conv.stride, self.padding, groups=conv.groups)
        return _align(out, self._patch_norm(x), self.shared)

    def _patch_norm(self, x: Tensor) -> Tensor:
        """[B, 1, h, w], or [B, out_channels, h, w] where there are groups."""
        conv = self.linear
        by_group = to_float32(x).square().view(x.shape[0], conv.groups, -1, *x.shape[2:])
        sums = F.avg_pool2d(
            by_group.sum(dim=2), conv.kernel_size, conv.stride, self.padding, divisor_override=1
        )
        norm = (sums + _CONV_EPS).sqrt()
        if conv.groups == 1:
            return norm
        return norm.repeat_interleave(conv.out_channels // conv.groups, dim=1)


class BcosLinear(nn.Module):
    """The same on the last dimension: [..., in_features] -> [..., out_features]; no bias."""

    def __init__(self, shared: BcosSettings, in_features: int, out_features: int) -> None:
        super().__init__()
        self.shared = shared
        self.linear = nn.Linear(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.linear.weight
        out = F.linear(x, weight / weight.norm(dim=1, keepdim=True))
        squares = to_float32(x).square().sum(dim=-1, keepdim=True)
        # A root has no gradient at zero; there the output is 0 whatever it is divided by.
        norm = torch.where(squares > 0, squares, 1.0).sqrt() + _LINEAR_EPS
        return _align(out, norm, self.shared)


class UncenteredBatchNorm2d(nn.Module):
    """y = weight * x / sqrt(var + eps), var the biased variance about the mean, which is never subtracted.

    In training mode over the batch and all positions, and the running variance follows with momentum
    0.1. `running_mean` stays 0; it is there for the names of published checkpoints.
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
        """[B, C, H, W] -> the same."""
        if self.training:
            var = to_float32(x).var(dim=(0, 2, 3), correction=0)
            with torch.no_grad():
                self.running_var.lerp_(var.to(self.running_var.dtype), self.momentum)
                self.num_batches_tracked += 1
        else:
            var = self.running_var
        factor = self.weight * (var + _NORM_EPS).rsqrt()
        return scale(factor.to(x.dtype).view(1, -1, 1, 1), x, self.mode)


class CenteredNorm(nn.Module):
    """y = weight * (x - mean) / sqrt(var + eps) of each example, without a bias; 1 / sqrt is the factor.

    Of tokens [..., C] over their last dimension (LayerNorm), or of feature maps [B, C, H, W] over all
    three others (GroupNorm with one group).
    """

    def __init__(self, shared: BcosSettings, channels: int, *, of_maps: bool = False) -> None:
        super().__init__()
        self.mode = shared.mode
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = None
        self.of_maps = of_maps

    def forward(self, x: Tensor) -> Tensor:
        dims = (1, 2, 3) if self.of_maps else (-1,)
        weight = self.weight.to(x.dtype)
        if self.of_maps:
            weight = weight.view(-1, 1, 1)
        var, mean = torch.var_mean(to_float32(x), dim=dims, correction=0, keepdim=True)
        factor = (var + _NORM_EPS).rsqrt().to(x.dtype)
        return scale(factor, x - mean.to(x.dtype), self.mode) * weight


class ClassMapOutput(NamedTuple):
    """A pass through a network whose classifier comes before the global pool."""

    logits: Tensor
    """[B, K]."""
    stages: list[Tensor]
    """[B, C, h, w] each; nothing follows that could be called an activation."""
    class_maps: Tensor
    """[B, K, h, w]: their average is the logits without the bias."""


class LogitLayer(nn.Module):
    """Logits = raw / temperature + bias, the bias of all classes alike; float32 at least.

    Raw logits of a fresh network are far smaller than the bias, beside which bfloat16 would lose them.
    """

    def __init__(self, temperature: float, bias: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.bias = bias

    def forward(self, raw: Tensor) -> Tensor:
        return to_float32(raw) / self.temperature + self.bias

    def inside(self, stages: list[Tensor], raw_maps: Tensor) -> ClassMapOutput:
        """What a pass gives whose classifier's maps are `raw_maps` [B, K, h, w]."""
        logits = self.forward(raw_maps.mean(dim=(2, 3)))
        return ClassMapOutput(logits, stages, to_float32(raw_maps) / self.temperature)
