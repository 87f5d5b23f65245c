"""Backend zarr: <pass>/fields.zarr/<field>, a Zarr v3 array for each field.

Chunk i is shard i of the manifest, so a short last shard does not shift other rows. Rows past a shard's last record are
padding (NaN, -1 or 65535). Fields with 4 KiB or more per record (a B-cos network's weights) are compressed, and a chunk
of more than 64 MiB is divided into inner chunks.

Zarr's codecs encode chunks one after the other, and each is written at once, so that memory does not grow with the
file. Zarr's arrays are not used for it: they pass each chunk to another thread, which takes longer than to compress it,
and their local store never syncs. Zarr never reads here: it treats a missing chunk as fill, and metadata of its second
format may name codecs that run code. A chunk is read as bytes, compared with the size and the checksum in the manifest,
and decoded by the layout that the fields imply.
Standard Zarr reads the same files; verification checks their zarr.json for it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any, Literal

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from permafrost.core.records import FieldSpec
from permafrost.storage.files import file_at
from permafrost.storage.local_files import HashingFile
from permafrost.storage.rooted_paths import RootedPath
from permafrost.store.entries import REPAIR, REWRITE, FileEntry, ManifestError
from permafrost.store.fields import (
    PassFields,
    StoredShard,
    Values,
    WrittenShard,
    entry_of,
    read_entry,
)
from permafrost.store.row_reader import (
    CHECKSUM_BYTES,
    InnerChunkRows,
    Rows,
    decode_chunk,
    most_chunk_bytes,
)

FIELDS_FOLDER = "fields.zarr"
"""Folder of the fields of a pass."""


_MAX_CHUNK_BYTES = 64 * 2**20


_INNER_CHUNK_BYTES = 64 * 2**10
"""Bytes before compression that are read for one row; one view of one record if that is larger."""


_COMPRESSED_RECORD_BYTES = 4 * 2**10
"""Minimum size per record of compressed fields; smaller fields are small as a whole and read in whole
chunks."""


_MAX_METADATA_BYTES = 2**20
"""Largest size of a zarr.json."""


class ZarrFields(PassFields):
    """Zarr v3 arrays [num_shards * rows_per_shard, V, *shape]."""

    def create(self) -> dict[str, str]:
        files = {}
        for path, metadata in self._shared_contents().items():
            data = json.dumps(metadata, indent=2).encode()
            place = self.folder / path
            is_there = file_at(place).is_file() and file_at(place).read(_MAX_METADATA_BYTES) == data
            files[path] = file_at(place).sha256() if is_there else file_at(place).write(data)
        return files

    def shared_files(self) -> list[str]:
        names = ["zarr.json", *(f"{spec.name}/zarr.json" for spec in self.fields)]
        return [f"{FIELDS_FOLDER}/{name}" for name in names]

    def shard_files(self, position: int, name: str) -> list[str]:
        return [self._chunk_path(spec, position) for spec in self.fields]

    def files_of_fields(self, fields: Container[str], position: int, name: str) -> list[str]:
        return [self._chunk_path(spec, position) for spec in self.fields if spec.name in fields]

    def inner_chunks_of_a_row(self) -> int:
        sharded = filter(self._is_sharded, self.fields)
        return sum(self.num_views // self._inner(spec)[1] for spec in sharded)

    def check_shared_files(self) -> None:
        _ = self._is_metadata_sound

    @cached_property
    def _is_metadata_sound(self) -> Literal[True]:
        """True; the check runs once and raises ManifestError if it fails."""
        for path, metadata in self._shared_contents().items():
            _check_metadata(self.folder / path, metadata)
        return True

    def write_shard(
        self, position: int, name: str, keys: Sequence[str], values: Values
    ) -> WrittenShard:
        entries, checksums = [], []
        for spec in self.fields:
            path = self._chunk_path(spec, position)
            with file_at(self.folder / path).open_atomically() as file:
                checksum, by_row = self._write_field(spec, values[spec.name], file)
            entries.append(
                FileEntry(path=path, bytes=file.bytes, sha256=file.sha256, crc32c=checksum)
            )
            if self._is_sharded(spec):
                checksums.append(by_row)
        by_row = np.concatenate(checksums, axis=1).tolist() if checksums else [[] for _ in keys]
        return WrittenShard(files=tuple(entries), chunk_crc32c=by_row)

    def _write_field(
        self, spec: FieldSpec, values: NDArray[Any], file: HashingFile
    ) -> tuple[int, NDArray[np.uint32]]:
        """Write a field's file.

        Returns:
            The CRC-32C of all but the file's last one, and that of the inner chunks of each row, [rows, inner chunks].
        """
        assert len(values) <= self.rows_per_shard
        values = values.reshape(-1, self.num_views, *spec.shape)
        rows, views = self._inner(spec)
        grid = self.rows_per_shard // rows, self.num_views // views
        index = np.empty((*grid, 2), "<u8")
        checksums = np.empty(grid, np.uint32)
        encode = _encoder(spec, (rows, views, *spec.shape))
        for at in sorted(np.ndindex(grid), key=_morton_code):
            row, view = at[0] * rows, at[1] * views
            chunk = encode(_padded(values[row : row + rows, view : view + views], rows, spec.dtype))
            index[at] = file.tell(), len(chunk)
            checksums[at] = int.from_bytes(chunk[-CHECKSUM_BYTES:], "little")
            file.write(chunk)
        checksum = int(checksums[0, 0])
        if self._is_sharded(spec):
            file.write(index.tobytes())
            checksum = file.crc32c
            file.write(google_crc32c.value(index.tobytes()).to_bytes(CHECKSUM_BYTES, "little"))
        return checksum, checksums[np.arange(len(values)) // rows]

    def read_shard(self, shard: StoredShard) -> Values:
        views = np.arange(self.num_views)
        every = np.arange(len(shard.keys))
        values = {}
        for name, rows in self.open_shard(shard).items():
            if not isinstance(rows, np.ndarray):
                rows = np.stack([rows[every, np.full_like(every, view)] for view in views], axis=1)
            values[name] = rows
        return values

    def open_shard(
        self, shard: StoredShard, fields: Container[str] | None = None
    ) -> dict[str, Rows]:
        self.check_shared_files()
        return {
            spec.name: self._open(spec, shard)
            if self._is_sharded(spec)
            else self._read(spec, shard)
            for spec in self.fields
            if fields is None or spec.name in fields
        }

    def _read(self, spec: FieldSpec, shard: StoredShard) -> NDArray[Any]:
        path = self._chunk_path(spec, shard.position)
        shape = (self.rows_per_shard, self.num_views, *spec.shape)
        most = most_chunk_bytes(shape, np.dtype(spec.dtype))
        values = decode_chunk(
            read_entry(self.folder, entry_of(shard, path), shard.name, most, CHECKSUM_BYTES),
            shape,
            np.dtype(spec.dtype),
            compressed=_is_compressed(spec),
            path=self.folder / path,
        )
        return values[: len(shard.keys)]

    def _open(self, spec: FieldSpec, shard: StoredShard) -> Rows:
        entry = entry_of(shard, self._chunk_path(spec, shard.position))
        sharded = [spec for spec in self.fields if self._is_sharded(spec)]
        counts = [self.num_views // self._inner(spec)[1] for spec in sharded]
        start = sum(counts[: sharded.index(spec)])
        return InnerChunkRows(
            self.folder / entry.path,
            (len(shard.keys), self.num_views, *spec.shape),
            spec.dtype,
            rows_per_shard=self.rows_per_shard,
            inner=self._inner(spec),
            compressed=_is_compressed(spec),
            checksums=shard.chunk_crc32c[:, start : start + counts[sharded.index(spec)]],
            entry=entry,
        )

    def _chunk_path(self, spec: FieldSpec, position: int) -> str:
        return f"{FIELDS_FOLDER}/{spec.name}/c/{position}" + "/0" * (1 + len(spec.shape))

    def _is_sharded(self, spec: FieldSpec) -> bool:
        return self.rows_per_shard * self.num_views * _record_bytes(spec) > _MAX_CHUNK_BYTES

    def _inner(self, spec: FieldSpec) -> tuple[int, int]:
        """Return the rows and views of an inner chunk: all, or as many rows as fit, or one view of one row."""
        if not self._is_sharded(spec):
            return self.rows_per_shard, self.num_views
        if (row_bytes := self.num_views * _record_bytes(spec)) > _INNER_CHUNK_BYTES:
            return 1, 1
        most = min(_INNER_CHUNK_BYTES // row_bytes, self.rows_per_shard)
        return max(
            rows for rows in range(1, most + 1) if self.rows_per_shard % rows == 0
        ), self.num_views

    def _shared_contents(self) -> dict[str, dict[str, Any]]:
        """Build every zarr.json (zarr-specs, v3), the same with every version of Zarr, which readers do not need."""
        group = {"attributes": {}, "zarr_format": 3, "node_type": "group"}
        described = [group, *map(self._metadata, self.fields)]
        return dict(zip(self.shared_files(), described, strict=True))

    def _metadata(self, spec: FieldSpec) -> dict[str, Any]:
        tail = (self.num_views, *spec.shape)
        outer = [self.rows_per_shard, *tail]
        codecs = _codecs(spec)
        if self._is_sharded(spec):
            inner = {
                "chunk_shape": [*self._inner(spec), *spec.shape],
                "codecs": codecs,
                "index_codecs": [_LITTLE_ENDIAN, {"name": "crc32c"}],
                "index_location": "end",
            }
            codecs = [{"name": "sharding_indexed", "configuration": inner}]
        padding = _padding(spec.dtype)
        axes = spec.axes or tuple(f"axis_{number}" for number in range(len(spec.shape)))
        return {
            "shape": [self.num_shards * self.rows_per_shard, *tail],
            "data_type": spec.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": outer}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": padding if isinstance(padding, int) else "NaN",
            "codecs": codecs,
            "attributes": _attributes(spec, self.fields),
            "dimension_names": ["array_row", "view", *axes],
            "zarr_format": 3,
            "node_type": "array",
            "storage_transformers": [],
        }


def _encoder(
    spec: FieldSpec, shape: tuple[int, ...]
) -> Callable[[NDArray[Any]], NDArray[np.uint8]]:
    """Return a function that encodes the values of a chunk of that shape with Zarr's codecs."""
    from zarr.buffer import cpu
    from zarr.core.array_spec import ArrayConfig, ArraySpec
    from zarr.dtype import parse_dtype
    from zarr.registry import get_codec_class

    codecs = [get_codec_class(codec["name"]).from_dict(codec) for codec in _codecs(spec)]
    described = ArraySpec(
        shape,
        parse_dtype(spec.dtype, zarr_format=3),
        _padding(spec.dtype),
        ArrayConfig.from_dict({}),
        cpu.buffer_prototype,
    )

    def encode(values: NDArray[Any]) -> NDArray[np.uint8]:
        chunk = cpu.NDBuffer.from_numpy_array(values)
        for codec in codecs:
            chunk = codec._encode_sync(chunk, described)  # zarr.abc.codec.SupportsSyncCodec
        return np.asarray(chunk.as_numpy_array())

    return encode


