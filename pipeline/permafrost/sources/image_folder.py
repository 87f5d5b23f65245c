"""Images in folders named after their classes: `<path>/<class>/...` or `<path>/<split>/<class>/...`.

Top-level folders are splits if all of them spell one (train, Testing, val_set). What was left out or looks wrong is
counted while the records are listed (`tally`), and becomes findings of a preview.

A record's key is its escaped path below data.path. A store of the folder therefore names every image permanently, and
folder and store can be compared name by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

from permafrost.config.data import ImageFolderDataConfig
from permafrost.core.errors import ConfigError, quote, require
from permafrost.core.records import Record, escape_key
from permafrost.sources.bursts import with_bursts
from permafrost.sources.classes import ClassIndex, index_classes
from permafrost.sources.image_files import (
    LEFT_OUT,
    OTHER_PICTURES,
    FilesBelowRoot,
    SourceFileError,
    first_image,
    has_image,
    iter_images,
    join_path,
    path_as_stored,
    sub_folders,
    tally_passed_over,
)
from permafrost.sources.splits import (
    SPELLED_SPLITS,
    TRAIN,
    is_split_name,
    known_split,
    split_off_test,
)
from permafrost.sources.tally import Tally
from permafrost.storage.files import file_at
from permafrost.storage.rooted_paths import RootedPath, user_path

# Topics of the tally of a folder. A topic of one split's folder has its path after a colon.
EMPTY_FOLDERS = "class folders without images"
"""Topic of a tally: class folders that have no image."""
CLASS_FOLDERS = "class folders"
"""Topic: class folders, by name."""
FOLDERS_ONLY = "class folders whose images are all in folders"
"""Topic: class folders that have images only in folders inside of them."""
NESTED_FOLDERS = "folders in class folders"
"""Topic, of a class folder after a colon: the folders inside of it."""

_KINDS_OF_FILES = {".parquet": "image_table", ".csv": "image_table", ".tar": "webdataset"}
"""Kinds of data that read a folder of files with a suffix."""


class ImageFolderSource(FilesBelowRoot):
    """Source of the images of a folder, with the files' own bytes."""

    name = "image_folder"

    def __init__(self, config: ImageFolderDataConfig) -> None:
        self.config = config
        self._root = user_path(config.path).absolute()
        self.tally = Tally()
        """Counts of what the last listing met."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the class folders with images of all splits, sorted, or the lines of data.classes."""
        return self._index.names

    @cached_property
    def _index(self) -> ClassIndex:
        folders = {
            name
            for folder in self._split_folders
            for name in self._class_folders(folder)
            if has_image(self._root / folder / name)
        }
        if not folders:
            raise ConfigError(
                f"data.path={self.config.path} has class folders but no images in them{self._describe_files()}; "
                "expected <path>/<class>/<image> or <path>/<split>/<class>/<image>"
            )
        index = index_classes(folders, self.config.classes, numbered=False)
        unknown = sorted(name for name in folders if index.label(name) is None)
        if unknown:
            line = index.line_of(unknown[0])
            remedy = (
                "add its name or move the folder away"
                if line is None
                else f"it has the line {quote(line)}; write the names of folders alone"
            )
            raise ConfigError(
                f"data.classes={self.config.classes} lacks the class folder {quote(unknown[0])} of "
                f"data.path={self.config.path}; {remedy}"
            )
        return index

    def _describe_files(self) -> str:
        """Describe the files of a folder without images, by suffix."""
        tally = Tally()
        for folder in self._split_folders:
            for name in self._class_folders(folder):
                list(iter_images(self._root, join_path(folder, name), tally))
        files = {**tally[LEFT_OUT], **tally[OTHER_PICTURES]}
        counts = ", ".join(f"{count:,} {item}" for item, (count, _) in list(files.items())[:8])
        return f" ({counts})" if counts else ""

    def records(self) -> Iterator[Record]:
        """Yield one record per image, labeled by its class folder."""
        images = with_bursts(self._images(), self._root) if self.config.group else self._images()
        return split_off_test(
            images,
            self.config.test_fraction,
            (lambda record: str(record.group)) if self.config.keep_groups else None,
            is_exact=True,
        )

    def stamps(self) -> dict[str, int]:
        """Return when images were last added to each class folder or removed from it, in nanoseconds.

        Of a bucket, it is a number that changes then.
        """
        return {
            (path := join_path(folder, name)): file_at(self._root / path).folder_stamp()
            for folder in self._split_folders
            for name in self._class_folders(folder)
        }

    def _images(self) -> Iterator[Record]:
        for folder, split in self._split_folders.items():
            tally_passed_over(self._root, folder, self.tally)
            if folder and folder != split and not self.config.splits:
                self.tally.add(SPELLED_SPLITS, folder, split)
            for name in self._class_folders(folder):
                yield from self._class_images(folder, split, name)

    def _class_images(self, folder: str, split: str, name: str) -> Iterator[Record]:
        """Yield the images of one class folder, and count the folders in it."""
        class_folder = join_path(folder, name)
        label = self._index.label(name)
        direct, nested, last = 0, 0, ""
        for path, size in iter_images(self._root, class_folder, self.tally):
            if label is None:  # the first image came after the folders were looked at
                raise SourceFileError(
                    f"{self._root / path} is new; run the command again once the data no longer change"
                )
            inner, is_nested, _ = path[len(class_folder) + 1 :].partition("/")
            if is_nested and inner != last:
                last = inner
                self.tally.add(f"{NESTED_FOLDERS}:{folder}", inner, f"{class_folder}/{inner}")
            direct, nested = direct + (not is_nested), nested + bool(is_nested)
            yield Record(key=escape_key(path), split=split, label=label, content=(path, size))
        if not direct and not nested:
            self.tally.add(EMPTY_FOLDERS, class_folder, class_folder)
            return
        self.tally.add(CLASS_FOLDERS, folder, class_folder)
        if not direct:
            self.tally.add(FOLDERS_ONLY, folder, class_folder)

    @cached_property
    def _split_folders(self) -> dict[str, str]:
        """Map each folder of class folders to its split; the empty name is data.path itself."""
        if self.config.splits:
            splits = {
                path_as_stored(self._root, folder, {}): split
                for folder, split in self.config.splits.items()
            }
            for folder, chosen in splits.items():
                if not file_at(self._root / folder).is_folder():
                    there = ", ".join(sub_folders(self._root)) or "no folders"
                    raise ConfigError(
                        f"data.splits names the folder {folder!r}, but data.path={self.config.path} "
                        f"contains: {there}"
                    )
                require(
                    is_split_name(chosen),
                    f"data.splits.{folder}={chosen!r} must have only letters, digits, - and _",
                )
            return splits
        top = sub_folders(self._root)
        splits = {name: split for name in top if (split := known_split(name)) is not None}
        others = [name for name in top if name not in splits]
        are_splits = bool(splits) and all(  # folders of folders, without images of their own
            first_image(folder) is None and sub_folders(folder)
            for folder in (self._root / name for name in splits)
        )
        if are_splits and not any(has_image(self._root / name) for name in others):
            others = []  # such as a folder of documents
        if not top or others:
            self._refuse_hidden_splits(top)
            return {"": TRAIN}
        self._refuse_loose_images("")
        for split in splits.values():
            names = [name for name in top if splits.get(name) == split]
            require(
                len(names) == 1,
                f"data.path={self.config.path}: the folders {' and '.join(names)} both spell split {split}; name "
                f"the splits: 'data.splits={{{names[0]}: {split}, ...}}'",
            )
        return splits

    def _refuse_hidden_splits(self, top: list[str]) -> None:
        """Raise ConfigError if only some top-level folders are splits, by their names and with only folders inside."""
        splits = {
            name: split
            for name in top
            if (split := known_split(name)) is not None
            and first_image(self._root / name) is None
            and sub_folders(self._root / name)
        }
        if splits:
            rest = next(name for name in top if name not in splits)
            pairs = ", ".join(f"{name}: {split}" for name, split in {**splits, rest: "..."}.items())
            raise ConfigError(
                f"data.path={self.config.path} contains folders of splits ({', '.join(splits)}) and others "
                f"({rest}); name the splits: 'data.splits={{{pairs}}}'"
            )

    def _class_folders(self, folder: str) -> list[str]:
        self._refuse_loose_images(folder)
        names = sub_folders(self._root / folder)
        if not names:
            files = file_at(RootedPath.of(self._root / folder)).paths()
            kinds = [kind for path in files if (kind := _KINDS_OF_FILES.get(path.suffix))]
            raise ConfigError(
                f"data.path={self.config.path} has no class folders in {folder or 'it'}; expected "
                "<path>/<class>/<image> or <path>/<split>/<class>/<image>"
                + (f", or read its files with data={kinds[0]}" if kinds else "")
            )
        return names

    def _refuse_loose_images(self, folder: str) -> None:
        if (image := first_image(self._root / folder)) is not None:
            raise ConfigError(
                f"data.path={self.config.path} has images outside of any class folder, such as "
                f"{join_path(folder, image)}; move them into a folder named after their class, or list them in a table "
                "(data=image_table)"
            )
