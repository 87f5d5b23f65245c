"""External WebDataset tars: found, listed by member, read by offset, never unpickled."""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from permafrost.core.errors import ConfigError, UserError, quote, require
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
    has_leading_zero,
    is_unknown,
    load_class_names,
    to_number,
)
from permafrost.sources.image_files import image_suffix, is_image_suffix
from permafrost.sources.label_cells import (
    LABEL_LISTS,
    UNLABELED_CELLS,
    is_one_hot,
    state_of,
    unique_names,
)
from permafrost.sources.several_files import (
    expand_range,
    find_files,
    split_before_number,
    split_in_name,
    tally_absent_parts,
    tally_other_files,
)
from permafrost.sources.splits import SPELLED_SPLITS, is_split_name, known_split
from permafrost.sources.tally import BOXES, Tally
from permafrost.storage.addresses import is_address
from permafrost.storage.files import file_at
from permafrost.storage.rooted_paths import AnyPath
from permafrost.store.image_decoding import ImageError
from permafrost.store.listing import Listing
from permafrost.store.shard_plan import ShardPlan, find_unmixed_shard
from permafrost_sources.downloads import check_download, download
from permafrost_sources.options import WebDatasetDataConfig
from permafrost_sources.tar_members import (
    Member,
    find_tars_in_bucket,
    has_scattered_samples,
    list_samples,
    read_member,
)

MASK_SUFFIX = "mask.png"
_MAX_LABEL_BYTES = 2**22
"""Largest size of a sample's .cls or .json."""

# Topics of the tally of tars.
NUMBERED_TARS = "tars whose labels are numbers"
"""Topic of a tally: tars whose labels are numbers."""
OTHER_MEMBERS = "members of tars that are not read"
"""Topic of a tally: members of samples that are not read, by suffix."""
UNLABELED_MEMBERS = "members of samples without a label"
"""Topic of a tally: members of samples that have no label."""
JSON_KEYS = "keys in the .json of samples without a label"
"""Topic of a tally: keys in the .json of samples that have no label."""
OTHER_KEYS = "keys of .json that are not read"
"""Topic of a tally: keys in the .json of samples that no option reads."""
UNKNOWN_LABELS = "labels of samples taken as unknown"
"""Topic of a tally: texts that were taken for an unknown label."""
IGNORED_JSON = ".json ignored next to a .cls"
"""Topic of a tally: samples with a .cls, whose .json was not read."""


