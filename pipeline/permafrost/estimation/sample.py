"""A sample of a store's records, packed or referenced in a temporary store, and the numbers of the whole.

The first shard of the sample has a few records only. It warms up the code that is timed afterwards, and its files
show which bytes of a shard do not depend on its number of records.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from itertools import count
from math import ceil
from pathlib import Path
from statistics import median
from time import monotonic
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from permafrost.config.data import NoDataConfig
from permafrost.core.errors import require
from permafrost.core.files import sha256_file, sha256_keys
from permafrost.core.seeds import derive_seed
from permafrost.sources.source import build_source, classes_of, list_source, plan_source
from permafrost.store.entries import StoreMismatchError
from permafrost.store.index_writer import StoreTablesWriter
from permafrost.store.listing import listing_files
from permafrost.store.manifest import DatasetIdentity, fingerprint_store, write_manifest
from permafrost.store.pack import PackShard, derive_packing
from permafrost.store.publish import publish_store
from permafrost.store.reader import Store
from permafrost.store.receipts import RECEIPT_SCHEMA, read_receipt, receipt_path

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from permafrost.config.store import SubsetOptions
    from permafrost.config.verbs import EstimateConfig
    from permafrost.core.files import RootedPath
    from permafrost.core.records import Source
    from permafrost.core.tasks import ShardResult, ShardTask
    from permafrost.store.listing import ListingFiles
    from permafrost.store.shards import ShardEntry


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median, lowest and highest of some measurements."""

    median: float
    lowest: float
    highest: float

    def times(self, factor: float) -> Spread:
        """Return the same measurements in another unit; the factor is positive."""
        return Spread(
            median=self.median * factor, lowest=self.lowest * factor, highest=self.highest * factor
        )

    def plus(self, other: Spread) -> Spread:
        """Return the sum of two quantities that are measured apart, from the lowest to the highest that is possible."""
        return Spread(
            median=self.median + other.median,
            lowest=self.lowest + other.lowest,
            highest=self.highest + other.highest,
        )


def spread_of(values: Sequence[float]) -> Spread:
    """Return the spread of at least one measurement."""
    return Spread(median=median(values), lowest=min(values), highest=max(values))


# ---- sample ----------------------------------------------------------------------------------------


_FEW = 8
"""Largest number of records of the first shard of a sample."""


Point = tuple[int, int]
"""Records and bytes of one file."""


