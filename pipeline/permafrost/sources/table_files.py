"""Tables in CSV and Parquet files: their rows and cells, as text and as labels."""

from __future__ import annotations

import csv
import io
import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv

from permafrost.core.errors import ConfigError, quote, require
from permafrost.sources.classes import composed, is_nan, is_unknown
from permafrost.sources.label_cells import UNLABELED_CELLS
from permafrost.sources.tally import Tally
from permafrost.storage.files import file_at
from permafrost.storage.untrusted import open_parquet_file

logger = logging.getLogger("permafrost.sources")


_PICTURE_NAME = re.compile(r"\.(jpe?g|png|tiff?|bmp|webp|gif|ppm)$", re.IGNORECASE)
_BLOCK_BYTES = 2**23
"""Bytes of a CSV that are parsed at once, and the most bytes of a row."""


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Describe the errors of a block that reads a table.

    Raises:
        ConfigError: If the file is of another kind, or if the block cannot read it.
    """
    require(
        path.suffix.lower() in (".csv", ".parquet"),
        f"data.path={path} must end in .csv or .parquet",
    )
    try:
        yield
    except (UnicodeDecodeError, OSError, csv.Error, pa.ArrowException) as error:
        advice = "; save it as UTF-8" if isinstance(error, UnicodeDecodeError) else ""
        raise ConfigError(f"data.path={path} cannot be read: {error}{advice}") from error


def column_names(path: Path) -> list[str]:
    """Return the names of a table's columns, in their order; call it inside of `readable`."""
    if path.suffix.lower() == ".csv":
        with io.TextIOWrapper(
            io.BufferedReader(file_at(path).open()), encoding="utf-8-sig", newline=""
        ) as text:
            return next((line for line in csv.reader(text) if line), [])
    with open_parquet_file(path) as file:
        names: list[str] = file.schema_arrow.names
    return names


def iter_parts(path: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Iterate over a table in parts of these columns. The cells of a CSV are text.

    Args:
        path: CSV or Parquet file.
        columns: Names of the columns, which must exist.
    """
    if path.suffix.lower() == ".csv":
        yield from pyarrow.csv.open_csv(
            path,
            # Without threads, errors name the row.
            read_options=pyarrow.csv.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES),
            parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(columns, pa.string()),
                include_columns=columns,
                strings_can_be_null=False,
            ),
        )
        return
    with open_parquet_file(path) as file:
        yield from file.iter_batches(columns=columns, use_threads=False)  # see arrow_files.py


# ---- rows ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ListedRow:
    """Row of the table."""

    table: Path
    number: int
    """Row number from 1, without the header."""
    cells: dict[str, Any]
    """Cell of each column: text in a CSV, values in Parquet."""

    @property
    def row_name(self) -> str:
        """Row as a spreadsheet counts it, in which the header of a CSV is row 1."""
        has_header = self.table.suffix.lower() == ".csv"
        return f"row {self.number + has_header}"

    def text(self, column: str) -> str | None:
        """Return the cell as text, or None if its value is unknown."""
        return to_text(self.cells[column])

    def path(self, column: str) -> str:
        """Return the cell as a path, with its blanks.

        Raises:
            ConfigError: If it is empty.
        """
        self.required(column)
        return str(self.cells[column])

    def required(self, column: str) -> str:
        """Return the cell as text.

        Raises:
            ConfigError: If it is empty.
        """
        text = self.text(column)
        if text is None:
            raise self.error(column, "is empty")
        return text

    def error(self, column: str, error_message: str) -> ConfigError:
        """Return the exception to raise for an invalid cell, with its position in the table."""
        return ConfigError(f"{self.table}, {self.row_name}, column {column}: {error_message}")


def to_text(value: Any) -> str | None:
    """Convert a cell to text without surrounding blanks, also a number that pandas converted to float.

    None for a cell that is empty, or NaN, also as text, so that a CSV and Parquet have the same cells.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    text = str(value).strip()
    return None if not text or is_nan(text) else text


def to_label(
    value: Any, class_list: Set[str], convert: Callable[[Any], str | None] = to_text
) -> str | None:
    """Convert a cell to the text of a label; None for a cell that is empty, or a word for an unknown label.

    Args:
        value: The cell.
        class_list: Names of data.classes, composed: such a word is a class if it is among them.
        convert: Function from a cell to its text, or None.
    """
    text = convert(value)
    word = value.strip() if text is None and isinstance(value, str) else text
    if not word:
        return None
    return word if composed(word) in class_list or not is_unknown(word) else None


UNKNOWN_CELLS = "label cells taken as unknown"
"""Topic of a tally: words that were taken for an unknown label."""


def tally_unknown(tally: Tally, value: Any, row: str, column: str) -> None:
    """Count the cell of an unlabeled row, by its word, or as -1 or an empty one.

    Args:
        tally: Counts to add to.
        value: The cell.
        row: Name of its row.
        column: Name of its column.
    """
    text = to_text(value)
    topic = UNKNOWN_CELLS if text is not None and is_unknown(text) else UNLABELED_CELLS
    tally.add(topic, text or "empty", f"{row}, column {column}")


def read_rows(path: Path, columns: dict[str, str]) -> Iterator[ListedRow]:
    """Yield the rows of a CSV or Parquet file with the wanted columns only.

    Args:
        path: The file.
        columns: Column that each option names, by the option's name without its group.

    Raises:
        ConfigError: If the file cannot be read or lacks a column.
    """
    with readable(path):
        require_columns(path, columns, column_names(path))
        batches = iter_parts(path, sorted(set(columns.values())))
        rows = (cells for batch in batches for cells in batch.to_pylist())
        yield from (ListedRow(path, number, cells) for number, cells in enumerate(rows, start=1))


def iter_distinct(path: Path, column: str) -> Iterator[list[str]]:
    """Yield the different cells of each part of a column that are text; none for a column of another type.

    Raises:
        ConfigError: If the file cannot be read.
    """
    with readable(path):
        for batch in iter_parts(path, [column]):
            cells = batch.column(0)
            if pa.types.is_dictionary(cells.type):
                cells = cells.dictionary_decode()
            if pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type):
                yield cells.unique().drop_null().to_pylist()


def require_columns(path: Path, columns: dict[str, str], existing: list[str]) -> None:
    """Check that each option's column exists, once.

    Args:
        path: The table, for messages.
        columns: Column that each option names, by the option's name without its group.
        existing: Columns of the table.

    Raises:
        ConfigError: If a column does not exist, or exists twice.
    """
    only = existing[0] if len(existing) == 1 else ""
    hint = next(
        (
            f"; its columns are separated by {separator!r}, save it with commas"
            for separator in "\t;|"
            if separator in only
        ),
        "",
    )
    if any(map(_PICTURE_NAME.search, existing)):
        hint = (
            f"; its first line is a record and no header: write one above it, such as "
            f"{','.join(columns.values())}"
        )
    for option, column in columns.items():
        require(
            existing.count(column) < 2,
            f"data.{option}={column} is the name of two columns of {path}; rename one of them",
        )
        if column not in existing:
            if option == "label" and not hint:
                hint = (
                    "; columns of 1 and 0, one for each class, are data.labels=[a,b,...] or, if each row has a single "
                    "1, a column of their names (as pandas' table[columns].idxmax(axis=1) writes it); data.label=null "
                    "reads none"
                )
            raise ConfigError(
                f"data.{option}={column} is not a column of {path}; it has: "
                f"{quote(', '.join(existing), 1000)[1:-1]}{hint}"
            )
