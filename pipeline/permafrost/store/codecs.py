"""Encoding of arrays: npy without pickle, rows of a table, and values relative to their largest absolute value.

A row of a table is a member of a shard: an npy file, float32 [d].

Shape letters: d columns, and those of FieldSpec.
"""

from __future__ import annotations

import io
import math
from functools import lru_cache
from tokenize import TokenError
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from permafrost.core.errors import RecordError
from permafrost.store.entries import ManifestError

if TYPE_CHECKING:
    from numpy.typing import NDArray


def encode_npy(array: NDArray[Any]) -> bytes:
    """Encode an array in NumPy's .npy format."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def decode_npy(data: bytes, dtype: str, shape: tuple[int, ...], where: str) -> NDArray[Any]:
    """Decode an array from .npy bytes; raise ManifestError if it has another dtype or shape.

    where  the file and the member, for messages
    """
    expected = np.dtype(dtype)
    header = _header(expected.str, shape)
    # Another release of NumPy may pad its headers differently.
    is_ours = data.startswith(header)
    body = memoryview(data)[len(header) :] if is_ours else _other_body(data, expected, shape, where)
    if body.nbytes != expected.itemsize * int(np.prod(shape, dtype=np.int64)):
        raise ManifestError(
            f"{where} has {len(data)} bytes, which do not match {dtype} {list(shape)}"
        )
    return np.frombuffer(body, expected).reshape(shape)


def _other_body(
    data: bytes, dtype: np.dtype[Any], shape: tuple[int, ...], where: str
) -> memoryview:
    """Return the bytes after the header, which is checked before memory of the declared size is allocated."""
    try:
        header = _read_header(data)
    except NpyError as error:
        raise ManifestError(f"{where} cannot be read as npy; run permafrost verify") from error
    if (header.dtype, header.shape) != (dtype, shape) or (header.is_fortran and len(shape) > 1):
        raise ManifestError(
            f"{where} is {header.dtype} {list(header.shape)} instead of {dtype} {list(shape)}; run permafrost verify"
        )
    return memoryview(data)[header.end :]


class NpyError(ValueError):
    """Bytes that are no array as it is wanted. The message says why, and the reader of the file adds its name."""


class _Header(NamedTuple):
    """Header of an npy file."""

    shape: tuple[int, ...]
    is_fortran: bool
    dtype: np.dtype[Any]
    end: int


def _read_header(data: bytes) -> _Header:
    """Read the header of an npy file. Raises NpyError."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, is_fortran, dtype = read(file)
    except _HEADER_ERRORS as error:
        kind = "it holds several arrays" if data.startswith(b"PK") else "it is not an npy file"
        raise NpyError(kind) from error
    if any(not 0 <= length <= len(data) for length in shape):
        raise NpyError(f"its shape is {tuple(shape)}")
    return _Header(tuple(shape), is_fortran, dtype, file.tell())


_HEADER_ERRORS = (
    *(ValueError, KeyError, TypeError, SyntaxError, TokenError),
    *(RecursionError, MemoryError, OverflowError),
)


def parse_npy(data: bytes, kinds: str, shape: tuple[int | None, ...]) -> NDArray[Any]:
    """Return the array of an npy file that someone else may have written, with finite values, read-only.

    Nothing of the size that the header declares is allocated before it is compared with the bytes.

    Args:
        data: Bytes of the file.
        kinds: Kinds of values that are accepted, as `numpy.dtype.kind` names them.
        shape: Length of each axis, None for any.

    Raises:
        NpyError: For another file, kind or shape, and values that are not finite.
    """
    header = _read_header(data)
    if header.dtype.kind not in kinds:
        raise NpyError(f"its values are of type {header.dtype}")
    if len(header.shape) != len(shape) or any(
        wanted not in (None, length) for wanted, length in zip(shape, header.shape, strict=True)
    ):
        raise NpyError(f"its shape is {header.shape}")
    size, body = header.dtype.itemsize * math.prod(header.shape), memoryview(data)[header.end :]
    if len(body) != size:
        raise NpyError(f"it has {len(body):,} bytes of values in place of {size:,}")
    order: Literal["F", "C"] = "F" if header.is_fortran else "C"
    values: NDArray[Any] = np.frombuffer(body, header.dtype).reshape(header.shape, order=order)
    if not np.isfinite(values).all():
        raise NpyError("some of its values are not finite numbers")
    return values


@lru_cache(maxsize=64)
def _header(dtype: str, shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    described = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, described)
    return buffer.getvalue()


# ---- table rows ------------------------------------------------------------------------------------


SUFFIX = "npy"
_TYPE = np.dtype("<f4")


class RowError(RecordError):
    """Row with values that are not finite numbers."""


def encode_row(values: NDArray[np.float32]) -> bytes:
    """Encode [d] as npy, which `numpy.load` reads without pickle."""
    return encode_npy(values.astype(_TYPE))


def decode_row(data: bytes, columns: int, where: str = "a row") -> NDArray[np.float32]:
    """Decode a row of `columns` values written by `encode_row`: f32 [d], read-only.

    where  the file and the record, for messages
    """
    return decode_npy(data, _TYPE.str, (columns,), where)


# ---- codecs ----------------------------------------------------------------------------------------


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


def cosines(values: NDArray[np.float32], stored: NDArray[np.generic]) -> NDArray[np.float64]:
    """Return the cosine [n] between each record's values [n, ...] and a stored form; 1 if both are zero."""
    original = values.reshape(len(values), -1).astype(np.float64)
    decoded = decode_unit(stored).reshape(len(values), -1).astype(np.float64)
    original /= np.maximum(np.abs(original).max(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    norms = np.linalg.norm(original, axis=1) * np.linalg.norm(decoded, axis=1)
    product = (original * decoded).sum(axis=1)
    both_zero = ~original.any(axis=1) & ~decoded.any(axis=1)
    quotient = np.divide(product, norms, out=np.zeros_like(product), where=norms > 0)
    return np.where(both_zero, 1.0, quotient)


def lowest_cosine(values: NDArray[np.float32], stored: NDArray[np.generic]) -> float:
    """Return the lowest of the `cosines` of at least 0 records."""
    return float(cosines(values, stored).min(initial=1.0))
