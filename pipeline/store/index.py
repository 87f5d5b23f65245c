"""Index of a store and receipts of its shards, as Parquet tables.

A receipt is a shard's part of the index. Its file's metadata lists the bytes that it covers and a digest of the
receipt's own content. Manifests are written from receipts, so a flipped bit in a receipt must be detected.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.core.files import canonical_json, read_regular, write_atomically
from pipeline.core.records import NO_LABEL
from pipeline.store.manifest import REPAIR, ManifestError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from pipeline.core.records import Record

_BOX = pa.struct(
    [("label", pa.int32())] + [(corner, pa.float32()) for corner in ("x0", "y0", "x1", "y1")]
)

_BOXES_UNIT = "normalized canonical coordinates: the outer edges of the frame are -1 and 1"

RECEIPT_SCHEMA = pa.schema(
    [
        pa.field(name, dtype, nullable=False)
        for name, dtype in {
            "key": pa.string(),
            "split": pa.string(),
            "shard": pa.string(),
            "row": pa.int32(),
            "offset": pa.int64(),
            "size": pa.int64(),
            "mask_offset": pa.int64(),
            "mask_size": pa.int64(),
            "height": pa.int32(),
            "width": pa.int32(),
            "label": pa.int32(),
            "labels": pa.list_(pa.int32()),
            "group": pa.int32(),
            "boxes": pa.list_(_BOX),
            "image_sha256": pa.string(),
            "image_crc32c": pa.uint32(),
            "mask_crc32c": pa.uint32(),
        }.items()
    ]
)
"""Columns of an image shard's receipt, as described in docs/reference/store-format.md."""

INDEX_SCHEMA = RECEIPT_SCHEMA.append(pa.field("array_row", pa.int64(), nullable=False))
"""Columns of index.parquet: those of the receipts, and each record's row in the arrays of canonical passes."""

PASS_RECEIPT_SCHEMA = pa.schema(
    [
        pa.field(name, dtype, nullable=False)
        for name, dtype in {
            "key": pa.string(),
            "row": pa.int32(),
            "array_row": pa.int64(),
            "chunk_crc32c": pa.list_(pa.uint32()),
        }.items()
    ]
)
"""Columns of a pass's receipt: each record's row in the shard and in the arrays, and the CRC-32C of the inner chunks
that contain it, view by view and field by field, for fields that are divided into inner chunks."""

RECEIPTS_FOLDER = "receipts"

_METADATA_KEY = b"permafrost"
_DIGEST_KEY = "content_sha256"


@dataclass(frozen=True, kw_only=True)
class IndexRow:
    """Location of one record's bytes, and its description."""

    record: Record
    shard: str
    row: int
    offset: int
    size: int
    mask_offset: int
    """Offset of the mask; -1 without a mask."""
    mask_size: int
    height: int
    """Height of the original image, `width` likewise."""
    width: int
    image_sha256: str
    image_crc32c: int
    """CRC-32C (Castagnoli) of the stored bytes, checked whenever they are read; `mask_crc32c` likewise, 0
    without a mask."""
    mask_crc32c: int

    def values(self) -> dict[str, Any]:
        """Return the row as the index stores it."""
        own = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "record"}
        known = ("key", "split", "label", "labels", "group")
        described = {name: getattr(self.record, name) for name in known}
        return own | described | {"boxes": [asdict(box) for box in self.record.boxes]}


def receipt_path(folder: Path, shard: str) -> Path:
    """Return the path of a shard's receipt in a store or a pass."""
    return folder / RECEIPTS_FOLDER / f"{shard}.parquet"


def receipt_table(rows: list[IndexRow]) -> pa.Table:
    """Convert rows to a table of RECEIPT_SCHEMA."""
    return pa.Table.from_pylist([row.values() for row in rows], schema=RECEIPT_SCHEMA)


def index_table(receipts: list[pa.Table], rows_per_shard: int) -> pa.Table:
    """Concatenate the receipts of all shards, in their order, to a table of INDEX_SCHEMA.

    rows_per_shard  rows of an array that each shard has
    """
    numbers = np.repeat(np.arange(len(receipts)), [receipt.num_rows for receipt in receipts])
    rows = pa.concat_tables(receipts).replace_schema_metadata(None)
    array_row = numbers * rows_per_shard + rows["row"].to_numpy()
    index = rows.append_column(INDEX_SCHEMA.field("array_row"), pa.array(array_row, pa.int64()))
    boxes = INDEX_SCHEMA.get_field_index("boxes")
    described = index.schema.field(boxes).with_metadata({"unit": _BOXES_UNIT})
    return index.cast(index.schema.set(boxes, described))


