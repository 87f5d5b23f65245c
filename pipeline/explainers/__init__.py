"""Explanations of a model's logits: differentiable, and the same code for teacher and student."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pipeline.explainers.bcos_weights import bcos_weights
from pipeline.explainers.gradcam import gradcam

Explainer = Callable[[Any, Any, Tensor], Tensor]
"""(model, its output, explained_class [B, E]) -> maps [B, E, A, h, w] on the model's own grid."""

EXPLAINERS: dict[str, Explainer] = {"gradcam": gradcam, "bcos_weights": bcos_weights}

DEFAULT_EXPLAINER = "gradcam"
"""Of a student that learned from labels alone and is compared with no teacher."""
