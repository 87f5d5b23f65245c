"""Writing of the tables of a store that is committed: its index, its shards and the records that were left out.

They are written while one commit marker after another is read, so memory does not grow with the number of records. The
rows arrive shard by shard, and the header of a column's file has their number. Each column is therefore collected in a
temporary file without a name, from which its file is written.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from permafrost.storage.files import file_at
from permafrost.storage.local_files import described_errors, write_error
from permafrost.storage.rooted_paths import RootedPath
from permafrost.store.arrow_files import RowWriter, write_rows
from permafrost.store.codecs import npy_header
from permafrost.store.columns import COLUMNS, DTYPES, INDEX_FOLDER, LISTS, NUMBERS, OFFSETS
from permafrost.store.commit_markers import has_many_labels
from permafrost.store.entries import FileEntry
from permafrost.store.manifest import PassManifest, StoreManifest
from permafrost.store.shards import (
    SHARDS_NAME,
    SKIPPED_NAME,
    ShardEntry,
    ShardTable,
    SkippedTable,
    shard_row,
)

_PIECE = 2**20
"""Bytes that are copied at once."""


class IndexWriter:
    """Index of a store in the making. As a context it removes its temporary files."""

    def __init__(self, store: RootedPath, suffix: str = "") -> None:
        """Begin an index.

        Args:
            store: Folder of the store.
            suffix: End of the names of the columns' files.
        """
        self._folder = store / INDEX_FOLDER
        self._suffix = suffix
        self._files: dict[str, IO[bytes]] = {}
        self._ends = dict.fromkeys(LISTS, 0)
        self._names = {*COLUMNS}
        self.num_records = 0

    def __enter__(self) -> IndexWriter:
        file_at(self._folder).make_folder()
        for name in DTYPES:
            self._files[name] = file_at(self._folder).scratch()
        for name in LISTS:
            self._append(f"{name}{OFFSETS}", np.zeros(1, np.int64))
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files.values():
            with suppress(OSError):  # it writes what is left in memory, which is never read
                file.close()

    def append(self, marker: pa.Table) -> None:
        """Append the rows of a shard's commit marker."""
        columns = columns_of_marker(marker)
        self._names |= {"weight"} & {*marker.column_names}
        for name in LISTS:
            columns[f"{name}{OFFSETS}"] = self._ends[name] + columns[f"{name}{OFFSETS}"][1:]
            self._ends[name] += len(columns[name])
        for name, values in columns.items():
            self._append(name, values)
        self.num_records += marker.num_rows

    def finish(self) -> dict[str, FileEntry]:
        """Write the file of each column atomically, and describe them."""
        return {name: self._write(name) for name in sorted(self._names)}

    def _append(self, name: str, values: NDArray[Any]) -> None:
        with described_errors(write_error, self._folder):
            self._files[name].write(values.astype(DTYPES[name].base, copy=False).tobytes())

    def _write(self, name: str) -> FileEntry:
        path, source, dtype = f"{name}{self._suffix}.npy", self._files[name], DTYPES[name]
        size = source.tell()
        with described_errors(write_error, self._folder / path):
            source.seek(0)  # writes what is left in memory
        with file_at(self._folder / path).open_atomically() as file:
            file.write(npy_header(dtype.base.str, (size // dtype.itemsize, *dtype.shape)))
            for start in range(0, size, _PIECE):
                file.write(source.read(min(_PIECE, size - start)))
        return FileEntry(
            path=f"{INDEX_FOLDER}/{path}",
            bytes=file.bytes,
            sha256=file.sha256,
            crc32c=file.crc32c,
        )


def columns_of_marker(marker: pa.Table) -> dict[str, NDArray[Any]]:
    """Return the columns of the index of a shard's commit marker, with offsets from 0."""
    table = {name: marker[name].combine_chunks() for name in marker.column_names}
    columns = {name: table[name].to_numpy() for name in NUMBERS}
    digests = bytes.fromhex("".join(table["image_sha256"].to_pylist()))
    columns["weight"] = (
        table["weight"].to_numpy() if "weight" in table else np.ones(marker.num_rows, np.float32)
    )
    columns["image_sha256"] = np.frombuffer(digests, np.uint8).reshape(-1, 32)
    columns["key"] = np.frombuffer("".join(table["key"].to_pylist()).encode(), np.uint8)
    columns["labels"] = table["labels"].flatten().to_numpy()
    boxes = [part.to_numpy().astype(np.float32) for part in table["boxes"].flatten().flatten()]
    columns["boxes"] = np.stack(boxes, axis=1)
    lengths = {name: pc.list_value_length(table[name]) for name in ("labels", "boxes")}
    columns |= {
        f"{name}{OFFSETS}": np.append(0, np.cumsum(values.to_numpy(), dtype=np.int64))
        for name, values in (lengths | {"key": pc.binary_length(table["key"])}).items()
    }
    return columns


# ---- store tables ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StoreTables:
    """Finished tables."""

    shards: ShardTable
    index: dict[str, FileEntry]
    skipped: SkippedTable
    multi_label: bool


class StoreTablesWriter:
    """Tables in the making. Nothing of the store is replaced before `finish`."""

    def __init__(self, store: RootedPath, suffix: str = "") -> None:
        """Begin the tables.

        Args:
            store: Folder of the store.
            suffix: End of the names of the files of the index.
        """
        self._store, self._suffix = store, suffix
        self._stack = ExitStack()
        self._multi_label = False
        self._skipped: RowWriter | None = None
        self.begin_generation()

    def __enter__(self) -> StoreTablesWriter:
        file_at(self._store).make_folder()
        self._index = self._stack.enter_context(IndexWriter(self._store, self._suffix))
        self._shards = self._stack.enter_context(
            write_rows(self._store / SHARDS_NAME, ShardTable.schema)
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(*error)  # type: ignore[arg-type]

    def begin_generation(self) -> None:
        """Count records that are left out from here on."""
        self.num_skipped = 0
        self.first_reason = ""

    @property
    def num_records(self) -> int:
        """Number of records so far."""
        return self._index.num_records

    def append(self, entry: ShardEntry, rows: pa.Table, marker_sha256: str) -> None:
        """Append a shard.

        Args:
            entry: The shard.
            rows: Rows of its commit marker.
            marker_sha256: SHA-256 of the commit marker's file.
        """
        self._index.append(rows)
        self._shards.append(**shard_row(entry, marker_sha256))
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
        index = self._index.finish()
        self._stack.close()
        return StoreTables(
            shards=ShardTable(self._store, self._shards.file),
            index=index,
            skipped=SkippedTable(self._store, self._skipped.file if self._skipped else None),
            multi_label=self._multi_label,
        )


def is_table(name: str) -> bool:
    """Return whether a file of a store's folder is named like a table or a column of the index."""
    parts = (table.partition(".") for table in (SHARDS_NAME, SKIPPED_NAME))
    return name.startswith(f"{INDEX_FOLDER}/") or any(
        name.split(".")[0].split("-")[0] == stem and name.endswith(end) for stem, _, end in parts
    )


def remove_other_tables(folder: RootedPath, *manifests: StoreManifest | PassManifest) -> None:
    """Remove the tables and indices of other manifests of this folder than these."""
    used = set[str]()
    for manifest in manifests:
        tables = [manifest.shards, getattr(manifest, "skipped", None)]
        files = [table.file for table in tables if table is not None]
        files += getattr(manifest, "index", {}).values()
        used |= {file.path for file in files if file is not None}
    paths = file_at(folder / INDEX_FOLDER).paths()
    for name in (SHARDS_NAME, SKIPPED_NAME):
        stem, _, suffix = name.rpartition(".")
        paths += file_at(folder).paths(f"{stem}*.{suffix}")
    for path in paths:
        if path.below(folder) not in used:
            file_at(path).remove()
