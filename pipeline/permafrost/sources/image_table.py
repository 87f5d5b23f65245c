"""Images listed in a CSV or Parquet file with one row per image.

A table can contain what folders cannot: groups, several labels, boxes and masks. Waterbirds' own metadata.csv is read
unchanged:

    data=image_table data.path=<folder>/metadata.csv data.image=img_filename data.label=y
    data.split=split 'data.split_names={0: train, 1: val, 2: test}' 'data.group=[y, place]'

A record's key is its image's escaped path below data.root. Cells are compared as text, so that CSV and Parquet give
the same records. A cell that is empty or a marker (null, NaN, NA; classes.is_unknown) is an unknown value, as is the
label -1.

Parquet files may contain the images themselves, as Hugging Face's `datasets` writes them: a column of bytes, or of
{bytes, path}. Their records are named by file and row, their classes are those of the file's features, and the split is
that of the file's name (train-00000-of-00004.parquet).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from permafrost.config.data import ImageTableDataConfig
from permafrost.core.errors import ConfigError, quote, require
from permafrost.core.records import (
    MAX_GROUP,
    NO_GROUP,
    NO_LABEL,
    NONE,
    Box,
    Content,
    ImageSource,
    Record,
    escape_key,
    label_of_box,
    labels_of_states,
)
from permafrost.sources.classes import (
    MAX_CLASSES,
    ClassIndex,
    index_classes,
    is_unknown,
    load_class_list,
    to_number,
)
from permafrost.sources.image_files import (
    IMAGE_SUFFIXES,
    TableFiles,
    image_suffix,
    is_image_name,
    read_file,
    to_mask_png,
)
from permafrost.sources.label_cells import (
    LABEL_LISTS,
    SEPARATORS,
    are_states,
    find_separator,
    is_list_text,
    is_one_hot,
    parse_list,
    separate,
    state_of,
    unique_names,
)
from permafrost.sources.parquet_images import ParquetImages, class_names_of, holds_images
from permafrost.sources.several_files import (
    find_files,
    inner_folder,
    split_in_name,
    tally_absent_parts,
    tally_other_files,
)
from permafrost.sources.splits import (
    TEST,
    TRAIN,
    UNKNOWN_SPLIT,
    known_split,
    split_of,
    split_off_test,
)
from permafrost.sources.table_files import (
    ListedRow,
    column_names,
    iter_distinct,
    read_rows,
    readable,
    tally_unknown,
    to_label,
    to_text,
)
from permafrost.sources.tally import BOXES, Tally
from permafrost.storage.files import file_at

_MAX_CLASS_CHARACTERS = 200
_MAX_DISTINCT = 100_000
"""Largest number of different label cells among which a separator is searched."""
_OF_SEVERAL = re.compile(r"-\d+-of-\d+$")

# Topics of the tally of a table.
SEPARATED = "label cells separated at"
"""Topic of a tally: cells of labels by the separator at which they were divided."""
JOINED = "label cells that may hold several labels"
"""Topic of a tally: cells of labels by a separator that they contain."""
NUMBERED = "labels that are numbers"
"""Topic of a tally: labels that are numbers."""


@dataclass(frozen=True)
class GroupColumn:
    """One digit of the group number: the position of each value of some columns, out of `radix`."""

    columns: tuple[str, ...]
    position_of: dict[str, int]
    radix: int

    @cached_property
    def text_of(self) -> dict[int, str]:
        """Value at each position."""
        return {position: text for text, position in self.position_of.items()}


class ImageTableSource(ImageSource):
    """Source of the images listed in a table, with the files' own bytes."""

    name = "image_table"

    def __init__(self, config: ImageTableDataConfig) -> None:
        self.config = config
        self._table = inner_folder(Path(config.path).absolute(), ".parquet")
        self.tally = Tally()
        """Counts of what the last listing met."""

    @cached_property
    def _files(self) -> list[Path]:
        """The table, or the files of a folder, a glob or a {00000..00003} range, in the order of their names."""
        is_pattern = not self._table.is_file() and set("*?[{") & set(self._table.name)
        is_folder = self._table.is_dir() or is_pattern
        return find_files(self._table, ".parquet") if is_folder else [self._table]

    @cached_property
    def _root(self) -> Path:
        if self.config.root is not None:
            return Path(self.config.root).absolute()
        return self._table if self._table.is_dir() else self._table.parent

    @cached_property
    def _image_column(self) -> str:
        """Column of the images: data.image, or the only one with images if it is not typed and there is no such one."""
        path, image = self._files[0], self.config.image
        if path.suffix.lower() == ".parquet" and image == type(self.config).image:
            with readable(path):
                names = column_names(path)
            columns = [] if image in names else [n for n in names if holds_images(path, n)]
            if len(columns) == 1:
                return columns[0]
        return image

    @cached_property
    def _images(self) -> dict[str, ParquetImages]:
        """The images that the files themselves contain, by the name of the file."""
        column = self._image_column
        return {
            path.name: ParquetImages.of(path, column, Path(self.config.cache))
            for path in self._files
            if path.suffix.lower() == ".parquet" and holds_images(path, column)
        }

    def stamps(self) -> dict[str, tuple[int, int | str]]:
        """Return the bytes of every file and when it was last changed."""
        return {path.name: file_at(path).stamp() for path in self._files if path.is_file()}

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Lines of data.classes, the sorted names in the label column, or its numbers up to the largest."""
        return self._classes.names

    def records(self) -> Iterator[Record]:
        """Yield one record per row."""
        unit_of = self._group_name if self.config.keep_groups else None
        draws_unknown = self.config.split is not None and self._has_unknown_splits
        drawn = UNKNOWN_SPLIT if draws_unknown else TRAIN
        fraction = self.config.test_fraction
        return split_off_test(self._rows(), fraction, unit_of, drawn, is_exact=True)

    @cached_property
    def _has_unknown_splits(self) -> bool:
        """True if a cell of data.split is empty, or a word for an unknown value, and nothing names its split."""
        column = self.config.split or ""
        if not self.config.test_fraction or "" in self.config.split_names:
            return False
        named = frozenset(self.config.split_names)
        rows = self._all_rows({"split": column})
        return any(to_label(row.cells[column], named) is None for row in rows)

    def _group_name(self, record: Record) -> str:
        """Return the values of a record's group as one text, or its key if it has none."""
        if record.group == NO_GROUP:
            return record.key
        texts, rest = [], record.group
        for group in reversed(self._group_columns):
            rest, position = divmod(rest, group.radix)
            texts.append(group.text_of[position])
        return "\0".join(reversed(texts))

    def _rows(self) -> Iterator[Record]:
        """Yield the records of rows whose files exist; raise ConfigError at the end for those that do not."""
        groups = self._group_columns
        files = TableFiles(self._root)
        is_empty = True
        self._tally_labels()
        tally_other_files(self._table, ".parquet", self.tally)
        tally_absent_parts((path.name for path in self._files), self.tally)
        for path in self._files:
            images = self._images.get(path.name)
            for row in self._read_rows(path, self._columns()):
                missing = files.num_missing
                record = self._record(row, groups, files, images)
                if files.num_missing == missing:
                    is_empty = False
                    yield record
            if images is not None:
                images.copy.require_unchanged()
        files.check_missing(self.config)
        require(not is_empty, f"data.path={self._table} has no rows")

    def _read_rows(self, path: Path, columns: dict[str, str]) -> Iterator[ListedRow]:
        """Yield the rows of one file, without the images that it contains."""
        images = self._images.get(path.name)
        if images is None:
            yield from read_rows(path, columns)
            return
        cells = {option: column for option, column in columns.items() if option != "image"}
        if cells:
            yield from read_rows(path, cells)
        else:
            yield from (ListedRow(path, number + 1, {}) for number in range(images.num_rows))

    def _all_rows(self, columns: dict[str, str]) -> Iterator[ListedRow]:
        return (row for path in self._files for row in read_rows(path, columns))

    def read(self, record: Record) -> Content:
        """Return the image's file unchanged, and the mask's values as PNG."""
        if isinstance(record.content[1], list | tuple):
            name, (row, size, suffix), *mask = record.content
            return Content(
                image=self._images[name].read(row, size),
                suffix=suffix,
                mask=self._read_mask(*mask) if mask else None,
            )
        path, size, *mask = record.content
        return Content(
            image=read_file(self._root, path, size),
            suffix=image_suffix(path),
            mask=self._read_mask(*mask) if mask else None,
        )

    def where(self, record: Record) -> str:
        """Return the image's file, or its row in a file of images."""
        name, place = record.content[:2]
        if isinstance(place, list | tuple):
            return f"{self._images[name].copy.path}, row {place[0] + 1}"
        return str(self._root / name)

    def _read_mask(self, path: str, size: int) -> bytes:
        return to_mask_png(read_file(self._root, path, size), path)

    # ---- columns ---------------------------------------------------------------------------------

    def _columns(self) -> dict[str, str]:
        """Map each option to the column that it names."""
        config = self.config
        named = {
            "image": self._image_column,
            "label": config.label,
            "labels": self._lists_column,
            "split": config.split,
            "boxes": config.boxes,
            "mask": config.mask,
            "weight": config.weight,
        }
        several = {"group": config.group, "labels": self._state_columns}
        for option, columns in several.items():
            named |= {f"{option}[{place}]": column for place, column in enumerate(columns)}
        return {option: column for option, column in named.items() if column is not None}

    @property
    def _state_columns(self) -> tuple[str, ...]:
        """Columns of data.labels, one for each class; empty if it names a single column or none."""
        return self.config.labels if isinstance(self.config.labels, tuple) else ()

    @property
    def _lists_column(self) -> str | None:
        """Column of data.labels, each of whose cells has all labels of a record."""
        return self.config.labels if isinstance(self.config.labels, str) else None

    @cached_property
    def _has_state_lists(self) -> bool:
        """True if the cells of data.labels say of each line of data.classes whether a record has it."""
        column, number = self._lists_column, len(self._class_list)
        if column is None or not number:
            return False
        rows = islice(self._all_rows({"labels": column}), _MAX_DISTINCT)
        lists = (self._cell_list(row, column) for row in rows)
        return any(are_states(values, number) for values in lists)

    @cached_property
    def _classes(self) -> ClassIndex:
        if self._state_columns:
            return ClassIndex(self._state_columns, False)
        if self._has_state_lists:
            return index_classes(set(), self.config.classes)
        column = self._label_column
        texts: set[str] = set()
        if column:
            for row in self._all_rows({self._label_option: column}):
                texts.update(self._class_texts(row))
        names = self._feature_names
        if names is not None and self.config.classes is None:
            return ClassIndex(names, all(to_number(text) is not None for text in texts))
        return index_classes(texts, self.config.classes)

    @cached_property
    def _feature_names(self) -> tuple[str, ...] | None:
        """Names of the labels in the features of Hugging Face's Parquet. Raises ConfigError if files differ."""
        names = {path.name: class_names_of(path, self._label_column) for path in self._files}
        if len(set(names.values())) > 1:
            first, *_ = names
            other = next(name for name, each in names.items() if each != names[first])
            raise ConfigError(
                f"data.path={self._table}: {first} and {other} give the labels of {self._label_column} other names, so "
                "their numbers mean other classes; write them with the same features"
            )
        return next(iter(names.values()), None)

    @property
    def _label_option(self) -> str:
        return "labels" if self.config.labels is not None else "label"

    @cached_property
    def _class_list(self) -> frozenset[str]:
        """Names of data.classes, among which a word such as NA is a class."""
        return load_class_list(self.config.classes)

    @cached_property
    def _distinct(self) -> set[str]:
        """Different label cells that are text, about _MAX_DISTINCT of them at most."""
        cells: set[str] = set()
        for path in self._files if self._label_column else ():
            for values in iter_distinct(path, self._label_column):
                cells |= {text for value in values if (text := to_text(value)) is not None}
                if len(cells) >= _MAX_DISTINCT:
                    return cells
        return cells

    @cached_property
    def _separator(self) -> str:
        """Separator of the names in a cell of data.labels; empty if cells are whole."""
        if self.config.label_separator is not None:
            return self.config.label_separator
        cells = {cell for cell in self._distinct if not is_list_text(cell)}
        return find_separator(cells, self._class_list)

    def _tally_labels(self) -> None:
        """Count what the label cells look like."""
        has_names = self.config.classes is not None or self._feature_names is not None
        if self._classes.is_numbered and not has_names:
            self.tally.add(NUMBERED, self._label_option, count=len(self.classes))
        cells = {cell for cell in self._distinct if not is_list_text(cell)}
        if self.config.labels is not None:
            if (
                self.config.label_separator is None
                and self._lists_column
                and not self._has_state_lists
            ):
                self._tally_separators(cells)
            return
        separator = find_separator(cells)
        if separator and separator != " " and self.config.label_separator is None:
            self._tally_cut(JOINED, cells, separator)
        for cell in sorted(self._distinct - cells)[:1]:
            self.tally.add(JOINED, "list", cell, len(self._distinct - cells))

    def _tally_separators(self, cells: set[str]) -> None:
        if self._separator:
            self._tally_cut(SEPARATED, cells, self._separator)
            return
        for separator in SEPARATORS:
            self._tally_cut(JOINED, cells, separator)

    def _tally_cut(self, topic: str, cells: set[str], separator: str) -> None:
        examples = sorted(cell for cell in cells if len(separate(cell, separator)) > 1)
        if examples:
            self.tally.add(topic, separator, examples[0], len(examples))

    @property
    def _label_column(self) -> str:
        return self._lists_column or self.config.label or ""

    @cached_property
    def _group_columns(self) -> list[GroupColumn]:
        groups = [self._group_column((name,), numbered=True) for name in self.config.group]
        fits = math.prod(group.radix for group in groups) <= MAX_GROUP
        return groups if fits else [self._group_column(self.config.group, numbered=False)]

    def _group_column(self, columns: tuple[str, ...], *, numbered: bool) -> GroupColumn:
        """Number the values of columns: whole numbers from 0 as they are, others by their position in sorted order.

        Args:
            columns: The columns.
            numbered: Whether whole numbers may stand for themselves; False for numbers that would be too large.
        """
        rows = self._all_rows({f"group[{at}]": column for at, column in enumerate(columns)})
        texts = {text for row in rows if (text := _group_text(row, columns)) is not None}
        numbers = {text: number for text in texts if (number := to_number(text)) is not None}
        if numbered and len(numbers) == len(texts) and min(numbers.values(), default=0) >= 0:
            return GroupColumn(columns, numbers, max(numbers.values(), default=0) + 1)
        return GroupColumn(
            columns, {text: number for number, text in enumerate(sorted(texts))}, len(texts)
        )

    def _class_texts(self, row: ListedRow) -> list[str]:
        if self._lists_column is not None:
            texts, column = self._many_texts(row, self._lists_column), self._lists_column
        else:
            text, column = self._label_text(row), self.config.label or ""
            texts = [] if text is None else [text]
        for text in texts:
            _check_class_text(row, column, text, is_named=self.config.classes is not None)
        return texts

    def _label_text(self, row: ListedRow) -> str | None:
        """Return the label's text, or None for an unlabeled row: a cell that means unknown, or -1."""
        if self.config.label is None:
            return None
        if isinstance(row.cells[self.config.label], (list, dict)):
            raise row.error(
                self.config.label,
                f"{quote(row.cells[self.config.label])} is not a single label; read a list of labels with "
                f"data.label=null data.labels={self.config.label}",
            )
        text = to_label(row.cells[self.config.label], self._class_list)
        return None if text is None or to_number(text) == NO_LABEL else text

    def _cell_list(self, row: ListedRow, column: str) -> Any:
        """Return a cell, parsed if it is the text of a list."""
        value = row.cells[column]
        if not isinstance(value, str) or not is_list_text(value.strip()):
            return value
        try:
            return parse_list(value.strip())
        except ValueError as error:
            raise row.error(
                column,
                f"{quote(value.strip())} looks like a list, but {error}; write JSON, as in "
                '["cat", "dog"]',
            ) from error

    def _many_texts(self, row: ListedRow, column: str) -> list[str]:
        value = self._cell_list(row, column)
        if isinstance(value, str):
            whole = to_label(value.strip(), self._class_list)
            value = [] if whole is None else separate(whole, self._separator)
        values = [] if value is None else value
        if isinstance(values, list) and values:
            self.tally.add(
                LABEL_LISTS, "0 and 1" if is_one_hot(values) else "labels", quote(values)
            )
        if not isinstance(values, list):
            raise row.error(column, f"expected a list of classes, got {quote(value)}")
        labels = (to_label(value, self._class_list) for value in values)
        return [text for text in labels if text is not None]

    # ---- one row ---------------------------------------------------------------------------------

    def _record(
        self,
        row: ListedRow,
        groups: list[GroupColumn],
        files: TableFiles,
        images: ParquetImages | None,
    ) -> Record:
        config = self.config
        if images is not None:
            image: tuple[Any, ...] = images.locate(row.number - 1)
            key = f"{row.table.stem}-{row.number - 1:07d}"
        else:
            image = files.add(row, config.image)
            if not is_image_name(image[0]):
                name = files.with_suffix(image[0])
                there = "" if name is None else f"; there is {quote(name)}: write the whole path"
                raise row.error(
                    config.image,
                    f"{quote(image[0])} is not an image file name{there}; known suffixes: {', '.join(IMAGE_SUFFIXES)}",
                )
            key = image[0]
        has_mask = config.mask is not None and row.text(config.mask) is not None
        mask = files.add(row, config.mask) if config.mask is not None and has_mask else ()
        label = self._label(row)
        labels = self._labels(row)
        boxes = self._boxes(row, label, labels)
        return Record(
            key=escape_key(key),
            split=self._split(row),
            label=label,
            labels=labels,
            group=_group(row, groups),
            weight=None if config.weight is None else _weight(row, config.weight),
            boxes=boxes,
            boxes_in_pixels=bool(boxes),
            content=(*image, *mask),
        )

    def _split(self, row: ListedRow) -> str:
        column, names = self.config.split, self.config.split_names
        if column is None:
            name = row.table.stem
            is_part = len(self._files) > 1 or _OF_SEVERAL.search(name)
            split = split_in_name(name) if is_part else TRAIN
            return split if known_split(split) else TRAIN
        text = row.text(column)
        if text is None or (is_unknown(text) and text not in names):
            return names.get("", self._split_to_draw(row, column))
        return split_of(text, names, partial(row.error, column), self.tally)

    def _split_to_draw(self, row: ListedRow, column: str) -> str:
        """Return UNKNOWN_SPLIT for a row without a split, if data.test_fraction draws it."""
        if self.config.test_fraction or "" in self.config.split_names:
            return UNKNOWN_SPLIT
        rows = self._all_rows({"split": column})
        count = sum(to_label(other.cells[column], frozenset()) is None for other in rows)
        raise row.error(
            column,
            f"is empty ({count:,} of all rows); data.test_fraction=0.2 draws such rows into {TRAIN} and {TEST}, and "
            f"'data.split_names={{\"\": {TRAIN}, ...}}' names their split",
        )

    def _label(self, row: ListedRow) -> int:
        text = self._label_text(row)
        if text is None or self.config.label is None:
            self._tally_unknown(row, self.config.label)
            return NO_LABEL
        return self._class(row, self.config.label, text)

    def _tally_unknown(self, row: ListedRow, column: str | None) -> None:
        if column is not None:
            tally_unknown(self.tally, row.cells[column], row.row_name, column)

    def _labels(self, row: ListedRow) -> tuple[int, ...]:
        column = self._lists_column
        if column is None:
            cells = {name: row.cells[name] for name in self._state_columns}
            return self._labels_of_states(row, cells)
        if self._has_state_lists:
            values = self._cell_list(row, column) or [None] * len(self.classes)
            if not isinstance(values, list) or len(values) != len(self.classes):
                raise row.error(
                    column,
                    f"{quote(values)} must have 1, 0 or null for each of the {len(self.classes)} lines of "
                    "data.classes, as other cells have",
                )
            return self._labels_of_states(row, dict(zip(self.classes, values, strict=True)))
        texts = self._many_texts(row, column)
        if not texts and _is_empty_list(row.cells[column]):
            return NONE
        if not texts:
            self._tally_unknown(row, column)
        return tuple(sorted({self._class(row, column, text) for text in texts}))

    def _labels_of_states(self, row: ListedRow, cells: dict[str, Any]) -> tuple[int, ...]:
        """Return the labels of a row, whose cells say of each class whether the record has it."""
        states: list[bool | None] = []
        for name, value in cells.items():
            try:
                states.append(state_of(value))
            except ValueError as error:
                raise row.error(name, str(error)) from error
        return labels_of_states(states)

    def _class(self, row: ListedRow, column: str, text: str) -> int:
        label = self._classes.label(text)
        if label is None:
            line = self._classes.line_of(text)
            remedy = (
                "correct it or data.classes"
                if line is None
                else f"data.classes has the line {quote(line)}: write the names of cells alone"
            )
            raise row.error(
                column,
                f"{quote(text)} is not one of the {len(self.classes)} classes; {remedy}",
            )
        return label

    def _boxes(self, row: ListedRow, label: int, labels: tuple[int, ...]) -> tuple[Box, ...]:
        column = self.config.boxes
        if column is None or to_text(row.cells[column]) is None:
            return ()
        value = row.cells[column]
        try:
            parsed = [
                (
                    [float(box[corner]) for corner in ("x0", "y0", "x1", "y1")],
                    to_text(box.get("label")),
                )
                for box in (
                    json.loads(value, object_pairs_hook=unique_names)
                    if isinstance(value, str)
                    else value
                )
            ]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise row.error(
                column, "expected a list of {x0, y0, x1, y1} in pixels, and optionally label"
            ) from error
        if self.config.labels is not None and any(text is None for _, text in parsed):
            try:
                label = label_of_box(labels)
            except ValueError as error:
                raise row.error(column, str(error)) from error
        return tuple(self._box(row, column, corners, text, label) for corners, text in parsed)

    def _box(
        self, row: ListedRow, column: str, corners: list[float], text: str | None, label: int
    ) -> Box:
        x0, y0, x1, y1 = corners
        self.tally.add(BOXES, "within 0 to 1" if max(corners) <= 1 else "in pixels", row.row_name)
        if not (x0 < x1 and y0 < y1 and all(map(math.isfinite, corners))):
            raise row.error(column, f"the box {x0:g}, {y0:g}, {x1:g}, {y1:g} has no area")
        box_label = label if text is None else self._class(row, column, text)
        return Box(label=box_label, x0=x0, y0=y0, x1=x1, y1=y1)


