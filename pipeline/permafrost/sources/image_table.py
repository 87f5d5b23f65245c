"""Images listed in a CSV or Parquet file with one row per image.

A table can contain what folders cannot: groups, several labels, boxes and masks. Waterbirds' own metadata.csv is read
unchanged:

    data=image_table data.path=<folder>/metadata.csv data.image=img_filename data.label=y
    data.split=split 'data.split_names={0: train, 1: val, 2: test}' 'data.group=[y, place]'

A record's key is its image's escaped path below data.root. Cells are compared as text, so that CSV and Parquet give
the same records. An empty cell (null, NaN) is an unknown value, as is the label -1.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from permafrost.core.errors import ConfigError
from permafrost.core.records import MAX_GROUP, NO_GROUP, NO_LABEL, Box, Content, Record
from permafrost.sources.classes import MAX_CLASSES, ClassIndex, load_class_names
from permafrost.sources.image_files import (
    IMAGE_SUFFIXES,
    escape_key,
    image_suffix,
    is_image_name,
    read_file,
    to_mask_png,
)
from permafrost.sources.splits import TRAIN, split_of, split_off_test
from permafrost.sources.table import TableFiles
from permafrost.sources.table_files import Row, is_all_digits, read_rows, to_number, to_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from permafrost.config.data import ImageTableDataConfig

_MAX_CLASS_CHARACTERS = 200


@dataclass(frozen=True)
class GroupColumn:
    """One digit of the group number: the position of each value, out of `radix`."""

    column: str
    position_of: dict[str, int]
    radix: int


class ImageTableSource:
    """Source of the images listed in a table, with the files' own bytes."""

    name = "image_table"
    revision = 1
    frame_size = None
    columns = None

    def __init__(self, config: ImageTableDataConfig) -> None:
        self.config = config
        self._table = Path(config.path).absolute()
        self._root = self._table.parent if config.root is None else Path(config.root).absolute()

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Lines of data.classes, the sorted names in the label column, or its numbers up to the largest."""
        return self._classes.names

    def records(self) -> Iterator[Record]:
        """Yield one record per row."""
        return split_off_test(self._rows(), self.config.test_fraction)

    def _rows(self) -> Iterator[Record]:
        """Yield the records of rows whose files exist; raise ConfigError at the end for those that do not."""
        groups = self._group_columns()
        files = TableFiles(self._root)
        is_empty = True
        for row in read_rows(self._table, self._columns()):
            missing = files.num_missing
            record = self._record(row, groups, files)
            if files.num_missing == missing:
                is_empty = False
                yield record
        files.check_missing(self.config)
        if is_empty:
            raise ConfigError(f"data.path={self._table} has no rows")

    def read(self, record: Record) -> Content:
        """Return the image's file unchanged, and the mask's values as PNG."""
        path, size, *mask = record.content
        return Content(
            image=read_file(self._root, path, size),
            suffix=image_suffix(path),
            mask=self._read_mask(*mask) if mask else None,
        )

    def where(self, record: Record) -> str:
        """Return the image's file."""
        return str(self._root / record.content[0])

    def _read_mask(self, path: str, size: int) -> bytes:
        return to_mask_png(read_file(self._root, path, size), path)

    # ---- columns ---------------------------------------------------------------------------------

    def _columns(self) -> dict[str, str]:
        """Map each option to the column that it names."""
        config = self.config
        named = {
            "image": config.image,
            "label": config.label,
            "labels": config.labels,
            "split": config.split,
            "boxes": config.boxes,
            "mask": config.mask,
        }
        named |= {f"group[{place}]": column for place, column in enumerate(config.group)}
        return {option: column for option, column in named.items() if column is not None}

    @cached_property
    def _classes(self) -> ClassIndex:
        config = self.config
        columns = {k: v for k, v in self._columns().items() if k in ("label", "labels")}
        rows = read_rows(self._table, columns) if columns else iter(())
        texts = {text for row in rows for text in self._class_texts(row)}
        numbers = [number for text in texts if (number := to_number(text)) is not None]
        is_numbered = len(numbers) == len(texts)
        if config.classes is not None:
            names = load_class_names(config.classes)
            return ClassIndex(names, is_numbered and not texts <= set(names))
        if is_numbered:
            return ClassIndex(tuple(map(str, range(max(numbers, default=-1) + 1))), True)
        return ClassIndex(tuple(sorted(texts)), False)

    def _group_columns(self) -> list[GroupColumn]:
        groups = [
            _group_column(column, read_rows(self._table, {"group": column}))
            for column in self.config.group
        ]
        if math.prod(group.radix for group in groups) > MAX_GROUP:
            raise ConfigError(
                f"data.group={list(self.config.group)} results in more than {MAX_GROUP} groups; "
                "choose columns with fewer values"
            )
        return groups

    def _class_texts(self, row: Row) -> list[str]:
        if self.config.labels is not None:
            texts, column = _many_texts(row, self.config.labels), self.config.labels
        else:
            text, column = self._label_text(row), self.config.label or ""
            texts = [] if text is None else [text]
        for text in texts:
            _check_class_text(row, column, text, is_named=self.config.classes is not None)
        return texts

    def _label_text(self, row: Row) -> str | None:
        """Return the label's text, or None for an unlabeled row: an empty cell, or -1."""
        text = row.text(self.config.label) if self.config.label is not None else None
        return None if text is None or to_number(text) == NO_LABEL else text

    # ---- one row ---------------------------------------------------------------------------------

    def _record(self, row: Row, groups: list[GroupColumn], files: TableFiles) -> Record:
        config = self.config
        image = files.add(row, config.image)
        if not is_image_name(image[0]):
            raise row.error(
                config.image,
                f"{image[0]!r} is not an image file name; known suffixes: {', '.join(IMAGE_SUFFIXES)}",
            )
        has_mask = config.mask is not None and row.text(config.mask) is not None
        mask = files.add(row, config.mask) if config.mask is not None and has_mask else ()
        label = self._label(row)
        boxes = self._boxes(row, label)
        return Record(
            key=escape_key(image[0]),
            split=self._split(row),
            label=label,
            labels=self._labels(row),
            group=_group(row, groups),
            boxes=boxes,
            boxes_in_pixels=bool(boxes),
            content=(*image, *mask),
        )

    def _split(self, row: Row) -> str:
        column, names = self.config.split, self.config.split_names
        if column is None:
            return TRAIN
        return split_of(
            row.required(column), names, lambda error_message: row.error(column, error_message)
        )

    def _label(self, row: Row) -> int:
        text = self._label_text(row)
        if text is None or self.config.label is None:
            return NO_LABEL
        return self._class(row, self.config.label, text)

    def _labels(self, row: Row) -> tuple[int, ...]:
        column = self.config.labels
        if column is None:
            return ()
        texts = _many_texts(row, column)
        return tuple(sorted({self._class(row, column, text) for text in texts}))

    def _class(self, row: Row, column: str, text: str) -> int:
        label = self._classes.label(text)
        if label is None:
            raise row.error(
                column,
                f"{text!r} is not one of the {len(self.classes)} classes; correct it or data.classes",
            )
        return label

    def _boxes(self, row: Row, label: int) -> tuple[Box, ...]:
        column = self.config.boxes
        if column is None or to_text(row.cells[column]) is None:
            return ()
        value = row.cells[column]
        try:
            parsed = [
                _parse_box(box) for box in (json.loads(value) if isinstance(value, str) else value)
            ]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise row.error(
                column, "expected a list of {x0, y0, x1, y1} in pixels, and optionally label"
            ) from error
        return tuple(self._box(row, column, corners, text, label) for corners, text in parsed)

    def _box(
        self, row: Row, column: str, corners: list[float], text: str | None, label: int
    ) -> Box:
        x0, y0, x1, y1 = corners
        if not (x0 < x1 and y0 < y1 and all(map(math.isfinite, corners))):
            raise row.error(column, f"the box {x0:g}, {y0:g}, {x1:g}, {y1:g} has no area")
        own = label if text is None else self._class(row, column, text)
        return Box(label=own, x0=x0, y0=y0, x1=x1, y1=y1)


