"""Tables of numbers (`data=table`, `data=sklearn_table`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pipeline.config.file_data import FileDataConfig
from pipeline.core.errors import require, require_fraction

ALL_COLUMNS = ("all",)
"""As data.log1p: every numeric column."""


@dataclass(frozen=True, kw_only=True)
class TableDataConfig(FileDataConfig):
    """A CSV or Parquet file with one record a row; options name its columns."""

    NOT_DATA: ClassVar[frozenset[str]] = FileDataConfig.NOT_DATA | {
        "label",
        "features",
        "exclude",
        "categorical",
        "log1p",
        "key",
        "split",
        "split_names",
        "test_fraction",
    }
    """The records say their keys, splits, labels and values themselves, and the store's manifest its columns."""

    kind: Literal["table"] = "table"
    path: str = ""
    label: str | None = "label"
    """Column of the class; null: none. An empty cell is a label that is not known."""
    features: tuple[str, ...] = ()
    """Numeric columns to store, in this order; empty takes every column that has a number in it, but for those
    that other options name."""
    exclude: tuple[str, ...] = ()
    """Columns to leave out, such as identifiers, or another form of the label."""
    categorical: tuple[str, ...] = ()
    """Columns stored as one column a value, 1 where the row has it. The values are those of split train; a row
    with another one, or with an empty cell, has 0 in all of them."""
    log1p: tuple[str, ...] = ()
    """Numeric columns stored as sign(x) log(1 + |x|), for bytes, durations and other heavy tails; `all` takes every
    one of them."""
    key: str | None = None
    """Column that names a record for ever; null numbers the rows."""
    split: str | None = None
    """Column of the split; null puts everything into train."""
    split_names: dict[str, str] = field(default_factory=dict)
    """Value of that column -> split; empty takes the values as they are."""
    classes: str | None = None
    """File with one class name a line, in label order; null takes the label column's values, sorted."""
    test_fraction: float = 0.0
    """Of the records of split train that go to split test, chosen by a hash of the key."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_path(self.path, "the CSV or Parquet file")
        require_fraction("data.test_fraction", self.test_fraction)
        answers = {"label": self.label, "split": self.split, "key": self.key}
        for option, column in answers.items():
            require(
                column is None or column not in (*self.features, *self.categorical),
                f"data.features and data.categorical must not name {column}, which is data.{option}; leave it out",
            )
        for option in ("features", "categorical"):
            names = getattr(self, option)
            require(len(set(names)) == len(names), f"data.{option} names one twice: {list(names)}")
        require(
            not (self.features and self.exclude),
            f"data.exclude={list(self.exclude)} leaves out columns that nobody names, and data.features names all that "
            "are stored; leave one of them empty",
        )
        both = set(self.features) & set(self.categorical)
        require(not both, f"data.features and data.categorical both name {', '.join(sorted(both))}")


@dataclass(frozen=True, kw_only=True)
class SklearnTableDataConfig:
    """A table that comes with scikit-learn; nothing is downloaded."""

    kind: Literal["sklearn_table"] = "sklearn_table"
    name: Literal["wine", "breast_cancer", "iris", "digits"] = "wine"
    """digits: its 8x8 pixels as 64 columns."""
    test_fraction: float = 0.2
    """Of the records, chosen by a hash of the key: the split test."""

    def __post_init__(self) -> None:
        require_fraction("data.test_fraction", self.test_fraction)
