"""Encoding of arrays as .npy bytes, read without pickle and never larger than expected."""

from __future__ import annotations

import io
from functools import lru_cache
from tokenize import TokenError
from typing import TYPE_CHECKING, Any

import numpy as np

from permafrost.store.file_entry import ManifestError

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
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        found_shape, is_fortran, found_dtype = read_header(file)
    except (ValueError, KeyError, SyntaxError, TokenError, RecursionError, MemoryError) as error:
        raise ManifestError(f"{where} cannot be read as npy; run permafrost verify") from error
    if (found_dtype, tuple(found_shape)) != (dtype, shape) or (is_fortran and len(shape) > 1):
        raise ManifestError(
            f"{where} is {found_dtype} {list(found_shape)} instead of {dtype} {list(shape)}; run permafrost verify"
        )
    return memoryview(data)[file.tell() :]


@lru_cache(maxsize=64)
def _header(dtype: str, shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    described = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, described)
    return buffer.getvalue()
