"""Rows of a CSV or Parquet file: cells as text, and errors that name the row."""

from __future__ import annotations

import csv
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from permafrost.core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@dataclass(frozen=True)
class Row:
    """Row of the table."""

    table: Path
    number: int
    """Row number from 1, without the header."""
    cells: dict[str, Any]
    """Cell of each column: text in a CSV, values in Parquet."""

    def text(self, column: str) -> str | None:
        """Return the cell as text, or None if it is empty."""
        return to_text(self.cells[column])

    def required(self, column: str) -> str:
        """Return the cell as text; raise ConfigError if it is empty."""
        text = self.text(column)
        if text is None:
            raise self.error(column, "is empty")
        return text

    def error(self, column: str, error_message: str) -> ConfigError:
        """Return the exception to raise for an invalid cell, with its position in the table."""
        return ConfigError(f"{self.table}, row {self.number}, column {column}: {error_message}")


def to_text(value: Any) -> str | None:
    """Convert a cell to text, also a number that pandas converted to float; None if it is empty."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def to_number(text: str) -> int | None:
    """Parse a whole number of at most 18 digits, written 3 or 3.0; None for other text."""
    match = re.fullmatch(r"([+-]?[0-9]{1,18})(\.0*)?", text)
    return int(match[1]) if match else None


def is_all_digits(text: str) -> bool:
    """Return whether a text looks like a whole number, with any number of digits."""
    return re.fullmatch(r"[+-]?[0-9]+(\.0*)?", text) is not None


def read_rows(path: Path, columns: dict[str, str]) -> Iterator[Row]:
    """Yield the rows of a CSV or Parquet file with the wanted columns only.

    columns  option -> the column that it names
    """
    readers = {".csv": _read_csv, ".parquet": _read_parquet}
    if path.suffix.lower() not in readers:
        raise ConfigError(f"data.path={path} must end in .csv or .parquet")
    try:
        yield from readers[path.suffix.lower()](path, columns)
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        raise ConfigError(f"data.path={path} cannot be read: {error}") from error


def _read_csv(path: Path, columns: dict[str, str]) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = (line for line in csv.reader(file) if line)
        header = next(lines, [])
        require_columns(path, columns, header)
        place_of = {column: header.index(column) for column in columns.values()}
        for number, line in enumerate(lines, start=1):
            if len(line) != len(header):
                raise ConfigError(
                    f"{path}, row {number}: {len(line)} cells, but the header has {len(header)}"
                )
            yield Row(path, number, {column: line[place] for column, place in place_of.items()})


def _read_parquet(path: Path, columns: dict[str, str]) -> Iterator[Row]:
    with pq.ParquetFile(path) as file:
        require_columns(path, columns, file.schema_arrow.names)
        number = 0
        wanted = sorted(set(columns.values()))
        for batch in file.iter_batches(columns=wanted, use_threads=False):  # see store/index.py
            for cells in batch.to_pylist():
                number += 1
                yield Row(path, number, cells)


def require_columns(path: Path, columns: dict[str, str], there: list[str]) -> None:
    """Raise ConfigError unless each option's column exists."""
    for option, column in columns.items():
        if column not in there:
            raise ConfigError(
                f"data.{option}={column} is not a column of {path}; it has: {', '.join(there)}"
            )
