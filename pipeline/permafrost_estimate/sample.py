"""A sample of a store's records, packed or referenced in a temporary store, and the numbers of the whole.

The first shard of the sample has a few records only. It warms up the code that is timed afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from math import ceil
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Any

import numpy as np
import pyarrow as pa

from permafrost.config.data import NoDataConfig
from permafrost.core.digests import derive_seed, sha256_keys
from permafrost.core.errors import require
from permafrost.core.tasks import Report, SerialExecutor, ShardResult, ShardTask
from permafrost.sources.data_preview import preview_source
from permafrost.sources.findings import add_findings, check_findings
from permafrost.sources.source import build_source, list_data
from permafrost.storage.files import file_at
from permafrost.storage.rooted_paths import RootedPath
from permafrost.store.commit_markers import MARKER_SCHEMA, marker_path, read_marker
from permafrost.store.entries import StoreMismatchError
from permafrost.store.generations import appended_store, packed_store
from permafrost.store.index_writer import StoreTablesWriter
from permafrost.store.listing import listing_files
from permafrost.store.manifest import write_manifest
from permafrost.store.pack import pack, plan_pack
from permafrost.store.reader import Store
from permafrost.store.shard_plan import ShardPlan
from permafrost_estimate.options import EstimateConfig


@dataclass(frozen=True)
class Spread:
    """Median, lowest and highest of some measurements."""

    median: float
    lowest: float
    highest: float

    def times(self, factor: float) -> Spread:
        """Return the same measurements in another unit; the factor is positive."""
        return Spread(self.median * factor, self.lowest * factor, self.highest * factor)

    def plus(self, other: Spread) -> Spread:
        """Return the sum of two quantities that are measured apart, from the lowest to the highest that is possible."""
        return Spread(
            self.median + other.median, self.lowest + other.lowest, self.highest + other.highest
        )


def spread_of(values: Sequence[float]) -> Spread:
    """Return the spread of at least one measurement."""
    return Spread(median(values), min(values), max(values))


class ShardTimes(SerialExecutor):
    """Executor in this process that keeps the results of each of its calls, shard by shard."""

    def __init__(self) -> None:
        self.results: list[list[ShardResult[Any]]] = []

    def map_shards(
        self, task: ShardTask[Report], shards: Sequence[Any], following: int = 0
    ) -> Iterator[ShardResult[Report]]:
        self.results.append([])
        for result in super().map_shards(task, shards):
            self.results[-1].append(result)
            yield result


# ---- sample ----------------------------------------------------------------------------------------


_MAX_FIRST_RECORDS = 8
"""Largest number of records of the first shard of a sample."""


CurvePoint = tuple[float, float]
"""Records and bytes of one file, or of several."""


@dataclass(frozen=True, kw_only=True)
class Whole:
    """Numbers of the store that is estimated."""

    records: int
    shards: int
    rows_per_shard: int
    """Rows of each shard in the arrays of passes, including unused ones."""
    trained: int
    """Records that a student trains on, or that a pass of stored views covers (`split`, `subset`)."""


@dataclass(frozen=True, kw_only=True)
class RecordSample:
    """Temporary store of some records, and what was known or measured when it was made."""

    store: Store
    """Temporary store, whose first shard has a few records only."""
    whole: Whole
    images: tuple[CurvePoint, ...]
    """Records and bytes of the measured shards of images, or of all shards where their files exist already."""
    finished: Store | None = None
    """The finished store whose records these are; None for records of a source."""
    in_place: bool = False
    """True if the images are in external tars, which are not copied."""
    packing: Spread | None = None
    """Seconds per record of packing, by shard; None for a finished store."""
    appended: int | None = None
    """Number of records that are to be appended to a finished store; None without one."""


def sample_finished(config: EstimateConfig, store: Store, folder: RootedPath) -> RecordSample:
    """Make a store of some records of a finished one, whose images stay where they are.

    Args:
        config: Options of the command.
        store: The finished store.
        folder: Folder of the new store.

    Raises:
        StoreMismatchError: If `data=` names a source of another kind, whose records are not listed.
        ConfigError: If a shard has a single record.
    """
    shards, manifest = list(store.shards), store.manifest
    if not isinstance(config.data, NoDataConfig):
        require(
            build_source(config.data).name == manifest.dataset.name,
            f"store.path={config.store.path} holds a finished store of {manifest.dataset.name}, but "
            f"data={config.data.kind}; leave out data= to estimate for its own records, or choose another store.path",
            StoreMismatchError,
        )
    sizes = [(shard.split, shard.records) for shard in shards]
    row = MARKER_SCHEMA.get_field_index("row")
    with StoreTablesWriter(folder) as writer:
        for number, start, stop in _pieces(sizes, config):
            shard = shards[number]
            path = marker_path(store.folder, shard.name)
            records = read_marker(path, MARKER_SCHEMA)[0].slice(start, stop - start)
            rows = pa.array(range(stop - start), pa.int32())
            entry = replace(
                shard,
                name=f"{shard.name}-{start}",
                records=stop - start,
                keys_sha256=sha256_keys(records["key"].to_pylist()),
                path=str(shard.file(store.folder.absolute())),
                referenced=True,
            )
            records = records.set_column(row, MARKER_SCHEMA.field(row), rows)
            writer.append(entry, records, file_at(path).sha256())
        tables = writer.finish()
    splits = tables.shards.records_of_splits()
    write_manifest(folder, replace(manifest, records=splits, **vars(tables)))
    return RecordSample(
        store=Store(folder),
        whole=_whole_numbers(config, sizes, len(manifest.classes), manifest.rows_per_shard),
        finished=store,
        in_place=any(shard.referenced for shard in shards),
        images=tuple((shard.records, shard.bytes) for shard in shards),
    )


def sample_source(config: EstimateConfig, folder: RootedPath) -> RecordSample:
    """List the source, and pack some of its records as precompute would.

    Args:
        config: Options of the command.
        folder: Folder of the new store.

    Raises:
        DataError: If the data were probably misunderstood.
        ConfigError: If the source cannot be listed, or a shard has a single record.
    """
    times = ShardTimes()
    with listing_files(folder) as files:
        packed = packed_store(config.store.folder)
        listed = list_data(config.data, files, config.store.seed, lambda _: times, packed)
        if (finished := appended_store(config, config.store.folder)) is not None:
            listed = listed.compared_with(finished, files, config.store.seed)
        plans = listed.plan_shards(config.store)
        preview = preview_source(
            config.data,
            listed,
            times,
            folder,
            files=config.preview.limit,
        )
        check_findings(add_findings(preview))
        sizes = [(plan.split, plan.num_records) for plan in plans]
        pieces = _pieces(sizes, config)
        parts = [
            _part_of(plans[number], position, start, stop)
            for position, (number, start, stop) in enumerate(pieces)
        ]
        plan = plan_pack(config, folder, listed.source, listed.classes, listed.listing, parts)
        pack(plan, config, times)
    seconds = [
        _seconds_of_a_record(result, plans[number])
        for result, (number, _, _) in zip(times.results[-1], pieces, strict=True)
    ]
    images = tuple(
        (plan.num_records, Path(plan.reference).stat().st_size)
        for plan in plans
        if plan.reference is not None
    )
    largest = max(size for _, size in sizes)
    rows = largest if images else config.store.shard_size or largest
    store = Store(folder)
    return RecordSample(
        store=store,
        whole=_whole_numbers(config, sizes, len(listed.classes), rows),
        in_place=bool(images),
        images=images or tuple((shard.records, shard.bytes) for shard in store.shards[1:]),
        packing=spread_of(seconds[1:]),
        appended=None if listed.comparison is None else len(listed.comparison.new),
    )


def _part_of(plan: ShardPlan, position: int, start: int, stop: int) -> ShardPlan:
    """Return the plan of some records of a shard, as a shard of the sample."""
    name = f"{plan.name}-{start}"
    start, stop = plan.start + start, plan.start + stop
    return replace(plan, position=position, name=name, start=start, stop=stop)


def _seconds_of_a_record(result: ShardResult[Any], plan: ShardPlan) -> float:
    """Divide the seconds of a shard's part among its records; an external tar is read whole for its digest."""
    records = max(1, result.records)
    if plan.reference is None:
        return result.seconds / records
    started = monotonic()
    file_at(Path(plan.reference)).sha256()
    digest = min(monotonic() - started, result.seconds)
    return (result.seconds - digest) / records + digest / plan.num_records


