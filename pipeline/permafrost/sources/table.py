"""Rows of numbers in a CSV or Parquet file, one record per row.

    data=table data.path=flows.csv data.label=ProtocolName data.exclude=[L7Protocol] \\
        data.categorical=[Protocol] data.log1p=all data.test_fraction=0.2

A store contains the numbers as they are (or their logarithms). A network scales them by its own training split.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property, partial
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from permafrost.core.records import NO_LABEL, Content, Record
from permafrost.sources.classes import ClassIndex, load_class_names
from permafrost.sources.keys import escape_key
from permafrost.sources.repeats import Repeats
from permafrost.sources.rows import ROW_KEY, bad_row_content, read_row, row_content
from permafrost.sources.splits import TRAIN, split_of, split_off_test
from permafrost.sources.tables.columns import TableColumns, read_columns, sorted_names, to_name
from permafrost.sources.tables.features import Features, table_features
from permafrost.sources.tables.rows import to_number
from permafrost.store.table_rows import RowError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from permafrost.config.table_data import TableDataConfig


class _Contents(NamedTuple):
    """Table in memory, and what is computed from all of its rows."""

    table: TableColumns
    classes: ClassIndex
    features: Features


class TableSource:
    """Source of a table's rows; records contain their values, so only the listing process reads the file.

    That process holds the columns of the whole table, but no object for each row.
    """

    name = "table"
    revision = 1
    frame_size = None

    def __init__(self, config: TableDataConfig) -> None:
        self.config = config
        self._table = Path(config.path).absolute()

    @property
    def classes(self) -> tuple[str, ...]:
        """Lines of data.classes, or the sorted values of the label column."""
        return self._contents.classes.names

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the stored columns."""
        return self._contents.features.columns

    def records(self) -> Iterator[Record]:
        """Yield one record per row."""
        table, classes, features = self._contents
        for row, record in enumerate(self._without_values(table, classes)):
            reason = features.complaints.get(row)
            values = features.values[row]
            content = row_content(values) if reason is None else bad_row_content(reason)
            yield replace(record, content=content)

    def read(self, record: Record) -> Content:
        """Return the row; raise RowError if a cell is not a finite number (data.on_error=skip)."""
        return read_row(record)

    def where(self, record: Record) -> str:
        """Return the table's file."""
        return str(self._table)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_contents"}

    # ---- contents --------------------------------------------------------------------------------

    @cached_property
    def _contents(self) -> _Contents:
        table = read_columns(self._table)
        table.require(self._columns())
        classes = self._classes(table)
        self._check_keys(table)
        records = self._without_values(table, classes)
        in_training = np.fromiter((record.split == TRAIN for record in records), np.bool_)
        features = table_features(table, self.config, in_training)
        if features.complaints and self.config.on_error == "stop":
            raise RowError(
                f"{self._table}: {len(features.complaints)} rows have values that are not finite numbers, the first: "
                f"{features.complaints[min(features.complaints)]}; repair them, leave the column out with data.exclude "
                "(data.categorical, if it is text), or skip such rows with data.on_error=skip"
            )
        return _Contents(table, classes, features)

    def _without_values(self, table: TableColumns, classes: ClassIndex) -> Iterator[Record]:
        """Yield the records without their content."""
        columns = self._keys(table), self._splits(table), self._labels(table, classes)
        records = (
            Record(key=key, split=split, label=label)
            for key, split, label in zip(*columns, strict=True)
        )
        return split_off_test(records, self.config.test_fraction)

    def _columns(self) -> dict[str, str]:
        """Map each option to the column that it names."""
        config = self.config
        named = {"label": config.label, "split": config.split, "key": config.key}
        for option in ("features", "exclude", "categorical"):
            named |= {f"{option}[{i}]": name for i, name in enumerate(getattr(config, option))}
        return {option: column for option, column in named.items() if column is not None}

    def _keys(self, table: TableColumns) -> Iterator[str]:
        column = self.config.key
        if column is None:
            yield from map(ROW_KEY.format, range(1, table.table.num_rows + 1))
            return
        for row, text in enumerate(table.texts(column)):
            if text is None:
                raise table.error(row, column, "is empty, but every record needs a key")
            yield escape_key(text)

    def _check_keys(self, table: TableColumns) -> None:
        """Raise ConfigError if two rows have the same key."""
        column = self.config.key
        if column is None:
            return
        repeats = Repeats()
        for key in self._keys(table):
            repeats.add(key)
        for first, row in repeats.candidates():
            text, again = (to_name(table.table[column][place].as_py()) for place in (first, row))
            if text == again:
                raise table.error(row, column, f"{text!r} is already the key of row {first + 1}")

    def _splits(self, table: TableColumns) -> Iterator[str]:
        column = self.config.split
        if column is None:
            yield from repeat(TRAIN, table.table.num_rows)
            return
        for row, text in enumerate(table.texts(column)):
            complain = partial(table.error, row, column)
            if text is None:
                raise complain("is empty")
            yield split_of(text, self.config.split_names, complain)

    def _label_texts(self, table: TableColumns) -> Iterator[str | None]:
        """Yield the label of each row as text; None for an unlabeled row."""
        if self.config.label is None:
            return repeat(None, table.table.num_rows)
        return table.texts(self.config.label)

    def _classes(self, table: TableColumns) -> ClassIndex:
        found = {text for text in self._label_texts(table) if text is not None}
        if self.config.classes is None:
            return ClassIndex(sorted_names(found), is_numbered=False)
        names = load_class_names(self.config.classes)
        are_numbers = all(to_number(text) is not None for text in found)
        return ClassIndex(names, is_numbered=are_numbers and not found <= set(names))

    def _labels(self, table: TableColumns, classes: ClassIndex) -> Iterator[int]:
        for row, text in enumerate(self._label_texts(table)):
            label = NO_LABEL if text is None else classes.label(text)
            if label is None:
                assert self.config.label is not None
                raise table.error(
                    row,
                    self.config.label,
                    f"{text!r} is not one of the {len(classes.names)} classes; correct it or data.classes",
                )
            yield label
