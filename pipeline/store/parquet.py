"""Parquet tables with a fixed schema, written atomically and read whole."""

from __future__ import annotations

import hashlib
import io
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.files import SHORT, open_atomically, read_regular, write_atomically
from pipeline.store.arrow_files import arrow_sink
from pipeline.store.file_entry import REPAIR, REWRITE, FileEntry, ManifestError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pipeline.core.files import AnyPath, RootedPath

_ROWS_PER_GROUP = 8192


def schema_of(**columns: pa.DataType) -> pa.Schema:
    """Return the schema of these columns, none of which has empty cells."""
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()])


def write_table(path: AnyPath, table: pa.Table) -> str:
    """Write a Parquet file atomically and return its SHA-256.

    The same table gives the same bytes with the same version of pyarrow.
    """
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return write_atomically(path, buffer.getvalue())


class RowWriter:
    """Parquet file that receives one row after another. `file` describes it once `write_rows` has ended."""

    file: FileEntry

    def __init__(self, write: Callable[[list[dict[str, object]]], None]) -> None:
        self._write = write
        self._rows: list[dict[str, object]] = []

    def append(self, **row: object) -> None:
        """Append one row."""
        self._rows.append(row)
        if len(self._rows) == _ROWS_PER_GROUP:
            self.flush()

    def flush(self) -> None:
        """Write the rows that are still in memory."""
        if self._rows:
            self._write(self._rows)
            self._rows = []


@contextmanager
def write_rows(path: RootedPath, schema: pa.Schema) -> Iterator[RowWriter]:
    """Provide a writer of a Parquet file that appears when the block ends without an error.

    Its name is <stem>-<digits of its SHA-256>, so that it never replaces a file that a manifest names.
    """
    with open_atomically(path) as file:
        parquet = pq.ParquetWriter(arrow_sink(file), schema, compression="zstd")
        writer = RowWriter(
            lambda rows: parquet.write_table(pa.Table.from_pylist(rows, schema=schema))
        )
        yield writer
        writer.flush()
        parquet.close()
        name = f"{path.stem}-{file.sha256[:SHORT]}{path.suffix}"
        file.destination = path.with_name(name)
        writer.file = FileEntry(path=name, bytes=file.bytes, sha256=file.sha256, crc32c=file.crc32c)


def read_table(
    path: AnyPath,
    schema: pa.Schema,
    sha256: str | None = None,
    advice: tuple[str, str] = (REPAIR, REWRITE),
) -> pa.Table:
    """Read a table of the given schema; raise ManifestError if the file contains anything else.

    sha256  the file's digest in its manifest; None is not checked
    advice  for messages: what to do about a missing file, and about a damaged one

    It is read by this thread alone. If a process ends while Arrow's threads are still being started, they abort it
    with SIGABRT ("terminate called without an active exception"), as observed in one of 20 runs on a busy machine.
    """
    try:
        data = read_regular(path)
    except FileNotFoundError:
        raise ManifestError(f"{path} is missing; {advice[0]}") from None
    if sha256 is not None:
        check_sha256(path, hashlib.sha256(data).hexdigest(), sha256, advice[1])
    try:
        source = pa.BufferReader(data)
        table = pq.ParquetFile(source, pre_buffer=False).read(use_threads=False)
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise ManifestError(f"{path} cannot be read as Parquet ({error})") from error
    if not table.schema.equals(schema, check_metadata=False):
        raise ManifestError(f"{path} does not have the columns of this version")
    required = [field.name for field in schema if not field.nullable]
    if any(_null_count(chunk) for name in required for chunk in table[name].chunks):
        raise ManifestError(f"{path} has empty cells")
    return table.combine_chunks()


def check_sha256(path: AnyPath, found: str, expected: str, advice: str = REWRITE) -> None:
    """Raise ManifestError unless a file has the SHA-256 that its manifest lists."""
    if found != expected:
        raise ManifestError(
            f"{path} is damaged: it has sha256 {found[:12]}, but its manifest lists {expected[:12]}; {advice}"
        )


def _null_count(array: pa.Array) -> int:
    """Count the nulls of an array and of its nested arrays."""
    nested = pa.types.is_nested(array.type)
    parts = array.flatten() if nested else []
    if isinstance(parts, pa.Array):  # a list; a struct is flattened to a list of its fields
        parts = [parts]
    return int(array.null_count + sum(map(_null_count, parts)))
