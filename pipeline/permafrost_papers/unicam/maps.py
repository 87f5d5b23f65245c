"""UniCAM: maps of the image regions in which one network has label-relevant features that another lacks.

The objective J is not a logit but RS(x | given; labels) of a batch (estimators.py). The map of a record is

    CAM        sum_k mean_uv(dJ/dF_k) F_k
    HiResCAM   sum_k dJ/dF_k F_k

where F [C, h, w] is its activation at the explained layer of x. `given` and the labels are constants. J is invariant
to a common shift or scale of all features, so the maps of a batch are relative to the batch: half of the evidence is
negative, and another batch results in another map. Each record is therefore explained against a fixed, class-balanced
bank, with the record and the bank as the batch. The derivative with respect to its features is the same, and only its
own row of distances has to be computed. Maps are signed, and pictures show their positive part.

Activations are taken by depth: depth 1 is the spatial average of the deepest layer, depth 2 that layer at every
position, depth 3 the layer before it. A teacher's are cached in the store, in <store>/artifacts/activations-<fp8>/.

Shape letters: n records, r of them explained, m records of the bank, p values of a feature, C channels, h w grid.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from permafrost.core.digests import sha256_keys
from permafrost.core.errors import require
from permafrost.evaluation.context import EvaluationContext
from permafrost.evaluation.forward import EvaluatedModel
from permafrost.store.artifacts import Artifact
from permafrost_papers.probe_set import POOLED, activations, layer_features, layer_names
from permafrost_papers.unicam.estimators import (
    correlation,
    feature_distances,
    inner,
    semi_partial,
    u_centered,
)
from permafrost_papers.unicam.teacher_artifact import teacher_artifact

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


NetworkActivations: TypeAlias = dict[str, Tensor]
"""Activations of one network: `features/<depth>`, features f32 [n, p] of all records, and `grids/<depth>`, activations
f32 [r, C, h, w] of the explained records (at depth 1 the input of the average, else the layer)."""


def feature_of(depth: int, grids: Tensor) -> Tensor:
    """Compute the features to compare from activations of the layer of a depth.

    Args:
        depth: Depth, counted from 1 at the average of the deepest layer.
        grids: [B, C, h, w].

    Returns:
        [B, p]: the spatial average at depth 1, otherwise the flattened activations.
    """
    return grids.mean(dim=(2, 3)) if depth == _POOLED_DEPTH else grids.flatten(1)


def check_depths(option: str, model: EvaluatedModel, depths: Sequence[int], title: str) -> None:
    """Raise ConfigError if the network has no spatial layer, or fewer layers than required.

    Args:
        option: Name of the option, for the message.
        model: The network.
        depths: Depths, counted from 1 at the average of the deepest layer.
        title: Name of the network, for the message.
    """
    layers = layer_names(model)
    require(
        POOLED in layers,
        f"evaluators=unicam needs a layer with a spatial grid, but {title} has none; choose another network",
    )
    require(
        max(depths) <= len(layers),
        f"{option}={list(depths)}: {title} has {len(layers)} depths: {', '.join(reversed(layers))}",
    )


@torch.no_grad()
def collect_activations(
    context: EvaluationContext,
    model: EvaluatedModel,
    probe_split: ProbeSplit,
    depths: Sequence[int],
) -> NetworkActivations:
    """Compute the activations by running the network.

    Args:
        context: Evaluation of the split.
        model: Network to run.
        probe_split: Explained records and banks.
        depths: Depths, counted from 1 at the average of the deepest layer.
    """
    parts: dict[str, list[Tensor]] = defaultdict(list)
    done = 0
    for images in replace(context, model=model).iter_views(probe_split.positions.tolist()):
        layers = activations(model.network, images)
        by_layer = list(layer_features(layers).values())
        shown = [
            *layers.values(),
            list(layers.values())[-1],
        ]  # depth 1 explains the input of the average
        for depth in depths:
            parts[f"features/{depth}"].append(by_layer[-depth].cpu())
            parts[f"grids/{depth}"].append(
                shown[-depth][: max(probe_split.explained - done, 0)].cpu()
            )
        done += len(images)
    return {name: torch.cat(values) for name, values in parts.items()}


# ---- the teacher's -------------------------------------------------------------------------------


def teacher_views(
    context: EvaluationContext, probe_split: ProbeSplit, depths: Sequence[int]
) -> NetworkActivations:
    """Load the teacher's activations from the store, or compute them with the network and store them."""
    if (artifact := activations_artifact(context, probe_split, depths)).exists:
        return artifact.load()[1]
    views = collect_activations(context, context.networks.teacher, probe_split, depths)
    artifact.save(views, {"layers": [f"depth{depth}" for depth in depths]})
    return views


def activations_artifact(
    context: EvaluationContext, probe_split: ProbeSplit, depths: Sequence[int]
) -> Artifact:
    """Return the place in the store of the teacher's activations."""
    return teacher_artifact(
        context,
        "activations",
        keys_sha256=sha256_keys(context.dataset.keys_at(probe_split.positions)),
        explained=probe_split.explained,
        depths=list(depths),
    )


# ---- maps ------------------------------------------------------------------------------------------


def relevance_left(x: Tensor, given: Tensor, labels: Tensor) -> Tensor:
    """Compute J = RS(x | given; labels) of condensed distances, a 0-dimensional f64, differentiable in x.

    If the residual of x is 0, the result is a constant 0.

    Args:
        x: Condensed distances of the explained network's features.
        given: Condensed distances of the features that are removed.
        labels: Condensed distances of the label features.
    """
    a, b, g = (u_centered(distances) for distances in (x, given, labels))
    aa, bb, gg = (inner(values, values) for values in (a, b, g))
    return semi_partial(
        correlation(inner(a, g), aa, gg),
        correlation(inner(a, b), aa, bb),
        correlation(inner(b, g), bb, gg),
    )


