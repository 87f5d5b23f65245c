"""Preview of data: summary of what was understood of them before anything is packed.

It is made from the listing (splits, classes, labels, files that were left out), from the headers of some files, or of
all (`preview.all=true`), and from the pixels of a few. The findings are those of findings.py. A store keeps the facts
as facts.json, signed and without anything of the machine.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, ClassVar, TypeAlias
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from permafrost.config.data import FACTS_OF_FINDINGS, DataConfig
from permafrost.core.errors import UserError, printable, shorten
from permafrost.core.records import NO_GROUP, Content, Record, Source, are_numbers
from permafrost.core.tasks import Executor, ShardResult, Subject, run_shards
from permafrost.sources.bursts import Photograph, photograph_of
from permafrost.sources.image_files import (
    BROKEN_LINKS,
    EMPTY_FILES,
    HIDDEN_FILES,
    LEFT_OUT,
    LEFTOVERS,
    OTHER_PICTURES,
)
from permafrost.sources.several_files import ABSENT_PARTS, OTHER_FILES, READ_PARTS
from permafrost.sources.source import ListedData
from permafrost.sources.tally import Tally
from permafrost.storage.rooted_paths import RootedPath
from permafrost.store.deaths import ShardDeaths
from permafrost.store.facts import TYPED, Fact, FactSheet, Finding, Level, StoredFacts
from permafrost.store.generations import StoreComparison
from permafrost.store.image_decoding import ImageFacts, largest_value, read_facts, read_pixels
from permafrost.store.image_shards import upright_regions
from permafrost.store.listing import Listing, RecordCounts, open_listing

logger = logging.getLogger("permafrost.preview")

Remark: TypeAlias = tuple[Level, str]
"""Level and message of a finding (findings.py)."""
_TASK_RECORDS = 2048
"""Records of a task that reads headers."""
_MEDIAN_FILES = 16_384
"""Maximum number of files to compute medians from."""
_NAMED_FILES = 50
"""Largest number of files of a topic, such as damaged ones, that are named; the others are counted."""
_LEFT_OUT = (
    *(OTHER_FILES, LEFT_OUT, HIDDEN_FILES, LEFTOVERS, OTHER_PICTURES, EMPTY_FILES, BROKEN_LINKS),
)
"""Topics of a tally that count files that are left out."""
_STORED_CLASSES = 10_000
"""Maximum number of classes whose counts are kept next to a store."""


DIM = 32
"""Largest value of 8 bits below which a picture is black to the eye."""
_COLORS = 3
"""Number of channels that are read besides transparency, and black of CMYK."""
_MOSTLY_TRANSLUCENT = 0.5
"""Fraction of the pixels of an image above which its alpha may be something else."""
_DECODED_FILES = 500
"""Maximum number of files whose pixels are examined."""
_DECODED_SIDE = 256
_DECODED_PIXELS = 400_000_000
"""Pixels after which a task looks at no further ones: some five seconds."""


@dataclass(kw_only=True)
class ImageSample:
    """Sums over the headers of image files."""

    files: int = 0
    """Number of files that were read."""
    formats: Counter[str] = field(default_factory=Counter)
    """Files of each format of Pillow."""
    kinds: Counter[str] = field(default_factory=Counter)
    """Files that are gray or CMYK, have a palette (palette), alpha, 16 bits, are turned by EXIF (turned), or are turned
    and have boxes or a mask (turned with regions)."""
    sides: list[tuple[int, int]] = field(default_factory=list)
    """Width and height of the first upright images, for medians."""
    smallest: tuple[int, int] | None = None
    """Smallest width and smallest height of upright images."""
    largest: tuple[int, int] | None = None
    """Largest width and largest height."""
    largest_values: list[int] = field(default_factory=list)
    """Largest value of each file of 16 bits, of many files of the first ones."""
    counts: Counter[str] = field(default_factory=Counter)
    """Number of files whose pixels were examined, among the first ones of the sample (decoded), of those of them that
    have 8 bits and no value from DIM on (dim), and of the files of each topic of `notes`."""
    notes: dict[str, dict[str, str]] = field(default_factory=partial(defaultdict, dict))
    """Text about each of the first files of a topic: the value that all pixels have (blank), the reason why boxes or
    the mask do not fit the image (regions), the largest value of a mask of a record with several labels that has no
    such class (mask_values), and the reason why a file cannot be read (damaged)."""
    means: dict[str, list[float]] = field(default_factory=dict)
    """Mean values of the decoded files of 8 bits, by split."""
    thumbnails: list[tuple[str, str, bytes]] = field(default_factory=list)
    """Key, split and thumbnail of each decoded file."""
    photographs: list[tuple[Photograph, str]] = field(default_factory=list)
    """Photographs with the split of each file that was read."""
    digests: dict[bytes, str] = field(default_factory=dict)
    """Key of each decoded file by its SHA-256."""
    traits: Counter[str] = field(default_factory=Counter)
    """Decoded files by trait, value, split and label, as JSON lists: what else may tell classes and splits apart."""

    def add(self, record: Record, content: Content, options: RegionOptions) -> ImageFacts | None:
        """Add the header of one record's file, and whether its boxes and its mask fit it.

        Args:
            record: The record.
            content: Its image and mask.
            options: What decides whether regions fit.

        Returns:
            The facts; None for a file that cannot be read.
        """
        self.files += 1
        data, has_mask = content.image, content.mask is not None
        try:
            facts = read_facts(data)
        except UserError as error:
            self.note("damaged", record, str(error))
            return None
        self.photographs.append((photograph_of(record, data), record.split))
        self.formats[facts.format] += 1
        self._add_sides([(facts.width, facts.height)])
        self._add_regions(record, content, facts, options)
        kinds = {
            "with a mask": has_mask,
            "several pictures": facts.is_animated,
            "further channels": facts.bands
            > _COLORS + (facts.has_alpha or facts.channels == "CMYK"),
            facts.channels: facts.channels != "color",
            "alpha": facts.has_alpha,
            "16 bits": facts.bits == 16,
            "turned": facts.is_turned,
            "turned with regions": facts.is_turned
            and (has_mask or (record.boxes_in_pixels and bool(record.boxes))),
        }
        self.kinds.update(name for name, holds in kinds.items() if holds)
        if facts.largest is not None and len(self.largest_values) < _MEDIAN_FILES:
            self.largest_values.append(facts.largest)
        return facts

    def add_pixels(self, record: Record, data: bytes, facts: ImageFacts) -> None:
        """Add the pixels of a file, and its traits.

        Raises:
            ImageError: If it cannot be decoded.
        """
        pixels = read_pixels(data, _DECODED_SIDE)
        self.counts["decoded"] += 1
        self.digests[hashlib.sha256(data).digest()] = record.key
        self.kinds["translucent"] += pixels.translucent > _MOSTLY_TRANSLUCENT
        if facts.bits == 8:
            self.means.setdefault(record.split, []).append(pixels.mean)
        self.thumbnails.append((record.key, record.split, pixels.thumbnail))
        if pixels.smallest == pixels.largest:
            self.note("blank", record, str(pixels.largest))
        elif facts.bits == 8 and pixels.largest < DIM:
            self.counts["dim"] += 1
        traits = {
            "format": facts.format,
            "color": f"{facts.channels} with alpha" if facts.has_alpha else facts.channels,
            "bits": str(facts.bits),
            "size": f"{facts.width}x{facts.height}",
            **({} if facts.largest is None else {"range": str(facts.largest.bit_length())}),
        }
        for trait, value in traits.items():
            self.traits[json.dumps([trait, value, record.split, record.label])] += 1

    def _add_regions(
        self, record: Record, content: Content, facts: ImageFacts, options: RegionOptions
    ) -> None:
        if not record.boxes and content.mask is None:
            return
        try:
            _, upright = upright_regions(
                record, content, options.boxes_of, facts.height, facts.width
            )
        except UserError as error:
            self.note("regions", record, str(error))
            return
        if upright.mask is not None and record.labels:
            largest = largest_value(upright.mask)
            if largest > options.classes:  # 0 is the background
                self.note("mask_values", record, str(largest))

    def _add_sides(self, sides: Iterable[tuple[int, int]]) -> None:
        """Add the width and height of images to the extremes and to the medians' values."""
        for width, height in sides:
            low, high = self.smallest or (width, height), self.largest or (width, height)
            self.smallest = min(low[0], width), min(low[1], height)
            self.largest = max(high[0], width), max(high[1], height)
            if len(self.sides) < _MEDIAN_FILES:
                self.sides.append((width, height))

    def note(self, topic: str, record: Record, text: str) -> None:
        """Count a file of a topic, and keep the text about it if it is one of the first."""
        self.counts[topic] += 1
        if len(self.notes[topic]) < _NAMED_FILES:
            self.notes[topic][unquote(record.key)] = text

    def merge(self, sample: ImageSample) -> None:
        """Add another sample."""
        self.files += sample.files
        self.formats.update(sample.formats)
        self.kinds.update(sample.kinds)
        self._add_sides((width, height) for width, height in sample.sides)
        if sample.smallest is not None and sample.largest is not None:
            # Extremes of more images than those of its list.
            room = len(self.sides)
            self._add_sides([sample.smallest, sample.largest])
            del self.sides[room:]
        room = _MEDIAN_FILES - len(self.largest_values)
        self.largest_values += sample.largest_values[:room]
        self.traits.update(sample.traits)
        for split, means in sample.means.items():
            self.means.setdefault(split, []).extend(means)
        self.thumbnails += sample.thumbnails
        self.digests |= sample.digests
        self.photographs += sample.photographs
        self.counts.update(sample.counts)
        for topic, texts in sample.notes.items():
            self.notes[topic] = dict(islice((self.notes[topic] | texts).items(), _NAMED_FILES))

    @property
    def typical_largest(self) -> int:
        """Value that nine tenths of the files of 16 bits do not exceed, so that no single bright pixel hides it."""
        return sorted(self.largest_values)[(9 * len(self.largest_values) - 1) // 10]

    def facts(self, records: int, which: str = "") -> Iterator[Fact]:
        """Iterate over the facts of the files.

        Args:
            records: Number of records of the data, of which the files may be a sample.
            which: Words on which records these are, if not all.
        """
        read = f"{self.files:,} of {records:,} headers" if self.files < records else "all headers"
        read += which
        pixels = f"{self.counts['decoded']:,} decoded{which}"
        words = [_counts_in_words(self.formats), _counts_in_words(self.kinds)]
        words += [f"damaged {self.counts['damaged']:,}"] if self.counts["damaged"] else []
        yield Fact(
            name="images",
            value="; ".join(filter(None, words)),
            source=read,
        )
        if self.smallest is not None and self.largest is not None:
            sides = np.array(self.sides)
            (low, high), (least, most) = zip(self.smallest, self.largest, strict=True)
            middle = "x".join(f"{side:.0f}" for side in np.median(sides, axis=0))
            yield Fact(
                name="size",
                value=middle
                if (low, least) == (high, most)
                else f"{middle} (median), widths {low} to {high}, heights {least} to {most}",
                source=read,
            )
            narrow, typical, wide = np.percentile(sides[:, 0] / sides[:, 1], (5, 50, 95))
            spread = "" if narrow == wide else f" (median), 5 to 95 %: {narrow:.3g} to {wide:.3g}"
            yield Fact(
                name="proportions", value=f"{typical:.3g}{spread}, width / height", source=read
            )
        if self.largest_values:
            most = max(self.largest_values)
            value = (
                f"16 bits in {self.kinds['16 bits']:,}, with values up to {self.typical_largest:,}"
            )
            if most > self.typical_largest:
                value += f" (in some files {most:,})"
            yield Fact(name="depth", value=f"{value} of 65,535", source=read)
        elif self.files > self.counts["damaged"]:
            yield Fact(name="depth", value="8 bits", source=read)
        if self.means:
            by_split = ", ".join(
                f"{printable(split)} {np.mean(means):.0f}"
                for split, means in sorted(self.means.items())
            )
            between = np.sqrt(np.mean([np.var(means) for means in self.means.values()]))
            yield Fact(
                name="brightness",
                value=f"{by_split} of 255, between images {between:.0f}",
                source=pixels,
            )


@dataclass(frozen=True, kw_only=True)
class RegionOptions:
    """Options and facts that decide whether boxes and masks fit their images."""

    boxes_of: str = "upright"
    classes: int = 0
    """Number of classes."""


@dataclass(frozen=True, kw_only=True)
class GroupCounts:
    """Groups of records, such as those of patients, and how many of them have records in several splits."""

    groups: int
    records: int
    """Number of records that have a group."""
    shared: int
    """Number of groups with records in more than one split."""
    examples: tuple[str, ...]
    """Records of the first shared group, one for each split: their keys and splits."""
    blank: str = ""
    """Key of the first record without a group."""


def count_groups(listing: Listing) -> GroupCounts:
    """Count the groups of a listing and those in several splits."""
    groups = listing.groups()
    rows = np.flatnonzero(groups != NO_GROUP)
    names, codes = listing.split_codes()
    pairs = groups[rows].astype(np.int64) * len(names) + codes[rows]
    distinct, first = np.unique(pairs, return_index=True)
    numbers, splits = np.unique(distinct // len(names), return_counts=True)
    shared = numbers[splits > 1]
    examples: list[str] = []
    if len(shared):
        places = first[distinct // len(names) == shared[0]]
        keys = listing.keys(rows[places])
        examples = [
            f"{unquote(key)} ({names[codes[row]]})"
            for key, row in zip(keys, rows[places], strict=True)
        ]
    return GroupCounts(
        groups=len(numbers),
        records=len(rows),
        shared=len(shared),
        examples=tuple(examples),
        blank="".join(map(unquote, listing.keys(np.flatnonzero(groups == NO_GROUP)[:1]))),
    )


@dataclass(frozen=True, kw_only=True)
class Preview:
    """Summary of the data as they were understood."""

    source: str
    """Kind of the source, as in data=."""
    classes: tuple[str, ...]
    counts: RecordCounts
    tally: Tally
    sample: ImageSample
    """Sums over the image files; empty for rows of a table."""
    data: DataConfig
    comparison: StoreComparison | None = None
    """Records that a store has to which the others are to be appended; the sample is then of the others alone."""
    groups: GroupCounts | None = None
    """None without groups."""
    measured: tuple[Fact, ...] = ()
    """Further facts, of rules."""
    is_packed_next: bool = False
    """True if all images are compared once they are packed, so that those of the sample need not be."""
    findings: tuple[Finding, ...] = ()

    @property
    def num_records(self) -> int:
        """Number of records."""
        return self.counts.records.total()

    @property
    def data_classes(self) -> str | None:
        """Option data.classes, None where it is not set or the source has none."""
        return getattr(self.data, "classes", None)

    @property
    def splits(self) -> str:
        """Origin of the splits, for cards: how data.test_fraction drew test, or that the data name them."""
        return (
            "given by the data"
            if not getattr(self.data, "test_fraction", 0)
            else f"drawn by groups of data.group={','.join(getattr(self.data, 'group', ()))}"
            if getattr(self.data, "keep_groups", False)
            else "drawn by file, bursts may be on both sides"
            if hasattr(self.data, "group")
            else "drawn by record"
        )

    def count(self, split: str, label: int) -> int:
        """Return the number of records of a class in a split."""
        return self.counts.labeled.get((split, label), 0)

    def labels_of(self, split: str) -> set[int]:
        """Return the labels that a split has."""
        return {label for name, label in self.counts.labeled if name == split}

    def has_records(self, label: int) -> bool:
        """Return whether a class has records in any split."""
        return any((split, label) in self.counts.labeled for split in self.counts.records)

    def names_of(self, labels: Iterable[int]) -> str:
        """List the names of some classes for a message."""
        return shorten([self.classes[label] for label in sorted(labels)], 5)

    def with_level(self, level: Level) -> list[Finding]:
        """Return the findings of a level."""
        return [finding for finding in self.findings if finding.level == level]

    def sheet(self) -> FactSheet:
        """Return the facts of the data; those that findings are about are marked."""
        facts = FactSheet(subject="data", facts=tuple(self._facts()))
        return facts.marked(self.findings, FACTS_OF_FINDINGS)

    def _facts(self) -> Iterator[Fact]:
        counts, listing = self.counts, self.source
        yield Fact(
            name="records",
            value=_counts_in_words(counts.records) or "0",
            source=listing
            + (f"; test {self.splits}" if getattr(self.data, "test_fraction", 0) else ""),
        )
        yield Fact(
            name="classes",
            value=_describe_classes(self),
            source="data.classes" if self.data_classes is not None else listing,
        )
        labels = "several per record" if counts.others["labels"] else "one per record"
        kind = (
            f"numbers from 0 to {len(self.classes) - 1:,}" if are_numbers(self.classes) else "names"
        )
        text = f"{labels}, {kind}" if self.classes else "none"
        for word, count in (
            ("with none of the classes", counts.others["none"]),
            ("with single unknown ones", counts.unknown.total()),
            ("without any", counts.unlabeled.total() if self.classes else 0),
        ):
            text += f"; {word} {count:,}" if count else ""
        columns = {name: getattr(self.data, name, None) for name in ("labels", "label")}
        named = [f"data.{name}={column}" for name, column in columns.items() if column]
        yield Fact(name="labels", value=text, source=next(iter(named), listing))
        absent, read = self.tally[ABSENT_PARTS], self.tally.total(READ_PARTS)
        if read > 1:
            names = shorten(sorted(absent), 3) if absent else "none"
            yield Fact(
                name="parts",
                value=f"{read:,} files; absent by their numbers: {names}",
                source="names of files",
                findings=("files_left_out",) if absent else (),
            )
        if others := sum(map(self.tally.total, _LEFT_OUT)):
            yield Fact(name="left out", value=f"{others:,} files", source="names of files")
        if self.groups is not None:
            group = getattr(self.data, "group", ())
            lacking = self.num_records - self.groups.records
            none = f"; records without one {lacking:,}" if lacking else ""
            shared = f"; in several splits {self.groups.shared:,}" if self.groups.shared else ""
            yield Fact(
                name="groups",
                value=f"{self.groups.groups:,}{none}{shared}",
                source=f"data.group={','.join(group)}" if group else listing,
            )
        if self.counts.others["boxes"]:
            yield Fact(name="boxes", value=f"in {counts.others['boxes']:,} records", source=listing)
        sampled = self.num_records
        if self.comparison is not None:
            sampled = len(self.comparison.new)
            yield Fact(
                name="new", value=f"{sampled:,} records that the store does not have", source="keys"
            )
        if self.sample.files:
            yield from self.sample.facts(
                sampled, "" if self.comparison is None else " of new records"
            )
        if bit_range := getattr(self.data, "bit_range", ()):
            yield Fact(name="bit_range", value=str(list(bit_range)), source=TYPED)
        yield from self.measured

    def stored(self) -> StoredFacts:
        """Return what is kept next to a store, which is the same on every machine."""
        splits = sorted(self.counts.records) if len(self.classes) <= _STORED_CLASSES else []
        return StoredFacts(
            source=self.source,
            records=dict(sorted(self.counts.records.items())),
            unlabeled=dict(sorted(self.counts.unlabeled.items())),
            classes=len(self.classes),
            records_of_classes={
                split: tuple(self.count(split, label) for label in range(len(self.classes)))
                for split in splits
            },
            sheet=self.sheet(),
            findings=self.findings,
            splits=self.splits,
        )


def _describe_classes(preview: Preview) -> str:
    """Return the number of classes, and their smallest and largest number of records by split."""
    names = preview.classes
    if not names:
        return "0"
    parts = [f"{len(names):,}: {shorten([printable(name) for name in names], 4)}"]
    for split in sorted(preview.counts.records):
        counts = [preview.count(split, label) for label in range(len(names))]
        low, high = int(np.argmin(counts)), int(np.argmax(counts))
        each = (
            f"{counts[low]:,} each"
            if counts[low] == counts[high]
            else (
                f"{counts[low]:,} ({printable(names[low])}) to {counts[high]:,} ({printable(names[high])})"
            )
        )
        absent = sum(count == 0 for count in counts)
        parts.append(f"{split} {each}" + (f", {absent:,} without records" if absent else ""))
    return "; ".join(parts)


def _counts_in_words(counts: Mapping[str, int]) -> str:
    return ", ".join(
        f"{printable(name)} {count:,}" for name, count in sorted(counts.items()) if count
    )


# ---- making ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ReadHeaders:
    """Task that reads the headers of some records: (number, rows of the listing) -> sums."""

    needs_gpu: ClassVar[bool] = False
    subject: ClassVar[Subject] = Subject("", "preview")
    source: Source
    listing: RootedPath
    folder: RootedPath
    """Folder in which a death of the process is noted, so that the next command finds the file that causes it."""
    regions: RegionOptions
    decoded: frozenset[int]
    """Rows whose pixels are examined."""

    def __call__(self, part: tuple[int, Sequence[int]]) -> ShardResult[ImageSample]:
        started = time.monotonic()
        number, rows = part
        records = open_listing(self.listing).records(np.asarray(rows, np.int64))
        sample = ImageSample()
        with ShardDeaths(self.folder, f"preview-{number:06d}") as deaths:
            by_key = {record.key: record for record in records}
            deaths.find_cause(list(by_key), partial(_read_alone, self.source, by_key))
            pixels = 0
            for row, record in zip(rows, records, strict=True):
                is_decoded = row in self.decoded and pixels < _DECODED_PIXELS
                pixels += self._add(sample, record, is_decoded=is_decoded)
        return ShardResult(
            name=f"preview-{number:06d}",
            records=len(rows),
            seconds=time.monotonic() - started,
            report=sample,
        )

    def _add(self, sample: ImageSample, record: Record, *, is_decoded: bool) -> int:
        """Add the header of a record's file, or its damage; return the number of pixels that were examined."""
        try:
            content = self.source.read(record)
        except (UserError, OSError) as error:
            sample.files += 1
            sample.note("damaged", record, self._without_place(str(error), record))
            return 0
        facts = sample.add(record, content, self.regions)
        if facts is None or not is_decoded:
            return 0
        try:
            sample.add_pixels(record, content.image, facts)
        except UserError as error:
            sample.note("damaged", record, str(error))
        return facts.height * facts.width

    def _without_place(self, text: str, record: Record) -> str:
        """Return the text of an error without the folder that has the record's file on this machine."""
        where = self.source.where(record)
        path, relative = where.partition(" at byte ")[0], str(next(iter(record.content), ""))
        root = path.removesuffix(relative) if relative else f"{path.rpartition('/')[0]}/"
        return text.replace(where, "it").replace(root, "") if len(root) > 1 else text


def _read_alone(source: Source, records: Mapping[str, Record], key: str) -> None:
    record, content = records[key], source.read(records[key])
    sample = ImageSample()
    facts = sample.add(record, content, RegionOptions())
    if facts is not None:
        sample.add_pixels(record, content.image, facts)


def preview_source(
    data: DataConfig,
    listed: ListedData,
    executor: Executor,
    folder: RootedPath,
    *,
    files: int | None,
    is_packed_next: bool = False,
) -> Preview:
    """Sum up the records of a listing and the headers of their files.

    Args:
        data: Options of the source.
        listed: The records.
        executor: Executor of the tasks that read headers.
        folder: Folder of the store, or another one for the tasks.
        files: Number of files whose headers are read, drawn at random; None reads all.
        is_packed_next: As in Preview.

    Returns:
        The preview, still without findings.
    """
    source, listing, sample = listed.source, listed.listing, ImageSample()
    if source.columns is None:
        new = None if listed.comparison is None else listed.comparison.new
        rows = _sampled_rows(listing, files, new)
        starts = range(0, len(rows), _TASK_RECORDS)
        parts = [(at, rows[start : start + _TASK_RECORDS]) for at, start in enumerate(starts)]
        task = ReadHeaders(
            source=source,
            listing=listing.path,
            folder=folder,
            regions=RegionOptions(
                boxes_of=getattr(data, "boxes_of", "upright"), classes=len(listed.classes)
            ),
            decoded=frozenset(map(int, _sampled_rows(listing, _DECODED_FILES, new))),
        )
        results: list[ShardResult[ImageSample]] = []
        run_shards("preview", executor, task, parts, results.append)
        for result in sorted(results, key=lambda result: result.name):  # by their first records
            sample.merge(result.report)
    return Preview(
        source=data.kind,
        classes=listed.classes,
        counts=listing.counts,
        tally=listed.tally,
        sample=sample,
        data=data,
        comparison=listed.comparison,
        is_packed_next=is_packed_next,
        groups=count_groups(listing) if listing.counts.others["groups"] else None,
    )


def _sampled_rows(listing: Listing, files: int | None, new: NDArray[np.int64] | None) -> Any:
    """Draw rows of a listing by the hashes of their keys, so that the sample is the same on every machine.

    Args:
        listing: The listing.
        files: Number of rows; None for all.
        new: Rows that are drawn from; None for all.
    """
    rows: Any = range(listing.num_records) if new is None else new
    if files is None or files >= len(rows):
        return rows
    ranks = listing.high_ranks() if new is None else listing.high_ranks()[new]
    chosen = np.sort(np.argpartition(ranks, files)[:files])
    return chosen if new is None else new[chosen]