def _pieces(
    shards: Sequence[tuple[str, int]], config: EstimateConfig
) -> list[tuple[int, int, int]]:
    """Choose the records of the sample: a few of its first shard, then the following ones and those of the others.

    Shards are drawn at random; the first is of the split that students train on, if there is one. Where there are too
    few shards, the next records of the same ones are measured as shards.

    Args:
        shards: Split and number of records of each.
        config: Options of the command.

    Returns:
        The number of a shard, its first record, and the one after its last, for each shard of the sample.
    """
    generator = np.random.default_rng(derive_seed(config.store.seed, "estimate"))
    order: list[int] = generator.permutation(len(shards)).tolist()
    first = next((number for number in order if shards[number][0] == config.split), order[0])
    others = [number for number in order[: config.estimate.shards] if number != first]
    size = shards[first][1]
    require(
        size > 1,
        f"store.shard_size={config.store.shard_size} leaves a shard of one record, which shows no cost of a record "
        "apart from that of a shard; raise store.shard_size, or name more data",
    )
    few = max(1, min(_MAX_FIRST_RECORDS, size // 4))
    parts = []
    for number in [first, *others[: config.estimate.shards - 1]]:
        size = shards[number][1]
        step = config.estimate.shard_records or size
        starts = range(few if number == first else 0, size, step)
        parts.append([(number, start, min(start + step, size)) for start in starts])
    in_turn = [part for turn in zip_longest(*parts) for part in turn if part is not None]
    return [(first, 0, few), *in_turn[: config.estimate.shards]]


def _whole_numbers(
    config: EstimateConfig, shards: Sequence[tuple[str, int]], classes: int, rows_per_shard: int
) -> Whole:
    """Return the numbers of the data, or those of estimate.records in the same proportions.

    A subset selects from classes that are taken as equally frequent. Each of `shards` is a split and a number of
    records.
    """
    total = sum(size for _, size in shards)
    of_split = sum(size for split, size in shards if split == config.split)
    requested = config.estimate.records
    records = requested or total
    trained = max(0, round(of_split * records / total) - config.subset.holdout * classes)
    if config.subset.shots is not None:
        trained = min(trained, config.subset.shots * classes)
    return Whole(
        records=records,
        shards=len(shards) if requested is None else ceil(requested / rows_per_shard),
        rows_per_shard=rows_per_shard,
        trained=trained,
    )
