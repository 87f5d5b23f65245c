"""Reading of some rows of a field of one shard, without the whole field in memory.

A run draws a few rows of many shards in every step. A large field (a B-cos network's weights: 600 kB per view)
is divided into inner chunks of one or a few rows, which are read one by one, like images from their tar. Zarr
itself reads whole shards well, but is many times slower than this for a single row.
"""

from __future__ import annotations

import io
import math
from functools import cached_property
from typing import Any, Protocol

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from permafrost.core.errors import require
from permafrost.storage.files import file_at, open_size, read_at
from permafrost.storage.local_files import read_error
from permafrost.storage.rooted_paths import RootedPath
from permafrost.storage.untrusted import FormatError, decompress_blosc
from permafrost.store.entries import REPAIR, REWRITE, FileEntry, ManifestError, damage_error

CHECKSUM_BYTES = 4
_COMPRESSION_OVERHEAD = 4096
REREAD = "run permafrost verify to list every damaged file"


class Rows(Protocol):
    """Field of one shard, [rows, V, *shape]; an array satisfies this protocol."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, V, *shape)."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Stored dtype."""

    def __getitem__(self, at: tuple[NDArray[np.int64], NDArray[np.int64]]) -> NDArray[Any]:
        """Return rows and one view of each: [n, *shape]."""


class SelectedRows:
    """Rows of an array that a run's selection needs."""

    def __init__(self, array: NDArray[Any], rows: NDArray[np.int64]) -> None:
        """Copy rows of an array.

        Args:
            array: Field of one shard, [rows, V, *shape].
            rows: Numbers of the rows, ascending.
        """
        self.shape = array.shape
        self.dtype = array.dtype
        self._rows = rows
        self._kept = array[rows]

    def __getitem__(self, at: tuple[NDArray[np.int64], NDArray[np.int64]]) -> NDArray[Any]:
        return self._kept[np.searchsorted(self._rows, at[0]), at[1]]


