"""Fields that a pass stores of a teacher's intermediates, as they are before encoding, and of a live teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from permafrost.core.errors import require
from permafrost.core.records import FEATURES
from permafrost.loading.transfer import copy_to
from permafrost.models.classifier import (
    POOLED_STAGE,
    ModelOutput,
    attention_map,
    stage_index,
    to_float32,
)
from permafrost.store.projections import Projection


def attention_fields(output: ModelOutput) -> dict[str, Tensor]:
    """Return the fields attention_1, ... [B, h, w]: Q of each stage."""
    return {
        f"attention_{number}": attention_map(stage.output.detach())
        for number, stage in enumerate(output.stages, start=1)
    }


def class_map_fields(output: ModelOutput) -> dict[str, Tensor]:
    """Return the field class_maps [B, K, h, w], on the features' grid."""
    return {"class_maps": output.require("class_maps").detach()}


def pooled_fields(output: ModelOutput) -> dict[str, Tensor]:
    """Return the field pooled [B, d]: the pooled feature before the classifier."""
    return {"pooled": output.require("pooled").detach()}


def stage_fields(
    output: ModelOutput, stages: Sequence[int] = (), margin: float = 0.0
) -> dict[str, Tensor]:
    """Return the fields features_<stage> [B, C, h, w] before the stage's last ReLU, then features_pooled [B, C].

    They are f32 or wider.

    Args:
        output: Output with its stages.
        stages: Numbers of the stages, counted from 1 at the finest or from -1 at the deepest; empty takes all.
        margin: Width of a border around the image in units of its side, which features_pooled does not average over.

    Raises:
        ConfigError: If the network has fewer stages.
    """
    count = len(output.stages)
    require(
        max(map(abs, stages), default=0) <= count,
        f"annotate.features_stages={list(stages)}: the teacher has {count} stages",
    )
    fields = {
        f"{FEATURES}_{place + 1}": to_float32(output.stages[place].preactivation.detach())
        for place in sorted(stage_index(number, count) for number in stages) or range(count)
    }
    deepest = to_float32(output.stages[-1].output.detach())
    top, left = (round(side * margin / (1 + 2 * margin)) for side in deepest.shape[-2:])
    inner = deepest[..., top : deepest.shape[-2] - top, left : deepest.shape[-1] - left]
    return {**fields, POOLED_STAGE: inner.mean(dim=(2, 3))}


_FIELDS: dict[str, Callable[[ModelOutput], dict[str, Tensor]]] = {
    "attention": attention_fields,
    "class_maps": class_map_fields,
    FEATURES: stage_fields,
    "pooled": pooled_fields,
}
"""Fields of each output of intermediates, with the default options of a pass."""


def fields_of_outputs(outputs: Iterable[str], output: ModelOutput) -> dict[str, Tensor]:
    """Compute the fields of outputs of intermediates, f32 and without a graph.

    Args:
        outputs: Names of outputs; those without intermediates are left out.
        output: Output with the intermediates that they need.
    """
    return {
        name: values
        for output_name in outputs
        if output_name in _FIELDS
        for name, values in _FIELDS[output_name](output).items()
    }


def project_features(features: Tensor, projection: Projection) -> Tensor:
    """Compute components (x - mean) at each position.

    Args:
        features: Features x, f32 [B, C, h, w].
        projection: Projection on C' components.

    Returns:
        f32 [B, C', h, w].
    """
    mean, components = (
        copy_to(torch.from_numpy(part), features.device).to(features.dtype)
        for part in projection[:2]
    )
    return torch.einsum("kc,bchw->bkhw", components, features - mean[:, None, None])
