"""Explanations of a model's logits: differentiable, and the same code for teacher and student."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.explainers.gradcam import gradcam

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

Explainer = "Callable[[Any, Any, Tensor], Tensor]"

EXPLAINERS: dict[str, Callable[[Any, Any, Tensor], Tensor]] = {"gradcam": gradcam}
"""(model, its output, explained_class [B, E]) -> maps [B, E, A, h, w] on the model's own grid."""
