"""Encoding of values as stored bytes, and its fidelity."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

INT8_STEPS = 127


def encode_maxabs(
    values: NDArray[np.float32], dtype: str, axes: tuple[int, ...]
) -> tuple[NDArray[np.generic], NDArray[np.float32]]:
    """Return values divided by their max-abs over `axes`, in `dtype`, and that scale without those axes.

    dtype  float32, float16, or int8 (in steps of 1/127)
    A slice of zeros stays zero and has scale 0. Any other slice keeps its full relative precision.
    """
    scale = np.abs(values).max(axis=axes, keepdims=True)
    unit = np.divide(values, scale, out=np.zeros_like(values), where=scale > 0)
    encoded = np.rint(unit * INT8_STEPS) if dtype == "int8" else unit
    return encoded.astype(dtype), scale.squeeze(axes).astype(np.float32)


def decode_unit(stored: NDArray[np.generic]) -> NDArray[np.float32]:
    """Decode what `encode_maxabs` stored, as float32 with max-abs 1."""
    values = stored.astype(np.float32)
    return values / np.float32(INT8_STEPS) if stored.dtype == np.int8 else values


def lowest_cosine(values: NDArray[np.float32], stored: NDArray[np.generic]) -> float:
    """Return the lowest cosine between a record's values [n, ...] and their stored form; 1 if both are zero."""
    original = values.reshape(len(values), -1).astype(np.float64)
    decoded = decode_unit(stored).reshape(len(values), -1).astype(np.float64)
    original /= np.maximum(np.abs(original).max(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    norms = np.linalg.norm(original, axis=1) * np.linalg.norm(decoded, axis=1)
    product = (original * decoded).sum(axis=1)
    both_zero = ~original.any(axis=1) & ~decoded.any(axis=1)
    cosines = np.divide(product, norms, out=np.zeros_like(product), where=norms > 0)
    return float(np.where(both_zero, 1.0, cosines).min(initial=1.0))
