"""Standardized targets: a teacher's channels with mean 0 and variance 1, for teachers whose scales differ (PHI-S)."""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor, nn

from permafrost.config.methods import Standardization
from permafrost.core.errors import require
from permafrost.loading.channel_moments import principal_components, stored_moments
from permafrost.store.reader import TeacherPass

logger = logging.getLogger("permafrost.training")

_LEAST_VARIANCE = 1e-8
"""Smallest variance of a channel relative to the mean over channels."""


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
    diagonal, mean = variances.clone(), variances.mean()
    rotation = torch.eye(len(variances), dtype=variances.dtype)
    for _ in range(len(variances) - 1):
        high, low = int(diagonal.argmax()), int(diagonal.argmin())
        if not diagonal[low] < mean < diagonal[high]:
            break
        share = (mean - diagonal[low]) / (diagonal[high] - diagonal[low])
        cosine, sine = share.sqrt(), (1 - share).sqrt()
        turn = torch.stack([torch.stack([cosine, sine]), torch.stack([-sine, cosine])])
        rotation[[high, low]] = turn @ rotation[[high, low]]
        diagonal[low] += diagonal[high] - mean
        diagonal[high] = mean
    return rotation


def standardizing_matrix(covariance: Tensor, kind: Standardization) -> Tensor:
    """Return A for which A (x - mean) has variance 1 in every channel.

    channel: A = diag(1 / std). phi_s: A = H U' / sqrt(phi), where U has the covariance's eigenvectors, phi is the mean
    of its eigenvalues, and H is `equalizing_rotation` (PHI-S, arXiv 2410.01680). All distances are then those of x
    divided by sqrt(phi).

    The covariance is first divided by a power of 4, so features that are multiplied by a power of 2 have the same bits.

    Args:
        covariance: Covariance of the channels, f64 [C, C].
        kind: Form of the map.

    Returns:
        f64 [C, C].
    """
    variances = covariance.diagonal()
    require(
        bool(variances.max() > 0),
        f"method.standardize={kind} divides by the deviation of the teacher's channels, but all of them are constant; "
        "set it to none",
    )
    exponent = math.frexp(float(variances.max()))[1] // 2
    covariance = covariance * 2.0 ** (-2 * exponent)
    variances = covariance.diagonal()
    if kind == "phi_s":
        eigenvalues, vectors = principal_components(covariance)
        matrix = equalizing_rotation(eigenvalues) @ vectors / variances.mean().sqrt()
    else:
        least = _LEAST_VARIANCE * variances.mean()
        if few := int((variances < least).sum()):
            logger.warning(
                "%d of %d channels hardly vary; they are divided by a floor", few, len(variances)
            )
        matrix = torch.diag(variances.clamp(min=least).rsqrt())
    return matrix * 2.0**-exponent


class StandardizedField(nn.Module):
    """Affine map of a field of a pass to channels of mean 0 and variance 1; not part of a checkpoint.

    It commutes with averages whose weights sum to 1: of covered cells, in warps and in mixtures.
    """

    def __init__(self, teacher: TeacherPass, field: str, split: str, kind: Standardization) -> None:
        super().__init__()
        mean, covariance = stored_moments(teacher, field, split)
        if (projection := teacher.projections.get(field)) is not None:
            components = torch.from_numpy(projection.components).double()
            mean = torch.from_numpy(projection.mean) + components.T @ mean
            covariance = components.T @ covariance @ components
        self.register_buffer("mean", mean.float(), persistent=False)
        matrix = standardizing_matrix(covariance, kind).float()
        self.register_buffer("matrix", matrix, persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        """Return A (x - mean) of values [B, C, ...]."""
        mean, matrix = (self.get_buffer(name).to(values) for name in ("mean", "matrix"))
        return ((values.movedim(1, -1) - mean) @ matrix.T).movedim(-1, 1)
