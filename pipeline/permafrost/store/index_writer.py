"""Writing of the tables of a store that is committed: its index, its shards and the records that were left out.

They are written while one receipt after another is read, so memory does not grow with the number of records. A column
of the finished index is contiguous, but the rows arrive shard by shard. Each column is therefore collected in a
temporary file without a name, and the Arrow file is written from these files, which are mapped into memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from permafrost.storage.files import (
    list_folder,
    make_folder,
    map_file,
    open_atomically,
    remove_file,
    scratch_file,
)
from permafrost.storage.local_files import described_errors, write_error
from permafrost.storage.rooted_paths import RootedPath
from permafrost.store.arrow_files import RowWriter, arrow_sink, write_rows
from permafrost.store.entries import FileEntry
from permafrost.store.index import (
    BOX_FIELDS,
    CHECKED_COLUMNS,
    INDEX_NAME,
    INDEX_SCHEMA,
    KEYS_NAME,
    KEYS_SCHEMA,
    LIST_COLUMNS,
    checksum,
)
from permafrost.store.receipts import BOX, has_many_labels
from permafrost.store.shards import (
    SHARDS_NAME,
    SKIPPED_NAME,
    ShardEntry,
    ShardTable,
    SkippedTable,
    shard_row,
)

if TYPE_CHECKING:
    from permafrost.store.manifest import PassManifest, StoreManifest


class IndexWriter:
    """Index of a store in the making. As a context it removes its temporary files."""

    def __init__(self, store: RootedPath, rows_per_shard: int, suffix: str = "") -> None:
        """Begin an index.

        Args:
            store: Folder of the store.
            rows_per_shard: Rows of each shard in the arrays of passes.
            suffix: End of the files' names.
        """
        self._store = store
        self._rows_per_shard = rows_per_shard
        self._suffix = suffix
        self._files: dict[str, IO[bytes]] = {}
        self._ends = dict.fromkeys((*LIST_COLUMNS, "key"), 0)
        self._splits: dict[str, int] = {}
        self._shards: list[str] = []
        self.num_records = 0

    def __enter__(self) -> IndexWriter:
        for name in (*LIST_COLUMNS, "key"):
            self._append(f"{name} offsets", np.zeros(1, np.int64))
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files.values():
            with suppress(OSError):  # it writes what is left in memory, which is never read
                file.close()

    def append(self, name: str, split: str, receipt: pa.Table, shard_number: int = 0) -> list[int]:
        """Append a shard's rows.

        Args:
            name: Name of the shard.
            split: Split of its records.
            receipt: Rows of its receipt.
            shard_number: Number of the shard in its generation.

        Returns:
            The CRC-32C of each of CHECKED_COLUMNS.
        """
        number, rows = len(self._shards), receipt.num_rows
        self._shards.append(name)
        code = self._splits.setdefault(split, len(self._splits))
        self._append("split", np.full(rows, code, np.int16))
        self._append("shard", np.full(rows, number, np.int32))
        first = shard_number * self._rows_per_shard
        columns = {column: receipt[column].combine_chunks() for column in receipt.column_names}
        columns["array_row"] = pa.array(np.arange(first, first + rows), pa.int64())
        checksums = []
        for column in CHECKED_COLUMNS:
            parts = list(_parts(columns[column]))
            checksums.append(checksum(iter(parts)))
            self._append_column(column, parts)
        self._append_keys(columns["key"], columns["image_sha256"])
        self.num_records += rows
        return checksums

    def finish(self) -> tuple[FileEntry, FileEntry]:
        """Write index.arrow and keys.arrow, each atomically, and describe them."""
        dictionaries = {"split": list(self._splits), "shard": self._shards}
        columns: list[pa.Array] = []
        for field in INDEX_SCHEMA:
            if field.name in dictionaries:
                codes = self._array(field.name, field.type.index_type)
                values = pa.array(dictionaries[field.name], pa.string())
                columns.append(pa.DictionaryArray.from_arrays(codes, values))
            elif field.name == "labels":
                columns.append(self._list("labels", self._array("labels", pa.int32())))
            elif field.name == "boxes":
                parts = [self._array(f"boxes {part.name}", part.type) for part in BOX]
                columns.append(
                    self._list("boxes", pa.StructArray.from_arrays(parts, fields=list(BOX)))
                )
            else:
                columns.append(self._array(field.name, field.type))
        index = self._write(INDEX_NAME, columns, INDEX_SCHEMA)
        text = pa.LargeStringArray.from_buffers(
            self.num_records, self._mapped("key offsets"), self._mapped("key")
        )
        digests = pa.FixedSizeBinaryArray.from_buffers(
            KEYS_SCHEMA.field("image_sha256").type,
            self.num_records,
            [None, self._mapped("image_sha256")],
        )
        return index, self._write(KEYS_NAME, [text, digests], KEYS_SCHEMA)

    def _append_column(self, name: str, parts: list[NDArray[Any]]) -> None:
        if name not in LIST_COLUMNS:
            self._append(name, parts[0])
            return
        self._append_offsets(name, parts[0])
        names = [name] if name == "labels" else [f"{name} {part}" for part in BOX_FIELDS]
        for part_name, part in zip(names, parts[1:], strict=True):
            self._append(part_name, part)

    def _append_keys(self, keys: pa.Array, digests: pa.Array) -> None:
        self._append_offsets("key", pc.binary_length(keys).to_numpy(zero_copy_only=False))
        self._append("key", np.frombuffer("".join(keys.to_pylist()).encode(), np.uint8))
        text = bytes.fromhex("".join(digests.to_pylist()))
        self._append("image_sha256", np.frombuffer(text, np.uint8))

    def _append_offsets(self, name: str, lengths: NDArray[Any]) -> None:
        ends = self._ends[name] + np.cumsum(lengths, dtype=np.int64)
        if len(ends):
            self._ends[name] = int(ends[-1])
        self._append(f"{name} offsets", ends)

    def _append(self, name: str, values: NDArray[Any]) -> None:
        with described_errors(write_error, self._store / INDEX_NAME):
            if name not in self._files:
                self._files[name] = scratch_file(self._store)
            self._files[name].write(values.tobytes())

    def _mapped(self, name: str) -> pa.Buffer:
        file = self._files.get(name)
        if file is None or file.tell() == 0:
            return pa.py_buffer(b"")
        with described_errors(write_error, self._store / INDEX_NAME):
            file.flush()
        return pa.py_buffer(map_file(file))

    def _array(self, name: str, kind: pa.DataType) -> pa.Array:
        buffer = self._mapped(name)
        return pa.Array.from_buffers(kind, buffer.size * 8 // kind.bit_width, [None, buffer])

    def _list(self, name: str, values: pa.Array) -> pa.Array:
        return pa.LargeListArray.from_arrays(self._array(f"{name} offsets", pa.int64()), values)

    def _write(self, name: str, columns: list[pa.Array], schema: pa.Schema) -> FileEntry:
        stem, _, end = name.partition(".")
        name = f"{stem}{self._suffix}.{end}"
        batch = pa.RecordBatch.from_arrays(columns, schema=schema)
        with (
            open_atomically(self._store / name) as file,
            pa.ipc.new_file(arrow_sink(file), schema) as writer,
        ):
            writer.write_batch(batch)
        return FileEntry(path=name, bytes=file.bytes, sha256=file.sha256, crc32c=file.crc32c)


def checksums_of(columns: dict[str, pa.Array]) -> list[int]:
    """Return the CRC-32C of each of CHECKED_COLUMNS of a shard's rows."""
    return [checksum(_parts(columns[name])) for name in CHECKED_COLUMNS]


