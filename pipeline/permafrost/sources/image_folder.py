"""Images in folders named after their classes: `<path>/<class>/...` or `<path>/<split>/<class>/...`.

A record's key is its escaped path below data.path. A store of the folder therefore names every image permanently, and
folder and store can be compared name by name.
"""

from __future__ import annotations

import logging
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from permafrost.core.addresses import is_address
from permafrost.core.errors import ConfigError
from permafrost.core.records import Content, Record
from permafrost.core.rooted_paths import is_folder, rooted
from permafrost.sources.classes import load_class_names
from permafrost.sources.image_files import (
    escape_key,
    first_image,
    hidden_folders,
    image_suffix,
    iter_images,
    read_file,
    stamp_of,
    sub_folders,
)
from permafrost.sources.splits import TRAIN, is_split_name, split_off_test

if TYPE_CHECKING:
    from collections.abc import Iterator

    from permafrost.config.data import ImageFolderDataConfig

logger = logging.getLogger("permafrost.precompute")

SPLIT_FOLDERS = frozenset({"train", "val", "valid", "validation", "test"})


class ImageFolderSource:
    """Source of the images of a folder, with the files' own bytes."""

    name = "image_folder"
    revision = 1
    frame_size = None
    columns = None

    def __init__(self, config: ImageFolderDataConfig) -> None:
        self.config = config
        self._root = (
            rooted(config.path) if is_address(config.path) else Path(config.path).absolute()
        )

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of the class folders of all splits, sorted, or the lines of data.classes."""
        found = {name for folder in self._split_folders() for name in self._class_folders(folder)}
        if self.config.classes is None:
            return tuple(sorted(found))
        names = load_class_names(self.config.classes)
        unknown = sorted(found - set(names))
        if unknown:
            raise ConfigError(
                f"data.classes={self.config.classes} lacks the class folder {unknown[0]!r} of "
                f"data.path={self.config.path}; add its name or move the folder away"
            )
        return names

    def records(self) -> Iterator[Record]:
        """Yield one record per image, labeled by its class folder."""
        return split_off_test(self._images(), self.config.test_fraction)

    def stamps(self) -> dict[str, int]:
        """Return when images were last added to each class folder or removed from it, in nanoseconds; of a bucket, a
        number that changes then.
        """
        return {
            (path := _join(folder, name)): stamp_of(self._root / path)
            for folder in self._split_folders()
            for name in self._class_folders(folder)
        }

    def _images(self) -> Iterator[Record]:
        label_of = {name: label for label, name in enumerate(self.classes)}
        found: set[int] = set()
        for folder, split in self._split_folders().items():
            for name in self._class_folders(folder):
                for path, size in iter_images(self._root, _join(folder, name)):
                    found.add(label_of[name])
                    yield Record(
                        key=escape_key(path),
                        split=split,
                        label=label_of[name],
                        content=(path, size),
                    )
        if not found:
            raise ConfigError(
                f"data.path={self.config.path} has class folders but no images in them; "
                "expected <path>/<class>/<image> or <path>/<split>/<class>/<image>"
            )
        self._warn_of_absent_classes(found)

    def _warn_of_absent_classes(self, classes: set[int]) -> None:
        """Name the classes without images, and the folders that are left out because they begin with a dot."""
        empty = [name for label, name in enumerate(self.classes) if label not in classes]
        if empty:
            logger.warning("classes without images: %s", ", ".join(empty[:10]))
        hidden = [
            _join(f, name) for f in self._split_folders() for name in hidden_folders(self._root / f)
        ]
        if hidden:
            logger.warning("folders that begin with a dot are left out: %s", ", ".join(hidden[:10]))

    def read(self, record: Record) -> Content:
        """Return the file unchanged."""
        path, size = record.content
        return Content(image=read_file(self._root, path, size), suffix=image_suffix(path))

    def where(self, record: Record) -> str:
        """Return the image's file."""
        return str(self._root / record.content[0])

    def _split_folders(self) -> dict[str, str]:
        """Map each folder of class folders to its split; the empty name is data.path itself."""
        if self.config.splits:
            self._check_splits()
            return self.config.splits
        top = sub_folders(self._root)
        if not top or not SPLIT_FOLDERS.issuperset(top):
            self._refuse_hidden_splits(top)
            return {"": TRAIN}
        self._refuse_loose_images("")
        return {name: name for name in top}

    def _refuse_hidden_splits(self, top: list[str]) -> None:
        """Raise ConfigError if only some top-level folders are splits (a split's name, and only folders
        inside)."""
        splits = [
            name
            for name in top
            if name in SPLIT_FOLDERS
            and first_image(self._root / name) is None
            and sub_folders(self._root / name)
        ]
        if splits:
            others = next(name for name in top if name not in SPLIT_FOLDERS)
            named = ", ".join(f"{name}: {name}" for name in splits)
            raise ConfigError(
                f"data.path={self.config.path} contains folders of splits ({', '.join(splits)}) and others "
                f"({others}); name the splits: 'data.splits={{{named}}}'"
            )

    def _check_splits(self) -> None:
        for folder, split in self.config.splits.items():
            if not is_folder(self._root / folder):
                there = ", ".join(sub_folders(self._root)) or "no folders"
                raise ConfigError(
                    f"data.splits names the folder {folder!r}, but data.path={self.config.path} "
                    f"contains: {there}"
                )
            if not is_split_name(split):
                raise ConfigError(
                    f"data.splits.{folder}={split!r} must have only letters, digits, - and _"
                )

    def _class_folders(self, folder: str) -> list[str]:
        self._refuse_loose_images(folder)
        names = sub_folders(self._root / folder)
        if not names:
            raise ConfigError(
                f"data.path={self.config.path} has no class folders in {folder or 'it'}; expected "
                "<path>/<class>/<image> or <path>/<split>/<class>/<image>"
            )
        return names

    def _refuse_loose_images(self, folder: str) -> None:
        image = first_image(self._root / folder)
        if image is not None:
            raise ConfigError(
                f"data.path={self.config.path} has images outside of any class folder, such as "
                f"{_join(folder, image)}; move them into a folder named after their class, leave their "
                "folder out with data.splits, or list them in a table and use data=image_table"
            )


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
