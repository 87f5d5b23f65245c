"""UniCAM: where in an image lies what one network knows of the labels and another does not.

The objective is no logit but RS(x | given; labels) of a batch (distance_correlation.py), and the map of a record

    CAM        sum_k mean_uv(dJ/dF_k) F_k
    HiResCAM   sum_k dJ/dF_k F_k

with F [C, h, w] its activation at the explained layer of x. `given` and the labels are constants. J does not change
when all features move or scale together, so a batch's maps are relative to the batch: half of the evidence is
negative, and another batch gives another map. Each record is therefore explained against a fixed, class-balanced
bank, batch = the record and the bank; the derivative by its own features is the same, and of the distances only its
own row is new. Maps are signed; a picture shows their positive part.

Shape letters: m records of the bank, p values of a feature, C channels, h w grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.evaluation.evaluators.distance_correlation.estimators import (
    correlation,
    feature_distances,
    inner,
    semi_partial,
    u_centered,
)


def relevance_left(x: Tensor, given: Tensor, labels: Tensor) -> Tensor:
    """J = RS(x | given; labels) of condensed distances, a 0-dimensional f64; differentiable in x.

    Where nothing of x is left, a constant 0.
    """
    a, b, g = (u_centered(distances) for distances in (x, given, labels))
    aa, bb, gg = (inner(values, values) for values in (a, b, g))
    return semi_partial(
        correlation(inner(a, g), aa, gg),
        correlation(inner(a, b), aa, bb),
        correlation(inner(b, g), bb, gg),
    )


def row_distances(feature: Tensor, others: Tensor) -> Tensor:
    """Distances f64 [m] of one feature [p] from others [m, p]; the derivative at an equal one is 0."""
    found: Tensor = torch.cdist(
        feature[None].double(),
        others.double(),
        compute_mode="donot_use_mm_for_euclid_dist",
    )
    return found[0]


@dataclass(frozen=True)
class Bank:
    """Condensed distances within a bank, and what a record's own are measured from."""

    features: Tensor
    """[m, p], at x's layer."""
    given_features: Tensor
    """[m, q], at the layer of `given`."""
    label_features: Tensor
    """[m, e]."""
    x: Tensor
    given: Tensor
    labels: Tensor

    @classmethod
    def of(cls, features: Tensor, given_features: Tensor, label_features: Tensor) -> Bank:
        """With its distances."""
        every = (features, given_features, label_features)
        return cls(*every, *(feature_distances(values) for values in every))

    def without(self, place: int) -> Bank:
        """Of the other m - 1 records: one that is in the bank itself is explained against these."""
        kept = torch.arange(len(self.features)) != place
        return Bank.of(self.features[kept], self.given_features[kept], self.label_features[kept])


class UnicamGradient(NamedTuple):
    """What UniCAM says of one record against one bank."""

    objective: float
    """J."""
    gradient: Tensor
    """dJ/dF, f64 [C, h, w]; zero where nothing of x is left."""


def explain_record(
    activation: Tensor,
    feature_of: Callable[[Tensor], Tensor],
    given_feature: Tensor,
    label_feature: Tensor,
    bank: Bank,
) -> UnicamGradient:
    """J of the batch {record} + bank, and its derivative by the record's activation.

    activation     [C, h, w] of x's explained layer
    feature_of     activations [1, C, h, w] -> features [1, p] that are compared, as the bank's
    given_feature  [q], label_feature [e]: the record's own
    """
    with torch.enable_grad():
        leaf = activation.detach().double().requires_grad_()
        own = row_distances(feature_of(leaf[None])[0], bank.features)
        # The pairs of the first of n records come first, then those of the others.
        objective = relevance_left(
            torch.cat([own, bank.x]),
            torch.cat([row_distances(given_feature, bank.given_features), bank.given]),
            torch.cat([row_distances(label_feature, bank.label_features), bank.labels]),
        )
        if not objective.requires_grad:
            return UnicamGradient(0.0, torch.zeros_like(leaf))
        (gradient,) = torch.autograd.grad(objective, leaf)
    return UnicamGradient(float(objective.detach()), gradient)


# ---- maps ----------------------------------------------------------------------------------------


def cam(activation: Tensor, gradient: Tensor) -> Tensor:
    """Signed f64 [h, w]: channels by their mean derivative (Selvaraju et al. 2017)."""
    weights = gradient.mean(dim=(-2, -1))
    return torch.einsum("c,chw->hw", weights, activation.double())


def hirescam(activation: Tensor, gradient: Tensor) -> Tensor:
    """Signed f64 [h, w]: channels by their derivative at each place (Draelos and Carin 2020)."""
    return (gradient * activation.double()).sum(dim=0)


REDUCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cam": cam, "hirescam": hirescam}


def reliability(maps: Sequence[Tensor]) -> float:
    """Mean cosine of a record's maps [h, w] against each pair of banks; nan with one bank, or where a map is zero."""
    flat = torch.stack([values.flatten() for values in maps])
    if len(flat) < 2 or not flat.any(dim=1).all():
        return float("nan")
    unit = F.normalize(flat / flat.abs().amax(dim=1, keepdim=True), dim=1)
    rows, columns = torch.triu_indices(len(flat), len(flat), offset=1)
    return float((unit[rows] * unit[columns]).sum(dim=1).mean())
