"""Encoding of arrays: npy without pickle, rows of a table, and values relative to their largest absolute value.

A row of a table is a member of a shard: an npy file, float32 [d].

Shape letters: d columns, and those of FieldSpec.
"""

from __future__ import annotations

import io
import math
import mmap
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from permafrost.core.errors import RecordError
from permafrost.storage.untrusted import FormatError, read_npy_header
from permafrost.store.entries import ManifestError

if TYPE_CHECKING:
    from torch import Tensor


_HEADER_BYTES = 2**14
"""Bytes that any header has; NumPy reads headers of at most 10,000 characters."""


def encode_npy(array: NDArray[Any]) -> bytes:
    """Encode an array in NumPy's .npy format."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def decode_npy(data: bytes, dtype: str, shape: tuple[int, ...], where: str) -> NDArray[Any]:
    """Decode an array from .npy bytes.

    Args:
        data: Content of a .npy file.
        dtype: Dtype that the array must have.
        shape: Shape that the array must have.
        where: File and member, for messages.

    Returns:
        A read-only array that lies in `data`.

    Raises:
        ManifestError: If the bytes are not a .npy file, or the array has another dtype or shape.
    """
    try:
        return npy_array(data, np.dtype(dtype), shape)
    except FormatError as error:
        raise ManifestError(f"{where} {error}; run permafrost verify") from error


def npy_array(
    data: bytes | mmap.mmap, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> NDArray[Any]:
    """Return the array of a .npy file, read-only. It lies in `data`.

    Args:
        data: The whole file.
        dtype: Dtype that the array must have.
        shape: Shape that the array must have.

    Raises:
        FormatError: If it is not such an array.
    """
    expected = npy_header(dtype.str, shape)
    # Another release of NumPy may pad its headers differently.
    is_ours = data[: len(expected)] == expected
    start = len(expected) if is_ours else _end_of_header(data, dtype, shape)
    body = memoryview(data)[start:]
    if body.nbytes != dtype.itemsize * math.prod(shape):
        raise FormatError(f"has {len(data)} bytes, which do not match {dtype} {list(shape)}")
    return np.frombuffer(body, dtype).reshape(shape)


@lru_cache(maxsize=64)
def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Return the header of a .npy file."""
    buffer = io.BytesIO()
    described = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, described)
    return buffer.getvalue()


