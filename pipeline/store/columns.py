"""A teacher pass's fields on disk, in one of two backends that hold the same values.

zarr        <pass>/columns.zarr/<field>: chunk i is manifest shard i, so a short last shard shifts no
            other row; rows past a shard's last record are fill and never read. A record of 4 KiB and more
            (a B-cos network's weights) is compressed, and a chunk of more than 64 MiB is cut into inner ones
webdataset  <pass>/<shard>.tar: the image shard's keys in its order, a member {key}.<field>.npy each

Zarr encodes, but commits go through files.py: its own local store never syncs, and a chunk that is
missing reads silently as fill. Receipts, not readers, say what is present.
"""

from __future__ import annotations

import io
import tarfile
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pipeline.store.files import open_atomically, sha256_file, write_atomically
from pipeline.store.manifest import FileEntry, ManifestError
from pipeline.store.rows import InnerChunkRows, Rows
from pipeline.store.tars import TarShard

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from pipeline.records import FieldSpec

Values = dict[str, "NDArray[Any]"]
"""Of one shard: field -> [rows, V, *shape]."""

COLUMNS_FOLDER = "columns.zarr"
_MAX_CHUNK_BYTES = 64 * 2**20
_INNER_CHUNK_BYTES = 64 * 2**10
"""Before compression: what is read for one row; one view of one record where that is larger."""
_COMPRESSED_RECORD_BYTES = 4 * 2**10
"""Fields of smaller records are small in all, and read in whole chunks."""


class Columns(Protocol):
    """One pass's columns; picklable, and opens nothing until it is used."""

    def create(self) -> dict[str, str]:
        """Write what all shards share, once, before any shard: path in the pass -> sha256."""

    def write_shard(
        self, position: int, name: str, keys: Sequence[str], values: Values
    ) -> list[FileEntry]:
        """Write one whole shard; exactly one process writes it."""

    def read_shard(self, position: int, name: str, keys: Sequence[str]) -> Values:
        """All fields of one shard."""

    def open_shard(
        self,
        position: int,
        name: str,
        keys: Sequence[str],
        fields: Container[str] | None = None,
    ) -> dict[str, Rows]:
        """Those fields of one shard (None: all), large ones as rows that are read when they are asked for."""


