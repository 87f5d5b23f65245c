"""Shards of a store and of a teacher pass: their entries, and the tables that list them.

A table is read when it is first needed, and a row becomes an object when it is asked for.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, ClassVar, Generic, Self, TypeVar, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from permafrost.core.errors import require
from permafrost.core.json_entries import EntryError, require_digest, require_entry, require_inside
from permafrost.storage.rooted_paths import AnyPath, RootedPath, is_absolute, user_path
from permafrost.store.arrow_files import read_table, table_schema
from permafrost.store.entries import FileEntry, ManifestError, require_shard_name

T = TypeVar("T")


class TableFile(Sequence[T], Generic[T]):
    """Rows of a Parquet file that a manifest names by its digest.

    Reading them raises ManifestError if the file is missing or damaged, or has a row that is not possible.
    """

    schema: ClassVar[pa.Schema]

    def __init__(
        self, folder: RootedPath, file: FileEntry | None, rows: slice = slice(None)
    ) -> None:
        """Name a file in its manifest's folder.

        Args:
            folder: Folder of the manifest.
            file: Entry of the manifest; None is a table without rows.
            rows: Rows of the file that the table has.
        """
        self.folder, self.file, self.rows = folder, file, rows

    def between(self, start: int, stop: int | None) -> Self:
        """Return the table of some of the file's rows."""
        return type(self)(self.folder, self.file, slice(start, stop))

    @cached_property
    def table(self) -> pa.Table:
        """All rows, read once."""
        return self._file_table[self.rows]

    @cached_property
    def _file_table(self) -> pa.Table:
        """All rows of the file."""
        if self.file is None:
            return self.schema.empty_table()
        advice = (
            f"delete {self.folder / 'manifest.json'} and run permafrost precompute again, which writes both again from "
            "the commit markers"
        )
        table = read_table(self.path, self.schema, self.file.sha256, (advice, advice))
        self._check(table)
        pa.default_memory_pool().release_unused()  # as much as the table itself remains of reading it
        return table

    @property
    def path(self) -> RootedPath:
        """Path of the file."""
        assert self.file is not None
        return self.folder / self.file.path

    def _check(self, table: pa.Table) -> None:
        """Raise ManifestError if the rows contradict each other."""

    @abstractmethod
    def _entry(self, row: dict[str, Any]) -> T:
        """Convert one row of the table."""

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @overload
    def __getitem__(self, number: int) -> T: ...
    @overload
    def __getitem__(self, number: slice) -> tuple[T, ...]: ...
    def __getitem__(self, number: int | slice) -> T | tuple[T, ...]:
        if isinstance(number, slice):
            return tuple(self[position] for position in range(*number.indices(len(self))))
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        (row,) = self.table.slice(number % len(self), 1).to_pylist()
        return self._checked(row)

    def __iter__(self) -> Iterator[T]:
        for batch in self.table.to_batches(max_chunksize=1024):
            yield from map(self._checked, batch.to_pylist())

    def _checked(self, row: dict[str, Any]) -> T:
        try:
            return self._entry(row)
        except EntryError as error:
            raise ManifestError(f"{self.path} is not a table of this version: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        # Another process reads the file itself.
        return {"folder": self.folder, "file": self.file, "rows": self.rows}


# ---- shards ----------------------------------------------------------------------------------------


SHARDS_NAME = "shards.parquet"
SKIPPED_NAME = "skipped.parquet"


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """Image shard."""

    name: str
    split: str
    records: int
    path: str
    """Path relative to the store, or absolute for a referenced tar."""
    bytes: int
    sha256: str
    keys_sha256: str
    referenced: bool = False
    """True if the file is not the store's own but an external tar, indexed in place."""

    def __post_init__(self) -> None:
        require_shard_name(self.name)
        require_entry(min(self.records, self.bytes) >= 0, f"shard {self.name} has a negative size")
        require_digest(self.sha256)
        require_digest(self.keys_sha256)
        if self.referenced:
            is_one = is_absolute(self.path) and "\0" not in self.path
            require_entry(is_one, f"the referenced tar {self.path!r} is not an absolute path")
        else:
            require_inside(self.path)

    def file(self, store: RootedPath) -> AnyPath:
        """Return the path of the file: below the store, or that of the external tar, which may lead through links."""
        return user_path(self.path, store) if self.referenced else store / self.path


@dataclass(frozen=True, kw_only=True)
class PassShard:
    """Shard of a teacher pass: the rows of one image shard, field by field."""

    name: str
    rows: int
    keys_sha256: str
    files: tuple[FileEntry, ...]

    def __post_init__(self) -> None:
        require_shard_name(self.name)
        require_entry(self.rows >= 0, f"shard {self.name} has {self.rows} rows")
        require_digest(self.keys_sha256)


_SHA256 = pa.binary(32)


class NamedShards(TableFile[T]):
    """Table of shards with a name and the SHA-256 of a commit marker."""

    _last_found = -1

    def number_of(self, name: str) -> int:
        """Return the number of the shard with that name, -1 if there is none.

        It is searched for in the table, as a dictionary of all names would need more memory than the table. The shard
        after the last one that was found is tried first.
        """
        names = self.table["name"]
        if (following := self._last_found + 1) < len(names) and names[following].as_py() == name:
            self._last_found = following
            return following
        number = int(pc.index(names, name).as_py())
        self._last_found = number if number >= 0 else self._last_found
        return number

    def marker_sha256(self, number: int) -> str:
        """Return the SHA-256 of a shard's commit marker.

        Args:
            number: Number of the shard in the table.
        """
        return str(self.table["marker_sha256"][number].as_py().hex())

    def _check(self, table: pa.Table) -> None:
        require(
            pc.count_distinct(table["name"]).as_py() == table.num_rows,
            f"{self.path} has two shards with the same name",
            ManifestError,
        )


class ShardTable(NamedShards[ShardEntry]):
    """Image shards of a store, in the order of the index."""

    schema = table_schema(
        name=pa.string(),
        split=pa.string(),
        records=pa.int64(),
        path=pa.string(),
        bytes=pa.int64(),
        sha256=_SHA256,
        keys_sha256=_SHA256,
        referenced=pa.bool_(),
        marker_sha256=_SHA256,
    )

    def _entry(self, row: dict[str, Any]) -> ShardEntry:
        digests = {name: row[name].hex() for name in ("sha256", "keys_sha256")}
        return ShardEntry(**{spec.name: row[spec.name] for spec in fields(ShardEntry)} | digests)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Row of the index at which each shard begins, and the number of all rows: [shards + 1]."""
        counts = self.table["records"].to_numpy()
        require(
            bool((counts >= 0).all()),
            f"{self.path} has a shard with a negative number of records",
            ManifestError,
        )
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    @cached_property
    def first_row(self) -> int:
        """Row of the index at which the first shard begins."""
        return pc.sum(self._file_table["records"][: self.rows.start or 0]).as_py() or 0

    @cached_property
    def rows_of_file(self) -> int:
        """Number of rows of the index, which has those of all shards of the file."""
        return pc.sum(self._file_table["records"]).as_py() or 0

    @cached_property
    def splits(self) -> dict[str, NDArray[np.int64]]:
        """Numbers of the shards of each split, ascending, in the order of the first shards."""
        encoded = self.table["split"].combine_chunks().dictionary_encode()
        codes = encoded.indices.to_numpy()
        return {
            name: np.flatnonzero(codes == code)
            for code, name in enumerate(encoded.dictionary.to_pylist())
        }

    @property
    def total_bytes(self) -> int:
        """Number of bytes of all shards."""
        return pc.sum(self.table["bytes"]).as_py() or 0

    def records_of_splits(self) -> dict[str, int]:
        """Return the number of records of each split."""
        counts = np.diff(self.starts)
        return {split: int(counts[numbers].sum()) for split, numbers in self.splits.items()}

    def names_and_keys(self) -> Iterator[tuple[str, str]]:
        """Iterate over the name and the digest of the keys of each shard, as the store's fingerprint covers them."""
        for batch in self.table.select(["name", "keys_sha256"]).to_batches(max_chunksize=4096):
            names, digests = (column.to_pylist() for column in batch.columns)
            yield from zip(names, map(bytes.hex, digests), strict=True)

    def keys_sha256(self, number: int) -> str:
        """Return the SHA-256 of a shard's keys.

        Args:
            number: Number of the shard in the table.
        """
        return str(self.table["keys_sha256"][number].as_py().hex())


_FILES = pa.list_(
    pa.struct(
        list(table_schema(path=pa.string(), bytes=pa.int64(), sha256=_SHA256, crc32c=pa.uint32()))
    )
)


class PassShardTable(NamedShards[PassShard]):
    """Shards of a teacher pass, in the order of its arrays."""

    schema = table_schema(
        name=pa.string(), rows=pa.int64(), keys_sha256=_SHA256, marker_sha256=_SHA256, files=_FILES
    )

    def _entry(self, row: dict[str, Any]) -> PassShard:
        files = (FileEntry(**file | {"sha256": file["sha256"].hex()}) for file in row["files"])
        return PassShard(
            name=row["name"],
            rows=row["rows"],
            keys_sha256=row["keys_sha256"].hex(),
            files=tuple(files),
        )

    @property
    def num_rows(self) -> int:
        """Number of records of all shards."""
        return pc.sum(self.table["rows"]).as_py() or 0

    @property
    def most_rows(self) -> int:
        """Number of rows of the largest shard."""
        return pc.max(self.table["rows"]).as_py() or 0

    @property
    def total_bytes(self) -> int:
        """Number of bytes of all files."""
        return pc.sum(self.table["files"].combine_chunks().flatten().field("bytes")).as_py() or 0

    def names(self) -> list[str]:
        """Return the names of the shards."""
        names: list[str] = self.table["name"].to_pylist()
        return names

    def covers(self, shards: ShardTable) -> bool:
        """Return whether it has the records of all the given shards, in their order."""
        rows, others = self.table, shards.table
        pairs = [("name", "name"), ("rows", "records"), ("keys_sha256", "keys_sha256")]
        return len(self) == len(shards) and all(
            rows[column].equals(others[shard_column]) for column, shard_column in pairs
        )


class JoinedShards(PassShardTable):
    """Shards of passes over one generation after the other."""

    def __init__(self, tables: Sequence[PassShardTable]) -> None:
        """Join the tables of passes."""
        super().__init__(tables[0].folder, tables[0].file)
        self.tables = tables

    @cached_property
    def _file_table(self) -> pa.Table:
        return pa.concat_tables([table.table for table in self.tables])

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"tables": self.tables}


class SkippedTable(TableFile[dict[str, str]]):
    """Records that were left out of a store, with the reasons."""

    schema = table_schema(key=pa.string(), reason=pa.string())

    def _entry(self, row: dict[str, Any]) -> dict[str, str]:
        return row


def shard_row(entry: ShardEntry | PassShard, marker_sha256: str) -> dict[str, Any]:
    """Return a shard's row of a ShardTable or a PassShardTable.

    Args:
        entry: The shard.
        marker_sha256: SHA-256 of its commit marker's file.
    """
    row = asdict(entry) | {"marker_sha256": marker_sha256}
    files = [file | {"sha256": bytes.fromhex(file["sha256"])} for file in row.get("files", ())]
    digests = {name: bytes.fromhex(row[name]) for name in _DIGESTS if name in row}
    return row | digests | ({"files": files} if "files" in row else {})


_DIGESTS = ("sha256", "keys_sha256", "marker_sha256")
