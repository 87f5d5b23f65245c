"""Images inside of Parquet files, as Hugging Face's `datasets` writes them: a column of bytes, or of {bytes, path}.

The images of a file are copied once to data.cache, where single rows can be read (column_copies.py).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from permafrost.core.errors import ConfigError
from permafrost.sources.column_copies import ColumnCopy, binary_cells
from permafrost.sources.image_files import SourceFileError
from permafrost.storage.untrusted import open_parquet_file
from permafrost.store.image_decoding import picture_suffix


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
        return any(kind.field(position).name == "bytes" for position in range(kind.num_fields))
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
        with open_parquet_file(path) as file:
            return file.schema_arrow
    except (OSError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"data.path={path} cannot be read: {reason}") from error


@dataclass(frozen=True)
class ParquetImages:
    """Images of one Parquet file, in the order of its rows."""

    copy: ColumnCopy

    @classmethod
    def of(cls, path: Path, column: str, cache: Path) -> ParquetImages:
        """Return the images of a column of bytes, or of {bytes, path}, copied to a folder on first use."""
        return cls(ColumnCopy(path, column, cache, binary_cells))

    @property
    def num_rows(self) -> int:
        """Number of rows of the file."""
        return self.copy.num_rows

    def locate(self, row: int) -> tuple[str, tuple[int, int, str]]:
        """Return what a record needs to read its image.

        Args:
            row: Row of the file, from 0.

        Returns:
            The file's name, and the row, bytes and suffix of the image.

        Raises:
            ConfigError: If the row has no image.
        """
        data = self.copy.peek(row)
        if data is None:
            raise ConfigError(
                f"{self.copy.path}, row {row + 1}, column {self.copy.column}: has no bytes; an image that is a file of "
                "its own is named by a column of paths"
            )
        return self.copy.path.name, (row, len(data), picture_suffix(bytes(data[:16])) or "bin")

    def read(self, row: int, size: int) -> bytes:
        """Return the bytes of an image.

        Args:
            row: Row of the file, from 0.
            size: Number of bytes when the image was listed.

        Raises:
            SourceFileError: If it has another size now.
            FileError: If the copy is damaged, or the file has changed.
        """
        buffer = self.copy.read(row)
        data = b"" if buffer is None else bytes(buffer)
        if len(data) != size:
            raise SourceFileError(
                f"{self.copy.path}, row {row + 1} had {size} bytes when it was listed and has {len(data)} now; run the "
                "command again once the data no longer change"
            )
        return data
