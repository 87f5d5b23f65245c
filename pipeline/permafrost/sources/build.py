"""Construction, listing and planning of the source that the options name.

A source lists its records one after the other and reads their bytes one by one. Reading is a pure function of the
record, so any process may read any shard at any time.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

from permafrost.config.file_data import FileDataConfig
from permafrost.config.options import resolve_implementation
from permafrost.core.errors import ConfigError
from permafrost.core.files import PARTIAL_SUFFIX, move_file
from permafrost.core.tasks import ShardResult, run_shards
from permafrost.sources.class_subset import ClassSubset, PartedClassSubset
from permafrost.sources.parts import PartedSource
from permafrost.store.listing import Listing, join_listings, write_listing
from permafrost.store.planning import RepeatedKeyError, check_keys, plan_shards

if TYPE_CHECKING:
    from permafrost.config.file_data import DataConfig
    from permafrost.config.store import StoreOptions
    from permafrost.core.records import Source
    from permafrost.core.tasks import MapShards
    from permafrost.store.listing import ListingFiles
    from permafrost.store.planning import ShardPlan


@runtime_checkable
class InPlaceSource(Protocol):
    """Source whose files may serve as shards in place."""

    def plan_in_place(self, form: str, listing: Listing) -> list[ShardPlan] | None:
        """Plan one shard per file; None if the records have to be packed again.

        form     store.format
        listing  all records; listing.part_sizes has the number of records of each part
        """


@dataclass(frozen=True, kw_only=True)
class ListPart:
    """Task that lists one part of a source: (number, name) -> a file with its records."""

    needs_gpu: ClassVar[bool] = False
    source: PartedSource
    files: ListingFiles
    seed: int

    def __call__(self, part: tuple[int, str]) -> ShardResult:
        started = time.monotonic()
        number, name = part
        path = self.files.part(number)
        # A task that is taken for lost and started again elsewhere may still be writing.
        own = path.with_name(f"{path.stem}.{secrets.token_hex(8)}{PARTIAL_SUFFIX}")
        records = write_listing(own, self.source.part_records(name), self.seed)
        move_file(own, path)
        return ShardResult(name=name, records=records, seconds=time.monotonic() - started)


def list_source(
    source: Source, files: ListingFiles, config: StoreOptions, map_shards: MapShards
) -> Listing:
    """Write all records of the source to a listing, in this process or part by part where `map_shards` runs."""
    if not isinstance(source, PartedSource):
        write_listing(files.records, source.records(), config.seed)
        return Listing(files.records)
    task = ListPart(source=source, files=files, seed=config.seed)
    parts = list(enumerate(source.parts()))
    run_shards("list", map_shards, task, parts)
    return join_listings((files.part(number) for number, _ in parts), files.records)


def classes_of(source: Source, listing: Listing) -> tuple[str, ...]:
    """Return the class names in label order, without listing the parts of a source again."""
    if isinstance(source, PartedSource):
        return source.classes_up_to(listing.largest_label)
    return source.classes


def plan_source(source: Source, listing: Listing, config: StoreOptions) -> list[ShardPlan]:
    """Plan the source's shards: its own tars if they can be used in place, new ones otherwise."""
    try:
        in_place = None
        if isinstance(source, InPlaceSource):
            in_place = source.plan_in_place(config.format, listing)
        if in_place is None:
            return plan_shards(listing, config.shard_size)
        check_keys(listing)
        return in_place
    except RepeatedKeyError as error:
        if not isinstance(source, PartedSource):
            raise
        raise ConfigError(
            f"{error.count} sample keys are not unique, such as {error.key!r}; "
            f"make them unique with {source.unique_keys_option}"
        ) from error


def build_source(config: DataConfig) -> Source:
    """Build the source that `data=` names."""
    source: Source = resolve_implementation(type(config))(config)
    if isinstance(config, FileDataConfig) and config.only_classes:
        subset = PartedClassSubset if isinstance(source, PartedSource) else ClassSubset
        return subset(source, config.only_classes)
    return source
