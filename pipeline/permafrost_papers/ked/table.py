r"""Tables of numbers from CSV and Parquet files and from scikit-learn.

    data=table data.path=flows.csv data.label=ProtocolName data.exclude=[L7Protocol] \
        data.categorical=[Protocol] data.log1p=all data.test_fraction=0.2

A store contains the numbers as they are (or their logarithms). A network scales them by its own training split.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property, partial
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from permafrost.core.errors import quote
from permafrost.core.records import NO_LABEL, Content, Record, escape_key
from permafrost.sources.classes import ClassIndex, index_classes, load_class_list
from permafrost.sources.splits import TRAIN, split_of, split_off_test
from permafrost.sources.table_files import require_columns, tally_unknown, to_label
from permafrost.sources.tally import Tally
from permafrost.store.codecs import SUFFIX, RowError, encode_row
from permafrost_papers.ked.data_options import SklearnTableDataConfig, TableDataConfig
from permafrost_papers.ked.table_columns import (
    Features,
    TableColumns,
    read_columns,
    table_features,
    to_name,
)

logger = logging.getLogger("permafrost.precompute")


ROW_KEY = "row-{:09d}"
"""Key of a row of a table without keys; sorting by key keeps the rows' order."""


def row_content(values: NDArray[np.float32]) -> tuple[str, ...]:
    """Return `Record.content` of a row [d]; that of a row that cannot be stored is empty, and the reason."""
    return (base64.b64encode(values.astype("<f4").tobytes()).decode(),)


class _RowSource:
    """Base of sources of rows, which records contain."""

    revision = 1
    frame_size = None

    def read(self, record: Record) -> Content:
        """Return the row as it is stored.

        Raises:
            RowError: If it cannot be stored, as a cell is not a finite number (data.on_error=skip).
        """
        encoded, *complaints = record.content
        if complaints:
            raise RowError(complaints[0])
        return Content(
            image=encode_row(np.frombuffer(base64.b64decode(encoded), "<f4")), suffix=SUFFIX
        )


# ---- table -----------------------------------------------------------------------------------------


class _Contents(NamedTuple):
    """Table in memory, and what is computed from all of its rows."""

    table: TableColumns
    classes: ClassIndex
    features: Features


class TableSource(_RowSource):
    """Source of a table's rows; records contain their values, so only the listing process reads the file.

    That process holds the columns of the whole table, but no object for each row.
    """

    name = "table"

    def __init__(self, config: TableDataConfig) -> None:
        self.config = config
        self._table = Path(config.path).absolute()
        self.tally = Tally()
        """Counts of what the last listing met."""

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
        self.tally.clear()  # reading the table has looked at all labels
        for row, record in enumerate(self._without_values(table, classes)):
            reason = features.complaints.get(row)
            values = features.values[row]
            content = row_content(values) if reason is None else ("", reason)
            yield replace(record, content=content)

    def where(self, record: Record) -> str:
        """Return the table's file."""
        return str(self._table)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_contents"}

    # ---- contents --------------------------------------------------------------------------------

    @cached_property
    def _contents(self) -> _Contents:
        table = read_columns(self._table)
        require_columns(self._table, self._columns(), table.table.column_names)
        classes = self._classes(table)
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
            named |= {
                f"{option}[{position}]": name
                for position, name in enumerate(getattr(config, option))
            }
        return {option: column for option, column in named.items() if column is not None}

    def _keys(self, table: TableColumns) -> Iterator[str]:
        if (column := self.config.key) is None:
            yield from map(ROW_KEY.format, range(1, table.table.num_rows + 1))
            return
        for row, text in enumerate(table.texts(column)):
            if text is None:
                raise table.error(row, column, "is empty, but every record needs a key")
            yield escape_key(text)

    def _splits(self, table: TableColumns) -> Iterator[str]:
        if (column := self.config.split) is None:
            yield from repeat(TRAIN, table.table.num_rows)
            return
        for row, text in enumerate(table.texts(column)):
            complain = partial(table.error, row, column)
            if text is None:
                raise complain("is empty")
            yield split_of(text, self.config.split_names, complain, self.tally)

    def _label_texts(self, table: TableColumns) -> Iterator[str | None]:
        """Yield the label of each row as text; None for an unlabeled row."""
        if (column := self.config.label) is None:
            return repeat(None, table.table.num_rows)
        class_list = load_class_list(self.config.classes)
        return (to_label(cell, class_list, to_name) for cell in table.cells(column))

    def _classes(self, table: TableColumns) -> ClassIndex:
        texts = {text for text in self._label_texts(table) if text is not None}
        if self.config.classes is None:
            return index_classes(texts, None, numbered=False)
        return index_classes(texts, self.config.classes)

    def _labels(self, table: TableColumns, classes: ClassIndex) -> Iterator[int]:
        for row, text in enumerate(self._label_texts(table)):
            if text is None and self.config.label is not None:
                cell = table.table[self.config.label][row].as_py()
                tally_unknown(self.tally, cell, f"row {row + 1}", self.config.label)
            label = NO_LABEL if text is None else classes.label(text)
            if label is None:
                assert self.config.label is not None
                raise table.error(
                    row,
                    self.config.label,
                    f"{quote(text)} is not one of the {len(classes.names)} classes; correct it or data.classes",
                )
            yield label


# ---- sklearn table ---------------------------------------------------------------------------------


class SklearnTableSource(_RowSource):
    """Source of one such table, in its own order of rows, columns and classes."""

    def __init__(self, config: SklearnTableDataConfig) -> None:
        self.config = config
        self.name: str = config.name

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names in scikit-learn."""
        return tuple(str(name) for name in self._load().target_names)

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Names in scikit-learn."""
        return tuple(str(name) for name in self._load().feature_names)

    def records(self) -> Iterator[Record]:
        """Yield one record per row, with its number as the key."""
        loaded = self._load()
        records = (
            Record(
                key=ROW_KEY.format(number),
                split=TRAIN,
                label=int(label),
                content=row_content(values),
            )
            for number, (values, label) in enumerate(
                zip(loaded.data.astype(np.float32), loaded.target, strict=True)
            )
        )
        return split_off_test(records, self.config.test_fraction)

    def where(self, record: Record) -> str:
        """Return the name of the data set."""
        return f"scikit-learn's {self.name}"

    def _load(self) -> Any:
        from sklearn import datasets  # takes seconds

        return getattr(datasets, f"load_{self.name}")()
