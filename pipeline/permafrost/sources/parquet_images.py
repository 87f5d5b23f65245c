"""Images inside of Parquet files, as Hugging Face's `datasets` writes them: a column of bytes, or of {bytes, path}.

Parquet cannot read one row without its whole row group, and a shard's records are spread over the file. The images of a
file are therefore copied once, in one pass, to an uncompressed Arrow file in data.cache, whose rows are mapped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from permafrost.core.errors import ConfigError
from permafrost.sources.image_files import SourceFileError
from permafrost.storage.files import open_atomically, open_regular
from permafrost.store.arrow_files import map_arrow
from permafrost.store.image_decoding import picture_suffix

_BATCH_ROWS = 64
"""Rows that are copied at once, and rows of a batch of the copy."""
_SCHEMA = pa.schema([("image", pa.large_binary())])


def holds_images(path: Path, column: str) -> bool:
    """Return whether a column of a Parquet file has images and not their paths.

    Raises:
        ConfigError: If the file cannot be read.
    """
    schema = _schema_of(path)
    if column not in schema.names:
        return False
    kind = schema.field(column).type
    if pa.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def class_names_of(path: Path, column: str) -> tuple[str, ...] | None:
    """Return the names of a column's labels in the features of Hugging Face's `datasets`; None if there are none.

    Raises:
        ConfigError: If the file cannot be read.
    """
    if path.suffix.lower() != ".parquet":
        return None
    try:
        text = (_schema_of(path).metadata or {}).get(b"huggingface", b"{}")
        feature = json.loads(text)["info"]["features"][column]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    while isinstance(feature, (list, dict)) and "names" not in feature:
        feature = feature.get("feature") if isinstance(feature, dict) else next(iter(feature), None)
    names = feature.get("names") if isinstance(feature, dict) else None
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return tuple(names) if is_list and names and len(set(names)) == len(names) else None


def _schema_of(path: Path) -> pa.Schema:
    try:
        stat = path.stat()
    except OSError as error:
        raise ConfigError(f"data.path={path} cannot be read: {error.strerror}") from error
    return _read_schema(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=256)
def _read_schema(path: Path, size: int, changed: int) -> pa.Schema:
    try:
        return pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"data.path={path} cannot be read: {error}") from error


@dataclass(frozen=True)
class ParquetImages:
    """Images of one Parquet file, in the order of its rows."""

    path: Path
    column: str
    cache: Path

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "column": self.column, "cache": self.cache}

    @property
    def num_rows(self) -> int:
        """Number of rows of the file."""
        return sum(batch.num_rows for batch in self._batches)

    def locate(self, row: int) -> tuple[str, tuple[int, int, str]]:
        """Return what a record needs to read its image.

        Args:
            row: Row of the file, from 0.

        Returns:
            The file's name, and the row, bytes and suffix of the image.

        Raises:
            ConfigError: If the row has no image.
        """
        cell = self._cell(row)
        if not cell.is_valid:
            raise ConfigError(
                f"{self.path}, row {row + 1}, column {self.column}: has no bytes; an image that is a file of its own "
                "is named by a column of paths"
            )
        data = cell.as_buffer()
        return self.path.name, (row, data.size, picture_suffix(data[:16].to_pybytes()) or "bin")

    def read(self, row: int, size: int) -> bytes:
        """Return the bytes of an image.

        Args:
            row: Row of the file, from 0.
            size: Number of bytes when the image was listed.

        Raises:
            SourceFileError: If it has another size now.
        """
        data: bytes = self._cell(row).as_py() or b""
        if len(data) != size:
            raise SourceFileError(
                f"{self.path}, row {row + 1} had {size} bytes when it was listed and has {len(data)} now; run the "
                "command again once the data no longer change"
            )
        return data

    def _cell(self, row: int) -> pa.Scalar:
        batch, number = divmod(row, _BATCH_ROWS)
        return self._batches[batch].column(0)[number]

    @cached_property
    def _batches(self) -> list[pa.RecordBatch]:
        copy = self._copy()
        with open_regular(copy) as file:
            reader = map_arrow(file)
        return [reader.get_batch(i) for i in range(reader.num_record_batches)]

    def _copy(self) -> Path:
        """Return the copy of the images, which is written if it is missing."""
        stat = self.path.stat()
        name = f"{self.path.stem}-{self.column}-{stat.st_size:x}-{stat.st_mtime_ns:x}.arrow"
        copy = self.cache.absolute() / name
        if copy.exists():
            return copy
        copy.parent.mkdir(parents=True, exist_ok=True)
        with (
            open_atomically(copy) as file,
            pa.ipc.new_file(pa.PythonFile(cast("Any", file), "w"), _SCHEMA) as out,
        ):
            for batch in self._stored_batches():
                out.write_batch(batch)
        return copy

    def _stored_batches(self) -> Iterator[pa.RecordBatch]:
        """Yield the images in batches of _BATCH_ROWS; only the last one may have fewer."""
        waiting: list[pa.Array] = []
        with pq.ParquetFile(self.path) as file:
            for batch in file.iter_batches(_BATCH_ROWS, columns=[self.column], use_threads=False):
                cells = batch.column(0)
                if pa.types.is_struct(cells.type):
                    cells = pc.struct_field(cells, "bytes")
                waiting.append(cells.cast(pa.large_binary()))
                while sum(map(len, waiting)) >= _BATCH_ROWS:
                    cells = pa.concat_arrays(waiting)
                    yield pa.record_batch([cells.slice(0, _BATCH_ROWS)], schema=_SCHEMA)
                    waiting = [cells.slice(_BATCH_ROWS)]
        if sum(map(len, waiting)):
            yield pa.record_batch([pa.concat_arrays(waiting)], schema=_SCHEMA)
