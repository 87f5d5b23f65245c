"""Explanations of B-cos networks, which explain themselves.

    W_c(x) = dz_c / dx with every factor of the layers held constant,    sum W_c(x) x = z_c - bias

W decomposes the whole logit over six channels of each pixel (for a ViT, except the contribution of its position
embedding). e2KD compares W itself. M = sum over channels of W x localizes the contributions to a logit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from permafrost.core.errors import ConfigError, require
from permafrost.models.classifier import Classifier, ModelOutput, to_float32
from permafrost.models.compute import exact_float32, float32_products
from permafrost.models.explanations import class_gradients
from permafrost_papers.bcos.layers import add_inverse

_LIFT = 2.0**12
"""Power of two that scales the gradient of a float16 pass above its underflow, and is exact in every other dtype."""
_TINY = 1e-12
_OPAQUE_QUANTILE = 0.995
"""Quantile of the norms of W at and above which a picture is opaque."""


def bcos_weights(model: Classifier, output: ModelOutput, target_class: Tensor) -> Tensor:
    """Compute W of the given classes, float32 or wider, with a graph to the parameters if they are trained.

    Args:
        output: Output of `model`, with or without its graph, so one forward pass is enough for logits and W.
        target_class: i64 [B, E], where a negative entry results in a zero map.

    Returns:
        [B, E, 6, H, W], signed.
    """
    if model.explanation_mode is None:
        raise ConfigError(
            f"explainer=bcos_weights explains B-cos networks (teacher=bcos, student=bcos), not "
            f"{type(model.network).__name__}; set explainer={model.explainer}, or choose B-cos networks for both"
        )
    features, logits = output.features, output.logits
    require(
        not torch.is_inference_mode_enabled() and not features.is_inference(),
        "explainer=bcos_weights computes a gradient, which inference_mode forbids; use torch.no_grad()",
        RuntimeError,
    )
    trained = torch.is_grad_enabled() and any(
        parameter.requires_grad for parameter in model.parameters()
    )
    with torch.enable_grad():
        if not (features.requires_grad and logits.requires_grad):
            # No graph was recorded (a frozen teacher, an evaluation), so run again in the parameters' precision.
            features = features.detach().to(next(model.parameters()).dtype).requires_grad_()
            with exact_float32(features.device):
                logits = model.forward_head(features, None)
        gradients = class_gradients(_LIFT * logits, features, target_class, create_graph=trained)
        with model.explanation_mode(), float32_products():
            weights = [to_float32(gradient) / _LIFT for gradient in gradients]
    return torch.stack(weights, dim=1) * (target_class >= 0)[:, :, None, None, None]


def bcos_contributions(model: Classifier, output: ModelOutput, target_class: Tensor) -> Tensor:
    """Compute `contribution_map` of `bcos_weights`, with a graph to the parameters if they are trained."""
    return contribution_map(bcos_weights(model, output, target_class), output.features.detach())


def contribution_map(maps: Tensor, features: Tensor) -> Tensor:
    """Compute M = sum over channels of W x, the signed contribution of each position to the logit.

    Args:
        maps: W [B, E, 6, H, W].
        features: x [B, 6, H, W].

    Returns:
        [B, E, 1, H, W], signed.
    """
    return (maps * features[:, None]).sum(dim=2, keepdim=True)


def color_picture(maps: Tensor, features: Tensor) -> Tensor:
    """Render W as a picture in [0, 1], RGBA [B, E, H, W, 4], with the colors that W responds to.

    A position is transparent if its contribution is negative, and opaque where W is largest.

    Args:
        maps: W [B, E, 6, H, W].
        features: x [B, 6, H, W].
    """
    against = contribution_map(maps, features).squeeze(2) < 0  # [B, E, H, W]
    positive = (maps / (maps.abs().amax(dim=2, keepdim=True) + _TINY)).clamp(min=0)
    color = positive[:, :, :3] / (positive[:, :, :3] + positive[:, :, 3:] + _TINY)
    alpha = maps.norm(dim=2).masked_fill(against, 0.0)
    opaque = alpha.flatten(2).quantile(_OPAQUE_QUANTILE, dim=2)[:, :, None, None]
    alpha = (alpha / opaque.clamp(min=_TINY)).clamp(0, 1)
    return torch.cat([color, alpha.unsqueeze(2)], dim=2).movedim(2, 4)


def image_contributions(maps: Tensor, images: Callable[[], Tensor]) -> Tensor:
    """Compute `contribution_map` for the images that the network has received (ExplainerConfig.contribution)."""
    return contribution_map(maps, add_inverse(images()))


def image_picture(maps: Tensor, images: Callable[[], Tensor]) -> Tensor:
    """Render `color_picture` for the images that the network has received (ExplainerConfig.picture)."""
    return color_picture(maps, add_inverse(images()))
