"""Append of records to a finished store: which of the listed records it has, what of them has changed, what is new.

A listed record is known by its key. Those of a generation are as they were if the digest of what was listed of them,
with labels, places and sizes of the files, is that of its packing. No file is read again for it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from permafrost.config.data import DataConfig
from permafrost.config.store import PrecomputeConfig
from permafrost.core.errors import require, shorten
from permafrost.core.records import NO_CLASS, NO_LABEL, Record, Source, are_numbers, mark_unknown
from permafrost.storage.files import file_at
from permafrost.storage.rooted_paths import RootedPath
from permafrost.store.commit import describe_other_options, needs_commit, unpacked_shards
from permafrost.store.entries import StoreMismatchError
from permafrost.store.listing import Listing, ListingFiles, write_listing
from permafrost.store.manifest import MANIFEST_NAME, DatasetIdentity
from permafrost.store.pack import PackPlan, derive_packing, fingerprint_dataset
from permafrost.store.reader import Store
from permafrost.store.shard_plan import ShardPlan, plan_shards

logger = logging.getLogger("permafrost.precompute")

_EXAMPLES = 3


@dataclass(frozen=True)
class StoreComparison:
    """Rows of a listing, by the generation of a finished store that has the record."""

    store: Store
    classes: tuple[str, ...]
    """Names of the classes, those of the store first."""
    rows: tuple[NDArray[np.int64], ...]
    new: NDArray[np.int64]
    """Rows of records that no generation has."""
    places: NDArray[np.int64]
    """Row of the index of each listed record, -1 for a new one or one that was left out."""
    missing: tuple[int, list[str]]
    """Number of records that are not listed any more, and the keys of some."""


def packed_store(path: RootedPath) -> Store | None:
    """Return a finished store that has its tables, None for others."""
    return None if needs_commit(path) else Store(path)


def appended_store(config: PrecomputeConfig, path: RootedPath) -> Store | None:
    """Return a finished store that has several generations, may get another or is compared anew, None for others."""
    if not file_at(path / MANIFEST_NAME).exists():
        return None
    store = Store(path)
    may_differ = config.store.append or config.store.relist
    return store if may_differ or store.num_generations > 1 else None


def compare_listing(store: Store, classes: tuple[str, ...], listing: Listing) -> StoreComparison:
    """Find listed records in a store by their keys.

    Args:
        store: The store.
        classes: Names of the classes, those of the store first.
        listing: Listing with labels in this order.
    """
    index, parts = store.index, store.manifest.packed_parts()
    keys, places = find_keys(store, listing)
    ends = index.shards.starts[np.cumsum([part.shards for part in parts])]
    ends_of_others = index.num_rows + np.cumsum([part.skipped for part in parts])
    numbers = np.where(
        places < index.num_rows,
        np.searchsorted(ends, places, side="right"),
        np.searchsorted(ends_of_others, places, side="right"),
    )
    is_listed = np.zeros(len(keys), bool)
    is_listed[places[places >= 0]] = True
    gone = np.flatnonzero(~is_listed)
    return StoreComparison(
        store=store,
        classes=classes,
        rows=tuple(
            np.flatnonzero((numbers == number) & (places >= 0)) for number in range(len(parts))
        ),
        new=np.flatnonzero(places < 0),
        places=np.where(places < index.num_rows, places, -1),
        missing=(len(gone), keys.take(pa.array(gone[:_EXAMPLES])).to_pylist()),
    )


def find_keys(store: Store, listing: Listing) -> tuple[pa.Array, NDArray[np.int64]]:
    """Return the keys of a store, those that were left out last, and the place in them of each listed record or -1."""
    left_out = pa.array([entry["key"] for entry in store.manifest.skipped], pa.large_string())
    keys = pa.concat_arrays([store.index.key_column(np.arange(store.index.num_rows)), left_out])
    listed = pa.chunked_array([batch.column("key") for batch in listing.batches], pa.string())
    found = pc.fill_null(pc.index_in(listed.cast(pa.large_string()), value_set=keys), -1)
    return keys, found.to_numpy().astype(np.int64)


def in_order_of_store(
    store: Store, classes: tuple[str, ...], listing: Listing, files: ListingFiles, seed: int
) -> tuple[tuple[str, ...], Listing]:
    """Return the classes of a store with new ones at the end, and a listing with labels in this order.

    Args:
        store: The store.
        classes: Names of the classes of the source.
        listing: Listing of its records.
        files: Paths for a listing with other labels.
        seed: Value of store.seed.
    """
    before = store.manifest.classes
    if are_numbers(classes):
        return before + classes[len(before) :], listing
    if are_numbers(before):
        before = classes[: len(before)]
    joined = before + tuple(name for name in classes if name not in before)
    numbers = [joined.index(name) for name in classes]
    if numbers == list(range(len(numbers))):
        return joined, listing
    every = np.arange(listing.num_records)

    def renumbered() -> Iterator[Record]:
        for start in range(0, len(every), 4096):
            yield from (
                _with_labels(record, numbers)
                for record in listing.records(every[start : start + 4096])
            )

    path = files.part(0)  # those of the source are joined
    counts = write_listing(path, renumbered(), seed)
    other = Listing(path, listing.part_sizes)
    other.counts = counts
    return joined, other


def _with_labels(record: Record, numbers: Sequence[int]) -> Record:
    def number(label: int) -> int:
        if label < NO_CLASS:
            return mark_unknown(numbers[mark_unknown(label)])
        return label if label in (NO_LABEL, NO_CLASS) else numbers[label]

    boxes = tuple(replace(box, label=number(box.label)) for box in record.boxes)
    labels = tuple(map(number, record.labels))
    return replace(record, label=number(record.label), labels=labels, boxes=boxes)


def plan_append(
    config: PrecomputeConfig,
    comparison: StoreComparison,
    source: Source,
    listing: Listing,
    plans: list[ShardPlan],
) -> PackPlan:
    """Compare a finished store with the records of the source, and plan the new ones as a further generation.

    Args:
        config: Options of the command.
        comparison: Records that the store has, and those that are new.
        source: Source of the records.
        listing: Listing of all records of the source, with labels in the order of the store's classes.
        plans: Shards of all records of the source, as of a first packing.

    Raises:
        StoreMismatchError: If records that the store has were changed or removed, or there are new ones and the options
            do not say that they are to be appended.
    """
    store, manifest = comparison.store, comparison.store.manifest
    stop_or_keep(config, describe_changes(config.data, comparison, source, listing))
    packing = derive_packing(config, source)
    added: list[ShardPlan] = []
    missing: list[ShardPlan] = []
    dataset = manifest.dataset
    if len(comparison.new):
        require(
            config.store.append,
            f"the data have {len(comparison.new):,} records that {store.path} does not have "
            f"({describe_keys(listing.keys(comparison.new[:_EXAMPLES]))}); store.append=true packs them as a further "
            "generation, and leave out data= to use the store as it is",
        )
        dataset = DatasetIdentity(
            name=source.name,
            fingerprint=fingerprint_dataset(config.data, source.revision, listing, comparison.new),
        )
        added = shards_of_rows(store, listing, comparison.new, plans, f"{dataset.fingerprint[:8]}-")
        missing = unpacked_shards(store.folder, added, dataset, packing)
    return PackPlan(
        path=store.folder,
        source=source,
        classes=comparison.classes,
        dataset=dataset,
        packing=packing,
        shards=added,
        missing=missing,
        before=manifest,
    )


def stop_or_keep(config: PrecomputeConfig, problems: list[str]) -> None:
    """Log how packed records differ from the listed ones if the options keep the packed ones.

    Raises:
        StoreMismatchError: If they differ, and store.changed=stop.
    """
    require(
        not problems or config.store.changed != "stop",
        f"records that {config.store.path} has are not as they were packed: {'; '.join(problems)}. Restore them, "
        "or keep the packed ones with store.changed=keep",
        StoreMismatchError,
    )
    for problem in problems:
        logger.warning("kept as packed (store.changed=keep): %s", problem)


def shards_of_rows(
    store: Store,
    listing: Listing,
    rows: NDArray[np.int64],
    plans: list[ShardPlan],
    tag: str,
) -> list[ShardPlan]:
    """Plan the shards of some records, in place if those of the source are.

    Args:
        store: The store.
        listing: Listing of all records of the source.
        rows: Rows of the records.
        plans: Shards of all records of the source, as of a first packing.
        tag: Beginning of the names of the shards, empty for the first generation.

    Raises:
        ConfigError: If a tar in place has records of several generations.
    """
    rows_per_shard = store.manifest.rows_per_shard
    if plans[0].reference is None:
        return plan_shards(listing, rows_per_shard, rows, tag)
    is_new = np.zeros(listing.num_records, bool)
    is_new[rows] = True
    added = [plan for plan in plans if is_new[plan.start : plan.stop].any()]
    for plan in added:
        require(
            bool(is_new[plan.start : plan.stop].all()) and plan.num_records <= rows_per_shard,
            f"{plan.reference} has records that {store.path} has already, or more than its {rows_per_shard} a shard; "
            "write the new ones to other tars, no larger than the first ones",
        )
    return added


def describe_changes(
    data: DataConfig, comparison: StoreComparison, source: Source, listing: Listing
) -> list[str]:
    """Describe how listed records differ from those that were packed, with numbers and examples.

    Args:
        data: Options of the source.
        comparison: Records that the store has.
        source: Source of the records.
        listing: Listing of all records of the source, with labels in the order of the store's classes.
    """
    store, problems = comparison.store, []
    count, keys = comparison.missing
    if count:
        problems.append(f"{count:,} not listed any more ({describe_keys(keys)})")
    parts = store.manifest.packed_parts()
    same = [
        fingerprint_dataset(data, source.revision, listing, rows) == part.dataset.fingerprint
        for rows, part in zip(comparison.rows, parts, strict=True)
    ]
    rows = np.concatenate(
        [rows for rows, is_same in zip(comparison.rows, same, strict=True) if not is_same]
        or [np.empty(0, np.int64)]
    )
    rows = rows[comparison.places[rows] >= 0]
    columns = store.index.take(("label", "size"), comparison.places[rows])
    differing = {"with another label": listing.labels(rows) != columns["label"]}
    if packed_with := describe_other_options(store.folder, data) if not all(same) else "":
        problems.append(f"{store.path} was packed with {packed_with}, so type that again")
    else:
        splits = stored_splits(store, comparison.places[rows])
        names, codes = listing.split_codes()
        differing["with another split"] = np.array(names, object)[codes[rows]] != splits
    canonical = store.manifest.canonical
    if canonical is not None and canonical.format == "original" and len(rows):
        sizes = np.concatenate(
            [
                [
                    _file_size(record.content)
                    for record in listing.records(rows[start : start + 4096])
                ]
                for start in range(0, len(rows), 4096)
            ]
        )
        differing["with another number of bytes"] = (sizes >= 0) & (sizes != columns["size"])
    for text, is_other in differing.items():
        if is_other.any():
            keys = listing.keys(rows[is_other][:_EXAMPLES])
            problems.append(f"{int(is_other.sum()):,} {text} ({describe_keys(keys)})")
    if not all(same) and not problems:
        problems.append(
            "places, groups, boxes or labels of some, or options of the data, are others"
        )
    return problems


def describe_keys(keys: list[str]) -> str:
    """Return the number of keys and the first ones, as their files are named."""
    return shorten([unquote(key) for key in keys], _EXAMPLES)


def stored_splits(store: Store, rows: NDArray[np.int64]) -> Any:
    """Return the split of some rows of a store's index."""
    return store.shards.table["split"].to_numpy()[store.index.shard_numbers(rows)]


def _file_size(content: Any) -> int:
    """Return the bytes of a record's file as its source has listed them, -1 if it lists none."""
    for part in content:
        if isinstance(part, tuple) and len(part) == 2:
            return int(part[1])
        if isinstance(part, int):
            return part
    return -1
