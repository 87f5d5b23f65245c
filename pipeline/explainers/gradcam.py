"""GradCAM (Selvaraju et al. 2017) for models whose head is linear on a global average pool.

For z = W . mean_ij(A) + b the gradient dz_c / dA is W[c] / (h w) at every place, so

    map = relu(sum_k W[c, k] A_k) / (h w)

with no second backward pass: the map is an ordinary first-order function of the features and the
head's weight, and its gradients equal those of the autograd definition.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pipeline.models.output import GapLinearModel, ModelOutput


def gradcam(model: GapLinearModel, output: ModelOutput, explained_class: Tensor) -> Tensor:
    """Maps of the given classes at the features' own grid.

    output           features [B, C, h, w] of `model`, with or without their graph
    explained_class  i64 [B, E]; a negative entry gives a zero map
    returns          [B, E, 1, h, w], >= 0
    """
    return gradcam_from_head(output.features, model.gap_linear_head.weight, explained_class)


def gradcam_from_head(features: Tensor, weight: Tensor, explained_class: Tensor) -> Tensor:
    """The closed form (spec of e2KD, 2.3) from features [B, C, h, w], head weight [K, C], classes [B, E]."""
    h, w = features.shape[-2:]
    class_weight = weight[explained_class.clamp(min=0)]  # [B, E, C]
    maps = torch.einsum("bec,bchw->behw", class_weight, features).relu() / (h * w)
    return (maps * (explained_class >= 0)[:, :, None, None]).unsqueeze(2)