def _is_empty_list(value: Any) -> bool:
    """Return whether a cell is a list without a label, which says that the record has none."""
    text = value.strip() if isinstance(value, str) else value
    return text == [] or (isinstance(text, str) and is_list_text(text) and not parse_list(text))


# ---- cells ---------------------------------------------------------------------------------------


def _check_class_text(row: ListedRow, column: str, text: str, *, is_named: bool) -> None:
    """Raise ConfigError for text that can be neither the number nor the name of a class.

    With `is_named`, a file lists the classes, so that numbers do not determine the number of classes.
    """
    if len(text) > _MAX_CLASS_CHARACTERS:
        raise row.error(column, f"{text[:20]}... has {len(text)} characters, too many for a class")
    number = to_number(text)
    looks_whole = re.fullmatch(r"[+-]?[0-9]+(\.0*)?", text)  # with any number of digits
    if looks_whole and (number is None or (number >= MAX_CLASSES and not is_named)):
        raise row.error(
            column,
            f"label {text} is not below {MAX_CLASSES:,}; correct it, or list the classes in a file "
            "and set data.classes to it",
        )


def _group_text(row: ListedRow, columns: tuple[str, ...]) -> str | None:
    """Return the values of a row in these columns as one text, or None if one of them is unknown."""
    texts = [to_label(row.cells[column], frozenset()) for column in columns]
    return None if None in texts else "\0".join(map(str, texts))


def _weight(row: ListedRow, column: str) -> float:
    """Return the weight of a row. Raises ConfigError if it is not a number from 0 to the largest float32."""
    with suppress(ValueError):
        if 0 <= (weight := float(row.required(column))) <= float(np.finfo(np.float32).max):
            return weight
    raise row.error(column, f"{quote(row.cells[column])} is not a finite number >= 0; correct it")


def _group(row: ListedRow, groups: list[GroupColumn]) -> int:
    """Combine the columns' positions to one number, with the first column as its highest digit."""
    value = 0 if groups else NO_GROUP
    for group in groups:
        text = _group_text(row, group.columns)
        if text is None:
            return NO_GROUP
        value = value * group.radix + group.position_of[text]
    return value
