"""A table's rows as members of a shard: npy files, float32 [d].

Shape letter: d columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pipeline.core.errors import RecordError
from pipeline.store.arrays import decode_npy, encode_npy

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

SUFFIX = "npy"
_TYPE = np.dtype("<f4")


class RowError(RecordError):
    """A row that is not all finite numbers."""


def encode_row(values: NDArray[np.float32]) -> bytes:
    """[d] as npy, which `numpy.load` reads without pickle."""
    return encode_npy(values.astype(_TYPE))


def decode_row(data: bytes, columns: int, where: str = "a row") -> Tensor:
    """f32 [d] of a row of `columns` values, as `encode_row` wrote it.

    where  the file and the record, for messages
    """
    import torch

    return torch.from_numpy(decode_npy(data, _TYPE.str, (columns,), where).copy())