def row_distances(feature: Tensor, features: Tensor) -> Tensor:
    """Compute the distances f64 [m] of one feature [p] from others [m, p]. The derivative at an equal feature is 0."""
    return torch.cdist(
        feature[None].double(), features.double(), compute_mode="donot_use_mm_for_euclid_dist"
    )[0]


@dataclass(frozen=True)
class Bank:
    """Condensed distances within a bank, and its features, from which a record's distances are computed."""

    features: Tensor
    """Features [m, p] at the layer of x."""
    given_features: Tensor
    """Features [m, q] at the layer of `given`."""
    label_features: Tensor
    """Label features [m, e]."""
    x: Tensor
    given: Tensor
    labels: Tensor

    @classmethod
    def of(cls, features: Tensor, given_features: Tensor, label_features: Tensor) -> Bank:
        """Build a bank from its features, and compute its distances.

        Args:
            features: [m, p] at the layer of x.
            given_features: [m, q] at the layer of `given`.
            label_features: [m, e].
        """
        every = (features, given_features, label_features)
        return cls(*every, *(feature_distances(values) for values in every))

    def without(self, position: int) -> Bank:
        """Return the bank of the other m - 1 records, used to explain a record that is itself in the bank.

        Args:
            position: Position of the record in the bank.
        """
        kept = torch.arange(len(self.features)) != position
        return Bank.of(self.features[kept], self.given_features[kept], self.label_features[kept])


class UnicamGradient(NamedTuple):
    """Objective and gradient of one record against one bank."""

    objective: float
    """Objective J."""
    gradient: Tensor
    """Gradient dJ/dF, f64 [C, h, w], zero if the residual of x is 0."""


def explain_record(
    activation: Tensor,
    feature_of: Callable[[Tensor], Tensor],
    given_feature: Tensor,
    label_feature: Tensor,
    bank: Bank,
) -> UnicamGradient:
    """Compute J of the batch {record} + bank, and its derivative with respect to the record's activation.

    Args:
        activation: [C, h, w] of the explained layer of x.
        feature_of: Function from activations [1, C, h, w] to features [1, p], as compared with the bank's.
        given_feature: Feature of the record at the layer of `given`, [q].
        label_feature: Label feature of the record, [e].
        bank: Bank without the record.
    """
    with torch.enable_grad():
        leaf = activation.detach().double().requires_grad_()
        distances = row_distances(feature_of(leaf[None])[0], bank.features)
        # The record is the first of the batch: in condensed form its pairs come first, then those of the bank.
        objective = relevance_left(
            torch.cat([distances, bank.x]),
            torch.cat([row_distances(given_feature, bank.given_features), bank.given]),
            torch.cat([row_distances(label_feature, bank.label_features), bank.labels]),
        )
        if not objective.requires_grad:
            return UnicamGradient(0.0, torch.zeros_like(leaf))
        (gradient,) = torch.autograd.grad(objective, leaf)
    return UnicamGradient(float(objective.detach()), gradient)


# ---- maps ----------------------------------------------------------------------------------------


def cam(activation: Tensor, gradient: Tensor) -> Tensor:
    """Compute a signed map with channels weighted by their mean derivative (Selvaraju et al. 2017).

    Args:
        activation: [C, h, w].
        gradient: dJ/dF, f64 [C, h, w].

    Returns:
        f64 [h, w].
    """
    return torch.einsum("c,chw->hw", gradient.mean(dim=(-2, -1)), activation.double())


def hirescam(activation: Tensor, gradient: Tensor) -> Tensor:
    """Compute a signed map with channels weighted by their derivative at each position (Draelos and Carin 2020).

    Args:
        activation: [C, h, w].
        gradient: dJ/dF, f64 [C, h, w].

    Returns:
        f64 [h, w].
    """
    return (gradient * activation.double()).sum(dim=0)


REDUCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cam": cam, "hirescam": hirescam}


def mean_of_depths(depths: Sequence[Sequence[Sequence[Tensor]]]) -> list[list[Tensor]]:
    """Average each record's maps over depths, one map for each bank, on the finest grid of the depths.

    A record's maps of one depth are divided by the highest absolute value of their mean over banks, because the scales
    of depths differ by orders of magnitude, and are enlarged bilinearly. A depth without evidence contributes zeros.

    Args:
        depths: Maps f64 [h, w] by depth, record and bank.
    """
    size = max((maps[0][0].shape for maps in depths), key=lambda shape: shape.numel())
    means = []
    for of_record in zip(*depths, strict=True):
        parts = []
        for maps in of_record:
            banks = torch.stack(list(maps))  # [R, h, w]
            scale = banks.mean(dim=0).abs().amax()
            unit = banks / scale if scale > 0 else torch.zeros_like(banks)
            parts.append(F.interpolate(unit[None], size=tuple(size), mode="bilinear")[0])
        means.append(list(torch.stack(parts).mean(dim=0)))
    return means


def reliability(maps: Sequence[Tensor]) -> float:
    """Compute the mean cosine of a record's maps [h, w] over pairs of banks, nan with one bank or if a map is zero."""
    flat = torch.stack([values.flatten() for values in maps])
    if len(flat) < 2 or not flat.any(dim=1).all():
        return float("nan")
    unit = F.normalize(flat / flat.abs().amax(dim=1, keepdim=True), dim=1)
    rows, columns = torch.triu_indices(len(flat), len(flat), offset=1)
    return float((unit[rows] * unit[columns]).sum(dim=1).mean())
