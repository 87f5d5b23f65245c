"""Adaptive gradient clipping (AGC; Brock et al. 2021): a gradient is judged by the weight it changes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn

_MIN_WEIGHT_NORM = 1e-3
"""A unit of smaller norm is clipped as if it had this one, so that what starts at zero can grow."""
_MIN_GRADIENT_NORM = 1e-6


@torch.no_grad()
def clip_by_unit(parameters: Iterable[nn.Parameter], ratio: float) -> None:
    """Shrink each unit's gradient to at most ratio * max(||w||, 1e-3); the others stay as they are.

    A unit is what makes one output: a row of a matrix, a kernel of a convolution; a vector is one unit.
    """
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        largest = ratio * _unit_norm(parameter).clamp(min=_MIN_WEIGHT_NORM)
        norm = _unit_norm(gradient)
        shrink = largest / norm.clamp(min=_MIN_GRADIENT_NORM)
        gradient.mul_(torch.where(norm < largest, 1.0, shrink))


def _unit_norm(tensor: Tensor) -> Tensor:
    """Of each unit, broadcasting to the tensor: [O, 1, 1, 1] of kernels, [O, 1] of rows, [1] of a vector."""
    dims: tuple[int, ...] | None = (1, 2, 3) if tensor.ndim == 4 else (1,)
    if tensor.squeeze().ndim <= 1:
        dims = None
    norm: Tensor = torch.linalg.vector_norm(tensor, dim=dims, keepdim=True)
    return norm
