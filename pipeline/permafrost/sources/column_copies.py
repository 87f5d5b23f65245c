"""Copies of columns of Parquet files, whose rows are mapped and compared when they are read.

Parquet cannot read one row without its whole row group, and the records of a shard are spread over the file. A column
is therefore copied once, in one pass, to an uncompressed Arrow file in a cache folder. The copy is named by the SHA-256
of the Parquet file and the column, so that no other file can have its name, and each row has a CRC-32C, so that a
damaged copy is an error and not another value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import google_crc32c
import pyarrow as pa
import pyarrow.compute as pc

from permafrost.core.digests import sha256_json
from permafrost.core.errors import FileError
from permafrost.storage.files import open_atomically, open_regular, sha256_file
from permafrost.storage.untrusted import open_parquet_file
from permafrost.store.arrow_files import map_arrow

_BATCH_ROWS = 64
"""Rows of a batch of the copy; only the last one may have fewer."""
_SCHEMA = pa.schema([("value", pa.large_binary()), ("crc32c", pa.uint32())])
_REVISION = 1
"""Revision of the form of copies, which is part of their names."""


@dataclass(frozen=True)
class ColumnCopy:
    """Rows of a column of a Parquet file as bytes, in their order. Picklable; written and opened on first use.

    Args:
        path: The Parquet file.
        column: Name of the column.
        cache: Folder of the copies.
        values: Function from the path and the column to the rows, as arrays of large_binary.
        listed_sha256: SHA-256 of the file when its records were listed; None computes it.
    """

    path: Path
    column: str
    cache: Path
    values: Callable[[Path, str], Iterator[pa.Array]]
    listed_sha256: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        opened = ("_batches", "sha256")
        state = {name: value for name, value in self.__dict__.items() if name not in opened}
        return state | {"listed_sha256": self.sha256}

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the Parquet file."""
        return self.listed_sha256 or sha256_file(self.path)

    @property
    def num_rows(self) -> int:
        """Number of rows of the file."""
        return sum(batch.num_rows for batch in self._batches)

    def read(self, row: int) -> pa.Buffer | None:
        """Return the bytes of a row, None for an empty cell.

        Args:
            row: Number of the row, from 0.

        Raises:
            FileError: If the copy is damaged.
        """
        data = self.peek(row)
        batch, number = divmod(row, _BATCH_ROWS)
        if self._batches[batch].column(1)[number].as_py() != _checksum(data):
            raise FileError(
                f"{self._copy_path} is damaged: its copy of row {row + 1}, column {self.column} of {self.path} has "
                "other bytes than were written; delete it and run the same command again"
            )
        return data

    def peek(self, row: int) -> pa.Buffer | None:
        """Return the mapped bytes of a row without comparing them, to look at their size and their beginning."""
        batch, number = divmod(row, _BATCH_ROWS)
        cell = self._batches[batch].column(0)[number]
        return cell.as_buffer() if cell.is_valid else None

    @property
    def _copy_path(self) -> Path:
        name = sha256_json({"file": self.sha256, "column": self.column, "form": _REVISION})
        return self.cache.absolute() / f"{name}.arrow"

    @cached_property
    def _batches(self) -> list[pa.RecordBatch]:
        """Mapped batches of the copy, which is written if it is missing."""
        if not self._copy_path.exists():
            self._write()
        with open_regular(self._copy_path) as file:
            reader = map_arrow(file)
        return [reader.get_batch(i) for i in range(reader.num_record_batches)]

    def _write(self) -> None:
        if self.listed_sha256 is not None and sha256_file(self.path) != self.listed_sha256:
            raise FileError(
                f"{self.path} was changed since it was listed; run the command again once the data no longer change"
            )
        with (
            open_atomically(self._copy_path) as file,
            pa.ipc.new_file(pa.PythonFile(cast("Any", file), "w"), _SCHEMA) as out,
        ):
            for values in _in_batches(self.values(self.path, self.column)):
                checksums = [_checksum(c.as_buffer() if c.is_valid else None) for c in values]
                columns = [values, pa.array(checksums, pa.uint32())]
                out.write_batch(pa.record_batch(columns, schema=_SCHEMA))


def _checksum(data: pa.Buffer | None) -> int:
    return 0 if data is None else google_crc32c.value(data.to_pybytes())


def _in_batches(parts: Iterator[pa.Array]) -> Iterator[pa.Array]:
    waiting: list[pa.Array] = []
    for part in parts:
        waiting.append(part)
        if sum(map(len, waiting)) >= _BATCH_ROWS:
            values = pa.concat_arrays(waiting)
            whole = len(values) - len(values) % _BATCH_ROWS
            yield from (values.slice(at, _BATCH_ROWS) for at in range(0, whole, _BATCH_ROWS))
            waiting = [values.slice(whole)]
    if sum(map(len, waiting)):
        yield pa.concat_arrays(waiting)


def binary_cells(path: Path, column: str) -> Iterator[pa.Array]:
    """Iterate over the cells of a column of bytes, or of {bytes, path}.

    Args:
        path: The Parquet file.
        column: Name of the column.
    """
    with open_parquet_file(path) as file:
        for batch in file.iter_batches(_BATCH_ROWS, columns=[column], use_threads=False):
            cells = batch.column(0)
            if pa.types.is_struct(cells.type):
                cells = pc.struct_field(cells, "bytes")
            yield cells.cast(pa.large_binary())
