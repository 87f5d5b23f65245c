"""Rules of findings about the columns of a table, which they read themselves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from permafrost.config.data import ImageTableDataConfig
from permafrost.core.errors import quote
from permafrost.sources.classes import to_number
from permafrost.sources.data_preview import Preview, Remark
from permafrost.sources.parquet_images import holds_images
from permafrost.sources.several_files import find_files, inner_folder
from permafrost.sources.table_files import column_names, iter_parts, readable, to_text
from permafrost.storage.untrusted import open_parquet_file


def _table_of(preview: Preview) -> tuple[Path, ImageTableDataConfig] | None:
    """Return the first file of a table and the options that read it; None for other data."""
    data = preview.data
    if not isinstance(data, ImageTableDataConfig):
        return None
    path = inner_folder(Path(data.path).absolute(), ".parquet")
    return path if path.is_file() else find_files(path, ".parquet")[0], data


def find_one_hot_columns(preview: Preview) -> Iterator[Remark]:
    """Find a column of labels that is one of several with a 1 in one of them."""
    table = _table_of(preview)
    columns = one_hot_columns(table[0]) if table and table[1].label is not None else []
    if table and table[1].label in columns:
        yield (
            "error",
            f"column {table[1].label} is 0 or 1, and one of {len(columns):,} columns of which each row has a 1 in one "
            f"({quote(', '.join(columns), 200)[1:-1]}), as classes in one column each; write the name of that column "
            "for each row, as pandas' table[columns].idxmax(axis=1) does, and name it data.label",
        )


def find_category_order(preview: Preview) -> Iterator[Remark]:
    """Find categories whose order in the file differs from the order of the labels."""
    table = _table_of(preview)
    if table is None or table[1].label is None or table[1].classes is not None:
        return
    order = ordered_categories(table[0], table[1].label)
    if order and list(order) != sorted(order) and set(preview.classes) <= set(order):
        yield (
            "warning",
            f"categories of the label column are ordered in the file ({quote(', '.join(order), 200)[1:-1]}), and "
            "labels here are in the order of their names; list them in data.classes=<file> in the order that is meant",
        )


def find_unread_split(preview: Preview) -> Iterator[Remark]:
    """Find a column that is named like one of splits and is not read."""
    table = _table_of(preview)
    if table is None or table[1].split is not None:
        return
    with readable(table[0]):
        names = column_names(table[0])
    yield from (
        ("warning", f"column {name} is not read; if it has the splits, set data.split={name}")
        for name in names
        if _may_be_split(name)
    )


def _may_be_split(name: str) -> bool:
    return name.strip().lower() in {"split", "subset", "partition", "fold", "phase"}


def find_unread_columns(preview: Preview) -> Iterator[Remark]:
    """Find columns that no option names."""
    table = _table_of(preview)
    if table is None:
        return
    path, data = table
    named = [data.image, data.label, data.split, data.boxes, data.mask, data.weight, *data.group]
    named += [data.labels] if isinstance(data.labels, str) else list(data.labels or ())
    with readable(path):
        names = column_names(path)
    is_parquet = path.suffix.lower() == ".parquet"
    others = [
        name
        for name in names
        if name not in named
        and not (is_parquet and holds_images(path, name))
        and not (data.split is None and _may_be_split(name))  # it has a finding of its own
    ]
    if others:
        yield "note", f"columns that are not read: {quote(', '.join(others), 200)[1:-1]}"


def one_hot_columns(path: Path) -> list[str]:
    """Return the columns of a table that have 0 or 1 in the first rows, if each of these rows has a 1 in one of them.

    Args:
        path: The file; of a Parquet file, columns of numbers are looked at.

    Raises:
        ConfigError: If the file cannot be read.
    """
    with readable(path):
        if path.suffix.lower() == ".csv":
            names = column_names(path)
        else:
            with open_parquet_file(path) as file:
                kinds = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
                names = [
                    column.name
                    for column in file.schema_arrow
                    if any(is_kind(column.type) for is_kind in kinds)
                ]
        batch = next(iter_parts(path, [name for name in names if names.count(name) == 1]), None)
    if batch is None:
        return []
    columns = {name: _flags(batch.column(name).slice(0, 1000)) for name in batch.schema.names}
    flags = {name: values for name, values in columns.items() if values is not None}
    is_one_hot = len(flags) > 2 and bool((np.sum(list(flags.values()), axis=0) == 1).all())
    return list(flags) if is_one_hot else []


def _flags(column: pa.Array) -> NDArray[np.int64] | None:
    """Return the values of a column of 0 and 1, also as text or with fractions; None for any other column."""
    values = [int(value) if isinstance(value, bool) else value for value in column.to_pylist()]
    numbers = [to_number(to_text(value) or "") for value in values]
    are_flags = bool(numbers) and all(number in (0, 1) for number in numbers)
    return np.array(numbers, np.int64) if are_flags else None


def ordered_categories(path: Path, column: str) -> tuple[str, ...]:
    """Return the categories of a column of Parquet that pandas wrote as ordered; empty for any other column.

    Raises:
        ConfigError: If the file cannot be read.
    """
    if path.suffix.lower() != ".parquet":
        return ()
    with readable(path), open_parquet_file(path) as file:
        place = file.schema_arrow.get_field_index(column)
        if place < 0 or not pa.types.is_dictionary(kind := file.schema_arrow.field(place).type):
            return ()
        batch = next(file.iter_batches(columns=[column], use_threads=False), None)
        if not kind.ordered or batch is None:
            return ()
        return tuple(map(str, batch.column(0).dictionary.to_pylist()))
