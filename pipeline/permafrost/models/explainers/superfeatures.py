"""Contribution of each superfeature of an additive network to a class: its logit, class-centered.

In an additive game this is the exact Shapley value of the superfeature, so no sampling is needed (KED). The
contribution of a superfeature is divided evenly over its cells.
"""

from __future__ import annotations

import torch
from torch import Tensor

from permafrost.core.errors import ConfigError
from permafrost.models.additive.base import AdditiveClassifier
from permafrost.models.additive.hierarchy import class_centered
from permafrost.models.classifier import Classifier
from permafrost.models.output import ModelOutput


def superfeature_contributions(
    model: Classifier, output: ModelOutput, explained_class: Tensor
) -> Tensor:
    """Compute signed maps of the given classes on the grid of the model's features, float32 or wider.

    output           output of `model`, whose features are used if it has no superfeatures
    explained_class  i64 [B, E], where a negative entry results in a zero map
    returns          [B, E, 1, rows, columns], with a table's columns in one row
    """
    if not isinstance(model, AdditiveClassifier):
        raise ConfigError(
            f"explainer=superfeatures explains additive networks (teacher=additive, student=additive), not "
            f"{type(model.network).__name__}; set explainer={model.explainer}, or choose additive networks for both"
        )
    if model.of_channels:
        raise ConfigError(
            "explainer=superfeatures spreads a contribution over the cells of its superfeature, and groups of channels "
            "(trunk_features=channels) have none; set explainer=gradcam"
        )
    logits = output.superfeature_logits
    if logits is None:
        with torch.autocast(output.features.device.type, enabled=False):
            dtype = next(model.parameters()).dtype
            logits = model.forward_superfeatures(output.features.to(dtype)).logits
    group = model.assignments[-1]
    index = explained_class.clamp(min=0)[:, None].expand(-1, logits.shape[1], -1)
    shares = class_centered(logits).gather(2, index) / group.bincount()[:, None]  # [B, M, E]
    cells = shares[:, group].transpose(1, 2) * (explained_class >= 0)[:, :, None]  # [B, E, d]
    rows, columns = model.grid or (1, len(group))
    return cells.reshape(*explained_class.shape, 1, rows, columns)
