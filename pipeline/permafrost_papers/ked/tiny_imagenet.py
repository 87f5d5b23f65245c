"""Tiny ImageNet with its boxes, as unpacked from tiny-imagenet-200.zip.

Labels number the 200 WordNet ids of wnids.txt in sorted order (the file itself is not sorted), so that they equal
those of an image folder of train/. The box corners in the files are the first and the last pixel inside. A record's
x1 and y1 are exclusive and therefore larger by one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from permafrost.core.errors import ConfigError, require
from permafrost.core.records import NO_LABEL, Box, Record, escape_key
from permafrost.sources.image_files import FilesBelowRoot, iter_images
from permafrost.storage.files import iter_lines
from permafrost_papers.ked.data_options import TinyImageNetDataConfig

logger = logging.getLogger("permafrost.sources")

_WITHOUT_BOXES = "restore it, or accept such images without boxes with data.on_error=skip"


class TinyImageNetSource(FilesBelowRoot):
    """Source of splits train and val, and of unlabeled_test if the folder test/ exists."""

    name = "tiny_imagenet"
    frame_size = (64, 64)
    _root: Path

    def __init__(self, config: TinyImageNetDataConfig) -> None:
        self.config = config
        self._root = Path(config.path).absolute()

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Sorted WordNet ids."""
        return tuple(sorted(set(self._read_lines("wnids.txt"))))

    def records(self) -> Iterator[Record]:
        """Yield every image; those of test/ have no label."""
        yield from self._train_records()
        yield from self._val_records()
        if (self._root / "test" / "images").is_dir():
            yield from (
                _record("unlabeled_test", path, size, NO_LABEL, [])
                for path, size in iter_images(self._root, "test/images")
            )

    def _train_records(self) -> Iterator[Record]:
        for label, wnid in enumerate(self.classes):
            if self.config.only_classes and wnid not in self.config.only_classes:
                continue  # whose boxes may be missing
            annotations = f"train/{wnid}/{wnid}_boxes.txt"
            corners = self._read_corners(annotations)
            without = 0
            for path, size in iter_images(self._root, f"train/{wnid}/images"):
                name = path.rpartition("/")[2]
                require(
                    name in corners or self.config.on_error != "stop",
                    f"{self._root / annotations} has no line for {name}; {_WITHOUT_BOXES}",
                )
                without += name not in corners
                yield _record("train", path, size, label, corners.get(name, []))
            if without:
                logger.warning("%s has no boxes for %d images", self._root / annotations, without)

    def _read_corners(self, annotations: str) -> dict[str, list[str]]:
        """Read the corners of each image's box by its name; empty if the file is missing and may be."""
        if not (self._root / annotations).exists():
            if self.config.on_error == "skip":
                return {}
            raise ConfigError(f"{self._root / annotations} is missing; {_WITHOUT_BOXES}")
        return {name: box for name, *box in self._read_table(annotations, columns=5)}

    def _val_records(self) -> Iterator[Record]:
        label_of = {wnid: label for label, wnid in enumerate(self.classes)}
        annotations = "val/val_annotations.txt"
        known = {name: rest for name, *rest in self._read_table(annotations, columns=6)}
        for path, size in iter_images(self._root, "val/images"):
            name = path.rpartition("/")[2]
            wnid, *corners = known.get(name, [""])
            require(
                wnid in label_of, f"{self._root / annotations} has no class of wnids.txt for {name}"
            )
            yield _record("val", path, size, label_of[wnid], corners)

    def _read_table(self, path: str, columns: int) -> Iterator[list[str]]:
        for number, line in enumerate(self._read_lines(path), start=1):
            cells = line.split()
            require(
                len(cells) == columns and all(cell.isdecimal() for cell in cells[-4:]),
                f"{self._root / path}, line {number}: expected {columns} columns, the last four "
                f"whole numbers, got {line!r}",
            )
            yield cells

    def _read_lines(self, path: str) -> list[str]:
        try:
            return [*filter(None, map(str.strip, iter_lines(self._root / path)))]
        except OSError as error:
            raise ConfigError(
                f"data.path={self.config.path} must be the folder tiny-imagenet-200 as unpacked, but "
                f"{path} cannot be read: {error.strerror}"
            ) from error


def _record(split: str, path: str, size: int, label: int, corners: list[str]) -> Record:
    boxes: tuple[Box, ...] = ()
    if corners:
        x0, y0, x1, y1 = map(int, corners)
        boxes = (Box(label=label, x0=x0, y0=y0, x1=x1 + 1, y1=y1 + 1),)
    return Record(
        key=escape_key(path),
        split=split,
        label=label,
        boxes=boxes,
        boxes_in_pixels=bool(boxes),
        content=(path, size),
    )