def _padded(values: NDArray[Any], rows: int, dtype: str) -> NDArray[Any]:
    """Return values of the stored dtype with as many rows."""
    if len(values) == rows:
        return values.astype(dtype, copy=False)
    padding = np.full((rows - len(values), *values.shape[1:]), _padding(dtype), dtype)
    return np.concatenate([values.astype(dtype, copy=False), padding])


def _morton_code(at: tuple[int, ...]) -> int:
    """Return the number by which Zarr orders inner chunks in a file: the bits of their row and view, interleaved."""
    row, view = at
    return sum(
        (row >> bit & 1 | (view >> bit & 1) << 1) << 2 * bit for bit in range(max(at).bit_length())
    )


def _record_bytes(spec: FieldSpec) -> int:
    """Return the size in bytes of one view of one record."""
    return int(np.prod(spec.shape, dtype=np.int64)) * np.dtype(spec.dtype).itemsize


def _is_compressed(spec: FieldSpec) -> bool:
    return _record_bytes(spec) >= _COMPRESSED_RECORD_BYTES


def _padding(dtype: str) -> float | int:
    """Return the value of rows without a record."""
    if dtype.startswith("float"):
        return float("nan")
    return int(np.iinfo(dtype).max) if dtype.startswith("uint") else -1


def _attributes(spec: FieldSpec, fields: Sequence[FieldSpec]) -> dict[str, Any]:
    """Return the attributes that a reader of the array alone needs to interpret its values.

    `units` is an expression of NumPy, with the arrays by their names and `values` and `step` of this one.
    """
    described = asdict(spec)
    attributes: dict[str, Any] = {
        name: described[name]
        for name in (
            "codec",
            "when_moved",
            "frame",
            "crop_fraction",
            "margin",
            "mirrored",
            "before_relu",
        )
    } | {
        "padding": str(_padding(spec.dtype)),
        "array_row": "place of the shard * rows_per_shard + row in the shard, or column array_row of "
        "commits/<shard>.parquet where the pass covers a selection",
    }
    if spec.codec == "maxabs":
        attributes["units"] = "values * step"
        for scale in (other for other in fields if other.name == f"{spec.name}_scale"):
            axes = ", ".join(["...", *["None"] * (len(spec.shape) - len(scale.shape))])
            attributes["units"] += f" * {scale.name}[{axes}]"
        attributes["step"] = 1 / 127 if spec.dtype == "int8" else 1.0
    return attributes


