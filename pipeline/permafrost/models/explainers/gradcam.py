"""GradCAM (Selvaraju et al. 2017) from the head between the features A [B, C, h, w] and the logits z.

    alpha_k = mean_ij dz_c / dA_k,    map = relu(sum_k alpha_k A_k)

If the head depends on A only through its average g, dz_c / dA is h_c(g) / (h w) at every position, and

    map = relu(sum_k h_k A_k) / (h w)

needs no second backward pass: h is W[c] for a linear head, and a function of g if a layer norm precedes it. Every
other head is differentiated by autograd. Only the head is differentiated, so the trunk's graph is used only for the
gradients of a student.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from permafrost.core.errors import ConfigError
from permafrost.models.classifier import Classifier
from permafrost.models.output import GapLinear, GapNormLinear, ModelOutput


def gradcam(model: Classifier, output: ModelOutput, explained_class: Tensor) -> Tensor:
    """Compute maps of the given classes on the features' grid, in float32 or wider.

    output           output of `model`, with or without its graph
    explained_class  i64 [B, E], where a negative entry results in a zero map
    returns          [B, E, 1, h, w], >= 0
    """
    if model.explainer != "gradcam":
        raise ConfigError(
            f"explainer=gradcam explains the features of a layer, but those of {type(model.network).__name__} are its "
            f"input; set explainer={model.explainer}"
        )
    with torch.autocast(output.features.device.type, enabled=False):
        features = _widen(output.features)
        match model.head:
            case GapLinear(linear):
                return gradcam_from_head(features, _widen(linear.weight), explained_class)
            case GapNormLinear(norm, linear):
                class_weight = norm_class_weight(features, norm, linear, explained_class)
                return _weighted_maps(features, class_weight, explained_class)
        class_weight = _autograd_class_weight(model, output, explained_class)
        return _weighted_maps(features, class_weight, explained_class)


def gradcam_from_head(features: Tensor, weight: Tensor, explained_class: Tensor) -> Tensor:
    """Compute the closed form for a linear head from features [B, C, h, w], weight [K, C] and classes [B, E]."""
    return _weighted_maps(features, weight[explained_class.clamp(min=0)], explained_class)


def norm_class_weight(
    features: Tensor, norm: nn.LayerNorm, linear: nn.Linear, explained_class: Tensor
) -> Tensor:
    """Compute dz_c / dg [B, E, C] of z = linear(norm(g)), g the features' average, differentiable in all inputs."""
    average = features.mean(dim=(2, 3))[:, None]  # [B, 1, C]
    scale = (average.var(dim=2, keepdim=True, correction=0) + norm.eps).sqrt()
    normalized = (average - average.mean(dim=2, keepdim=True)) / scale
    weight = _widen(linear.weight)[explained_class.clamp(min=0)]  # [B, E, C]
    if norm.weight is not None:
        weight = weight * _widen(norm.weight)
    along = (weight * normalized).mean(dim=2, keepdim=True)
    return (weight - weight.mean(dim=2, keepdim=True) - normalized * along) / scale


def _autograd_class_weight(
    model: Classifier, output: ModelOutput, explained_class: Tensor
) -> Tensor:
    """Compute h w times alpha, [B, E, C], by differentiating the head.

    If no gradients are recorded (a frozen teacher, an evaluation), the head runs again on detached features.
    """
    if torch.is_inference_mode_enabled() or output.features.is_inference():
        raise RuntimeError(
            "GradCAM differentiates this head, which inference_mode forbids; use torch.no_grad()"
        )
    create_graph = torch.is_grad_enabled() and output.logits.requires_grad
    features, logits = output.features, output.logits
    with torch.enable_grad():
        if not features.requires_grad:
            dtype = next(model.parameters()).dtype
            features = features.to(dtype).detach().requires_grad_()
            context = None if output.context is None else output.context.to(dtype)
            logits = model.forward_head(features, context)
        weights = []
        for classes in explained_class.clamp(min=0).T:
            score = logits.gather(1, classes[:, None]).sum()
            (gradient,) = torch.autograd.grad(
                score, features, create_graph=create_graph, retain_graph=True
            )
            weights.append(_widen(gradient).sum(dim=(2, 3)))
    return torch.stack(weights, dim=1)


def _weighted_maps(features: Tensor, class_weight: Tensor, explained_class: Tensor) -> Tensor:
    """Compute relu(sum_k class_weight_k features_k) / (h w) [B, E, 1, h, w], zero where a class is negative."""
    h, w = features.shape[-2:]
    maps = torch.einsum("bec,bchw->behw", class_weight, features).relu() / (h * w)
    return (maps * (explained_class >= 0)[:, :, None, None]).unsqueeze(2)


def _widen(tensor: Tensor) -> Tensor:
    """Convert half precision to float32. Other tensors are returned as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
