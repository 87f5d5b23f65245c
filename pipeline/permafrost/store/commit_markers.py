"""Commit markers: one Parquet table for each shard of a store or of a pass, which commits the shard.

The commit marker of an image shard is its part of the index. Its metadata list the bytes that it covers and a digest of
its own content. Manifests are written from commit markers, so a flipped bit in one must be detected.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from permafrost.core.digests import canonical_json
from permafrost.core.errors import require
from permafrost.storage.rooted_paths import RootedPath
from permafrost.store.arrow_files import read_table, require_small, table_schema, write_table
from permafrost.store.entries import ManifestError

BOX = pa.struct(
    [("label", pa.int32())] + [(corner, pa.float32()) for corner in ("x0", "y0", "x1", "y1")]
)

MARKER_SCHEMA = table_schema(
    key=pa.string(),
    split=pa.string(),
    shard=pa.string(),
    row=pa.int32(),
    offset=pa.int64(),
    size=pa.int64(),
    mask_offset=pa.int64(),
    mask_size=pa.int64(),
    height=pa.int32(),
    width=pa.int32(),
    orientation=pa.int8(),
    label=pa.int32(),
    labels=pa.list_(pa.int32()),
    group=pa.int32(),
    boxes=pa.list_(BOX),
    image_sha256=pa.string(),
    image_crc32c=pa.uint32(),
    mask_crc32c=pa.uint32(),
)
"""Columns of an image shard's commit marker: where the bytes of a record are, and its description. Those of the index
follow from them (docs/reference/store-format.md)."""

WEIGHT = pa.field("weight", pa.float32(), nullable=False)
"""Last column of the commit markers of a store whose data have weights."""

PASS_MARKER_SCHEMA = table_schema(
    key=pa.string(),
    row=pa.int32(),
    array_row=pa.int64(),
    chunk_crc32c=pa.list_(pa.uint32()),
)
"""Columns of a pass's commit marker: each record's row in the shard and in the arrays, and the CRC-32C of the inner
chunks that contain it, view by view and field by field, for fields that are divided into inner chunks."""

COMMITS_FOLDER = "commits"
MARKER_SUFFIX = ".parquet"

_METADATA_KEY = b"permafrost"
_DIGEST_KEY = "content_sha256"


def marker_path(folder: RootedPath, shard: str) -> RootedPath:
    """Return the path of a shard's commit marker in a store or a pass."""
    return folder / COMMITS_FOLDER / f"{shard}{MARKER_SUFFIX}"


def marker_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Convert rows, each with a value for every column of MARKER_SCHEMA, and of WEIGHT or none, to a table."""
    return pa.Table.from_pylist(
        rows,
        schema=MARKER_SCHEMA.append(WEIGHT)
        if any(WEIGHT.name in row for row in rows[:1])
        else MARKER_SCHEMA,
    )


def has_many_labels(marker: pa.Table) -> bool:
    """Return whether any record lists its classes in `labels`; `label` is then not read."""
    return bool(pc.max(pc.list_value_length(marker["labels"])).as_py())


def write_marker(path: RootedPath, table: pa.Table, metadata: dict[str, Any]) -> str:
    """Write a commit marker atomically and return the SHA-256 of its file.

    Args:
        path: File to write.
        table: Rows of the commit marker.
        metadata: JSON values for the footer, to which the digest of the content is added.

    Raises:
        ConfigError: If the table is too large for its readers (`require_small`).
    """
    require_small(path, table.nbytes)
    text = json.dumps({**metadata, _DIGEST_KEY: _digest(table, metadata)}, sort_keys=True)
    return write_table(path, table.replace_schema_metadata({_METADATA_KEY: text.encode()}))


def read_marker(
    path: RootedPath, schema: pa.Schema, sha256: str | None = None
) -> tuple[pa.Table, dict[str, Any]]:
    """Read a commit marker and its metadata, checked against the digest that it contains.

    Args:
        path: File of the commit marker.
        schema: Columns that it must have.
        sha256: Digest of the file in its manifest; None is not checked.

    Returns:
        The rows, and the metadata without the digest.

    Raises:
        ManifestError: If the commit marker is missing, damaged or of another version.
    """
    table = read_table(path, schema, sha256, added=[WEIGHT] if schema is MARKER_SCHEMA else [])
    stored = (table.schema.metadata or {}).get(_METADATA_KEY, b"{}")
    table = table.replace_schema_metadata(None)
    try:
        metadata = json.loads(stored)
        claimed = metadata.pop(_DIGEST_KEY)
        digest = _digest(table, metadata)
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RecursionError,
        pa.ArrowException,
    ) as error:
        raise ManifestError(f"{path} is damaged: its metadata cannot be read") from error
    require(
        digest == claimed,
        f"{path} is damaged: its content has sha256 {digest[:12]}, but it lists {str(claimed)[:12]!r}",
        ManifestError,
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


def _bytes(numbers: pa.Array) -> bytes:
    values: NDArray[Any] = numbers.to_numpy(zero_copy_only=False)
    return values.astype(values.dtype.newbyteorder("<")).tobytes()