@dataclass(frozen=True, kw_only=True)
class Whole:
    """Numbers of the store that is estimated."""

    records: int
    shards: int
    trained: int
    """Records that a student trains on, or that a pass of stored views covers (`split`, `subset`)."""
    is_scaled: bool = False
    """True if estimate.records asks for another number of records than the data have."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Temporary store of some records, and what was known or measured when it was made."""

    store: Store
    """Temporary store, whose first shard has a few records only."""
    whole: Whole
    finished: Store | None = None
    """The finished store whose records these are; None for records of a source."""
    in_place: bool = False
    """True if the images are in external tars, which are not copied."""
    images: tuple[Point, ...] = ()
    """Records and bytes of every shard of images, where its file exists already."""
    packing: Spread | None = None
    """Seconds a record of packing, by shard; None for a finished store."""

    @property
    def shards(self) -> tuple[ShardEntry, ...]:
        """The measured shards, without the first one."""
        return tuple(self.store.manifest.shards[1:])


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Part of a shard."""

    shard: int
    """Position of the shard in its store."""
    name: str
    first: int
    count: int


def sample_finished(config: EstimateConfig, store: Store, folder: RootedPath) -> Sample:
    """Make a store of some records of a finished one, whose images stay where they are.

    Raises StoreMismatchError if `data=` names a source of another kind, whose records are not listed.
    """
    _check_same_data(config, store)
    shards = store.shards
    pieces = _pieces(
        [shard.name for shard in shards],
        [shard.split for shard in shards],
        [shard.records for shard in shards],
        config,
    )
    with StoreTablesWriter(folder, store.manifest.rows_per_shard) as writer:
        for piece in pieces:
            shard = shards[piece.shard]
            path = receipt_path(store.folder, shard.name)
            receipt, _ = read_receipt(path, RECEIPT_SCHEMA)
            rows = receipt.slice(piece.first, piece.count)
            place = RECEIPT_SCHEMA.get_field_index("row")
            numbers = pa.array(range(piece.count), pa.int32())
            rows = rows.set_column(place, RECEIPT_SCHEMA.field("row"), numbers)
            entry = replace(
                shard,
                name=piece.name,
                records=piece.count,
                keys_sha256=sha256_keys(rows["key"].to_pylist()),
                path=str(shard.file(store.folder.absolute())),
                referenced=True,
            )
            writer.append(entry, rows, sha256_file(path))
        tables = writer.finish()
    manifest = store.manifest
    write_manifest(
        folder,
        replace(
            manifest,
            records=tables.shards.records_of_splits(),
            fingerprint=fingerprint_store(
                manifest.dataset,
                manifest.canonical,
                manifest.columns,
                tables.shards.names_and_keys(),
            ),
            shards=tables.shards,
            index=tables.index,
            keys=tables.keys,
            skipped=tables.skipped,
            multi_label=tables.multi_label,
        ),
    )
    return Sample(
        store=Store(folder),
        whole=_whole_numbers(
            config,
            records=store.num_records(),
            shards=len(shards),
            split_records=store.num_records(config.split),
            classes=len(store.manifest.classes),
            shard_records=store.manifest.rows_per_shard,
        ),
        finished=store,
        in_place=any(shard.referenced for shard in shards),
        images=tuple((shard.records, shard.bytes) for shard in shards),
    )


def _check_same_data(config: EstimateConfig, store: Store) -> None:
    if isinstance(config.data, NoDataConfig):
        return
    name, held = build_source(config.data).name, store.manifest.dataset.name
    if name != held:
        raise StoreMismatchError(
            f"store.path={config.store.path} holds a finished store of {held}, but data={config.data.kind}; leave out "
            "data= to estimate for its own records, or choose another store.path"
        )


def sample_source(config: EstimateConfig, folder: RootedPath) -> Sample:
    """List the source, and pack some of its records as precompute would."""
    source = build_source(config.data)
    with listing_files(folder) as files:
        return _sample_listed(config, folder, source, files)


def _sample_listed(
    config: EstimateConfig, folder: RootedPath, source: Source, files: ListingFiles
) -> Sample:
    listing = list_source(source, files, config.store, _in_this_process)
    plans = plan_source(source, listing, config.store)
    classes = classes_of(source, listing)
    sizes = [plan.num_records for plan in plans]
    pieces = _pieces([plan.name for plan in plans], [plan.split for plan in plans], sizes, config)
    chosen = []
    for position, piece in enumerate(pieces):
        plan = plans[piece.shard]
        start = plan.start + piece.first
        stop = start + piece.count
        chosen.append(replace(plan, position=position, name=piece.name, start=start, stop=stop))
    keys = sha256_keys(key for plan in chosen for key in plan.keys)
    dataset = DatasetIdentity(name=source.name, fingerprint=keys)
    packing = derive_packing(config, source)
    task = PackShard(
        store=folder, source=source, packing=packing, dataset_fingerprint=dataset.fingerprint
    )
    seconds = []
    for piece, plan in zip(pieces, chosen, strict=True):
        result = task(plan)
        packed_now = max(1, result.records)
        seconds.append(
            _seconds_of_a_record(result.seconds, packed_now, plan.reference, sizes[piece.shard])
        )
    in_place = any(plan.reference for plan in plans)
    publish_store(
        folder,
        chosen,
        dataset,
        classes=classes,
        packing=packing,
        image_size=config.store.image_size,
        rows_per_shard=max(sizes) if in_place else config.store.shard_size,
        max_skipped=sum(piece.count for piece in pieces),
    )
    splits = Counter[str]()
    for plan in plans:
        splits[plan.split] += plan.num_records
    return Sample(
        store=Store(folder),
        whole=_whole_numbers(
            config,
            records=listing.num_records,
            shards=len(plans),
            split_records=splits[config.split],
            classes=len(classes),
            shard_records=listing.num_records / len(plans) if in_place else config.store.shard_size,
        ),
        in_place=in_place,
        images=tuple(
            (size, Path(plan.reference).stat().st_size)
            for plan, size in zip(plans, sizes, strict=True)
            if plan.reference is not None
        ),
        packing=spread_of(seconds[1:]),
    )


def _in_this_process(task: ShardTask, shards: Sequence[Any]) -> Iterator[ShardResult]:
    return map(task, shards)


def _seconds_of_a_record(
    seconds: float, records: int, reference: str | None, shard_records: int
) -> float:
    """Divide the seconds of a shard's part among its records; an external tar is read whole for its digest."""
    if reference is None:
        return seconds / records
    started = monotonic()
    sha256_file(Path(reference))
    digest = min(monotonic() - started, seconds)
    return (seconds - digest) / records + digest / shard_records


