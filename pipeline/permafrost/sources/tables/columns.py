"""Columns of a CSV or Parquet file, as text or as numbers, equal for both formats.

Shape letters: N rows.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from permafrost.core.errors import ConfigError
from permafrost.sources.tables.rows import require_columns, to_number, to_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

_WORDS = {"true": 1.0, "false": 0.0}
_EMPTY = ("", "nan")
_CELLS = 65_536
"""Number of cells that are converted at once."""


@dataclass(frozen=True)
class TableColumns:
    """Table in memory."""

    path: Path
    table: pa.Table
    """Cells of the table; those of a CSV are all text."""

    @property
    def names(self) -> list[str]:
        """Column names in the file's order."""
        names: list[str] = self.table.column_names
        return names

    def require(self, columns: dict[str, str]) -> None:
        """Raise ConfigError unless the columns exist; `columns` maps each option to the column that it names."""
        require_columns(self.path, columns, self.names)

    def texts(self, column: str) -> Iterator[str | None]:
        """Yield every cell as text, a whole number without its decimal point; None for an empty cell."""
        for cells in self.table.select([column]).to_batches(max_chunksize=_CELLS):
            yield from map(to_name, cells.column(0).to_pylist())

    def numbers(self, column: str) -> NDArray[np.float64]:
        """Return every cell as a number, [N]; nan for an empty cell or one that is not a number."""
        values = self.table[column]
        if pa.types.is_dictionary(values.type):
            values = values.cast(values.type.value_type)
        kind = values.type
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            texts = pc.utf8_trim_whitespace(values)
            texts = pc.if_else(pc.equal(texts, ""), pa.scalar(None, kind), texts)
            try:
                values = texts.cast(pa.float64())
            except pa.ArrowInvalid:  # at least one is not a number
                return np.array([_number(text) for text in texts.to_pylist()], np.float64)
        elif not (
            pa.types.is_integer(kind)
            or pa.types.is_floating(kind)
            or pa.types.is_decimal(kind)
            or pa.types.is_boolean(kind)
        ):
            return np.full(len(values), np.nan)
        numbers: NDArray[np.float64] = values.cast(pa.float64(), safe=False).to_numpy()
        return numbers

    def error_message(self, row: int, column: str) -> str:
        """Describe why a cell is not a finite float32; `row` counts from 0, the message counts from 1."""
        cell: Any = self.table[column][row].as_py()
        number = _number(str(cell)) if cell is not None else np.nan
        what = f"{str(cell)!r} is not a number"
        if cell is None or str(cell).strip().lower() in _EMPTY:
            what = "is empty or NaN"
        elif np.isinf(number):
            what = "is infinite"
        elif np.isfinite(number):
            what = f"{number:g} is beyond the range of float32"
        return f"row {row + 1}, column {column}: {what}"

    def error(self, row: int, column: str, error_message: str) -> ConfigError:
        """Return the exception to raise for an invalid cell, with its position in the table."""
        return ConfigError(f"{self.path}, row {row + 1}, column {column}: {error_message}")


def read_columns(path: Path) -> TableColumns:
    """Read a whole .csv or .parquet file."""
    readers = {".csv": _read_csv, ".parquet": _read_parquet}
    if path.suffix.lower() not in readers:
        raise ConfigError(f"data.path={path} must end in .csv or .parquet")
    try:
        table = readers[path.suffix.lower()](path)
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        raise ConfigError(f"data.path={path} cannot be read: {error}") from error
    twice = sorted({name for name in table.column_names if table.column_names.count(name) > 1})
    if twice:
        raise ConfigError(f"data.path={path} has two columns named {twice[0]}; rename one of them")
    if table.num_rows == 0:
        raise ConfigError(f"data.path={path} has no rows")
    return TableColumns(path, table)


def _read_csv(path: Path) -> pa.Table:
    with path.open(encoding="utf-8-sig", newline="") as file:
        names = next((line for line in csv.reader(file) if line), [])
    return pyarrow.csv.read_csv(
        path,
        read_options=pyarrow.csv.ReadOptions(use_threads=False),  # errors then name the row
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False
        ),
    )


def _read_parquet(path: Path) -> pa.Table:
    with pq.ParquetFile(path) as file:
        return file.read(use_threads=False)  # see store/index.py


def to_name(value: Any) -> str | None:
    """Convert a cell to a class, category or split: 3, 3.0 and "3.0" are equal; None for an empty cell."""
    text = to_text(value)
    return None if text is None else re.sub(r"^([+-]?[0-9]+)\.0+$", r"\1", text)


def sorted_names(names: Iterable[str]) -> tuple[str, ...]:
    """Sort distinct names, numerically if all are whole numbers, else alphabetically."""
    distinct = sorted(set(names))
    numbers = [to_number(name) for name in distinct]
    if all(number is not None for number in numbers):
        return tuple(sorted(distinct, key=lambda name: to_number(name) or 0))
    return tuple(distinct)


def _number(text: str | None) -> float:
    if text is None or "_" in text:
        return np.nan
    try:
        return float(text)
    except ValueError:
        return _WORDS.get(text.strip().lower(), np.nan)
