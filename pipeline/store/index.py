"""The index of a store and the receipts of its shards: Parquet tables of one schema.

A receipt is a shard's part of the index; its file's metadata says which bytes it vouches for.
"""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.records import NO_LABEL
from pipeline.store.files import write_atomically
from pipeline.store.manifest import REPAIR, ManifestError

if TYPE_CHECKING:
    from pathlib import Path

    from pipeline.records import Record

_BOX = pa.struct(
    [("label", pa.int32())] + [(corner, pa.float32()) for corner in ("x0", "y0", "x1", "y1")]
)

INDEX_SCHEMA = pa.schema(
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
        }.items()
    ]
)

PASS_RECEIPT_SCHEMA = pa.schema(
    [pa.field("key", pa.string(), nullable=False), pa.field("row", pa.int32(), nullable=False)]
)

RECEIPTS_FOLDER = "receipts"

_METADATA_KEY = b"permafrost"


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

    def values(self) -> dict[str, Any]:
        """The row as the index stores it."""
        own = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "record"}
        known = ("key", "split", "label", "labels", "group")
        described = {name: getattr(self.record, name) for name in known}
        return own | described | {"boxes": [asdict(box) for box in self.record.boxes]}


def receipt_path(folder: Path, shard: str) -> Path:
    """Where a shard's receipt lies in a store or a pass."""
    return folder / RECEIPTS_FOLDER / f"{shard}.parquet"


def index_table(rows: list[IndexRow]) -> pa.Table:
    """Rows as a table of INDEX_SCHEMA."""
    return pa.Table.from_pylist([row.values() for row in rows], schema=INDEX_SCHEMA)


def has_many_labels(index: pa.Table) -> bool:
    """Whether any record lists its classes in `labels`; then no `label` is read."""
    return _longest_list(index) > 0


def most_labels(index: pa.Table) -> int:
    """Labels of the record that has most; 0 where none has any."""
    labelled = bool((index["label"].to_numpy() != NO_LABEL).any())
    return max(_longest_list(index), int(labelled))


def _longest_list(index: pa.Table) -> int:
    return pc.max(pc.list_value_length(index["labels"])).as_py() or 0


def write_table(path: Path, table: pa.Table, metadata: dict[str, Any] | None = None) -> str:
    """Write a Parquet file in one commit, with `metadata` as JSON in its footer; its SHA-256.

    The same table and metadata give the same bytes with the same pyarrow.
    """
    if metadata is not None:
        text = json.dumps(metadata, sort_keys=True)
        table = table.replace_schema_metadata({_METADATA_KEY: text.encode()})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return write_atomically(path, buffer.getvalue())


def read_table(path: Path, schema: pa.Schema) -> tuple[pa.Table, dict[str, Any]]:
    """A table that `write_table` wrote, and its metadata."""
    try:
        table = pq.read_table(pa.BufferReader(path.read_bytes()))
    except FileNotFoundError:
        raise ManifestError(f"{path} is missing; {REPAIR}") from None
    except (pa.ArrowException, OSError) as error:
        raise ManifestError(f"{path} cannot be read as Parquet ({error})") from error
    if not table.schema.equals(schema, check_metadata=False):
        raise ManifestError(f"{path} has other columns than this version writes")
    stored = (table.schema.metadata or {}).get(_METADATA_KEY, b"{}")
    return table, json.loads(stored)
