"""Tables of a store that is published: its index, its shards and the records that were left out.

They are written while one receipt after another is read, so memory does not grow with the number of records.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from permafrost.core.files import list_folder, make_folder, remove_file
from permafrost.store.index_writer import IndexWriter
from permafrost.store.parquet import RowWriter, write_rows
from permafrost.store.receipts import has_many_labels
from permafrost.store.shards import (
    SHARDS_NAME,
    SKIPPED_NAME,
    ShardEntry,
    ShardTable,
    SkippedTable,
    shard_row,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pyarrow as pa

    from permafrost.core.files import RootedPath
    from permafrost.store.file_entry import FileEntry
    from permafrost.store.manifest import PassManifest, StoreManifest


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

    def __init__(self, store: RootedPath, rows_per_shard: int) -> None:
        """rows_per_shard  rows of each shard in the arrays of passes"""
        self._store = store
        self._rows_per_shard = rows_per_shard
        self._stack = ExitStack()
        self._multi_label = False
        self._skipped: RowWriter | None = None
        self.num_skipped = 0
        self.first_reason = ""

    def __enter__(self) -> StoreTablesWriter:
        make_folder(self._store)
        self._index = self._stack.enter_context(IndexWriter(self._store, self._rows_per_shard))
        self._shards = self._stack.enter_context(
            write_rows(self._store / SHARDS_NAME, ShardTable.schema)
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(*error)  # type: ignore[arg-type]

    @property
    def num_records(self) -> int:
        """Number of records so far."""
        return self._index.num_records

    def append(self, entry: ShardEntry, rows: pa.Table, receipt_sha256: str) -> None:
        """Append a shard and the rows of its receipt."""
        crcs = self._index.append(entry.name, entry.split, rows)
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


def remove_other_tables(folder: RootedPath, manifest: StoreManifest | PassManifest) -> None:
    """Remove the tables of earlier manifests of this folder."""
    tables = [manifest.shards, getattr(manifest, "skipped", None)]
    used = {table.file.path for table in tables if table is not None and table.file is not None}
    for name in (SHARDS_NAME, SKIPPED_NAME):
        stem, _, suffix = name.rpartition(".")
        for path in list_folder(folder, f"{stem}*.{suffix}"):
            if path.name not in used:
                remove_file(path)
