"""Parquet tables that a manifest names by their digests, so that its own size does not grow with them.

A table is read when it is first needed, and a row becomes an object when it is asked for.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, overload

import pyarrow as pa

from permafrost.store.entries import EntryError
from permafrost.store.file_entry import ManifestError
from permafrost.store.parquet import read_table

if TYPE_CHECKING:
    from permafrost.core.files import RootedPath
    from permafrost.store.file_entry import FileEntry

T = TypeVar("T")


class TableFile(Sequence[T], Generic[T]):
    """Rows of a Parquet file that a manifest names by its digest.

    Raises ManifestError if the file is missing or damaged, or has a row that is not possible.
    """

    schema: ClassVar[pa.Schema]

    def __init__(self, folder: RootedPath, file: FileEntry | None) -> None:
        """Name a file in its manifest's folder; None is a table without rows."""
        self.folder = folder
        self.file = file

    @cached_property
    def table(self) -> pa.Table:
        """All rows, read once."""
        if self.file is None:
            return self.schema.empty_table()
        advice = (
            f"delete {self.folder / 'manifest.json'} and run permafrost precompute again, which writes both again from "
            "the receipts"
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
            return tuple(self[each] for each in range(*number.indices(len(self))))
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
        return {"folder": self.folder, "file": self.file}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