def _pieces(
    names: Sequence[str], splits: Sequence[str], sizes: Sequence[int], config: EstimateConfig
) -> list[_Piece]:
    """Choose the records of the sample: a few of its first shard, then the following ones and those of the others.

    Where there are too few shards, the next records of the same ones are measured as shards.
    """
    most = config.estimate.shard_records
    shards = _draw(splits, config)
    require(
        sizes[shards[0]] > 1,
        f"store.shard_size={config.store.shard_size} leaves a shard of one record, which shows no cost of a record "
        "apart from that of a shard; raise store.shard_size, or name more data",
    )
    few = max(1, min(_FEW, sizes[shards[0]] // 4))
    pieces = [_Piece(shard=shards[0], name=f"{names[shards[0]]}-first", first=0, count=few)]
    taken = Counter({shards[0]: few})
    for number in count(1):
        for shard in shards:
            left = sizes[shard] - taken[shard]
            if left and len(pieces) <= config.estimate.shards:
                size = left if most is None else min(left, most)
                name = names[shard] if number == 1 else f"{names[shard]}-part-{number}"
                pieces.append(_Piece(shard=shard, name=name, first=taken[shard], count=size))
                taken[shard] += size
        if len(pieces) > config.estimate.shards or all(taken[s] == sizes[s] for s in shards):
            break
    return pieces


def _draw(splits: Sequence[str], config: EstimateConfig) -> list[int]:
    """Draw positions of shards at random; the first is of the split that students train on, if there is one."""
    generator = np.random.default_rng(derive_seed(config.store.seed, "estimate"))
    order = generator.permutation(len(splits)).tolist()
    of_split = next((shard for shard in order if splits[shard] == config.split), order[0])
    drawn = order[: config.estimate.shards]
    others = [shard for shard in drawn if shard != of_split]
    return [of_split, *others[: config.estimate.shards - 1]]


def _whole_numbers(
    config: EstimateConfig,
    *,
    records: int,
    shards: int,
    split_records: int,
    classes: int,
    shard_records: float,
) -> Whole:
    """Return the numbers of the data, or those of estimate.records in the same proportions."""
    wanted = config.estimate.records
    if wanted is None:
        trained = _selected(split_records, classes, config.subset)
        return Whole(records=records, shards=shards, trained=trained)
    return Whole(
        records=wanted,
        shards=ceil(wanted / shard_records),
        trained=_selected(round(split_records / records * wanted), classes, config.subset),
        is_scaled=True,
    )


def _selected(records: int, classes: int, subset: SubsetOptions) -> int:
    """Return the number of records of a split that a subset selects, if its classes are equally frequent."""
    remaining = max(0, records - subset.holdout * classes)
    return remaining if subset.shots is None else min(remaining, subset.shots * classes)
