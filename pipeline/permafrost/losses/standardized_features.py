"""Standardized targets: a teacher's channels with mean 0 and variance 1, for teachers whose scales differ (PHI-S)."""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from permafrost.config.methods import Standardization
from permafrost.loading.channel_moments import principal_components, stored_moments
from permafrost.losses.base import StoredTeacher

_LEAST_VARIANCE = 1e-8
"""Smallest divisor of a channel's variance, relative to the mean over channels."""


def equalizing_rotation(variances: Tensor) -> Tensor:
    """Return an orthogonal H for which H diag(variances) H' has an equal diagonal.

    Each of at most n - 1 Givens rotations turns the largest and the smallest entry so that the first becomes the mean.
    What is not yet turned stays diagonal, so the angle has a closed form. H exists for every order, as opposed to a
    Hadamard matrix.

    Args:
        variances: Eigenvalues of a covariance, f64 [n].

    Returns:
        f64 [n, n].
    """
    rows = torch.eye(len(variances), dtype=variances.dtype)
    diagonal, mean = variances.tolist(), float(variances.mean())
    while min(diagonal) < mean < max(diagonal):
        low, high = diagonal.index(min(diagonal)), diagonal.index(max(diagonal))
        span = diagonal[high] - diagonal[low]
        c, s = (math.sqrt(abs(mean - diagonal[other]) / span) for other in (low, high))
        rows[[high, low]] = torch.stack(
            [c * rows[high] + s * rows[low], c * rows[low] - s * rows[high]]
        )
        diagonal[low], diagonal[high] = diagonal[low] + diagonal[high] - mean, mean
    return rows


def standardizing_matrix(covariance: Tensor, kind: Standardization) -> Tensor:
    """Return A for which A (x - mean) has variance 1 in every channel.

    channel: A = diag(1 / std). phi_s: A = H U' / sqrt(phi), where U has the covariance's eigenvectors, phi is the mean
    of its eigenvalues, and H is `equalizing_rotation` (PHI-S, arXiv 2410.01680). All distances are then those of x
    divided by sqrt(phi).

    The covariance is first divided by a power of 4, so that features multiplied by a power of 2 give the same bits.

    Args:
        covariance: Covariance of the channels, f64 [C, C].
        kind: Form of the map.

    Returns:
        f64 [C, C].
    """
    scale = 2.0 ** (math.frexp(float(covariance.diagonal().max()))[1] // 2)
    variances = (covariance / scale**2).diagonal()
    phi = variances.mean().clamp(min=torch.finfo(variances.dtype).tiny)
    if kind == "phi_s":
        eigenvalues, vectors = principal_components(covariance / scale**2)
        return equalizing_rotation(eigenvalues) @ vectors / phi.sqrt() / scale
    if few := int((variances < _LEAST_VARIANCE * phi).sum()):
        logging.getLogger("permafrost.training").warning(
            "method.standardize=channel: %d of %d channels hardly vary and are divided by a floor",
            few,
            len(variances),
        )
    return torch.diag(variances.clamp(min=_LEAST_VARIANCE * phi).rsqrt()) / scale


def standardization_of(
    teacher: StoredTeacher, field: str, split: str, kind: Standardization
) -> tuple[Tensor, Tensor]:
    """Return the mean f32 [C] and the matrix A f32 [C, C] that standardize a field, A (x - mean).

    The map commutes with averages whose weights sum to 1: of covered cells, in warps and in mixtures.

    Args:
        teacher: Pass that stores the field, or components of its channels.
        field: Name of the field.
        split: Split that students are trained on.
        kind: Form of the map.
    """
    mean, covariance = stored_moments(teacher, field, split)
    if (projection := teacher.projections.get(field)) is not None:
        components = torch.from_numpy(projection.components).double()
        mean = torch.from_numpy(projection.mean) + components.T @ mean
        covariance = components.T @ covariance @ components
    return mean.float(), standardizing_matrix(covariance, kind).float()
