"""Some classes of a source (`data.only_classes=`): the records of these classes, with labels in the given order."""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from permafrost.core.errors import ConfigError, require, shorten

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from permafrost.core.records import Content, Record, Source
    from permafrost.sources.parts import PartedSource


class ClassSubset:
    """The records of some classes of a source. Records without a label and boxes of other classes are left out."""

    def __init__(self, source: Source, classes: tuple[str, ...]) -> None:
        for name in classes:
            if name not in source.classes:
                close = difflib.get_close_matches(name, source.classes, n=1)
                hint = f" (did you mean {close[0]}?)" if close else ""
                raise ConfigError(
                    f"data.only_classes: there is no class {name!r}{hint} among the {len(source.classes)} of the "
                    f"data: {shorten(source.classes)}"
                )
        self.source = source
        self.classes = classes
        self.name = source.name
        self.revision = source.revision

    @property
    def frame_size(self) -> tuple[int, int] | None:
        """(height, width) of all images; None where sizes differ or are unknown."""
        return self.source.frame_size

    @property
    def columns(self) -> tuple[str, ...] | None:
        """Names of a table's columns; None where records are images."""
        return self.source.columns

    def records(self) -> Iterator[Record]:
        """Yield the records of the classes. Raises ConfigError if records have several labels."""
        return self._kept(self.source.records())

    def _kept(self, records: Iterable[Record]) -> Iterator[Record]:
        new_labels = {
            label: self.classes.index(name)
            for label, name in enumerate(self.source.classes)
            if name in self.classes
        }
        for record in records:
            require(
                not record.labels,
                f"data.only_classes={list(self.classes)} needs records with one label, but {record.key} has several; "
                "leave data.only_classes empty",
            )
            if record.label in new_labels:
                boxes = tuple(
                    replace(box, label=new_labels[box.label])
                    for box in record.boxes
                    if box.label in new_labels
                )
                yield replace(record, label=new_labels[record.label], boxes=boxes)

    def read(self, record: Record) -> Content:
        """Return the bytes of a record."""
        return self.source.read(record)

    def where(self, record: Record) -> str:
        """Return the location of a record for messages."""
        return self.source.where(record)


class PartedClassSubset(ClassSubset):
    """The same for a source in parts, which stay parts."""

    @property
    def unique_keys_option(self) -> str:
        """Option that makes equal keys in several parts different."""
        return self._parted.unique_keys_option

    def parts(self) -> dict[str, int]:
        """Return the bytes of each part by its name."""
        return self._parted.parts()

    def part_records(self, part: str) -> Iterator[Record]:
        """Yield the records of the classes in one part."""
        return self._kept(self._parted.part_records(part))

    def classes_up_to(self, largest_label: int) -> tuple[str, ...]:
        """Return the chosen classes."""
        return self.classes

    @property
    def _parted(self) -> PartedSource:
        return cast("PartedSource", self.source)
