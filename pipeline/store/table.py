"""A table's rows as members of a shard: npy files, float32 [d].

Shape letter: d columns.
"""

from __future__ import annotations

import io
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import RecordError
from pipeline.store.manifest import ManifestError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

SUFFIX = "npy"
_TYPE = np.dtype("<f4")


class RowError(RecordError):
    """A row that is not all finite numbers."""


def encode_row(values: NDArray[np.float32]) -> bytes:
    """[d] as npy, which `numpy.load` reads without pickle."""
    buffer = io.BytesIO()
    np.save(buffer, values.astype(_TYPE), allow_pickle=False)
    return buffer.getvalue()


def decode_row(data: bytes, columns: int) -> Tensor:
    """f32 [d] of a row of `columns` values, as `encode_row` wrote it."""
    import torch

    header = _header(columns)
    if data.startswith(header) and len(data) == len(header) + columns * _TYPE.itemsize:
        return torch.from_numpy(np.frombuffer(data, _TYPE, offset=len(header)).copy())
    try:  # another NumPy's header
        values: NDArray[np.float32] = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ManifestError(f"a row cannot be read as npy ({error}); run stages.verify") from error
    if values.dtype != _TYPE or values.shape != (columns,):
        raise ManifestError(
            f"a row is {values.dtype} {list(values.shape)}, the store's have float32 [{columns}]; run stages.verify"
        )
    return torch.from_numpy(values)


@lru_cache(maxsize=8)
def _header(columns: int) -> bytes:
    return encode_row(np.zeros(columns, np.float32))[: -columns * _TYPE.itemsize]
