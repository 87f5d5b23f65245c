"""Sources by name, subsets of their classes, their listing in parts, and the digest of where records come from.

A source lists its records one after the other and reads their bytes one by one. Reading is a pure function of the
record, so any process may read any shard at any time.

The digest covers the options, the places of the files, and times of change where they cost little. It may miss a
change, such as an image that is overwritten; store.relist=true then compares the bytes of all records.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from permafrost.config.data import DataConfig, FileDataConfig
from permafrost.config.options import Role, options_of, resolve_implementation
from permafrost.config.store import StoreOptions
from permafrost.config.suggestions import suggest
from permafrost.core.digests import sha256_json
from permafrost.core.errors import ConfigError, require, shorten
from permafrost.core.records import NO_LABEL, Record, Source
from permafrost.core.tasks import Executor, ShardResult, Subject, run_shards
from permafrost.sources.classes import composed
from permafrost.sources.drawn_splits import with_drawn_splits
from permafrost.sources.tally import Tally
from permafrost.storage.files import file_at
from permafrost.storage.local_files import PARTIAL_SUFFIX
from permafrost.store.generations import StoreComparison, compare_listing, in_order_of_store
from permafrost.store.listing import (
    Listing,
    ListingFiles,
    RecordCounts,
    join_listings,
    write_listing,
)
from permafrost.store.reader import Store
from permafrost.store.shard_plan import RepeatedKeyError, ShardPlan, check_keys, plan_shards

BYTES_PER_RECORD = 100_000
"""Assumed size of a record, which decides whether listing is worth starting Ray: that of a photograph."""


@runtime_checkable
class PartedSource(Protocol):
    """Source whose parts are listed separately, in any process."""

    unique_keys_option: str
    """Option that makes equal keys in several parts different, for a message."""

    def parts(self) -> dict[str, int]:
        """Return the bytes of each part by its name, in the order of the listing."""

    def part_records(self, part: str) -> Iterator[Record]:
        """Yield the records of one part."""

    def classes_up_to(self, largest_label: int) -> tuple[str, ...]:
        """Return the class names of records with labels up to this one."""


@runtime_checkable
class FolderedSource(Protocol):
    """Source of the files of one kind in a folder, which may also have others."""

    def tally_other_files(self, tally: Tally) -> None:
        """Count what is there besides the files that are read."""


# ---- origin ----------------------------------------------------------------------------------------


_REVISION = 1
"""Revision of this digest and of the planning, incremented whenever finished stores must be compared again."""


@runtime_checkable
class StampedSource(Protocol):
    """Source that knows where common changes of its files show."""

    def stamps(self) -> Mapping[str, Any]:
        """Return JSON values that change with the files, such as times of change, without listing the records."""


def digest_origin(data: DataConfig, store: StoreOptions) -> str:
    """Return the SHA-256 of what determines the records, the plan and the form of a store.

    Of files, it covers the size and the time of change, not the content.
    """
    source = resolve_implementation(type(data))(data)
    values = {option.name: getattr(data, option.name) for option in options_of(type(data))}
    stamps: dict[str, Any] = {}
    for option in options_of(type(data)):
        value = values[option.name]
        if Role.CACHE in option.roles:
            del values[option.name]
        elif Role.FILE in option.roles and value and "://" not in value:
            path = Path(value).absolute()
            values[option.name] = str(path)
            stamps[option.name] = _stamp(path)
    return sha256_json(
        {
            "digest_revision": _REVISION,
            "data": values,
            "files": stamps,
            "source_revision": source.revision,
            "source_stamps": source.stamps() if isinstance(source, StampedSource) else {},
            "store": [store.shard_size, store.seed, store.format, store.image_size],
        }
    )


def _stamp(path: Path) -> list[int | str] | None:
    """Return the bytes of a file and when it was changed, or when a folder got or lost an entry."""
    try:
        return [file_at(path).folder_stamp()] if path.is_dir() else [*file_at(path).stamp()]
    except OSError:
        return None


# ---- class subset ----------------------------------------------------------------------------------


class ClassSubset:
    """The records of some classes of a source. Records without a label and boxes of other classes are left out.

    One process lists them, also of a source in parts: what is chosen is packed, which takes far longer.

    Args:
        source: The source of all records.
        classes: Names of the classes, in the order of the new labels.

    Raises:
        ConfigError: If the source has no such class.
    """

    def __init__(self, source: Source, classes: tuple[str, ...]) -> None:
        stored = {composed(name): name for name in source.classes}
        classes = tuple(stored.get(composed(name), name) for name in classes)
        for name in classes:
            if name not in source.classes:
                raise ConfigError(
                    f"data.only_classes: there is no class {name!r}{suggest(name, source.classes)} among the "
                    f"{len(source.classes)} of the data: {shorten(source.classes)}"
                )
        self.source = source
        self.classes = classes
        self.name, self.revision = source.name, source.revision
        self.frame_size, self.columns = source.frame_size, source.columns
        self.read, self.where = source.read, source.where

    @property
    def tally(self) -> Tally:
        """Counts of the whole source."""
        return tally_of(self.source)

    def records(self) -> Iterator[Record]:
        """Yield the records of the classes.

        Raises:
            ConfigError: If records have several labels.
        """
        new_labels = {
            label: self.classes.index(name)
            for label, name in enumerate(self.source.classes)
            if name in self.classes
        }
        for record in self.source.records():
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


# ---- build -----------------------------------------------------------------------------------------


@runtime_checkable
class InPlaceSource(Protocol):
    """Source whose files may serve as shards in place."""

    def plan_in_place(self, form: str, listing: Listing) -> list[ShardPlan] | None:
        """Plan one shard per file.

        Args:
            form: Option store.format.
            listing: All records; `listing.part_sizes` has the number of records of each part.

        Returns:
            The shards; None if the records have to be packed again.
        """


@dataclass(frozen=True, kw_only=True)
class ListPart:
    """Task that lists one part of a source: (number, name) -> a file with its records."""

    needs_gpu: ClassVar[bool] = False
    subject: ClassVar[Subject] = Subject("", "list")
    source: PartedSource
    files: ListingFiles
    seed: int

    def __call__(self, part: tuple[int, str]) -> ShardResult[tuple[RecordCounts, Tally]]:
        started = time.monotonic()
        number, name = part
        path = self.files.part(number)
        # A task that is taken for lost and started again elsewhere may still be writing.
        partial = path.with_name(f"{path.stem}.{secrets.token_hex(8)}{PARTIAL_SUFFIX}")
        tally = tally_of(self.source)
        tally.clear()
        counts = write_listing(partial, self.source.part_records(name), self.seed)
        file_at(partial).move(path)
        return ShardResult(
            name=name,
            records=counts.records.total(),
            seconds=time.monotonic() - started,
            report=(counts, deepcopy(tally)),  # the next part in this process counts anew
        )


def list_source(
    source: Source, files: ListingFiles, seed: int, executor: Executor
) -> tuple[Listing, Tally]:
    """Write all records of the source to a listing, in this process or part by part where the executor runs.

    Args:
        source: The records.
        files: Paths of the listing.
        seed: Value of store.seed, which determines the order of the records in shards.
        executor: Executor of a source in parts.

    Returns:
        The listing with its counts, and what the source met besides its records.

    Raises:
        ConfigError: If the source cannot be listed, or if a key is malformed.
    """
    if not isinstance(source, PartedSource):
        tally = tally_of(source)
        tally.clear()
        counts = write_listing(files.records, source.records(), seed)
        listing = Listing(files.records)
        listing.counts = counts
        return listing, tally
    task = ListPart(source=source, files=files, seed=seed)
    parts = list(enumerate(source.parts()))
    results: list[ShardResult[tuple[RecordCounts, Tally]]] = []
    run_shards("list", executor, task, parts, results.append)
    reports = {result.name: result.report for result in results}
    tally, counts = Tally(), RecordCounts()
    for _, name in parts:  # in their order, whichever ended first
        part_counts, part_tally = reports[name]
        counts.merge(part_counts)
        tally.merge(part_tally)
    if isinstance(source, FolderedSource):
        source.tally_other_files(tally)
    listing = join_listings((files.part(number) for number, _ in parts), files.records)
    listing.counts = counts
    return listing, tally


def tally_of(source: Source | PartedSource) -> Tally:
    """Return the counts that a source keeps of what it meets besides its records; empty if it keeps none."""
    tally = getattr(source, "tally", None)
    return tally if isinstance(tally, Tally) else Tally()


def classes_of_source(source: Source, listing: Listing) -> tuple[str, ...]:
    """Return the class names in label order, without listing the parts of a source again."""
    if isinstance(source, PartedSource):
        return source.classes_up_to(listing.largest_label)
    return source.classes


@dataclass(frozen=True)
class ListedData:
    """Records of data that were listed, and what was met besides them."""

    source: Source
    listing: Listing
    tally: Tally
    comparison: StoreComparison | None = None
    """Records that a store has to which others may be appended; None for a first packing."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes in label order."""
        if self.comparison is not None:
            return self.comparison.classes
        return classes_of_source(self.source, self.listing)

    def compared_with(self, store: Store, files: ListingFiles, seed: int) -> ListedData:
        """Return the data with their records that a store has, and with labels in the order of its classes.

        Args:
            store: The store.
            files: Paths of the listing.
            seed: Value of store.seed.
        """
        classes, listing = in_order_of_store(store, self.classes, self.listing, files, seed)
        return replace(self, listing=listing, comparison=compare_listing(store, classes, listing))

    def plan_shards(self, options: StoreOptions) -> list[ShardPlan]:
        """Plan the source's shards: its own tars if they can be used in place, new ones otherwise.

        Args:
            options: Options of the store.

        Raises:
            ConfigError: If there are no records, if several have the same key, or if the tars cannot be used in place
                although the options ask for it.
        """
        source, listing = self.source, self.listing
        with named_repeats(source, listing):
            in_place = (
                source.plan_in_place(options.format, listing)
                if isinstance(source, InPlaceSource)
                else None
            )
            if in_place is None:
                return plan_shards(listing, options.shard_size)
            check_keys(listing)
            require(
                options.shard_size is None,
                f"store.shard_size={options.shard_size} has no effect on tars that are used in place, one shard each; "
                "leave it out, or set data.reference=never, which packs copies",
            )
            return in_place


