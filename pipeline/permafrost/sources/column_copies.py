"""Copies of columns of Parquet files, whose rows are mapped and compared when they are read.

Parquet cannot read one row without its whole row group, and the records of a shard are spread over the file. A column
is therefore copied once, in one pass, to a file in a cache folder:

    bytes of all rows, one after another
    table       a place of each row: offset i64, size i64 (-1 for an empty cell), CRC-32C u32
    footer      mark, number of rows i64, SHA-256 of the table

The copy is named by the SHA-256 of the Parquet file and the column, so that no other file can have its name. A damaged
copy is an error and not another value.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from permafrost.core.digests import sha256_json
from permafrost.core.errors import ConfigError, FileError, first_line, require
from permafrost.core.progress import log_once
from permafrost.storage.files import file_at
from permafrost.storage.untrusted import FormatError, iter_cells, open_parquet_file

logger = logging.getLogger("permafrost.sources")

_PLACE = np.dtype([("offset", "<i8"), ("size", "<i8"), ("crc32c", "<u4")])
_FOOTER = struct.Struct("<8sq32s")
_MARK = b"PFROWS\x00\x02"
_REVISION = 2
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
        opened = ("_opened", "sha256")
        state = {name: value for name, value in self.__dict__.items() if name not in opened}
        return state | {"listed_sha256": self.sha256}

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the Parquet file."""
        return self.listed_sha256 or file_at(self.path).sha256()

    @property
    def num_rows(self) -> int:
        """Number of rows of the file."""
        return len(self._opened[1])

    def read(self, row: int) -> memoryview | None:
        """Return the bytes of a row, None for an empty cell.

        Args:
            row: Number of the row, from 0.

        Raises:
            FileError: If the copy is damaged.
        """
        data = self.peek(row)
        if int(self._opened[1]["crc32c"][row]) != _checksum(data):
            raise FileError(
                f"{self._copy_path} is damaged: its copy of row {row + 1}, column {self.column} of {self.path} has "
                "other bytes than were written; delete it and run the same command again"
            )
        return data

    def peek(self, row: int) -> memoryview | None:
        """Return the mapped bytes of a row without comparing them, to look at their size and their beginning."""
        data, places = self._opened
        offset, size, _ = places[row].tolist()
        return None if size < 0 else data[offset : offset + size]

    def require_unchanged(self) -> None:
        """Check that what was read of the Parquet file since its digest was computed is of the same file.

        Raises:
            FileError: If the file has other bytes now.
        """
        require(
            file_at(self.path).sha256() == self.sha256,
            f"{self.path} was changed since it was listed; run the command again once the data no longer change",
            FileError,
        )

    @property
    def _copy_path(self) -> Path:
        name = sha256_json({"file": self.sha256, "column": self.column, "form": _REVISION})
        return self.cache.absolute() / f"{name}.rows"

    @cached_property
    def _opened(self) -> tuple[memoryview, NDArray[Any]]:
        """Mapped bytes of the copy, which is written if it is missing, and the place of each row."""
        if not self._copy_path.exists():
            self._write()
        with file_at(self._copy_path).open() as file:
            size = file.seek(0, 2)
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b"")
        mark, rows, digest = _FOOTER.unpack(bytes(data[-_FOOTER.size :]).rjust(_FOOTER.size))
        begin = size - _FOOTER.size - _PLACE.itemsize * rows if mark == _MARK else -1
        table = data[max(begin, 0) : size - _FOOTER.size]
        require(
            begin >= 0 and hashlib.sha256(table).digest() == digest,
            f"{self._copy_path} is damaged: it is not whole; delete it and run the same command again",
            FileError,
        )
        return data, np.frombuffer(table, _PLACE)

    def _write(self) -> None:
        log_once(
            logger,
            logging.INFO,
            f"Parquet cannot read single rows: column {self.column} is copied to {self.cache.absolute()} "
            "(data.cache=), which may be deleted later and is then written again",
        )
        tables, offset = [], 0
        with file_at(self._copy_path).open_atomically() as file:
            for values in self.values(self.path, self.column):
                places = _places_of(values, offset)
                data = _bytes_of(values)
                file.write(bytes(data))
                offset += len(data)
                tables.append(places)
            table = np.concatenate(tables).tobytes() if tables else b""
            file.write(table)
            rows = len(table) // _PLACE.itemsize
            file.write(_FOOTER.pack(_MARK, rows, hashlib.sha256(table).digest()))
            self.require_unchanged()


def _checksum(data: memoryview | None) -> int:
    return 0 if data is None else int(google_crc32c.value(bytes(data)))


def _bytes_of(values: pa.LargeBinaryArray) -> memoryview:
    """Return the bytes of all cells of an array, one after another."""
    _, offsets, data = values.buffers()
    if data is None or not len(values):
        return memoryview(b"")
    first, last = np.frombuffer(offsets, np.int64)[[values.offset, values.offset + len(values)]]
    return memoryview(data)[int(first) : int(last)]


def _places_of(values: pa.LargeBinaryArray, offset: int) -> NDArray[Any]:
    """Return the place of each cell of an array whose bytes are written at an offset."""
    places = np.zeros(len(values), _PLACE)
    offsets = np.frombuffer(values.buffers()[1], np.int64)
    ends = offsets[values.offset : values.offset + len(values) + 1]
    places["offset"] = ends[:-1] - (ends[0] if len(ends) else 0) + offset
    places["size"] = np.where(values.is_valid().to_numpy(zero_copy_only=False), np.diff(ends), -1)
    places["crc32c"] = [
        _checksum(memoryview(cell.as_buffer()) if cell.is_valid else None) for cell in values
    ]
    return places


def binary_cells(path: Path, column: str) -> Iterator[pa.Array]:
    """Iterate over the cells of a column of bytes, or of {bytes, path}, as arrays of large_binary.

    Args:
        path: The Parquet file.
        column: Name of the column.

    Raises:
        ConfigError: If they cannot be read, or would take far more room than the file.
    """
    try:
        with open_parquet_file(path) as file:
            is_struct = pa.types.is_struct(file.schema_arrow.field(column).type)
        for cells in iter_cells(path, column):
            values = pc.struct_field(cells, "bytes") if is_struct else cells
            yield values.cast(pa.large_binary())
    except (FormatError, pa.ArrowException) as error:
        raise ConfigError(
            f"{path}, column {column}: cannot be read: {first_line(error)}"
        ) from error
