"""The index of a store and the receipts of its shards, as Parquet tables.

A receipt is a shard's part of the index. Its file's metadata says which bytes it vouches for, and holds a
digest of the receipt's own content: a receipt is what a manifest is written from, so a flipped bit in it
must not become the truth.
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
"""Columns of an image shard's receipt; docs/store-format.md says what each one holds."""

INDEX_SCHEMA = RECEIPT_SCHEMA.append(pa.field("array_row", pa.int64(), nullable=False))
"""Columns of index.parquet: the receipts', and each record's row in the arrays of canonical passes."""

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
"""Columns of a pass's receipt: of each record its row in the shard and in the arrays, and the CRC-32C of the
inner chunks that hold it, view by view and field by field, of the fields that are cut into inner chunks."""

RECEIPTS_FOLDER = "receipts"

_METADATA_KEY = b"permafrost"
_DIGEST_KEY = "content_sha256"


@dataclass(frozen=True, kw_only=True)
class IndexRow:
    """Where one record's bytes lie and what is known of it."""

    record: Record
    shard: str
    row: int
    offset: int
    size: int
    mask_offset: int
    """-1 where there is no mask."""
    mask_size: int
    height: int
    """Of the original image, like `width`."""
    width: int
    image_sha256: str
    image_crc32c: int
    """CRC-32C (Castagnoli) of the stored bytes, compared whenever they are read; like `mask_crc32c`, 0 without
    a mask."""
    mask_crc32c: int

    def values(self) -> dict[str, Any]:
        """The row as the index stores it."""
        own = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "record"}
        known = ("key", "split", "label", "labels", "group")
        described = {name: getattr(self.record, name) for name in known}
        return own | described | {"boxes": [asdict(box) for box in self.record.boxes]}


def receipt_path(folder: Path, shard: str) -> Path:
    """Where a shard's receipt lies in a store or a pass."""
    return folder / RECEIPTS_FOLDER / f"{shard}.parquet"


def receipt_table(rows: list[IndexRow]) -> pa.Table:
    """Rows as a table of RECEIPT_SCHEMA."""
    return pa.Table.from_pylist([row.values() for row in rows], schema=RECEIPT_SCHEMA)


def index_table(receipts: list[pa.Table], rows_per_shard: int) -> pa.Table:
    """The receipts of all shards, in their order, as a table of INDEX_SCHEMA.

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
    """Whether any record lists its classes in `labels`; then no `label` is read."""
    return _longest_list(index) > 0


def max_labels(index: pa.Table) -> int:
    """Labels of the record that has most; 0 where none has any."""
    labeled = bool((index["label"].to_numpy() != NO_LABEL).any())
    return max(_longest_list(index), int(labeled))


def _longest_list(index: pa.Table) -> int:
    return pc.max(pc.list_value_length(index["labels"])).as_py() or 0


def write_table(path: Path, table: pa.Table, metadata: dict[str, Any] | None = None) -> str:
    """Write a Parquet file in one commit; its SHA-256.

    metadata  of a receipt: JSON values for the footer, with the receipt's digest
    The same table and metadata give the same bytes with the same pyarrow.
    """
    if metadata is not None:
        sealed = {**metadata, _DIGEST_KEY: _digest(table, metadata)}
        text = json.dumps(sealed, sort_keys=True)
        table = table.replace_schema_metadata({_METADATA_KEY: text.encode()})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return write_atomically(path, buffer.getvalue())


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """A table of that schema; ManifestError where the file holds anything else.

    Read by this thread alone: Arrow's threads, still being started when a process ends, end it by SIGABRT
    ("terminate called without an active exception"), as a busy machine showed in one of 20 runs.
    """
    try:
        source = pa.BufferReader(read_regular(path))
        table = pq.ParquetFile(source, pre_buffer=False).read(use_threads=False)
    except FileNotFoundError:
        raise ManifestError(f"{path} is missing; {REPAIR}") from None
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise ManifestError(f"{path} cannot be read as Parquet ({error})") from error
    if not table.schema.equals(schema, check_metadata=False):
        raise ManifestError(f"{path} has other columns than this version writes")
    required = [field.name for field in schema if not field.nullable]
    if any(_null_count(chunk) for name in required for chunk in table[name].chunks):
        raise ManifestError(f"{path} has empty cells")
    return table.combine_chunks()


def read_receipt(path: Path, schema: pa.Schema) -> tuple[pa.Table, dict[str, Any]]:
    """A receipt that `write_table` wrote and its metadata, checked against the digest that it holds."""
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
            f"{path} is damaged: its content has sha256 {found[:12]}, it claims {str(claimed)[:12]!r}"
        )
    return table, metadata


def _digest(table: pa.Table, metadata: dict[str, Any]) -> str:
    """SHA-256 of a table's values and its metadata, whatever release of pyarrow wrote them and how."""
    digest = hashlib.sha256(canonical_json(metadata))
    for name, column in zip(table.column_names, table.columns, strict=True):
        digest.update(f"\n{name}\n".encode())
        for values in _flat_values(column.combine_chunks()):
            digest.update(values)
    return digest.hexdigest()


def _flat_values(array: pa.Array) -> Iterator[bytes]:
    """The values of an array without nulls, and the lengths of its texts and lists, as bytes."""
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
    """Nulls of an array and of all that it is made of."""
    nested = pa.types.is_list(array.type) or pa.types.is_struct(array.type)
    parts = array.flatten() if nested else []
    if isinstance(parts, pa.Array):  # of a list; a struct gives a list of its fields
        parts = [parts]
    return int(array.null_count + sum(map(_null_count, parts)))


def _bytes(numbers: pa.Array) -> bytes:
    values: NDArray[Any] = numbers.to_numpy(zero_copy_only=False)
    return values.astype(values.dtype.newbyteorder("<")).tobytes()
