"""Outputs of networks, assembled from given tensors."""

from typing import Any

import torch
from torch import Tensor

from permafrost.losses.base import StudentOutput
from permafrost.models.classifier import ModelOutput


def student_output(
    *,
    logits: Tensor,
    maps: Tensor | None = None,
    input_size: tuple[int, int] = (0, 0),
    record_index: Tensor | None = None,
    view_index: Tensor | None = None,
    **intermediates: Any,
) -> StudentOutput:
    """Student's output of a step. `intermediates` are fields of ModelOutput by name."""
    features = torch.zeros(len(logits), 1, 1, 1)
    return StudentOutput(
        output=ModelOutput(logits=logits, features=features, **intermediates),
        maps=maps,
        input_size=input_size,
        record_index=record_index,
        view_index=view_index,
    )
