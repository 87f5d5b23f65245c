"""A teacher pass's fields on disk, in one of two backends that hold the same values.

zarr        <pass>/columns.zarr/<field>: chunk i is manifest shard i, so a short last shard shifts no
            other row; rows past a shard's last record are fill and never read
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
from pipeline.store.tars import TarShard

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from pipeline.records import FieldSpec

Values = dict[str, "NDArray[Any]"]
"""Of one shard: field -> [rows, V, *shape]."""

COLUMNS_FOLDER = "columns.zarr"
_MAX_CHUNK_BYTES = 64 * 2**20
_INNER_CHUNK_BYTES = 8 * 2**20


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
            zeros = "/0" * (1 + len(spec.shape))
            path = f"{COLUMNS_FOLDER}/{spec.name}/c/{position}{zeros}"
            digest = write_atomically(self.folder / path, chunk)
            entries.append(FileEntry(path=path, bytes=len(chunk), sha256=digest))
        return entries

    def read_shard(self, position: int, name: str, keys: Sequence[str]) -> Values:
        import zarr

        start = position * self.shard_size
        rows = slice(start, start + len(keys))
        return {
            spec.name: np.asarray(
                zarr.open_array(self.folder / COLUMNS_FOLDER / spec.name, mode="r")[rows]
            )
            for spec in self.fields
        }

    def _encode(self, spec: FieldSpec, values: NDArray[Any] | None) -> tuple[bytes, bytes]:
        """A chunk's bytes (empty where `values` is None) and the array's zarr.json."""
        import zarr
        from zarr.codecs import Crc32cCodec
        from zarr.storage import MemoryStore

        tail = (self.num_views, *spec.shape)
        row_bytes = int(np.prod(tail)) * np.dtype(spec.dtype).itemsize
        outer = (self.shard_size, *tail)
        sharded = row_bytes * self.shard_size > _MAX_CHUNK_BYTES
        memory: dict[str, Any] = {}
        array = zarr.create_array(
            MemoryStore(memory),
            shape=(self.num_shards * self.shard_size, *tail),
            chunks=(_inner_rows(self.shard_size, row_bytes), *tail) if sharded else outer,
            shards=outer if sharded else None,
            dtype=spec.dtype,
            compressors=[Crc32cCodec()],
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


def _encode_group() -> bytes:
    import zarr
    from zarr.storage import MemoryStore

    memory: dict[str, Any] = {}
    zarr.create_group(MemoryStore(memory), zarr_format=3)
    data: bytes = memory["zarr.json"].to_bytes()
    return data


def _fill(dtype: str) -> float | int:
    return float("nan") if dtype.startswith("float") else 0


def _inner_rows(shard_size: int, row_bytes: int) -> int:
    """The most rows an inner chunk of at most 8 MiB may have; must divide the shard."""
    most = max(1, _INNER_CHUNK_BYTES // row_bytes)
    return max(rows for rows in range(1, min(most, shard_size) + 1) if shard_size % rows == 0)


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
