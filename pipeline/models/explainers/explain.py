"""Explanations of a model's logits: differentiable, and the same code for teacher and student."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pipeline.models.classifier import Classifier
from pipeline.models.explainers.bcos_weights import bcos_contributions, bcos_weights
from pipeline.models.explainers.gradcam import gradcam
from pipeline.models.explainers.superfeatures import superfeature_contributions
from pipeline.models.output import NO_INTERMEDIATES, Intermediates, ModelOutput

Explainer = Callable[[Any, Any, Tensor], Tensor]
"""(model, its output, explained_class [B, E]) -> maps [B, E, A, h, w] on the model's own grid."""

EXPLAINERS: dict[str, Explainer] = {
    "gradcam": gradcam,
    "bcos_weights": bcos_weights,
    "superfeatures": superfeature_contributions,
}

ATTRIBUTIONS: dict[str, Explainer] = {
    **EXPLAINERS,
    "bcos_weights": bcos_contributions,
}
"""What each place says for or against a class, [B, E, 1, h, w]: what can be compared with a region."""

DEFAULT_EXPLAINER = "gradcam"
"""Of a student that learned from labels alone and is compared with no teacher."""


def forward_to_explain(
    model: Classifier, images: Tensor, intermediates: Intermediates = NO_INTERMEDIATES
) -> ModelOutput:
    """One forward pass of a frozen model for both its logits and its maps, also inside no_grad.

    It is recorded where a map is a gradient of the input, which would otherwise cost a second pass. The
    logits then carry the graph with them: detach what is kept.

    images  f32 [B, 3, H, W] in [0, 1]
    inner   what else is asked of the pass
    """
    recorded = torch.is_grad_enabled() or model.explainer == "bcos_weights"
    with torch.set_grad_enabled(recorded):
        output: ModelOutput = model(images, intermediates)
    return output
