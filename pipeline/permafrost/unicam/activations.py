"""Activations of a network for a few explained records and for the banks that they are compared with, by depth.

Depth 1 is the spatial average of the deepest layer, depth 2 that layer at every position, depth 3 the layer before it.
A teacher's activations are cached in the store, in <store>/artifacts/activations-<fp8>/.

Shape letters: n records, r of them explained, p values of a feature, C channels, h w grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from permafrost.core.errors import ConfigError
from permafrost.core.files import sha256_keys
from permafrost.evaluation.context import EvaluationContext
from permafrost.evaluation.evaluators.layers import (
    POOLED,
    activations,
    layer_features,
    layer_names,
    pool,
)
from permafrost.evaluation.evaluators.probe_set import iter_views
from permafrost.evaluation.forward import EvaluatedModel
from permafrost.store.artifacts import Artifact
from permafrost.unicam.teacher_artifact import teacher_artifact

_POOLED_DEPTH = 1


@dataclass(frozen=True)
class ProbeSplit:
    """The explained records and the banks that they are compared with."""

    positions: NDArray[np.int64]
    """Positions of all records in the context's dataset, the explained ones first."""
    explained: int
    """Number r of explained records."""
    banks: tuple[NDArray[np.int64], ...]
    """Indices into `positions` of each bank's records."""
    bank_sha256: tuple[str, ...]
    """Hash of each bank's record keys in their order."""
    classes: int = 0
    """Number of classes in the banks. The maps are not informative about other classes."""


@dataclass(frozen=True)
class NetworkActivations:
    """Activations of one network by depth."""

    features: dict[int, Tensor]
    """Features f32 [n, p] of all records."""
    grids: dict[int, Tensor]
    """Activations f32 [r, C, h, w] of the explained records: at depth 1 the input of the average, else the layer."""


def feature_of(depth: int, grids: Tensor) -> Tensor:
    """Compute features [B, p] from activations [B, C, h, w]."""
    return pool(grids) if depth == _POOLED_DEPTH else grids.flatten(1)


def check_depths(option: str, model: EvaluatedModel, depths: Sequence[int], title: str) -> None:
    """Raise ConfigError if the network has no spatial layer, or fewer layers than required.

    title  name of the network, for the message
    """
    layers = layer_names(model)
    if POOLED not in layers:
        raise ConfigError(
            f"evaluators=unicam needs a layer with a spatial grid, but {title} has none; choose another network"
        )
    if max(depths) > len(layers):
        raise ConfigError(
            f"{option}={list(depths)}: {title} has {len(layers)} depths: {', '.join(reversed(layers))}"
        )


@torch.no_grad()
def collect_activations(
    context: EvaluationContext,
    model: EvaluatedModel,
    probe_split: ProbeSplit,
    depths: Sequence[int],
) -> NetworkActivations:
    """Compute the activations by running the network."""
    features: dict[int, list[Tensor]] = {depth: [] for depth in depths}
    grids: dict[int, list[Tensor]] = {depth: [] for depth in depths}
    done = 0
    for images in iter_views(
        model, context.dataset, probe_split.positions.tolist(), context.options
    ):
        found = activations(model.network, images)
        by_layer = list(layer_features(found).values())
        shown = [
            *found.values(),
            list(found.values())[-1],
        ]  # depth 1 explains the input of the average
        for depth in depths:
            features[depth].append(by_layer[-depth].cpu())
            grids[depth].append(shown[-depth][: max(probe_split.explained - done, 0)].cpu())
        done += len(images)
    return NetworkActivations(
        features={depth: torch.cat(parts) for depth, parts in features.items()},
        grids={depth: torch.cat(parts) for depth, parts in grids.items()},
    )


# ---- the teacher's -------------------------------------------------------------------------------


def has_teacher_views(
    context: EvaluationContext, probe_split: ProbeSplit, depths: Sequence[int]
) -> bool:
    """Return whether the store contains the teacher's activations."""
    return _artifact(context, probe_split, depths).exists


def teacher_views(
    context: EvaluationContext, probe_split: ProbeSplit, depths: Sequence[int]
) -> NetworkActivations:
    """Load the teacher's activations from the store, or compute them with the network and store them."""
    artifact = _artifact(context, probe_split, depths)
    if not artifact.exists:
        views = collect_activations(context, context.networks.teacher, probe_split, depths)
        tensors = {f"features/{depth}": values for depth, values in views.features.items()}
        tensors |= {f"grids/{depth}": values for depth, values in views.grids.items()}
        artifact.save(tensors, {"layers": [f"depth{depth}" for depth in depths]})
        return views
    _, tensors = artifact.load()
    return NetworkActivations(
        features={depth: tensors[f"features/{depth}"] for depth in depths},
        grids={depth: tensors[f"grids/{depth}"] for depth in depths},
    )


def _artifact(
    context: EvaluationContext, probe_split: ProbeSplit, depths: Sequence[int]
) -> Artifact:
    return teacher_artifact(
        context,
        "activations",
        keys_sha256=sha256_keys(context.dataset.keys_at(probe_split.positions)),
        explained=probe_split.explained,
        depths=list(depths),
    )
