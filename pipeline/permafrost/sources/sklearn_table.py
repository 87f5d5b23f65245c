"""Tables that are part of scikit-learn: small, real, and available without a download."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from permafrost.core.records import Content, Record
from permafrost.sources.rows import ROW_KEY, read_row, row_content
from permafrost.sources.splits import TRAIN, split_off_test

if TYPE_CHECKING:
    from collections.abc import Iterator

    from permafrost.config.table_data import SklearnTableDataConfig


class SklearnTableSource:
    """Source of one such table, in its own order of rows, columns and classes."""

    revision = 1
    frame_size = None

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

    def read(self, record: Record) -> Content:
        """Return the row."""
        return read_row(record)

    def where(self, record: Record) -> str:
        """Return the name of the data set."""
        return f"scikit-learn's {self.name}"

    def _load(self) -> Any:
        from sklearn import datasets  # takes seconds

        return getattr(datasets, f"load_{self.name}")()
