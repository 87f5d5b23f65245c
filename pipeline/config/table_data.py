"""Tables of numbers (`data=table`, `data=sklearn_table`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Lt

from pipeline.config.file_data import DataConfig, FileDataConfig
from pipeline.config.options import Role
from pipeline.core.errors import require

ALL_COLUMNS = ("all",)
"""As data.log1p: every numeric column."""


@dataclass(frozen=True, kw_only=True)
class TableDataConfig(FileDataConfig):
    """A CSV or Parquet file with one record a row; options name its columns."""

    implementation: ClassVar[str] = "pipeline.sources.table:TableSource"
    minimal: ClassVar[tuple[str, ...]] = ("data.path=somewhere",)

    kind: Literal["table"] = "table"
    path: Annotated[str, Role.FILE, Role.OUTSIDE_DATASET] = ""
    label: Annotated[str | None, Role.OUTSIDE_DATASET] = "label"
    """Column of the class; null: none. An empty cell is a label that is not known."""
    features: Annotated[tuple[str, ...], Role.OUTSIDE_DATASET] = ()
    """Numeric columns to store, in this order; empty takes every column that has a number in it, but for those
    that other options name."""
    exclude: Annotated[tuple[str, ...], Role.OUTSIDE_DATASET] = ()
    """Columns to leave out, such as identifiers, or another form of the label."""
    categorical: Annotated[tuple[str, ...], Role.OUTSIDE_DATASET] = ()
    """Columns stored as one column a value, 1 where the row has it. The values are those of split train; a row
    with another one, or with an empty cell, has 0 in all of them."""
    log1p: Annotated[tuple[str, ...], Role.OUTSIDE_DATASET] = ()
    """Numeric columns stored as sign(x) log(1 + |x|), for bytes, durations and other heavy tails; `all` takes every
    one of them."""
    key: Annotated[str | None, Role.OUTSIDE_DATASET] = None
    """Column that names a record for ever; null numbers the rows."""
    split: Annotated[str | None, Role.OUTSIDE_DATASET] = None
    """Column of the split; null puts everything into train."""
    split_names: Annotated[dict[str, str], Role.OUTSIDE_DATASET] = field(default_factory=dict)
    """Value of that column -> split; empty takes the values as they are."""
    classes: Annotated[str | None, Role.FILE, Role.OUTSIDE_DATASET] = None
    """File with one class name a line, in label order; null takes the label column's values, sorted."""
    test_fraction: Annotated[float, Ge(0), Lt(1), Role.OUTSIDE_DATASET] = 0.0
    """Of the records of split train that go to split test, chosen by a hash of the key."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_path(self.path, "the CSV or Parquet file")
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
class SklearnedableDataConfig(DataConfig):
    """A table that comes with scikit-learn; nothing is downloaded."""

    implementation: ClassVar[str] = "pipeline.sources.sklearn_table:SklearnedableSource"

    kind: Literal["sklearn_table"] = "sklearn_table"
    name: Literal["wine", "breast_cancer", "iris", "digits"] = "wine"
    """digits: its 8x8 pixels as 64 columns."""
    test_fraction: Annotated[float, Ge(0), Lt(1)] = 0.2
    """Of the records, chosen by a hash of the key: the split test."""
