"""Maps at the pixels from gradients of a class's logit z_c at the image x, summed over the colors.

    gradient              dz_c / dx
    input_x_gradient      x dz_c / dx
    integrated_gradients  (x - b) times the mean of dz_c / dx on the straight line from the baseline b to x
    smoothgrad            the mean of dz_c / dx over x + noise

All take images f32 [B, 3, H, W] in [0, 1] and classes i64 [B, E], and return signed maps [B, E, 1, H, W]. Their graph
to the parameters is recorded where gradients are, as a student's map term needs.

Not here: rules of propagation (LRP, DeepLIFT), which change the layers of a network.
"""

from __future__ import annotations

from functools import reduce

import numpy as np
import torch
from torch import Tensor

from permafrost.models.classifier import Classifier
from permafrost.models.explanations import input_gradients


def gradient(model: Classifier, images: Tensor, target_class: Tensor) -> Tensor:
    """Compute dz_c / dx."""
    return _sum_colors(input_gradients(model, images, target_class))


def input_x_gradient(model: Classifier, images: Tensor, target_class: Tensor) -> Tensor:
    """Compute x dz_c / dx, in units of a pixel's range."""
    return _sum_colors(images[:, None] * input_gradients(model, images, target_class))


def integrated_gradients(
    model: Classifier, images: Tensor, target_class: Tensor, *, steps: int, baseline: float
) -> Tensor:
    """Compute Integrated Gradients, whose sum is z_c(x) - z_c(b) up to the error of the quadrature.

    Args:
        steps: Number of points of the Gauss-Legendre rule.
        baseline: Value of all pixels of b.
    """
    points, weights = np.polynomial.legendre.leggauss(steps)
    difference = images - baseline
    parts = (
        weight / 2 * input_gradients(model, baseline + (1 + point) / 2 * difference, target_class)
        for point, weight in zip(points.tolist(), weights.tolist(), strict=True)
    )
    return _sum_colors(difference[:, None] * reduce(torch.add, parts))


def smoothgrad(
    model: Classifier,
    images: Tensor,
    target_class: Tensor,
    *,
    samples: int,
    noise: float,
    noise_seed: int,
) -> Tensor:
    """Compute SmoothGrad.

    Args:
        samples: Number of noisy copies.
        noise: Standard deviation of the noise.
        noise_seed: Seed of the noise, which all images share, so that a map does not depend on its batch.
    """
    generator = torch.Generator().manual_seed(noise_seed)
    drawn = (noise * torch.randn(samples, *images.shape[1:], generator=generator)).to(images)
    parts = (input_gradients(model, images + each, target_class) for each in drawn)
    return _sum_colors(reduce(torch.add, parts) / samples)


def _sum_colors(values: Tensor) -> Tensor:
    return values.sum(dim=2, keepdim=True)