def _parts(column: pa.Array) -> Iterator[NDArray[Any]]:
    """Yield the arrays that a column is stored as: its numbers, or its lists' lengths and values."""
    if not pa.types.is_list(column.type):
        yield column.to_numpy(zero_copy_only=False)
        return
    yield pc.list_value_length(column).to_numpy(zero_copy_only=False).astype(np.int64)
    values = column.flatten()
    for part in values.flatten() if pa.types.is_struct(values.type) else [values]:
        yield part.to_numpy(zero_copy_only=False)


# ---- store tables ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StoreTables:
    """Finished tables."""

    shards: ShardTable
    index: FileEntry
    keys: FileEntry
    skipped: SkippedTable
    multi_label: bool


class StoreTablesWriter:
    """Tables in the making. Nothing of the store is replaced before `finish`."""

    def __init__(self, store: RootedPath, rows_per_shard: int, suffix: str = "") -> None:
        """Begin the tables.

        Args:
            store: Folder of the store.
            rows_per_shard: Rows of each shard in the arrays of passes.
            suffix: End of the names of the files of the index.
        """
        self._store = store
        self._rows_per_shard = rows_per_shard
        self._suffix = suffix
        self._stack = ExitStack()
        self._multi_label = False
        self._skipped: RowWriter | None = None
        self.begin_generation()

    def __enter__(self) -> StoreTablesWriter:
        make_folder(self._store)
        self._index = self._stack.enter_context(
            IndexWriter(self._store, self._rows_per_shard, self._suffix)
        )
        self._shards = self._stack.enter_context(
            write_rows(self._store / SHARDS_NAME, ShardTable.schema)
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(*error)  # type: ignore[arg-type]

    def begin_generation(self) -> None:
        """Count shards, and records that are left out, from here on."""
        self._shard_number = self.num_skipped = 0
        self.first_reason = ""

    @property
    def num_records(self) -> int:
        """Number of records so far."""
        return self._index.num_records

    def append(self, entry: ShardEntry, rows: pa.Table, receipt_sha256: str) -> None:
        """Append a shard.

        Args:
            entry: The shard.
            rows: Rows of its receipt.
            receipt_sha256: SHA-256 of the receipt's file.
        """
        crcs = self._index.append(entry.name, entry.split, rows, self._shard_number)
        self._shard_number += 1
        self._shards.append(**shard_row(entry, receipt_sha256, crcs))
        self._multi_label = self._multi_label or has_many_labels(rows)

    def skip(self, records: Iterable[dict[str, str]]) -> None:
        """Append records that were left out, with `key` and `reason`."""
        for record in records:
            self.first_reason = self.first_reason or record["reason"]
            self.num_skipped += 1
            if self._skipped is None:
                self._skipped = self._stack.enter_context(
                    write_rows(self._store / SKIPPED_NAME, SkippedTable.schema)
                )
            self._skipped.append(**record)

    def finish(self) -> StoreTables:
        """Commit the files; the manifest that names them is still to be written."""
        index, keys = self._index.finish()
        self._stack.close()
        return StoreTables(
            shards=ShardTable(self._store, self._shards.file),
            index=index,
            keys=keys,
            skipped=SkippedTable(self._store, self._skipped.file if self._skipped else None),
            multi_label=self._multi_label,
        )


def is_table(name: str) -> bool:
    """Return whether a file of a store's folder is named like a table or an index."""
    parts = (table.partition(".") for table in (SHARDS_NAME, SKIPPED_NAME, INDEX_NAME, KEYS_NAME))
    return any(
        name.split(".")[0].split("-")[0] == stem and name.endswith(end) for stem, _, end in parts
    )


def remove_other_tables(folder: RootedPath, *manifests: StoreManifest | PassManifest) -> None:
    """Remove the tables and indices of other manifests of this folder than these."""
    used = set[str]()
    for manifest in manifests:
        tables = [manifest.shards, getattr(manifest, "skipped", None)]
        files = [table.file for table in tables if table is not None]
        files += [getattr(manifest, name, None) for name in ("index", "keys")]
        used |= {file.path for file in files if file is not None}
    for name in (SHARDS_NAME, SKIPPED_NAME, INDEX_NAME, KEYS_NAME):
        stem, _, suffix = name.rpartition(".")
        for path in list_folder(folder, f"{stem}*.{suffix}"):
            if path.name not in used:
                remove_file(path)