_LITTLE_ENDIAN = {"name": "bytes", "configuration": {"endian": "little"}}


def _codecs(spec: FieldSpec) -> list[dict[str, Any]]:
    """Return the lossless codecs of a chunk, as zarr.json names them.

    The checksum is outermost, because a decompressor may miss a flipped bit.
    """
    itemsize = np.dtype(spec.dtype).itemsize
    codecs: list[dict[str, Any]] = [_LITTLE_ENDIAN if itemsize > 1 else {"name": "bytes"}]
    if _is_compressed(spec):
        shuffle = "bitshuffle" if itemsize > 1 else "noshuffle"
        options = {"cname": "zstd", "clevel": 1, "shuffle": shuffle, "blocksize": 0}
        codecs.append({"name": "blosc", "configuration": {"typesize": itemsize, **options}})
    return [*codecs, {"name": "crc32c"}]


def _check_metadata(path: RootedPath, expected: dict[str, Any]) -> None:
    """Raise ManifestError unless a zarr.json has the expected entries."""
    try:
        metadata = json.loads(file_at(path).read(_MAX_METADATA_BYTES))
    except FileNotFoundError:
        raise ManifestError(f"{path} is missing; {REPAIR}") from None
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path} is not valid JSON ({error}); {REWRITE}") from error
    metadata = metadata if isinstance(metadata, dict) else {}
    names = sorted({*expected, *metadata})
    if different := [name for name in names if metadata.get(name) != expected.get(name)]:
        raise ManifestError(
            f"{path} does not describe the arrays of its manifest ({', '.join(different)[:200]}); {REWRITE}"
        )
