"""What each superfeature of an additive network adds to a class: its own logit, class-centered.

In an additive game that is the Shapley value of the superfeature, so nothing is sampled (KED). A superfeature's
share is spread evenly over its cells.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.core.errors import ConfigError
from pipeline.models.additive.hierarchy import class_centered
from pipeline.models.additive.network import AdditiveClassifier
from pipeline.models.classifier import Classifier
from pipeline.models.output import ModelOutput


def superfeature_contributions(
    model: Classifier, output: ModelOutput, explained_class: Tensor
) -> Tensor:
    """Maps of the given classes on the grid of the model's features, signed, float32 or wider.

    output           of `model`; where it has no superfeatures, they are computed from its features
    explained_class  i64 [B, E]; a negative entry gives a zero map
    returns          [B, E, 1, rows, columns], a table's columns in one row
    """
    if not isinstance(model, AdditiveClassifier):
        raise ConfigError(
            f"explainer=superfeatures explains additive networks (teacher=additive, student=additive), not "
            f"{type(model.network).__name__}; set explainer={model.explainer}, or make both networks additive"
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
