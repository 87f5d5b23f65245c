"""Arrow and Parquet files: mapped or read with checks, and written atomically."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from permafrost.core.digests import SHORT
from permafrost.core.errors import require
from permafrost.storage.files import file_at, map_file
from permafrost.storage.local_files import HashingFile
from permafrost.storage.rooted_paths import AnyPath, RootedPath
from permafrost.storage.untrusted import (
    MAX_TABLE_BYTES,
    open_parquet,
    table_bytes,
)
from permafrost.store.entries import REPAIR, REWRITE, FileEntry, ManifestError, damage_error

_PIECE = 2**20


def map_arrow(file: io.FileIO) -> pa.RecordBatchFileReader:
    """Map an open Arrow file into memory. Its batches lie in the mapped pages, which outlive the file's descriptor.

    Arrow's own memory map would start threads (see `read_table`).

    Raises:
        ValueError: If the file cannot be mapped.
        pa.ArrowException: If it is not an Arrow file.
    """
    options = pa.ipc.IpcReadOptions(use_threads=False)
    return pa.ipc.open_file(pa.py_buffer(map_file(file)), options=options)


def arrow_sink(file: HashingFile) -> pa.NativeFile:
    """Return a file for Arrow's writers that passes large buffers on in pieces, without copying them whole."""
    return pa.PythonFile(_Pieces(file), mode="w")


class _Pieces:
    """File that receives a large buffer in pieces."""

    closed = False

    def __init__(self, file: HashingFile) -> None:
        self._file = file

    def write(self, data: Any) -> int:
        whole = memoryview(data).cast("B")
        for start in range(0, len(whole), _PIECE):
            self._file.write(bytes(whole[start : start + _PIECE]))
        return len(whole)

    def flush(self) -> None:
        """Do nothing; the atomic file flushes itself."""

    def tell(self) -> int:
        return int(self._file.tell())


# ---- parquet ---------------------------------------------------------------------------------------


_ROWS_PER_GROUP = 8192


def table_schema(**columns: pa.DataType) -> pa.Schema:
    """Return the schema of these columns, none of which has empty cells."""
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()])


def write_table(path: AnyPath, table: pa.Table) -> str:
    """Write a Parquet file atomically and return its SHA-256.

    The same table gives the same bytes with the same version of pyarrow.
    """
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return file_at(path).write(buffer.getvalue())


class RowWriter:
    """Parquet file that receives one row after another. `file` describes it once `write_rows` has ended."""

    file: FileEntry

    def __init__(self, path: RootedPath, parquet: pq.ParquetWriter) -> None:
        self._path, self._parquet = path, parquet
        self._rows: list[dict[str, object]] = []
        self._size = 0

    def append(self, **row: object) -> None:
        """Append one row.

        Raises:
            ConfigError: If the table becomes too large for its readers (`require_small`).
        """
        self._rows.append(row)
        if len(self._rows) == _ROWS_PER_GROUP:
            self.flush()

    def flush(self) -> None:
        """Write the rows that are still in memory.

        Raises:
            ConfigError: If the table becomes too large for its readers (`require_small`).
        """
        if self._rows:
            table = pa.Table.from_pylist(self._rows, schema=self._parquet.schema)
            self._size += table.nbytes
            require_small(self._path, self._size)
            self._parquet.write_table(table)
            self._rows = []


@contextmanager
def write_rows(path: RootedPath, schema: pa.Schema) -> Iterator[RowWriter]:
    """Provide a writer of a Parquet file that appears when the block ends without an error.

    Its name is <stem>-<digits of its SHA-256>, so that it never replaces a file that a manifest names.

    Args:
        path: Path of the file without those digits.
        schema: Columns of the rows.
    """
    with file_at(path).open_atomically() as file:
        parquet = pq.ParquetWriter(arrow_sink(file), schema, compression="zstd")
        writer = RowWriter(path, parquet)
        yield writer
        writer.flush()
        parquet.close()
        name = f"{path.stem}-{file.sha256[:SHORT]}{path.suffix}"
        file.destination = path.with_name(name)
        writer.file = FileEntry(path=name, bytes=file.bytes, sha256=file.sha256, crc32c=file.crc32c)


def require_small(path: RootedPath, size: int) -> None:
    """Refuse a table that readers would refuse, with a margin: it may have half of the bytes that they accept.

    Args:
        path: File of the table, for the message.
        size: Size of the table in memory, in bytes.

    Raises:
        ConfigError: If the table is larger.
    """
    require(
        2 * size <= MAX_TABLE_BYTES,
        f"{path} would have more than {MAX_TABLE_BYTES // 2:,} bytes in memory; choose another store.shard_size: a "
        "larger one for a table of shards, a smaller one for a commit marker",
    )


def read_table(
    path: AnyPath,
    schema: pa.Schema,
    sha256: str | None = None,
    advice: tuple[str, str] = (REPAIR, REWRITE),
    most: int | None = MAX_TABLE_BYTES,
    added: Sequence[pa.Field] = (),
) -> pa.Table:
    """Read a table of the given schema.

    It is read by this thread alone. If a process ends while Arrow's threads are still being started, they abort it
    with SIGABRT ("terminate called without an active exception"), as observed in one of 20 runs on a busy machine.

    Args:
        path: Parquet file.
        schema: Columns that the file must have. Those that are not nullable must have no empty cells.
        sha256: Digest of the file in its manifest; None is not checked.
        advice: What to do about a missing file, and about a damaged one, for messages.
        most: Largest number of bytes, as a file and in memory, compared before it is read; None for any.
        added: Columns of which the file may have one after those of the schema.

    Raises:
        ManifestError: If the file is missing, damaged, too large, or contains anything else.
    """
    try:
        data = file_at(path).read(most, sha256)
    except FileNotFoundError:
        raise ManifestError(f"{path} is missing; {advice[0]}") from None
    if sha256 is not None and (actual := hashlib.sha256(data).hexdigest()) != sha256:
        raise damage_error(
            path,
            sha256,
            f"{path} is damaged: it has sha256 {actual[:12]}, but its manifest lists {sha256[:12]}; {advice[1]}",
        )
    try:
        file = open_parquet(data)
        if not any(
            file.schema_arrow.equals(each, check_metadata=False)
            for each in (schema, *map(schema.append, added))
        ):
            raise ManifestError(f"{path} does not have the columns of this version")
        if most is not None and table_bytes(file.metadata, data, most) > most:
            raise ManifestError(
                f"{path} would have more than {most:,} bytes in memory; {advice[1]}"
            )
        table = file.read(use_threads=False)
        table.validate(full=True)  # of texts that are not UTF-8
    except ManifestError:
        raise
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise ManifestError(f"{path} cannot be read as Parquet ({error})") from error
    required = [field.name for field in table.schema if not field.nullable]
    if any(_null_count(chunk) for name in required for chunk in table[name].chunks):
        raise ManifestError(f"{path} has empty cells")
    return table.combine_chunks()


def _null_count(array: pa.Array) -> int:
    """Count the nulls of an array and of its nested arrays."""
    parts = array.flatten() if pa.types.is_nested(array.type) else []
    if isinstance(parts, pa.Array):  # a list; a struct is flattened to a list of its fields
        parts = [parts]
    return int(array.null_count + sum(map(_null_count, parts)))
