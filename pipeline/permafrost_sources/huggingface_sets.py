"""Data sets of Hugging Face, as the package `datasets` reads them: a folder, or a name on the hub.

Images, labels, class names, several labels and boxes are columns. `datasets` keeps them in Arrow files that it maps
into memory, so a row is read without the others. No code of a data set runs: `datasets` reads data files alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from permafrost.core.errors import ConfigError, FileError, first_line, quote, require
from permafrost.core.records import (
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
from permafrost.sources.classes import ClassIndex, index_classes
from permafrost.sources.image_files import SourceFileError
from permafrost.sources.label_cells import UNLABELED_CELLS, state_of
from permafrost.sources.splits import known_split, split_off_test
from permafrost.sources.table_files import UNKNOWN_CELLS, to_label
from permafrost.sources.tally import Tally
from permafrost.storage.files import file_at, named_file
from permafrost.store.image_decoding import MAX_IMAGE_BYTES, picture_suffix
from permafrost_sources.options import HuggingFaceDataConfig

_ROWS_AT_ONCE = 1000


class HuggingFaceSource(ImageSource):
    """Source of the images of a data set, with the files' own bytes."""

    name = "huggingface"

    def __init__(self, config: HuggingFaceDataConfig) -> None:
        self.config = config
        self.tally = Tally()
        """Counts of what the last listing met."""

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config, "tally": self.tally}

    @cached_property
    def _sets(self) -> dict[str, Any]:
        """Data set of each of its splits, with images as bytes."""
        try:
            import datasets
        except ImportError:
            raise ConfigError(
                "data=huggingface needs the package datasets; install it (pip install datasets), or read the "
                "Parquet files of a folder with data=image_table data.path=<folder>"
            ) from None
        config = self.config
        where = config.path or config.name
        datasets.disable_progress_bars()
        try:
            if config.path and (Path(config.path) / "dataset_dict.json").is_file():
                opened = datasets.load_from_disk(config.path)
            elif config.path and (Path(config.path) / "state.json").is_file():
                opened = {"train": datasets.load_from_disk(config.path)}
            else:
                opened = datasets.load_dataset(
                    where, config.configuration, revision=config.revision, cache_dir=config.cache
                )
        except Exception as error:  # of untrusted files, the network or the hub
            raise ConfigError(
                f"data={config.kind}: {where} cannot be read by datasets ({first_line(error)}); correct data.path or "
                "data.name"
            ) from error
        sets = {}
        for split, rows in opened.items():
            columns = rows.features
            for option, column in self._column_names.items():
                require(
                    column in columns,
                    f"data.{option}={column}: {where} has no such column in split {split}, but {', '.join(columns)}",
                )
            if isinstance(columns[config.image], datasets.Image):
                rows = rows.cast_column(config.image, datasets.Image(decode=False))
            sets[str(split)] = rows
        return sets

    @property
    def _column_names(self) -> dict[str, str]:
        """Columns by the option that names them."""
        config = self.config
        options = {
            "image": config.image,
            "label": config.label,
            "labels": config.labels if isinstance(config.labels, str) else None,
            "boxes": config.boxes,
            "key": config.key,
            **{f"labels[{place}]": column for place, column in enumerate(self._state_columns)},
        }
        return {option: column for option, column in options.items() if column is not None}

    @property
    def _state_columns(self) -> tuple[str, ...]:
        """Columns of data.labels, one for each class; empty if it names a single column or none."""
        return self.config.labels if isinstance(self.config.labels, tuple) else ()

    def stamps(self) -> Mapping[str, str]:
        """Return the fingerprint of each split, which `datasets` derives from its files."""
        return {split: str(rows._fingerprint) for split, rows in self._sets.items()}

    # ---- classes ---------------------------------------------------------------------------------

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the features of the label column, or its sorted values."""
        return self._classes.names

    @cached_property
    def _classes(self) -> ClassIndex:
        column = self.config.label or self.config.labels
        if column is None or isinstance(column, tuple):
            return ClassIndex(self._state_columns, False)
        names = [_names_of(rows.features[column]) for rows in self._sets.values()]
        if names[0] is not None:
            require(
                all(other == names[0] for other in names),
                f"data.label={column}: the splits give the labels other names, so their numbers mean other classes",
            )
            return ClassIndex(tuple(names[0]), True)
        texts: set[str] = set()
        for rows in self._sets.values():
            for batch in rows.select_columns([column]).iter(_ROWS_AT_ONCE):
                cells = batch[column]
                lists = cells if self.config.labels else ([cell] for cell in cells)
                labels = (to_label(value, frozenset()) for cell in lists for value in cell or ())
                texts |= {text for text in labels if text is not None and text != str(NO_LABEL)}
        return index_classes(texts, None)

    def _label(self, value: Any, where: str) -> int:
        text = to_label(value, frozenset())
        if text is None or text == str(NO_LABEL):
            topic = UNKNOWN_CELLS if text is None and value else UNLABELED_CELLS
            place = where[where.rindex("split ") :]
            self.tally.add(
                topic, "empty" if value is None else str(value).strip() or "empty", place
            )
            return NO_LABEL
        label = self._classes.label(text)
        if label is None:
            raise ConfigError(
                f"{where}: {quote(value)} is not one of the {len(self.classes)} classes"
            )
        return label

    # ---- records ---------------------------------------------------------------------------------

    def records(self) -> Iterator[Record]:
        """Yield one record per row."""
        return split_off_test(self._rows(), self.config.test_fraction, is_exact=True)

    def _rows(self) -> Iterator[Record]:
        for name, rows in self._sets.items():
            split = self.config.splits.get(name, known_split(name) or name)
            if self.config.splits and name not in self.config.splits:
                continue
            columns = [column for option, column in self._column_names.items() if option != "image"]
            number = 0
            if not columns:
                yield from (self._record(name, split, number, {}) for number in range(len(rows)))
                continue
            for batch in rows.select_columns(list(dict.fromkeys(columns))).iter(_ROWS_AT_ONCE):
                for place in range(len(next(iter(batch.values())))):
                    cells = {column: values[place] for column, values in batch.items()}
                    yield self._record(name, split, number, cells)
                    number += 1

    def _record(self, name: str, split: str, number: int, cells: Mapping[str, Any]) -> Record:
        config = self.config
        where = f"{config.path or config.name}, split {name}, row {number}"
        label = NO_LABEL if config.label is None else self._label(cells[config.label], where)
        labels: tuple[int, ...] = ()
        if isinstance(config.labels, str):
            cell = cells[config.labels]
            labels = tuple(sorted({self._label(value, where) for value in cell or ()} - {NO_LABEL}))
            labels = NONE if cell == [] else labels
        elif config.labels is not None:
            try:
                labels = labels_of_states([state_of(cells[column]) for column in config.labels])
            except ValueError as error:
                raise ConfigError(f"{where}: {error}") from error
        boxes = () if config.boxes is None else self._boxes(cells[config.boxes], label, where)
        if config.labels is not None and any(box.label == NO_LABEL for box in boxes):
            try:
                only = label_of_box(labels)
            except ValueError as error:
                raise ConfigError(f"{where}: {error}") from error
            boxes = tuple(
                replace(box, label=only) if box.label == NO_LABEL else box for box in boxes
            )
        key = f"{name}/{number:08d}" if config.key is None else str(cells[config.key])
        return Record(
            key=escape_key(key),
            split=split,
            label=label,
            labels=labels,
            boxes=boxes,
            boxes_in_pixels=bool(boxes),
            content=(name, number),
        )

    def _boxes(self, cell: Any, label: int, where: str) -> tuple[Box, ...]:
        """Return the boxes of a cell: {bbox: [[...]], category: [...]}, or a list of such mappings, or of corners."""
        if cell is None:
            return ()
        try:
            if isinstance(cell, Mapping):
                corners = list(cell["bbox"])
                kinds = list(
                    next(
                        (cell[name] for name in _CATEGORIES if name in cell), [None] * len(corners)
                    )
                )
            else:
                corners = [entry["bbox"] if isinstance(entry, Mapping) else entry for entry in cell]
                kinds = [
                    next((entry[name] for name in _CATEGORIES if name in entry), None)
                    if isinstance(entry, Mapping)
                    else None
                    for entry in cell
                ]
            return tuple(
                self._box([float(number) for number in box], label if kind is None else kind, where)
                for box, kind in zip(corners, kinds, strict=True)
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{where}: data.boxes={self.config.boxes} must have `bbox`, lists of four numbers, and optionally "
                f"`category` ({error})"
            ) from error

    def _box(self, numbers: list[float], kind: Any, where: str) -> Box:
        x0, y0, third, fourth = numbers
        x1, y1 = (third, fourth) if self.config.box_form == "xyxy" else (x0 + third, y0 + fourth)
        require(
            x0 < x1 and y0 < y1 and all(map(math.isfinite, (x0, y0, x1, y1))),
            f"{where}: the box {numbers} has no area; see data.box_form",
        )
        label = (
            kind if isinstance(kind, int) and kind < len(self.classes) else self._label(kind, where)
        )
        return Box(label=label, x0=x0, y0=y0, x1=x1, y1=y1)

    def read(self, record: Record) -> Content:
        """Return the image's file unchanged."""
        split, number = record.content
        cell = self._sets[split][number][self.config.image]
        data = cell if isinstance(cell, bytes) else None
        if isinstance(cell, Mapping):
            data = cell.get("bytes")
            if data is None and cell.get("path"):
                data = self._read_file(str(cell["path"]), record)
        if not data:
            raise SourceFileError(
                f"{self.where(record)}: column {self.config.image} has no image; set data.image="
            )
        return Content(image=data, suffix=picture_suffix(data[:16]) or "bin")

    def _read_file(self, name: str, record: Record) -> bytes:
        """Read the file that a cell names, in the folder of the data set or in the caches of `datasets` and the hub."""
        import datasets
        from huggingface_hub.constants import HF_HUB_CACHE

        config = self.config
        caches = [config.cache or datasets.config.HF_DATASETS_CACHE, HF_HUB_CACHE]
        folder = Path(config.root or config.path or caches[0])
        try:
            return file_at(named_file(name, folder, *map(Path, caches))).read(MAX_IMAGE_BYTES)
        except (FileError, FileNotFoundError) as error:
            raise SourceFileError(
                f"{self.where(record)}: {error}; the folder of all files is data.root="
            ) from error

    def where(self, record: Record) -> str:
        """Return the data set, its split and the row."""
        split, number = record.content
        return f"{self.config.path or self.config.name}, split {split}, row {number}"


_CATEGORIES = ("category", "categories", "label", "labels", "category_id")


def _names_of(feature: Any) -> list[str] | None:
    """Return the class names of a column of labels, or of lists of labels; None if it has none."""
    inner = getattr(feature, "feature", feature)
    inner = inner[0] if isinstance(inner, list) else inner
    names = getattr(inner, "names", None)
    return None if names is None else list(names)
