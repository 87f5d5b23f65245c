"""Conversion of a table's columns to the stored values: numbers, and categories as zeros and ones.

Shape letters: N rows, d columns of the store.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from permafrost.config.table_data import ALL_COLUMNS
from permafrost.core.errors import ConfigError, require
from permafrost.sources.splits import TRAIN
from permafrost.sources.tables.columns import sorted_names

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from permafrost.config.table_data import TableDataConfig
    from permafrost.sources.tables.columns import TableColumns

logger = logging.getLogger("permafrost.sources")

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

    in_training  [N]: the rows whose categories are used
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
        columns.append(_log1p(numeric) if _is_logged(name, config) else numeric)
    for name in config.categorical:
        categories = _categories(table, name, in_training)
        names += [f"{name}={category}" for category in categories]
        columns += categories.values()
    return Features(tuple(names), np.stack(columns, axis=1), complaints)


def _numeric_columns(
    table: TableColumns, config: TableDataConfig
) -> dict[str, NDArray[np.float32]]:
    """Return the numeric columns by name, [N] each."""
    if config.features:
        return {name: _narrow(table.numbers(name)) for name in config.features}
    named = {config.label, config.split, config.key, *config.exclude, *config.categorical}
    columns, left_out = {}, []
    for name in table.names:
        if name in named:
            continue
        numbers = table.numbers(name)
        if np.isnan(numbers).all():
            left_out.append(name)
        else:
            columns[name] = _narrow(numbers)
    if left_out:
        logger.info("%s: left out columns without numbers: %s", table.path, ", ".join(left_out))
    if not columns and not config.categorical:
        raise ConfigError(
            f"data.path={table.path} has no column of numbers in addition to those that options name; name the "
            "columns to store with data.features or data.categorical"
        )
    return columns


def _narrow(numbers: NDArray[np.float64]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # values beyond float32 become infinite and are reported
        return numbers.astype(np.float32)


def _is_logged(name: str, config: TableDataConfig) -> bool:
    return config.log1p == ALL_COLUMNS or name in config.log1p


def _log1p(column: NDArray[np.float32]) -> NDArray[np.float32]:
    wide = column.astype(np.float64)
    return np.asarray(np.sign(wide) * np.log1p(np.abs(wide)), np.float32)


def _categories(
    table: TableColumns, name: str, in_training: NDArray[np.bool_]
) -> dict[str, NDArray[np.float32]]:
    """Map each value of a categorical column to 0 or 1 per row, [N]."""
    texts = np.array(list(table.texts(name)), dtype=object)
    known = sorted_names(text for text in texts[in_training] if text is not None)
    require(
        0 < len(known) <= MAX_CATEGORIES,
        f"data.categorical names {name}, which has {len(known)} values in split {TRAIN} of {table.path} but "
        f"must have 1 to {MAX_CATEGORIES}: leave the column out with data.exclude, or check the split",
    )
    return {category: (texts == category).astype(np.float32) for category in known}