class ZarrColumns:
    """Zarr v3 arrays [num_shards * shard_size, V, *shape]."""

    def __init__(
        self,
        folder: Path,
        fields: Sequence[FieldSpec],
        num_shards: int,
        shard_size: int,
        num_views: int,
    ) -> None:
        self.folder = folder
        self.fields = tuple(fields)
        self.num_shards = num_shards
        self.shard_size = shard_size
        self.num_views = num_views

    def create(self) -> dict[str, str]:
        files = {}
        encoded = {f"{spec.name}/zarr.json": self._encode(spec, None)[1] for spec in self.fields}
        for name, data in ({"zarr.json": _encode_group()} | encoded).items():
            path = f"{COLUMNS_FOLDER}/{name}"
            if (self.folder / path).is_file() and (self.folder / path).read_bytes() == data:
                files[path] = sha256_file(self.folder / path)
            else:
                files[path] = write_atomically(self.folder / path, data)
        return files

    def write_shard(
        self, position: int, name: str, keys: Sequence[str], values: Values
    ) -> list[FileEntry]:
        entries = []
        for spec in self.fields:
            chunk, _ = self._encode(spec, values[spec.name])
            path = self._chunk_path(spec, position)
            digest = write_atomically(self.folder / path, chunk)
            entries.append(FileEntry(path=path, bytes=len(chunk), sha256=digest))
        return entries

    def read_shard(self, position: int, name: str, keys: Sequence[str]) -> Values:
        return {spec.name: self._read(spec, position, len(keys)) for spec in self.fields}

    def open_shard(
        self,
        position: int,
        name: str,
        keys: Sequence[str],
        fields: Container[str] | None = None,
    ) -> dict[str, Rows]:
        rows = len(keys)
        return {
            spec.name: self._open(spec, position, rows)
            if self._is_sharded(spec)
            else self._read(spec, position, rows)
            for spec in self.fields
            if fields is None or spec.name in fields
        }

    def _read(self, spec: FieldSpec, position: int, rows: int) -> NDArray[Any]:
        import zarr

        start = position * self.shard_size
        array = zarr.open_array(self.folder / COLUMNS_FOLDER / spec.name, mode="r")
        return np.asarray(array[start : start + rows])

    def _open(self, spec: FieldSpec, position: int, rows: int) -> Rows:
        return InnerChunkRows(
            self.folder / self._chunk_path(spec, position),
            (rows, self.num_views, *spec.shape),
            spec.dtype,
            shard_size=self.shard_size,
            inner=self._inner(spec),
            compressed=_is_compressed(spec),
        )

    def _chunk_path(self, spec: FieldSpec, position: int) -> str:
        return f"{COLUMNS_FOLDER}/{spec.name}/c/{position}" + "/0" * (1 + len(spec.shape))

    def _is_sharded(self, spec: FieldSpec) -> bool:
        return self.shard_size * self.num_views * _record_bytes(spec) > _MAX_CHUNK_BYTES

    def _inner(self, spec: FieldSpec) -> tuple[int, int]:
        """Rows and views of an inner chunk: of as many rows as fit, or of one view of one row."""
        row_bytes = self.num_views * _record_bytes(spec)
        if row_bytes > _INNER_CHUNK_BYTES:
            return 1, 1
        most = min(_INNER_CHUNK_BYTES // row_bytes, self.shard_size)
        return max(n for n in range(1, most + 1) if self.shard_size % n == 0), self.num_views

    def _encode(self, spec: FieldSpec, values: NDArray[Any] | None) -> tuple[bytes, bytes]:
        """A chunk's bytes (empty where `values` is None) and the array's zarr.json."""
        import zarr
        from zarr.storage import MemoryStore

        tail = (self.num_views, *spec.shape)
        outer = (self.shard_size, *tail)
        sharded = self._is_sharded(spec)
        memory: dict[str, Any] = {}
        array = zarr.create_array(
            MemoryStore(memory),
            shape=(self.num_shards * self.shard_size, *tail),
            chunks=(*self._inner(spec), *spec.shape) if sharded else outer,
            shards=outer if sharded else None,
            dtype=spec.dtype,
            compressors=_compressors(spec),
            fill_value=_fill(spec.dtype),
            config={"write_empty_chunks": True},
            zarr_format=3,
        )
        chunk = b""
        if values is not None:
            padded = np.full(outer, _fill(spec.dtype), dtype=spec.dtype)
            padded[: len(values)] = values
            array[: self.shard_size] = padded
            chunk = memory["c/0" + "/0" * len(tail)].to_bytes()
        return chunk, memory["zarr.json"].to_bytes()


def _record_bytes(spec: FieldSpec) -> int:
    """Of one view of one record."""
    return int(np.prod(spec.shape)) * np.dtype(spec.dtype).itemsize


def _is_compressed(spec: FieldSpec) -> bool:
    return _record_bytes(spec) >= _COMPRESSED_RECORD_BYTES


def _compressors(spec: FieldSpec) -> list[Any]:
    """Lossless; the checksum is outermost, as a flipped bit may pass a decompressor unseen."""
    from zarr.codecs import BloscCodec, Crc32cCodec

    if not _is_compressed(spec):
        return [Crc32cCodec()]
    itemsize = np.dtype(spec.dtype).itemsize
    shuffle = "bitshuffle" if itemsize > 1 else "noshuffle"
    return [
        BloscCodec(cname="zstd", clevel=1, shuffle=shuffle, typesize=itemsize),
        Crc32cCodec(),
    ]


def _encode_group() -> bytes:
    import zarr
    from zarr.storage import MemoryStore

    memory: dict[str, Any] = {}
    zarr.create_group(MemoryStore(memory), zarr_format=3)
    data: bytes = memory["zarr.json"].to_bytes()
    return data


def _fill(dtype: str) -> float | int:
    return float("nan") if dtype.startswith("float") else 0


class WebDatasetColumns:
    """One tar a shard, for tools that read WebDataset and zip it with the images."""

    def __init__(
        self,
        folder: Path,
        fields: Sequence[FieldSpec],
        num_shards: int,
        shard_size: int,
        num_views: int,
    ) -> None:
        self.folder = folder
        self.fields = tuple(fields)
        self.num_views = num_views

    def create(self) -> dict[str, str]:
        return {}

    def write_shard(
        self, position: int, name: str, keys: Sequence[str], values: Values
    ) -> list[FileEntry]:
        path = f"{name}.tar"
        with open_atomically(self.folder / path) as file, TarShard(file) as tar:
            for row, key in enumerate(keys):
                for spec in self.fields:
                    tar.add(f"{key}.{spec.name}.npy", _npy(values[spec.name][row]))
        return [FileEntry(path=path, bytes=file.bytes, sha256=file.sha256)]

    def read_shard(self, position: int, name: str, keys: Sequence[str]) -> Values:
        path = self.folder / f"{name}.tar"
        members = _read_members(path)
        if not keys:  # all its images were skipped
            return {
                spec.name: np.empty((0, self.num_views, *spec.shape), spec.dtype)
                for spec in self.fields
            }
        try:
            return {
                spec.name: np.stack([_load_npy(members[f"{key}.{spec.name}.npy"]) for key in keys])
                for spec in self.fields
            }
        except KeyError as error:
            raise ManifestError(f"{path} has no member {error}; run stages.verify") from None

    def open_shard(
        self,
        position: int,
        name: str,
        keys: Sequence[str],
        fields: Container[str] | None = None,
    ) -> dict[str, Rows]:
        values = self.read_shard(position, name, keys)
        return {
            field: array for field, array in values.items() if fields is None or field in fields
        }


def _npy(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _load_npy(data: bytes) -> NDArray[Any]:
    array: NDArray[Any] = np.load(io.BytesIO(data), allow_pickle=False)
    return array


def _read_members(path: Path) -> dict[str, bytes]:
    try:
        with tarfile.open(path, "r:") as tar:
            files = ((member.name, tar.extractfile(member)) for member in tar)
            return {name: file.read() for name, file in files if file is not None}
    except (OSError, tarfile.TarError) as error:
        raise ManifestError(f"{path} cannot be read ({error}); run stages.verify") from error


BACKENDS: dict[str, Callable[[Path, Sequence[FieldSpec], int, int, int], Columns]] = {
    "zarr": ZarrColumns,
    "webdataset": WebDatasetColumns,
}
