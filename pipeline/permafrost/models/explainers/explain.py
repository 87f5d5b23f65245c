"""Differentiable explanations of a model's logits, with the same code for teacher and student."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from permafrost.config.explainers import EXPLAINERS, ExplainerConfig
from permafrost.config.options import resolve_implementation
from permafrost.config.store import PassOptions
from permafrost.models.classifier import Classifier
from permafrost.models.output import NO_INTERMEDIATES, Intermediates, ModelOutput

Explainer = Callable[[Any, Any, Tensor], Tensor]
"""(model, its output, explained_class [B, E]) -> maps [B, E, A, h, w] on the model's own grid."""

DEFAULT_EXPLAINER = "gradcam"
"""Explainer of a student that is trained on labels only and not compared with a teacher."""


def explainer_named(kind: str) -> Explainer:
    """Return the explainer of that name in config.explainers.EXPLAINERS."""
    explainer: Explainer = resolve_implementation(EXPLAINERS[kind])
    return explainer


def attribution_named(kind: str) -> Explainer:
    """Return an explainer's maps [B, E, 1, h, w] of contributions to a class, which are comparable with a region."""
    name = EXPLAINERS[kind].attribution
    attribution: Explainer = pkgutil.resolve_name(name) if name else explainer_named(kind)
    return attribution


def needs_graph(model: Classifier) -> bool:
    """Return whether the model's maps are gradients through the whole network, which need the graph of its pass."""
    return EXPLAINERS[model.explainer].needs_graph


def pass_precision(config: PassOptions, explainer: ExplainerConfig) -> str:
    """Return the precision of the forward passes of a pass with these options.

    Maps are computed in float32. If they are gradients through the whole network, that takes a float32 pass of it,
    which then is the only one.
    """
    return "float32" if "map" in config.payloads and explainer.needs_graph else config.precision


def forward_to_explain(
    model: Classifier, images: Tensor, intermediates: Intermediates = NO_INTERMEDIATES
) -> ModelOutput:
    """Run one forward pass of a model for both its logits and its maps, also inside no_grad.

    The graph is recorded if maps are gradients with respect to the input, which would otherwise need a second pass. In
    that case the logits hold the graph, so detach the tensors that are kept.

    images         f32 [B, 3, H, W] in [0, 1]
    intermediates  additional outputs of the pass
    """
    recorded = torch.is_grad_enabled() or needs_graph(model)
    with torch.set_grad_enabled(recorded):
        output: ModelOutput = model(images, intermediates)
    return output
