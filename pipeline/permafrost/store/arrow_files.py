"""Arrow and Parquet files: mapped or read with checks, and written atomically."""

from __future__ import annotations

import hashlib
import io
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from permafrost.core.digests import SHORT
from permafrost.core.errors import require
from permafrost.storage.files import (
    map_file,
    open_atomically,
    read_regular,
    refuse_damaged_copy,
    write_atomically,
)
from permafrost.store.entries import REPAIR, REWRITE, FileEntry, ManifestError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from permafrost.storage.local_files import HashingFile
    from permafrost.storage.rooted_paths import AnyPath, RootedPath


_PIECE = 2**20
_MARK = b"ARROW1\0\0"
"""Beginning of an Arrow file; a stream of messages follows."""


def map_arrow(file: io.FileIO) -> pa.RecordBatchFileReader:
    """Map an open Arrow file into memory. Its batches lie in the mapped pages, which outlive the file's descriptor.

    Arrow's own memory map would start threads (see parquet.read_table). Raises ValueError or pa.ArrowException if it
    is not an Arrow file.
    """
    options = pa.ipc.IpcReadOptions(use_threads=False)
    return pa.ipc.open_file(pa.py_buffer(map_file(file)), options=options)


def map_batch(file: io.FileIO, schema: pa.Schema) -> pa.RecordBatch:
    """Map the only batch of an open Arrow file into memory. It lies in the mapped pages and takes no other memory.

    The messages are looked at before they are read, because compressed buffers would be decompressed into memory of any
    size, and NumPy has no view of a column with nulls. Raises ValueError, with the reason, or pa.ArrowException.
    """
    data = pa.py_buffer(map_file(file))
    if data.size < len(_MARK) or data.slice(0, len(_MARK)).to_pybytes() != _MARK:
        raise ValueError("it does not begin as an Arrow file")
    stream = data.slice(len(_MARK))
    kinds = []
    for message in pa.ipc.MessageReader.open_stream(pa.BufferReader(stream)):
        kinds.append(message.type)
        if message.type != "schema":
            _require_plain(message)
    if kinds.count("record batch") != 1 or kinds[-1] != "record batch":
        raise ValueError(f"it has {kinds.count('record batch')} batches, not one")
    options = pa.ipc.IpcReadOptions(use_threads=False)
    reader = pa.ipc.open_stream(pa.BufferReader(stream), options=options)
    if not reader.schema.equals(schema):
        raise ValueError("it does not have the columns of this version")
    return reader.read_next_batch()


def _require_plain(message: pa.ipc.Message) -> None:
    """Raise ValueError unless the arrays of a message are neither compressed nor have nulls.

    pyarrow does not show either, so both are read from the message (Message.fbs of Arrow's format). It is a flatbuffer,
    which pyarrow has verified: a table begins with the distance to the positions of its fields.
    """
    data = message.metadata.to_pybytes()

    def field(table: int, number: int) -> int:
        positions = table - int(struct.unpack_from("<i", data, table)[0])
        (size,) = struct.unpack_from("<H", data, positions)
        at = 4 + 2 * number
        offset = struct.unpack_from("<H", data, positions + at)[0] if at < size else 0
        return table + int(offset) if offset else 0

    def target(index: int) -> int:
        return index + int(struct.unpack_from("<I", data, index)[0])

    batch = target(field(target(0), 2))  # Message.header
    if message.type == "dictionary":
        batch = target(field(batch, 1))  # DictionaryBatch.data
    if field(batch, 3):  # RecordBatch.compression
        raise ValueError("its buffers are compressed")
    nodes = target(field(batch, 1)) if field(batch, 1) else 0
    count = struct.unpack_from("<I", data, nodes)[0] if nodes else 0
    for number in range(count):
        _, null_count = struct.unpack_from("<qq", data, nodes + 4 + 16 * number)
        if null_count:
            raise ValueError("it has empty cells")


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
MAX_TABLE_BYTES = 2**26
"""Largest size of a table of a store, as a file and in memory. Receipts of 100,000 records and tables of 50,000 shards
are smaller."""
_FEW_BYTES = MAX_TABLE_BYTES // 16
"""Bound of a column of texts up to which it is not looked at more closely."""
_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "FLOAT": 4, "DOUBLE": 8} | {
    "FIXED_LEN_BYTE_ARRAY": 32  # digests
}
"""Bytes of a value by its type in the file."""
_MOST_PARTS = 10_000
"""Largest number of any list in the footer of a table."""


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
        size = 0

        def write(rows: list[dict[str, object]]) -> None:
            nonlocal size
            table = pa.Table.from_pylist(rows, schema=schema)
            size += table.nbytes
            require_small(path, size)
            parquet.write_table(table)

        writer = RowWriter(write)
        yield writer
        writer.flush()
        parquet.close()
        name = f"{path.stem}-{file.sha256[:SHORT]}{path.suffix}"
        file.destination = path.with_name(name)
        writer.file = FileEntry(path=name, bytes=file.bytes, sha256=file.sha256, crc32c=file.crc32c)