# ---- cells ---------------------------------------------------------------------------------------


def _parse_box(box: dict[str, Any]) -> tuple[list[float], str | None]:
    """Return the corners and the label's text."""
    return [float(box[corner]) for corner in ("x0", "y0", "x1", "y1")], to_text(box.get("label"))


def _many_texts(row: Row, column: str) -> list[str]:
    value = row.cells[column]
    values = value.split() if isinstance(value, str) else value or []
    if not isinstance(values, list):
        raise row.error(column, f"expected a list of classes, got {value!r}")
    return [text for text in map(to_text, values) if text is not None]


def _check_class_text(row: Row, column: str, text: str, *, is_named: bool) -> None:
    """Raise ConfigError for text that can be neither the number nor the name of a class.

    is_named  True if a file lists the classes, so that numbers do not determine the number of classes
    """
    if len(text) > _MAX_CLASS_CHARACTERS:
        raise row.error(column, f"{text[:20]}... has {len(text)} characters, too many for a class")
    number = to_number(text)
    if is_all_digits(text) and (number is None or (number >= MAX_CLASSES and not is_named)):
        raise row.error(
            column,
            f"label {text} is not below {MAX_CLASSES:,}; correct it, or list the classes in a file "
            "and set data.classes to it",
        )


def _group_column(column: str, rows: Iterable[Row]) -> GroupColumn:
    """Number a column's values: whole numbers from 0 as they are, others by their position in sorted order."""
    texts = {text for row in rows if (text := row.text(column)) is not None}
    numbers = {text: number for text in texts if (number := to_number(text)) is not None}
    if len(numbers) == len(texts) and min(numbers.values(), default=0) >= 0:
        return GroupColumn(column, numbers, max(numbers.values(), default=0) + 1)
    return GroupColumn(column, {t: i for i, t in enumerate(sorted(texts))}, len(texts))


def _group(row: Row, groups: list[GroupColumn]) -> int:
    """Combine the columns' positions to one number, with the first column as its highest digit."""
    value = 0 if groups else NO_GROUP
    for group in groups:
        text = row.text(group.column)
        if text is None:
            return NO_GROUP
        value = value * group.radix + group.position_of[text]
    return value