class InnerChunkRows:
    """Field written by Zarr's sharding codec (zarr-specs, `sharding_indexed` 1.0).

    The file contains the inner chunks in any order, then the offset and the length of each (u64, in C order of the
    grid of inner chunks), then the CRC-32C of those. An inner chunk is Blosc data if it is compressed, followed by
    its own CRC-32C. This checksum shows that the chunk is whole. The pass's commit marker also contains it, which shows
    that it is the right chunk.
    """

    def __init__(
        self,
        path: RootedPath,
        shape: tuple[int, ...],
        dtype: str,
        *,
        rows_per_shard: int,
        inner: tuple[int, int],
        compressed: bool,
        checksums: NDArray[np.uint32],
        entry: FileEntry,
    ) -> None:
        """Open the file and compare its size.

        Args:
            path: File of the field.
            shape: (rows, V, *shape) of the existing records.
            dtype: Stored dtype.
            rows_per_shard: Rows that the file has room for.
            inner: Rows and views of an inner chunk, which spans the other axes.
            compressed: True if the inner chunks are Blosc data.
            checksums: CRC-32C of the inner chunks of each row, [rows, V / inner views].
            entry: The file in the manifest.

        Raises:
            ManifestError: If the file is missing or has another size.
        """
        self.path, self._entry, self._checksums = path, entry, checksums
        require(
            checksums.shape == (shape[0], shape[1] // inner[1]),
            f"{path} has no checksums of its chunks in the commit marker; {REPAIR}",
            ManifestError,
        )
        try:
            with self._open() as file:
                size = open_size(file)
        except FileNotFoundError:
            raise ManifestError(f"{path} is missing; {REPAIR}") from None
        if size != entry.bytes:
            raise damage_error(
                path,
                entry.sha256,
                f"{path} has {size} bytes, but its manifest lists {entry.bytes}; {REWRITE}",
            )
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self.rows_per_shard, self.inner, self.compressed = rows_per_shard, inner, compressed

    def __getitem__(self, at: tuple[NDArray[np.int64], NDArray[np.int64]]) -> NDArray[Any]:
        rows, views = at
        chunks = rows // self.inner[0] * (self.shape[1] // self.inner[1]) + views // self.inner[1]
        expected = self._checksums[rows, views // self.inner[1]]
        values = np.empty((len(rows), *self.shape[2:]), self.dtype)
        with self._open() as file:
            for chunk in np.unique(chunks):
                here = chunks == chunk
                try:
                    read = self._read_chunk(file, int(chunk), int(expected[here][0]))
                except ManifestError:
                    file_at(self.path).refuse_damaged_copy(self._entry.sha256)
                    raise
                values[here] = read[rows[here] % self.inner[0], views[here] % self.inner[1]]
        return values

    def _open(self) -> io.FileIO:
        return file_at(self.path).open(self._entry.sha256)

    def _read_chunk(self, file: io.FileIO, chunk: int, checksum: int) -> NDArray[Any]:
        offset, length = (int(entry) for entry in self._index[chunk])
        if length > most_chunk_bytes((*self.inner, *self.shape[2:]), self.dtype):
            raise ManifestError(f"{self.path} is damaged: a chunk has {length} bytes; {REREAD}")
        try:
            data = read_at(file, length, offset)
        except OSError as error:
            raise ManifestError(str(read_error(self.path, error))) from error
        except OverflowError as error:
            raise ManifestError(f"{self.path} is damaged: {error}; {REREAD}") from error
        if len(data) != length or data[-CHECKSUM_BYTES:] != checksum.to_bytes(4, "little"):
            raise ManifestError(
                f"{self.path} is damaged: inner chunk {chunk} is not the one in its commit marker; {REREAD}"
            )
        return decode_chunk(
            data,
            (*self.inner, *self.shape[2:]),
            self.dtype,
            compressed=self.compressed,
            path=self.path,
        )

    @cached_property
    def _index(self) -> NDArray[np.uint64]:
        """[inner chunks, 2]: offset and length."""
        chunks = self.rows_per_shard // self.inner[0] * (self.shape[1] // self.inner[1])
        length = chunks * 16 + CHECKSUM_BYTES
        with self._open() as file:
            start = open_size(file) - length
            data = read_at(file, length, start) if start >= 0 else b""
        body = strip_checksum(data, self.path) if len(data) == length else b""
        if not body:
            raise ManifestError(f"{self.path} is damaged: it has no index of its chunks; {REREAD}")
        return np.frombuffer(body, np.uint64).reshape(-1, 2)


def most_chunk_bytes(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """Return an upper bound of the bytes of a stored chunk, compressed or not.

    Args:
        shape: Shape of the chunk's values.
        dtype: Their dtype.
    """
    return 2 * math.prod(shape) * dtype.itemsize + _COMPRESSION_OVERHEAD


def decode_chunk(
    data: bytes, shape: tuple[int, ...], dtype: np.dtype[Any], *, compressed: bool, path: RootedPath
) -> NDArray[Any]:
    """Decode a chunk written by Zarr's codecs (bytes, Blosc if compressed, CRC-32C).

    Args:
        data: The chunk with its checksum.
        shape: Shape of the result.
        dtype: Dtype of the result.
        compressed: True if it is Blosc data.
        path: File of the chunk, for messages.

    Raises:
        ManifestError: If the chunk is damaged or has another number of values.
    """
    body = strip_checksum(data, path)
    expected = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if compressed:
        try:
            return decompress_blosc(body, expected).view(dtype).reshape(shape)
        except FormatError as error:
            raise ManifestError(f"{path} {error}; {REREAD}") from error
    if len(body) != expected:
        raise ManifestError(
            f"{path} has {len(body)} bytes, which do not match {dtype} {list(shape)}; {REREAD}"
        )
    return np.frombuffer(body, dtype).reshape(shape)


def strip_checksum(data: bytes, path: RootedPath) -> bytes:
    """Return the bytes before their CRC-32C.

    Args:
        data: Bytes that end with their CRC-32C.
        path: Their file, for messages.

    Raises:
        ManifestError: If the checksum does not match them.
    """
    body, checksum = data[:-CHECKSUM_BYTES], data[-CHECKSUM_BYTES:]
    if google_crc32c.value(body) != int.from_bytes(checksum, "little"):
        raise ManifestError(f"{path} is damaged: a chunk's checksum is wrong; {REREAD}")
    return body