def require_small(path: RootedPath, size: int) -> None:
    """Raise ConfigError if readers would refuse a table of that many bytes, which is half of what they accept."""
    require(
        2 * size <= MAX_TABLE_BYTES,
        f"{path} would have more than {MAX_TABLE_BYTES // 2:,} bytes in memory; choose another store.shard_size: a "
        "larger one for a table of shards, a smaller one for a receipt",
    )


def read_table(
    path: AnyPath,
    schema: pa.Schema,
    sha256: str | None = None,
    advice: tuple[str, str] = (REPAIR, REWRITE),
    most: int | None = MAX_TABLE_BYTES,
) -> pa.Table:
    """Read a table of the given schema; raise ManifestError if the file contains anything else.

    sha256  the file's digest in its manifest; None is not checked
    advice  for messages: what to do about a missing file, and about a damaged one
    most    largest number of bytes, as a file and in memory, compared before it is read; None for any

    It is read by this thread alone. If a process ends while Arrow's threads are still being started, they abort it
    with SIGABRT ("terminate called without an active exception"), as observed in one of 20 runs on a busy machine.
    """
    try:
        data = read_regular(path, most, sha256)
    except FileNotFoundError:
        raise ManifestError(f"{path} is missing; {advice[0]}") from None
    if sha256 is not None:
        check_sha256(path, hashlib.sha256(data).hexdigest(), sha256, advice[1])
    try:
        file = _open_parquet(data)
        if not file.schema_arrow.equals(schema, check_metadata=False):
            raise ManifestError(f"{path} does not have the columns of this version")
        if most is not None and _memory_bytes(file.metadata, data) > most:
            raise ManifestError(
                f"{path} would have more than {most:,} bytes in memory; {advice[1]}"
            )
        table = file.read(use_threads=False)
        table.validate(full=True)  # of texts that are not UTF-8
    except ManifestError:
        raise
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise ManifestError(f"{path} cannot be read as Parquet ({error})") from error
    required = [field.name for field in schema if not field.nullable]
    if any(_null_count(chunk) for name in required for chunk in table[name].chunks):
        raise ManifestError(f"{path} has empty cells")
    return table.combine_chunks()


def _open_parquet(data: bytes, texts: list[str] | None = None) -> pq.ParquetFile:
    """Open a Parquet file in memory, whose columns `texts` are read as they are stored, each different value once."""
    return pq.ParquetFile(
        pa.BufferReader(data),
        pre_buffer=False,
        read_dictionary=texts,
        thrift_container_size_limit=_MOST_PARTS,
    )


def _memory_bytes(metadata: pq.FileMetaData, data: bytes) -> int:
    """Return an upper bound of the bytes of a table's values in memory, from its footer.

    A text that is repeated is stored once, so the bound of texts is their number times the bytes of all different ones.
    If that is large, their lengths are added up, without the texts.
    """
    stored = total = 0
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        stored += row_group.total_byte_size
        for number in range(row_group.num_columns):
            column = row_group.column(number)
            is_text = column.physical_type == "BYTE_ARRAY"
            size = column.total_uncompressed_size if is_text else _WIDTHS.get(column.physical_type)
            if size is None:
                raise ValueError(f"column {column.path_in_schema} has no physical type")
            most = column.num_values * size
            if is_text and most > _FEW_BYTES and column.num_values <= MAX_TABLE_BYTES:
                most = _text_bytes(data, group, column.path_in_schema)
            total += most
    return max(stored, total)


def _text_bytes(data: bytes, group: int, column: str) -> int:
    """Return the bytes of all texts of a column in a group of rows."""
    file = _open_parquet(data, [column])
    arrays = file.read_row_group(group, columns=[column], use_threads=False).columns[0].chunks
    leaves = [leaf for array in arrays for leaf in _leaves(array)]
    total = 0
    for leaf in leaves:
        lengths = pc.binary_length(leaf.dictionary)
        total += pc.sum(lengths.take(leaf.indices).cast(pa.int64())).as_py() or 0
    return total


def _leaves(array: pa.Array) -> list[pa.Array]:
    """Return the arrays of values in an array of lists and structures."""
    if not pa.types.is_nested(array.type):
        return [array]
    parts = array.flatten()
    return [
        leaf for part in (parts if isinstance(parts, list) else [parts]) for leaf in _leaves(part)
    ]


def check_sha256(path: AnyPath, actual: str, expected: str, advice: str = REWRITE) -> None:
    """Raise ManifestError unless a file has the SHA-256 that its manifest lists."""
    if actual != expected:
        refuse_damaged_copy(path, expected)
        raise ManifestError(
            f"{path} is damaged: it has sha256 {actual[:12]}, but its manifest lists {expected[:12]}; {advice}"
        )


def _null_count(array: pa.Array) -> int:
    """Count the nulls of an array and of its nested arrays."""
    nested = pa.types.is_nested(array.type)
    parts = array.flatten() if nested else []
    if isinstance(parts, pa.Array):  # a list; a struct is flattened to a list of its fields
        parts = [parts]
    return int(array.null_count + sum(map(_null_count, parts)))