def _end_of_header(data: bytes | mmap.mmap, dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
    """Return the place after a header, which is checked before memory of the declared size is allocated."""
    try:
        header = read_npy_header(data[:_HEADER_BYTES], len(data))
    except FormatError as error:
        raise FormatError("cannot be read as npy") from error
    if (header.dtype, header.shape) != (dtype, shape) or (header.is_fortran and len(shape) > 1):
        raise FormatError(
            f"is {header.dtype} {list(header.shape)} instead of {dtype} {list(shape)}"
        )
    return header.end


# ---- table rows ------------------------------------------------------------------------------------


SUFFIX = "npy"
"""Suffix of a row of numbers that is stored as a file."""
_TYPE = np.dtype("<f4")


class RowError(RecordError):
    """Row with values that are not finite numbers."""


def encode_row(values: NDArray[np.float32]) -> bytes:
    """Encode [d] as npy, which `numpy.load` reads without pickle."""
    return encode_npy(values.astype(_TYPE))


def decode_row(data: bytes, columns: int, where: str = "a row") -> NDArray[np.float32]:
    """Decode a row of `columns` values written by `encode_row`: f32 [d], read-only.

    Args:
        data: Content of a .npy file.
        columns: Number d of values.
        where: File and record, for messages.

    Raises:
        ManifestError: If the bytes do not hold such a row.
    """
    return decode_npy(data, _TYPE.str, (columns,), where)


# ---- codecs ----------------------------------------------------------------------------------------


INT8_STEPS = 127


def encode_unit(values: Tensor, dtype: str, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return values divided by their max-abs over `axes`, in `dtype`, and that scale without those axes.

    A slice of zeros stays zero and has scale 0. Any other slice keeps its full relative precision. The bits are the
    same on every device: a maximum, a division, a rounding to even and a cast are exact operations of IEEE 754.

    Args:
        values: Tensor to encode.
        dtype: float32, float16, or int8 (in steps of 1/127).
        axes: Axes that share a scale.

    Returns:
        The encoded values, of the same shape, and their scales in float32, on the device of the values.
    """
    import torch

    scale = values.abs().amax(dim=axes, keepdim=True)
    unit = torch.where(scale > 0, values / scale, 0.0)
    encoded = unit.mul_(INT8_STEPS).round_() if dtype == "int8" else unit
    return encoded.to(getattr(torch, dtype)), scale.squeeze(axes).float()


def decode_unit(stored: NDArray[np.generic]) -> NDArray[np.float32]:
    """Decode what `encode_unit` stored, as float32 with max-abs 1."""
    values = stored.astype(np.float32)
    return values / np.float32(INT8_STEPS) if stored.dtype == np.int8 else values


def decode_tensor(stored: Tensor, scale: Tensor | None = None) -> Tensor:
    """Decode as `decode_unit`, on the device of the values, with the same bits on every device.

    Args:
        stored: Stored values.
        scale: Factors of the decoded values, with their first axes.
    """
    import torch

    values = stored.float()
    if stored.dtype == torch.int8:
        # On a GPU, division by a Python number would multiply by its rounded reciprocal.
        values = values / torch.full((), INT8_STEPS, dtype=values.dtype, device=values.device)
    if scale is None:
        return values
    return values * scale.reshape(*scale.shape, *[1] * (values.ndim - scale.ndim))


def decode_scaled(
    stored: NDArray[np.generic], scale: NDArray[np.generic] | None
) -> NDArray[np.generic]:
    """Return the stored values of a field in the units of the network, float32; classes stay integers.

    Args:
        stored: Values of the field, of any shape.
        scale: Values of its field of scales, which have the first axes of the values; None if it has none.
    """
    is_number = np.issubdtype(stored.dtype, np.integer) and stored.dtype != np.int8
    values = stored if is_number else decode_unit(stored)
    if scale is None:
        return values
    factors = scale.astype(np.float32)
    return values.astype(np.float32, copy=False) * factors.reshape(
        *factors.shape, *[1] * (values.ndim - factors.ndim)
    )


def cosines(values: NDArray[np.float32], stored: NDArray[np.generic]) -> NDArray[np.float64]:
    """Compute the cosine between each record's values and a stored form.

    Args:
        values: Original values, f32 [n, ...].
        stored: What `encode_unit` returned for them, of the same shape.

    Returns:
        f64 [n]; 1 if both are zero.
    """
    flat = values.reshape(len(values), -1)
    largest = np.abs(flat).max(axis=1, keepdims=True).astype(np.float64)
    original = flat / np.maximum(largest, np.finfo(np.float64).tiny)
    decoded = _to_double(stored).reshape(len(values), -1)
    product, squared, decoded_squared = (
        np.einsum("ij,ij->i", left, right)
        for left, right in ((original, decoded), (original, original), (decoded, decoded))
    )
    norms = np.sqrt(squared) * np.sqrt(decoded_squared)
    quotient = np.divide(product, norms, out=np.zeros_like(product), where=norms > 0)
    return np.where((squared == 0) & (decoded_squared == 0), 1.0, quotient)


def _to_double(stored: NDArray[np.generic]) -> NDArray[np.float64]:
    """Decode to float64, float16 with torch, which takes a fifth of NumPy's time."""
    if stored.dtype != np.float16:
        return decode_unit(stored).astype(np.float64)
    import torch

    return torch.from_numpy(np.array(stored)).double().numpy()


def lowest_cosine_of_arrays(values: NDArray[np.float32], stored: NDArray[np.generic]) -> float:
    """Return the lowest of the `cosines`; 1 if there are no records."""
    return float(cosines(values, stored).min(initial=1.0))