class WebDatasetSource(ImageSource):
    """Source of samples of tars: an image, a .cls or .json, optionally a .mask.png."""

    name = "webdataset"
    unique_keys_option = "data.key_prefix=shard"
    _last: tuple[str, io.FileIO] | None = None

    def __init__(self, config: WebDatasetDataConfig) -> None:
        self.config = config

    def __getstate__(self) -> dict[str, Any]:
        # Found once, by the driver: another process needs neither the folder nor the file of the class names.
        return {"config": self.config, "tars": self.tars, "_names": self._names}

    @cached_property
    def tally(self) -> Tally:
        """Counts of what the last listing met."""
        return Tally()

    @cached_property
    def tars(self) -> dict[str, AnyPath]:
        """Path of every tar by file name; those of an http(s) address are downloaded first.

        Raises:
            ConfigError: If data.path names no tar, or two with the same file name.
            DownloadError: If one cannot be downloaded.
        """
        if _is_downloaded(self.config.path):
            folder = Path(self.config.cache)
            paths: Sequence[AnyPath] = [
                download(url, folder) for url in expand_range(self.config.path)
            ]
        elif is_address(self.config.path):
            paths = find_tars_in_bucket(self.config.path)
        else:
            paths = find_files(Path(self.config.path), ".tar")
        named = {path.name: path.absolute() for path in paths}
        require(
            len(named) == len(paths),
            f"data.path={self.config.path} names two tars with the same file name; rename one of them",
        )
        return dict(sorted(named.items()))

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names in label order: from `data.classes`, from classes.txt next to the tars, or the numbers."""
        if self._names is not None:
            return self._names
        labels = (label for record in self.records() for label in (record.label, *record.labels))
        return self.classes_up_to(max(labels, default=NO_LABEL))

    def classes_up_to(self, largest_label: int) -> tuple[str, ...]:
        """Return the names from the file, or the numbers up to the largest label."""
        if self._names is not None:
            return self._names
        return tuple(str(label) for label in range(largest_label + 1))

    @cached_property
    def _names(self) -> tuple[str, ...] | None:
        """Names from a file, which labels may use."""
        if self.config.classes is None and not file_at(self._classes_file).is_file():
            return None
        return load_class_names(self.config.classes or str(self._classes_file))

    @property
    def _classes_file(self) -> AnyPath:
        """File of class names next to the tars, which may be missing."""
        return next(iter(self.tars.values())).parent / "classes.txt"

    def tally_other_files(self, tally: Tally) -> None:
        """Count what the folder of the tars has besides them, and tars that their names count and that are absent."""
        tally_absent_parts(self.tars, tally)
        if not is_address(self.config.path):
            tally_other_files(Path(self.config.path), ".tar", tally, {self._classes_file.name})

    def records(self) -> Iterator[Record]:
        """Yield one record per sample, in the order of the tars; its content is the position of its bytes."""
        return (record for name in self.tars for record in self.part_records(name))

    def parts(self) -> dict[str, int]:
        """Return the bytes of every tar by file name."""
        return {name: file_at(path).size() or 0 for name, path in self.tars.items()}

    def stamps(self) -> dict[str, tuple[int, int | str]]:
        """Return the bytes of every tar and of the class names, and when they were last changed, or their ETags.

        Tars of an address have none, because they would have to be downloaded.
        """
        if _is_downloaded(self.config.path):
            return {}
        files = dict(self.tars)
        if file_at(self._classes_file).is_file():
            files[self._classes_file.name] = self._classes_file
        return {name: file_at(path).stamp() for name, path in files.items()}

    def read(self, record: Record) -> Content:
        """Return the sample's image, and its mask if it has one."""
        name, suffix, image, mask = record.content
        file = self._open(name)
        return Content(
            image=read_member(file, Member(*image), f"{name}: the image"),
            suffix=suffix,
            mask=read_member(file, Member(*mask), f"{name}: the mask") if mask else None,
            offset=image[0],
            mask_offset=mask[0] if mask else -1,
        )

    def _open(self, name: str) -> io.FileIO:
        """Return an open tar, which stays open for the next record: the copy of one in a bucket is asked for once."""
        if self._last is None or self._last[0] != name:
            self._last = name, file_at(self.tars[name]).open()
        return self._last[1]

    def where(self, record: Record) -> str:
        """Return the tar and the position in it."""
        name, _, (offset, _), _ = record.content
        return f"{self.tars[name]} at byte {offset}"

    def _split(self, name: str) -> str:
        """Return the split of a tar."""
        split = self.config.split or self._split_of_folder(name) or split_in_name(Path(name).stem)
        require(
            is_split_name(split),
            f"{self.tars[name]} would belong to split {split!r}, which must have only letters, digits, - and _; "
            "set data.split, or rename the tar",
        )
        return split

    def _split_of_folder(self, name: str) -> str | None:
        """Return the split that a tar's folder spells, if tars of several folders do not say it themselves."""
        has_several = len({path.parent for path in self.tars.values()}) > 1
        is_told = known_split(split_before_number(name)) is not None
        return known_split(self.tars[name].parent.name) if has_several and not is_told else None

    def part_records(self, part: str) -> Iterator[Record]:
        """Yield the records of one tar.

        Raises:
            ConfigError: If the tar cannot be read, or if a sample has no image, several, or labels that cannot be used.
        """
        name, split = part, self._split(part)
        if _is_downloaded(self.config.path):
            check_download(Path(str(self.tars[name])))
        stem = split_before_number(name)
        if self.config.split is None and stem not in ("", split):
            self.tally.add(SPELLED_SPLITS, stem, split)
        if self._names is None:
            self.tally.add(NUMBERED_TARS, "no data.classes", name)
        prefix = {
            "none": "",
            "split": f"{self.config.split or stem or split}-",
            "shard": f"{Path(name).stem}-",
        }
        file = self._open(name)
        for sample, members in list_samples(self.tars[name], self.tally):
            suffixes = [each for each in members if not f".{each}".endswith(f".{MASK_SUFFIX}")]
            # Or, if there is none, those that end with one after another dot: input.jpg.
            images = list(filter(is_image_suffix, suffixes)) or [
                suffix for suffix in suffixes if is_image_suffix(suffix.rpartition(".")[2])
            ]
            if len(images) != 1:
                raise ConfigError(self._describe_sample(name, sample, members, images))
            # Members may be named after their image, as in s.input.jpg and s.input.json.
            for kind in ("cls", "json", MASK_SUFFIX) if "." in images[0] else ("cls",):
                found = [suffix for suffix in members if suffix.endswith(f".{kind}")]
                if kind not in members and len(found) == 1:
                    members[kind] = members.pop(found[0])
            mask = members.get(MASK_SUFFIX)
            image = members[images[0]]
            record = Record(
                key=escape_key(prefix[self.config.key_prefix] + sample),
                split=split,
                content=(
                    name,
                    image_suffix(f"image.{images[0]}"),
                    (image.offset, image.size),
                    (mask.offset, mask.size) if mask else (),
                ),
            )
            for suffix in members.keys() - {images[0], MASK_SUFFIX, "cls", "json"}:
                self.tally.add(OTHER_MEMBERS, f".{suffix}", f"{sample}.{suffix}")
            labeled = self._labeled(record, members, file, f"{self.tars[name]}: {sample}")
            if labeled.label == NO_LABEL and not labeled.labels:
                for suffix in sorted(members.keys() - {images[0], MASK_SUFFIX}):
                    self.tally.add(UNLABELED_MEMBERS, f".{suffix}", f"{sample}.{suffix}")
            yield labeled

    def _describe_sample(
        self, name: str, sample: str, members: dict[str, Member], images: list[str]
    ) -> str:
        """Describe a sample without exactly one image, and its cause: further dots, or a tar that is not sorted."""
        text = (
            f"{self.tars[name]}: sample {quote(sample)} has {len(images)} images among its members "
            f"{', '.join(members)}; it needs exactly one"
        )
        if any("." in suffix for suffix in images):
            return (
                f"{text}. A sample's name ends at its first dot: if these are several samples, write other dots as _; "
                "if they are one, leave out all images but one"
            )
        if images or not has_scattered_samples(self.tars[name]):
            return text
        return (
            f"{text}. Members of other samples stand between those of this one, so the tar is not sorted; sort it: "
            "mkdir sorted && tar -xf NAME.tar -C sorted && tar --sort=name -cf NAME-sorted.tar -C sorted ."
        )

    def _labeled(
        self, record: Record, members: dict[str, Member], file: io.FileIO, where: str
    ) -> Record:
        """Add what a sample's .cls and .json contain. Raises ConfigError if their labels differ."""
        if "cls" not in members:
            if "json" not in members:
                return record
            values = self._read_json(members["json"], file, where)
            record_of_json = self._described(record, values, where)
            if record_of_json.label == NO_LABEL and not record_of_json.labels:
                for key in values:
                    self.tally.add(JSON_KEYS, str(key)[:80], record.key)
            return record_of_json
        text = read_member(file, members["cls"], f"{where}.cls", _MAX_LABEL_BYTES)
        record = replace(
            record, label=self._label(text.decode("utf-8-sig", errors="replace"), where)
        )
        return (
            self._check_with_cls(record, members["json"], file, where)
            if "json" in members
            else record
        )

    def _check_with_cls(
        self, record: Record, member: Member, file: io.FileIO, where: str
    ) -> Record:
        """Add what a .json next to a .cls contains. One of another form is skipped and counted."""
        try:
            values = self._read_json(member, file, where)
        except (ConfigError, ImageError) as error:
            self.tally.add(IGNORED_JSON, type(error.__cause__ or error).__name__, record.key)
            return record
        label, value = NO_LABEL, values.get(self.config.label_key)
        try:
            label = NO_LABEL if value is None else self._label(value, where)
        except ConfigError:  # a caption, for example; the .cls has the label
            self.tally.add(IGNORED_JSON, f"value of {self.config.label_key}", record.key)
        require(
            label in (NO_LABEL, record.label),
            f"{where} has label {record.label} in its .cls and {label} as {self.config.label_key!r} in its .json; "
            "correct one of them, or set data.label_key to a key that the .json does not have",
        )
        try:
            record_of_json = self._described(
                record, values | {self.config.label_key: record.label}, where
            )
        except ConfigError as error:
            if error.__cause__ is None:  # a box or a label of the right form with a wrong value
                raise
            self.tally.add(IGNORED_JSON, type(error.__cause__).__name__, record.key)
            return record
        return replace(record_of_json, boxes_in_pixels=bool(record_of_json.boxes))

    def _read_json(self, member: Member, file: io.FileIO, where: str) -> dict[str, Any]:
        """Read a sample's .json. Raises ConfigError unless it is a mapping, ImageError if it is too large."""
        data = read_member(file, member, f"{where}.json", _MAX_LABEL_BYTES)
        try:
            values: dict[str, Any] = json.loads(data, object_pairs_hook=unique_names)
            read = {self.config.label_key, "labels", "group", "boxes"}
            keys = values.keys()  # which only a mapping has
            for key in keys:
                if key not in read:
                    self.tally.add(OTHER_KEYS, str(key)[:80], where.rpartition("/")[2])
        except (ValueError, AttributeError, RecursionError) as error:
            raise self._form_error(where, error) from error
        return values

    def _form_error(self, where: str, error: Exception) -> ConfigError:
        return ConfigError(
            f"{where}.json cannot be read ({type(error).__name__}: {error}); it may have "
            f"{self.config.label_key}, labels, group and boxes of label, x0, y0, x1, y1"
        )

    def _described(self, record: Record, values: dict[str, Any], where: str) -> Record:
        try:
            label = values.get(self.config.label_key)
            number = NO_LABEL if label is None else self._label(label, where)
            labels = values.get("labels")
            boxes = _list_of(values, "boxes")
            if not isinstance(labels, dict):
                labels = _list_of(values, "labels")
            if labels and isinstance(labels, list):
                self.tally.add(
                    LABEL_LISTS, "0 and 1" if is_one_hot(labels) else "labels", record.key
                )
            classes = NONE if values.get("labels") == [] else self._labels(labels, where)
            of_boxes = number
            if label is None and "labels" in values and any("label" not in box for box in boxes):
                try:
                    of_boxes = label_of_box(classes)
                except ValueError as error:
                    raise ConfigError(f"{where}: {error}") from error
            return replace(
                record,
                label=number,
                labels=classes,
                group=_group(values.get("group", NO_GROUP)),
                boxes=tuple(self._box(box, of_boxes, where) for box in boxes),
                boxes_in_pixels=True,
            )
        except UserError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise self._form_error(where, error) from error

    def _labels(self, values: list[Any] | dict[str, Any], where: str) -> tuple[int, ...]:
        """Return the labels of a list, without unknown ones, or of a mapping from classes to 1, 0 or null."""
        if isinstance(values, dict):
            require(
                self._names is not None,
                f"{where}: labels that are a mapping from classes to 1, 0 or null need data.classes=FILE, which lists "
                "the classes",
            )
            states = {self._label(name, where): state_of(value) for name, value in values.items()}
            return labels_of_states([states.get(label) for label in range(len(self._names or ()))])
        labels = [self._label(value, where) for value in values]
        return tuple(label for label in labels if label != NO_LABEL)

    def _box(self, box: dict[str, Any], label: int, where: str) -> Box:
        """Return a box in pixels, with its own label or the record's."""
        x0, y0, x1, y1 = corners = [float(box[corner]) for corner in ("x0", "y0", "x1", "y1")]
        self.tally.add(
            BOXES, "within 0 to 1" if max(corners) <= 1 else "in pixels", where.rpartition("/")[2]
        )
        require(
            x0 < x1 and y0 < y1 and all(map(math.isfinite, (x0, y0, x1, y1))),
            f"{where} has a box {x0:g}, {y0:g}, {x1:g}, {y1:g}, which has no area",
        )
        box_label = self._label(box["label"], where) if "label" in box else label
        return Box(label=box_label, x0=x0, y0=y0, x1=x1, y1=y1)

    def _label(self, value: Any, where: str) -> int:
        """Return the label that a text or a number denotes; NO_LABEL for one that means unknown.

        If the class names are themselves numbers, a label is one of the names, as in a table.
        """
        if isinstance(value, float) and (math.isnan(value) or value.is_integer()):
            value = "" if math.isnan(value) else int(value)
        text = str(value).strip()
        if isinstance(value, (str, int)) and not isinstance(value, bool):
            label = self._named_label(text, where)
            if label is not None:
                return label
            if isinstance(value, str) and is_unknown(text):
                topic = UNKNOWN_LABELS if text else UNLABELED_CELLS
                self.tally.add(topic, text or "empty", where.rpartition("/")[2])
                return NO_LABEL
        else:
            text = ""
        number = to_number(text)
        if number is None or has_leading_zero(text):
            raise ConfigError(
                f"{where} has label {quote(value)}, which is neither a number nor in data.classes; "
                "set data.classes to the file of the class names"
            )
        if self._names is None and number >= MAX_CLASSES:
            raise ConfigError(
                f"{where} has label {number}, but labels must be below {MAX_CLASSES:,}; correct it, or list "
                "the classes in a file and set data.classes to it"
            )
        is_above = self._names is not None and number >= len(self._names)
        if number < NO_LABEL or is_above or (self._are_numbers and number != NO_LABEL):
            classes = (
                ""
                if self._names is None
                else f" of {len(self._names)} classes, counted from 0; if labels count from 1, subtract one from "
                "each, or write the names"
            )
            if self._are_numbers:
                classes = "; the class names are numbers themselves, and it is not one of them"
            raise ConfigError(f"{where} has label {number}, which is not a label{classes}")
        if number == NO_LABEL:
            self.tally.add(UNLABELED_CELLS, "-1", where.rpartition("/")[2])
        return number

    @cached_property
    def _index(self) -> ClassIndex:
        return ClassIndex(self._names or (), False)

    @cached_property
    def _are_numbers(self) -> bool:
        """True if all class names are whole numbers."""
        return bool(self._names) and all(to_number(name) is not None for name in self._names or ())

    def _named_label(self, text: str, where: str) -> int | None:
        """Return the label of a class name; None for other texts.

        Raises:
            ConfigError: For a number that is the name of one class and the position of another.
        """
        number = to_number(text)
        label = self._index.label(text)
        if has_leading_zero(text):
            return label
        if (
            number is not None
            and label not in (None, number)
            and 0 <= number < len(self._index.names)
        ):
            raise ConfigError(
                f"{where} has label {number}, which is the name of class {label} and the position of class "
                f"{self._index.names[number]!r} in data.classes; give the classes other names there, as in "
                f"class_{number}"
            )
        return label

    def plan_in_place(self, form: str, listing: Listing) -> list[ShardPlan] | None:
        """Plan one shard per tar, with its records in the tar's order.

        Args:
            form: Option store.format; re-encoded frames cannot be used in place.
            listing: All records, with the tars as its parts.

        Returns:
            The shards; None if the records have to be packed again.

        Raises:
            ConfigError: If data.reference=always, and other options or the mixture of the tars do not allow it.
        """
        wanted = self.config.reference
        require(
            wanted != "always" or form == "original",
            f"data.reference=always keeps the images' bytes; store.format={form} does not",
        )
        if self.config.bit_range or self.config.boxes_of == "stored":
            require(
                wanted != "always",
                "data.reference=always keeps the images' bytes; data.bit_range and data.boxes_of=stored do not",
            )
            return None
        downloaded = _is_downloaded(self.config.path)
        if wanted == "never" or form != "original" or (wanted == "auto" and downloaded):
            return None
        sizes = listing.part_sizes
        rows = [
            (self._split(name), name, stop - size, stop)
            for name, size, stop in zip(self.tars, sizes, accumulate(sizes), strict=True)
            if size
        ]
        numbers = Counter[str]()
        plans: list[ShardPlan] = []
        for split, name, start, end in sorted(rows):
            shard = f"{split}-{numbers[split]:06d}"
            numbers[split] += 1
            at, path = len(plans), str(self.tars[name])
            plans.append(ShardPlan(at, shard, split, start, end, listing.path, reference=path))
        unmixed = find_unmixed_shard(plans)
        if unmixed is None:
            return plans
        require(
            wanted != "always",
            f"{unmixed.reference} contains few of the classes of split {unmixed.split}, and so would a "
            "student's batches: pack it again with data.reference=never",
        )
        return None


def _is_downloaded(path: str) -> bool:
    return path.startswith(("http://", "https://"))


def _list_of(values: dict[str, Any], name: str) -> list[Any]:
    """Return a list of the sample's JSON, empty if missing; raise ValueError if it is not a list."""
    items = values.get(name, [])
    require(isinstance(items, list), f"{name} is {str(items)[:80]!r}, not a list", ValueError)
    return items  # type: ignore[no-any-return]


def _group(value: Any) -> int:
    require(
        type(value) is int and -MAX_GROUP <= value <= MAX_GROUP,
        f"group is {str(value)[:80]!r}, not a whole number up to {MAX_GROUP}; number groups from 0",
        ValueError,
    )
    return int(value)
