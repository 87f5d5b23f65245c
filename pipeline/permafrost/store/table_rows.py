"""Encoding of a table's rows as members of a shard: npy files, float32 [d].

Shape letter: d columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from permafrost.core.errors import RecordError
from permafrost.store.arrays import decode_npy, encode_npy

if TYPE_CHECKING:
    from numpy.typing import NDArray

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
