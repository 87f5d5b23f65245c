"""Columns of a table of numbers: features, labels and rows of each split.

Shape letters: N rows, d columns of the store.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from permafrost.core.errors import ConfigError, quote, require
from permafrost.sources.classes import sorted_names
from permafrost.sources.splits import TRAIN
from permafrost.sources.table_files import (
    column_names,
    iter_parts,
    readable,
    to_text,
)
from permafrost_papers.ked.data_options import ALL_COLUMNS, TableDataConfig

logger = logging.getLogger("permafrost.sources")

_WORDS = {"true": 1.0, "false": 0.0}
_CELLS = 65_536
"""Number of cells that are converted at once."""


@dataclass(frozen=True)
class TableColumns:
    """Table in memory."""

    path: Path
    table: pa.Table
    """Cells of the table; those of a CSV are all text."""

    def texts(self, column: str) -> Iterator[str | None]:
        """Yield every cell as text, a whole number without its decimal point; None for an empty cell."""
        yield from map(to_name, self.cells(column))

    def cells(self, column: str) -> Iterator[Any]:
        """Yield every cell as it is."""
        for batch in self.table.select([column]).to_batches(max_chunksize=_CELLS):
            yield from batch.column(0).to_pylist()

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
        return np.asarray(values.cast(pa.float64(), safe=False).to_numpy(), np.float64)

    def error_message(self, row: int, column: str) -> str:
        """Describe why a cell is not a finite float32; `row` counts from 0, the message counts from 1."""
        cell: Any = self.table[column][row].as_py()
        number = _number(str(cell)) if cell is not None else np.nan
        what = f"{quote(cell)} is not a number"
        if to_text(cell) is None:
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
    """Read a whole .csv or .parquet file.

    Raises:
        ConfigError: If the file has no rows, or two columns of the same name.
    """
    with readable(path):
        names = column_names(path)
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(
                f"data.path={path} has two columns named {twice[0]}; rename one of them"
            )
        batches = list(iter_parts(path, names))
    require(any(len(batch) for batch in batches), f"data.path={path} has no rows")
    return TableColumns(path, pa.Table.from_batches(batches))


def to_name(value: Any) -> str | None:
    """Convert a cell to a class, category or split: 3, 3.0 and "3.0" are equal; None for an empty cell."""
    text = to_text(value)
    return None if text is None else re.sub(r"^([+-]?[0-9]+)\.0+$", r"\1", text)


def _number(text: str | None) -> float:
    if text is None or "_" in text:
        return np.nan
    try:
        return float(text)
    except ValueError:
        return _WORDS.get(text.strip().lower(), np.nan)


# ---- features --------------------------------------------------------------------------------------


MAX_CATEGORIES = 1000
"""Largest number of values of a categorical column; a column with more is probably an identifier."""


class Features(NamedTuple):
    """Stored columns and values."""

    columns: tuple[str, ...]
    """Names of the numeric columns, then <column>=<value> for each category."""
    values: NDArray[np.float32]
    """[N, d]."""
    complaints: dict[int, str]
    """First invalid cell of each row that cannot be stored, by row number from 0."""


def table_features(
    table: TableColumns, config: TableDataConfig, in_training: NDArray[np.bool_]
) -> Features:
    """Select and convert the columns that the options choose.

    Args:
        table: Table of N rows.
        config: Options of the table.
        in_training: Bool [N], True for the rows whose categories are used.

    Raises:
        ConfigError: If an option names a column that does not fit, or no column of numbers is left.
    """
    numbers = _numeric_columns(table, config)
    if config.log1p != ALL_COLUMNS:
        for column in config.log1p:
            require(
                column in numbers,
                f"data.log1p names {column}, which is not one of the numeric columns: {', '.join(numbers)}",
            )
    names, columns, complaints = list(numbers), [], dict[int, str]()
    for name, numeric in numbers.items():
        for row in np.flatnonzero(~np.isfinite(numeric)).tolist():
            complaints.setdefault(row, table.error_message(row, name))
        if config.log1p == ALL_COLUMNS or name in config.log1p:
            wide = numeric.astype(np.float64)
            numeric = np.asarray(np.sign(wide) * np.log1p(np.abs(wide)), np.float32)
        columns.append(numeric)
    for name in config.categorical:
        texts = np.array(list(table.texts(name)), dtype=object)
        known = sorted_names(text for text in texts[in_training] if text is not None)
        require(
            0 < len(known) <= MAX_CATEGORIES,
            f"data.categorical names {name}, which has {len(known)} values in split {TRAIN} of {table.path} but "
            f"must have 1 to {MAX_CATEGORIES}: leave the column out with data.exclude, or check the split",
        )
        names += [f"{name}={category}" for category in known]
        columns += [(texts == category).astype(np.float32) for category in known]
    return Features(tuple(names), np.stack(columns, axis=1), complaints)


def _numeric_columns(
    table: TableColumns, config: TableDataConfig
) -> dict[str, NDArray[np.float32]]:
    """Return the numeric columns by name, [N] each."""
    if config.features:
        return {name: _narrow(table, name, table.numbers(name)) for name in config.features}
    named = {config.label, config.split, config.key, *config.exclude, *config.categorical}
    columns, left_out = {}, []
    for name in [name for name in table.table.column_names if name not in named]:
        numbers = table.numbers(name)
        if np.isnan(numbers).all():
            cell = next(filter(None, map(to_text, table.cells(name))), "")
            require(
                re.fullmatch(r"[-+]?\d+,\d+", cell) is None,
                f"{table.path}, column {name}: {quote(cell)} has a decimal comma; write points, or leave the column "
                "out with data.exclude",
            )
            left_out.append(name)
        else:
            columns[name] = _narrow(table, name, numbers)
    if left_out:
        logger.info("%s: left out columns without numbers: %s", table.path, ", ".join(left_out))
    require(
        len(columns) + len(config.categorical) > 0,
        f"data.path={table.path} has no column of numbers in addition to those that options name; name the "
        "columns to store with data.features or data.categorical",
    )
    return columns


def _narrow(table: TableColumns, name: str, numbers: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return a column in float32; warn of whole numbers that it rounds, as those of times and identifiers are."""
    with np.errstate(over="ignore"):  # values beyond float32 become infinite and are reported
        narrow = numbers.astype(np.float32)
    finite = np.isfinite(narrow)
    rounded = finite & (narrow != numbers)
    if rounded.any() and not (numbers[finite] % 1).any():
        row = int(np.flatnonzero(rounded)[0])
        logger.warning(
            "%s, column %s: %s whole numbers are rounded to float32, such as %.0f in row %d to %.0f; if their last "
            "digits matter, subtract a constant, or leave the column out with data.exclude",
            table.path,
            name,
            f"{int(rounded.sum()):,}",
            numbers[row],
            row + 1,
            narrow[row],
        )
    return narrow
