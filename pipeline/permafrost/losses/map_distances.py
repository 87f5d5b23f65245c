"""Distance of two explanations as a function of tensors.

e2KD compares bilinearly upsampled maps (eq. 3). Upsampling is linear, u(a) = U_h a U_w', so the inner product of two
upsampled maps is <a, G_h b G_w> with the small Gram matrices G = U' U. No tensor of the input's size is created.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from permafrost.losses.shapes import require_same_shape
from permafrost.models.classifier import to_float32

_TINY = torch.finfo(torch.float32).tiny


# ---- two maps --------------------------------------------------------------------------------------


def map_cosine(
    student_maps: Tensor, teacher_maps: Tensor, size: tuple[int, int] | int
) -> tuple[Tensor, Tensor]:
    """Compute the cosine of each pair of maps at (height, width) `size`, and its validity (eq. 3 of e2KD).

    A pair is valid if neither map is zero.

    Args:
        student_maps: [B, E, A, h, w], of any positive scale. Gradients flow here.
        teacher_maps: [B, E, A, h, w], constant, on the same grid, of any positive scale.
        size: (height, width), or the side of a square, to which the maps are upsampled.

    Returns:
        The cosines [B, E], 0 where invalid, without a gradient, and their validity, bool [B, E].

    Raises:
        ConfigError: If the shapes differ.

    >>> import torch
    >>> maps = torch.eye(4).reshape(1, 1, 1, 4, 4)
    >>> cosine, valid = map_cosine(3 * maps, maps, size=(32, 32))
    >>> round(cosine.item(), 5), valid.item(), map_cosine(0 * maps, maps, size=(32, 32))[1].item()
    (1.0, True, False)
    """
    require_same_shape("map_cosine", student_maps, teacher_maps, 5)
    student = unit_scale(student_maps, (2, 3, 4))
    teacher = unit_scale(teacher_maps.detach(), (2, 3, 4)).to(student.dtype)
    grams = _grams(student, size)
    product = _inner(student, teacher, grams)
    squared_norms = _inner(student, student, grams) * _inner(teacher, teacher, grams)
    valid = squared_norms != 0  # nan counts as valid, so that it appears in the loss
    # The double `where` keeps an invalid pair from back-propagating 0 * infinity through the root.
    norms = torch.where(valid, squared_norms, 1.0).sqrt()
    return torch.where(valid, product / norms, 0.0), valid


def map_error(
    student_maps: Tensor, teacher_maps: Tensor, size: tuple[int, int] | int
) -> tuple[Tensor, Tensor]:
    """Compute |s - t|^2 / (2 |t|^2) of each pair of maps s, t at (height, width) `size`, and its validity.

    It is 1 - cosine for maps of equal norm, so a weight of the map term means the same for both distances. A pair is
    valid if the teacher's map is not zero.

    Args:
        student_maps: [B, E, A, h, w]. Gradients flow here.
        teacher_maps: [B, E, A, h, w], constant, on the same grid and in the same units.
        size: (height, width), or the side of a square, to which the maps are upsampled.

    Returns:
        The errors [B, E], 0 where invalid, and their validity, bool [B, E].

    Raises:
        ConfigError: If the shapes differ.
    """
    require_same_shape("map_error", student_maps, teacher_maps, 5)
    teacher = to_float32(teacher_maps.detach())
    scale = teacher.abs().amax(dim=(2, 3, 4), keepdim=True)
    valid = (scale > 0).flatten(1)
    scale = torch.where(scale > 0, scale.clamp(min=_TINY), 1.0)
    teacher, student = teacher / scale, to_float32(student_maps) / scale
    grams = _grams(student, size)
    difference = student - teacher
    squared_norm = torch.where(valid, _inner(teacher, teacher, grams), 1.0)
    return torch.where(
        valid, _inner(difference, difference, grams) / (2 * squared_norm), 0.0
    ), valid


def _grams(maps: Tensor, size: tuple[int, int] | int) -> list[Tensor]:
    """Gram matrices of the upsampling of maps to a size, none for maps of that size, which are compared as they are."""
    h, w = maps.shape[-2:]
    height, width = (size, size) if isinstance(size, int) else size
    return [
        _gram_on_device(length, full, maps.device, maps.dtype)
        for length, full in ((h, height), (w, width))
        if (h, w) != (height, width)
    ]


@lru_cache(maxsize=64)
def upsampling_gram(n: int, full: int) -> Tensor:
    """Compute U' U, [n, n] float64, of the bilinear upsampling U [full, n] (half-pixel centers)."""
    with torch.inference_mode(False):  # as later calls share it
        upsampled = F.interpolate(
            torch.eye(n, dtype=torch.float64)[None], size=full, mode="linear", align_corners=False
        )[0].T
        return upsampled.T @ upsampled


@lru_cache(maxsize=64)
def _gram_on_device(n: int, full: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Cached copy of `upsampling_gram` on the device, because a copy in every step would synchronize with it."""
    with torch.inference_mode(False):
        return upsampling_gram(n, full).to(device, dtype)


def unit_scale(values: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Divide values by their largest absolute value over `dim`, a constant, so that squares stay in range.

    Args:
        values: Tensor of any positive scale.
        dim: Axes that share a scale.

    Returns:
        Values of largest absolute value 1 in float32 or wider; zeros stay zero.
    """
    values = to_float32(values)
    scale = values.detach().abs().amax(dim=dim, keepdim=True)
    return values / torch.where(scale > 0, scale.clamp(min=_TINY), 1.0)


def _inner(a: Tensor, b: Tensor, grams: list[Tensor]) -> Tensor:
    weighted = grams[0] @ b @ grams[1] if grams else b
    return (a * weighted).sum(dim=(2, 3, 4))


MIN_ENERGY = 1e-7
"""Minimum positive mass of a map. The EPG of a map with less is 0."""
