"""Some rows of a field of one shard, without keeping the whole of it in memory.

A run draws a few rows of many shards in every step. A large field (a B-cos network's weights: 600 kB a view)
is cut into inner chunks of a row or a few, so those are read one by one, as images are from their tar. Zarr
itself reads whole shards well, and a single row many times slower than this.
"""

from __future__ import annotations

import os
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import google_crc32c
import numcodecs
import numpy as np

from pipeline.store.manifest import ManifestError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

_CHECKSUM_BYTES = 4
_INDEX_ENTRY_BYTES = 16


class Rows(Protocol):
    """A field of one shard, [rows, V, *shape]; an array is one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, V, *shape)."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """As stored."""

    def __getitem__(self, at: tuple[NDArray[np.int64], NDArray[np.int64]]) -> NDArray[Any]:
        """Rows and a view of each: [n, *shape]."""


class KeptRows:
    """Of an array, only the rows that a run's selection needs."""

    def __init__(self, array: NDArray[Any], rows: NDArray[np.int64]) -> None:
        """rows  ascending"""
        self.shape = array.shape
        self.dtype = array.dtype
        self._rows = rows
        self._kept = array[rows]

    def __getitem__(self, at: tuple[NDArray[np.int64], NDArray[np.int64]]) -> NDArray[Any]:
        kept: NDArray[Any] = self._kept[np.searchsorted(self._rows, at[0]), at[1]]
        return kept


class InnerChunkRows:
    """A field that Zarr's sharding codec wrote (zarr-specs, `sharding_indexed` 1.0).

    The file is the inner chunks in any order, then the offset and the length of each (u64, in C order of the
    grid of inner chunks), then the CRC-32C of those. An inner chunk is Blosc where it is compressed, then its
    own CRC-32C.
    """

    def __init__(
        self,
        path: Path,
        shape: tuple[int, ...],
        dtype: str,
        *,
        shard_size: int,
        inner: tuple[int, int],
        compressed: bool,
    ) -> None:
        """shape       (rows, V, *shape) of the records that are there
        shard_size  rows that the file has room for
        inner       rows and views of an inner chunk, which has the rest whole
        """
        self.path = path
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self.shard_size = shard_size
        self.inner = inner
        self.compressed = compressed

    def __getitem__(self, at: tuple[NDArray[np.int64], NDArray[np.int64]]) -> NDArray[Any]:
        rows, views = at
        chunks = rows // self.inner[0] * (self.shape[1] // self.inner[1]) + views // self.inner[1]
        values = np.empty((len(rows), *self.shape[2:]), self.dtype)
        file = os.open(self.path, os.O_RDONLY)
        try:
            for chunk in np.unique(chunks):
                here = chunks == chunk
                read = self._read_chunk(file, int(chunk))
                values[here] = read[rows[here] % self.inner[0], views[here] % self.inner[1]]
        finally:
            os.close(file)
        return values

    def _read_chunk(self, file: int, chunk: int) -> NDArray[Any]:
        offset, length = (int(entry) for entry in self._index[chunk])
        data = self._checked(os.pread(file, length, offset), length)
        if self.compressed:
            data = numcodecs.Blosc().decode(data)
        return np.frombuffer(data, self.dtype).reshape(*self.inner, *self.shape[2:])

    @cached_property
    def _index(self) -> NDArray[np.uint64]:
        """[inner chunks, 2]: offset and length."""
        chunks = self.shard_size // self.inner[0] * (self.shape[1] // self.inner[1])
        length = chunks * _INDEX_ENTRY_BYTES + _CHECKSUM_BYTES
        with self.path.open("rb") as file:
            file.seek(-length, os.SEEK_END)
            data = self._checked(file.read(length), length)
        return np.frombuffer(data, np.uint64).reshape(-1, 2)

    def _checked(self, data: bytes, length: int) -> bytes:
        body, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
        if len(data) != length or google_crc32c.value(body) != int.from_bytes(checksum, "little"):
            raise ManifestError(
                f"{self.path} is damaged: a chunk's checksum is wrong; run stages.verify"
            )
        return body
