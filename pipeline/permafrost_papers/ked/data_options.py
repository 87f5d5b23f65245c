"""Options of the data of KED: tables of numbers (`data=table`, `data=sklearn_table`), and Tiny ImageNet."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Lt

from permafrost.config.data import DataConfig, FileDataConfig
from permafrost.config.options import Role
from permafrost.core.errors import require

ALL_COLUMNS = ("all",)
"""Value of data.log1p that selects every numeric column."""


@dataclass(frozen=True, kw_only=True)
class TableDataConfig(FileDataConfig):
    """CSV or Parquet file with one record per row; options name its columns."""

    implementation: ClassVar[str] = "permafrost_papers.ked.table:TableSource"
    path_is: ClassVar[str] = "the CSV or Parquet file"

    kind: Literal["table"] = "table"
    path: Annotated[str, Role.FILE, Role.OUTSIDE_DATASET] = ""
    """CSV or Parquet file."""
    label: Annotated[str | None, Role.OUTSIDE_DATASET] = "label"
    """Column of the class; null: no labels. An empty cell is an unknown label."""
    features: Annotated[tuple[str, ...], Role.OUTSIDE_DATASET] = ()
    """Numeric columns to store, in this order; empty takes every column with a number in it that no other
    option names."""
    exclude: Annotated[tuple[str, ...], Role.OUTSIDE_DATASET] = ()
    """Columns to leave out, such as identifiers or another form of the label."""
    categorical: Annotated[tuple[str, ...], Role.OUTSIDE_DATASET] = ()
    """Columns stored as one column per value, 1 where the row has that value. The values are those of split
    train; a row with another value, or with an empty cell, is 0 in all of them."""
    log1p: Annotated[tuple[str, ...], Role.OUTSIDE_DATASET] = ()
    """Numeric columns stored as sign(x) log(1 + |x|), for bytes, durations and other heavy tails; `all` selects
    every one."""
    key: Annotated[str | None, Role.OUTSIDE_DATASET] = None
    """Column with a permanent key of each record; null numbers the rows."""
    split: Annotated[str | None, Role.OUTSIDE_DATASET] = None
    """Column of the split; null puts all records into split train."""
    split_names: Annotated[dict[str, str], Role.OUTSIDE_DATASET] = field(default_factory=dict)
    """Mapping from values of that column to splits; empty takes the values as they are."""
    classes: Annotated[str | None, Role.FILE, Role.OUTSIDE_DATASET] = None
    """File with one class name per line, in label order; null takes the sorted values of the label column."""
    test_fraction: Annotated[float, Ge(0), Lt(1), Role.OUTSIDE_DATASET] = 0.0
    """Fraction of split train that is moved to split test: the rows whose key has a hash below it, of small classes,
    too, so that published splits stay."""

    def _check_together(self) -> None:
        super()._check_together()
        for option, column in {"label": self.label, "split": self.split, "key": self.key}.items():
            require(
                column is None or column not in (*self.features, *self.categorical),
                f"data.features and data.categorical must not name {column}, which is data.{option}; leave it out",
            )
        for option in ("features", "categorical"):
            names = getattr(self, option)
            require(
                len(set(names)) == len(names), f"data.{option} lists a column twice: {list(names)}"
            )
        require(
            not (self.features and self.exclude),
            f"data.exclude={list(self.exclude)} excludes columns from the default, but data.features lists all columns "
            "that are stored; leave one of them empty",
        )
        both = set(self.features) & set(self.categorical)
        require(not both, f"data.features and data.categorical both name {', '.join(sorted(both))}")


@dataclass(frozen=True, kw_only=True)
class SklearnTableDataConfig(DataConfig):
    """Table that is part of scikit-learn, without a download."""

    implementation: ClassVar[str] = "permafrost_papers.ked.table:SklearnTableSource"

    kind: Literal["sklearn_table"] = "sklearn_table"
    name: Literal["wine", "breast_cancer", "iris", "digits"] = "wine"
    """Name of the table; `digits` has the 8x8 pixels as 64 columns."""
    test_fraction: Annotated[float, Ge(0), Lt(1)] = 0.2
    """Fraction of the records that forms split test: those whose key has a hash below it."""


# ---- Tiny ImageNet ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TinyImageNetDataConfig(FileDataConfig):
    """Tiny ImageNet (200 classes, 64x64) with its boxes, as unpacked from tiny-imagenet-200.zip."""

    implementation: ClassVar[str] = "permafrost_papers.ked.tiny_imagenet:TinyImageNetSource"
    path_is: ClassVar[str] = "the folder tiny-imagenet-200"

    kind: Literal["tiny_imagenet"] = "tiny_imagenet"
    path: Annotated[str, Role.FILE, Role.OUTSIDE_DATASET] = ""
    """Folder tiny-imagenet-200."""