def list_data(
    config: DataConfig,
    files: ListingFiles,
    seed: int,
    choose: Callable[[int], Executor],
    store: Store | None = None,
) -> ListedData:
    """Build the source that `data=` names, and list its records.

    Args:
        config: Options of the data.
        files: Paths of the listing.
        seed: Value of store.seed, which determines the order of the records in shards.
        choose: Function of a guessed number of records that returns the executor of a source in parts.
        store: Finished store of the data, whose records keep the splits that were drawn; None for a first packing.

    Raises:
        ConfigError: If the source cannot be listed, or if a key is malformed.
    """
    source = build_source(config)
    size = sum(source.parts().values()) if isinstance(source, PartedSource) else 0
    listing, tally = list_source(source, files, seed, choose(size // BYTES_PER_RECORD))
    listing = with_drawn_splits(listing, config, files, store)
    return ListedData(source, listing, tally)


@contextmanager
def named_repeats(source: Source, listing: Listing) -> Iterator[None]:
    """Name the places of two records if the block finds that they have the same key.

    Raises:
        ConfigError: If it does.
    """
    try:
        yield
    except RepeatedKeyError as error:
        if isinstance(source, PartedSource):
            raise ConfigError(
                f"{error.count} sample keys are not unique, such as {error.key!r}; "
                f"make them unique with {source.unique_keys_option}"
            ) from error
        (record,) = listing.records(np.array([error.row]))
        several = (
            "; if its rows have one label each, list all of them in one row (data.labels)"
            if source.name == "image_table" and record.label != NO_LABEL
            else ""
        )
        raise ConfigError(f"{source.where(record)}: {error}{several}") from error


def build_source(config: DataConfig) -> Source:
    """Build the source that `data=` names, of the classes in `data.only_classes` if there are any.

    Raises:
        ConfigError: If there is no such class.
    """
    source: Source = resolve_implementation(type(config))(config)
    if isinstance(config, FileDataConfig) and config.only_classes:
        return ClassSubset(source, config.only_classes)
    return source