def has_many_labels(index: pa.Table) -> bool:
    """Return whether any record lists its classes in `labels`; `label` is then not read."""
    return _longest_list(index) > 0


def max_labels(index: pa.Table) -> int:
    """Return the largest number of labels of a record; 0 if no record has any."""
    labeled = bool((index["label"].to_numpy() != NO_LABEL).any())
    return max(_longest_list(index), int(labeled))


def _longest_list(index: pa.Table) -> int:
    return pc.max(pc.list_value_length(index["labels"])).as_py() or 0


def write_table(path: Path, table: pa.Table, metadata: dict[str, Any] | None = None) -> str:
    """Write a Parquet file atomically and return its SHA-256.

    metadata  for a receipt: JSON values for the footer, to which the receipt's digest is added
    The same table and metadata give the same bytes with the same version of pyarrow.
    """
    if metadata is not None:
        sealed = {**metadata, _DIGEST_KEY: _digest(table, metadata)}
        text = json.dumps(sealed, sort_keys=True)
        table = table.replace_schema_metadata({_METADATA_KEY: text.encode()})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return write_atomically(path, buffer.getvalue())


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """Read a table of the given schema; raise ManifestError if the file contains anything else.

    It is read by this thread alone. If a process ends while Arrow's threads are still being started, they abort it
    with SIGABRT ("terminate called without an active exception"), as observed in one of 20 runs on a busy machine.
    """
    try:
        source = pa.BufferReader(read_regular(path))
        table = pq.ParquetFile(source, pre_buffer=False).read(use_threads=False)
    except FileNotFoundError:
        raise ManifestError(f"{path} is missing; {REPAIR}") from None
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise ManifestError(f"{path} cannot be read as Parquet ({error})") from error
    if not table.schema.equals(schema, check_metadata=False):
        raise ManifestError(f"{path} does not have the columns of this version")
    required = [field.name for field in schema if not field.nullable]
    if any(_null_count(chunk) for name in required for chunk in table[name].chunks):
        raise ManifestError(f"{path} has empty cells")
    return table.combine_chunks()


def read_receipt(path: Path, schema: pa.Schema) -> tuple[pa.Table, dict[str, Any]]:
    """Read a receipt written by `write_table` and its metadata, checked against the digest that it contains."""
    table = read_table(path, schema)
    stored = (table.schema.metadata or {}).get(_METADATA_KEY, b"{}")
    table = table.replace_schema_metadata(None)
    try:
        metadata = json.loads(stored)
        claimed = metadata.pop(_DIGEST_KEY)
        found = _digest(table, metadata)
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RecursionError,
        pa.ArrowException,
    ) as error:
        raise ManifestError(f"{path} is damaged: its metadata cannot be read") from error
    if found != claimed:
        raise ManifestError(
            f"{path} is damaged: its content has sha256 {found[:12]}, but it lists {str(claimed)[:12]!r}"
        )
    return table, metadata


def _digest(table: pa.Table, metadata: dict[str, Any]) -> str:
    """Return the SHA-256 of a table's values and metadata, independent of the pyarrow version."""
    digest = hashlib.sha256(canonical_json(metadata))
    for name, column in zip(table.column_names, table.columns, strict=True):
        digest.update(f"\n{name}\n".encode())
        for values in _flat_values(column.combine_chunks()):
            digest.update(values)
    return digest.hexdigest()


def _flat_values(array: pa.Array) -> Iterator[bytes]:
    """Yield the values of an array without nulls, and the lengths of its texts and lists, as bytes."""
    if pa.types.is_list(array.type):
        yield _bytes(pc.list_value_length(array))
        yield from _flat_values(array.flatten())
    elif pa.types.is_struct(array.type):
        for field in array.flatten():
            yield from _flat_values(field)
    elif pa.types.is_string(array.type):
        yield _bytes(pc.binary_length(array))
        yield "".join(array.to_pylist()).encode()
    else:
        yield _bytes(array)


def _null_count(array: pa.Array) -> int:
    """Count the nulls of an array and of its nested arrays."""
    nested = pa.types.is_list(array.type) or pa.types.is_struct(array.type)
    parts = array.flatten() if nested else []
    if isinstance(parts, pa.Array):  # a list; a struct is flattened to a list of its fields
        parts = [parts]
    return int(array.null_count + sum(map(_null_count, parts)))


def _bytes(numbers: pa.Array) -> bytes:
    values: NDArray[Any] = numbers.to_numpy(zero_copy_only=False)
    return values.astype(values.dtype.newbyteorder("<")).tobytes()
