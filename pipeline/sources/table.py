"""Rows of numbers in a CSV or Parquet file, one record per row.

    data=table data.path=flows.csv data.label=ProtocolName data.exclude=[L7Protocol] \\
        data.categorical=[Protocol] data.log1p=all data.test_fraction=0.2

A store contains the numbers as they are (or their logarithms). A network scales them by its own training split.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.core.records import NO_LABEL, Content, Record
from pipeline.sources.classes import ClassIndex, load_class_names
from pipeline.sources.keys import escape_key
from pipeline.sources.rows import ROW_KEY, bad_row_content, read_row, row_content
from pipeline.sources.splits import TRAIN, split_of, split_off_test
from pipeline.sources.tables.columns import TableColumns, read_columns, sorted_names
from pipeline.sources.tables.features import table_features
from pipeline.sources.tables.rows import to_number
from pipeline.store.table_rows import RowError

if TYPE_CHECKING:
    from pipeline.config.table_data import TableDataConfig


class _Listing(NamedTuple):
    """Contents of the table."""

    records: list[Record]
    classes: tuple[str, ...]
    columns: tuple[str, ...]


class TableSource:
    """Source of a table's rows; records contain their values, so only the listing process reads the file."""

    name = "table"
    revision = 1
    frame_size = None

    def __init__(self, config: TableDataConfig) -> None:
        self.config = config
        self._table = Path(config.path).absolute()

    @property
    def classes(self) -> tuple[str, ...]:
        """Lines of data.classes, or the sorted values of the label column."""
        return self._listing.classes

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the stored columns."""
        return self._listing.columns

    def records(self) -> list[Record]:
        """Return one record per row."""
        return self._listing.records

    def read(self, record: Record) -> Content:
        """Return the row; raise RowError if a cell is not a finite number (data.on_error=skip)."""
        return read_row(record)

    def where(self, record: Record) -> str:
        """Return the table's file."""
        return str(self._table)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_listing"}

    # ---- listing ---------------------------------------------------------------------------------

    @cached_property
    def _listing(self) -> _Listing:
        table = read_columns(self._table)
        table.require(self._columns())
        labels = self._label_texts(table)
        classes = self._classes(labels)
        records = split_off_test(
            [
                Record(key=key, split=split, label=label)
                for key, split, label in zip(
                    self._keys(table),
                    self._splits(table),
                    self._labels(table, labels, classes),
                    strict=True,
                )
            ],
            self.config.test_fraction,
        )
        in_training = np.array([record.split == TRAIN for record in records])
        features = table_features(table, self.config, in_training)
        if features.complaints and self.config.on_error == "stop":
            raise RowError(
                f"{self._table}: {len(features.complaints)} rows have values that are not finite numbers, the first: "
                f"{features.complaints[min(features.complaints)]}; repair them, leave the column out with data.exclude "
                "(data.categorical, if it is text), or skip such rows with data.on_error=skip"
            )
        contents = [
            bad_row_content(features.complaints[row])
            if row in features.complaints
            else row_content(values)
            for row, values in enumerate(features.values)
        ]
        return _Listing(
            [replace(r, content=content) for r, content in zip(records, contents, strict=True)],
            classes.names,
            features.columns,
        )

    def _columns(self) -> dict[str, str]:
        """Map each option to the column that it names."""
        config = self.config
        named = {"label": config.label, "split": config.split, "key": config.key}
        for option in ("features", "exclude", "categorical"):
            named |= {f"{option}[{i}]": name for i, name in enumerate(getattr(config, option))}
        return {option: column for option, column in named.items() if column is not None}

    def _keys(self, table: TableColumns) -> list[str]:
        column = self.config.key
        if column is None:
            return [ROW_KEY.format(number) for number in range(1, table.table.num_rows + 1)]
        row_of: dict[str, int] = {}
        for row, text in enumerate(table.texts(column)):
            if text is None:
                raise table.error(row, column, "is empty, but every record needs a key")
            first = row_of.setdefault(escape_key(text), row)
            if first != row:
                raise table.error(row, column, f"{text!r} is already the key of row {first + 1}")
        return list(row_of)

    def _splits(self, table: TableColumns) -> list[str]:
        column = self.config.split
        if column is None:
            return [TRAIN] * table.table.num_rows
        splits = []
        for row, text in enumerate(table.texts(column)):
            complain = partial(table.error, row, column)
            if text is None:
                raise complain("is empty")
            splits.append(split_of(text, self.config.split_names, complain))
        return splits

    def _label_texts(self, table: TableColumns) -> list[str | None]:
        """Return the label of each row as text; None for an unlabeled row."""
        if self.config.label is None:
            return [None] * table.table.num_rows
        return table.texts(self.config.label)

    def _classes(self, labels: list[str | None]) -> ClassIndex:
        found = {text for text in labels if text is not None}
        if self.config.classes is None:
            return ClassIndex(sorted_names(found), is_numbered=False)
        names = load_class_names(self.config.classes)
        are_numbers = all(to_number(text) is not None for text in found)
        return ClassIndex(names, is_numbered=are_numbers and not found <= set(names))

    def _labels(
        self, table: TableColumns, texts: list[str | None], classes: ClassIndex
    ) -> list[int]:
        labels = []
        for row, text in enumerate(texts):
            label = NO_LABEL if text is None else classes.label(text)
            if label is None:
                assert self.config.label is not None
                raise table.error(
                    row,
                    self.config.label,
                    f"{text!r} is not one of the {len(classes.names)} classes; correct it or data.classes",
                )
            labels.append(label)
        return labels
