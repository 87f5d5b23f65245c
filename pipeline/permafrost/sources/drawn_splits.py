"""Splits that data.test_fraction draws of images: exact for small classes, and those of a store once it is packed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from permafrost.config.data import DataConfig
from permafrost.core.records import NO_POSITION
from permafrost.sources.splits import TEST, TRAIN
from permafrost.store.generations import find_keys, stored_splits
from permafrost.store.listing import Listing, ListingFiles
from permafrost.store.reader import Store

_EXACT_BELOW = 1000
"""Number of records of a class from which on the hashes alone draw its share closely enough."""


def choose_test(
    positions: NDArray[np.float64],
    labels: NDArray[np.int64],
    fraction: float,
    *,
    keep_groups: bool,
) -> NDArray[np.bool_]:
    """Choose the records of split test at a first packing: the fraction of each class, in the order of the hashes.

    A class of 1,000 records or more gives those whose hash is below the fraction. Smaller ones give exactly the
    fraction of their records together, at least one record. A class keeps a record in split train, and so does the last
    group. Where no class has two records, the hashes alone decide.

    Args:
        positions: Hash of each record's key, or of its group: f64 [n].
        labels: Label of each record; records without a single label form one class: i64 [n].
        fraction: Value of data.test_fraction.
        keep_groups: Choose whole groups, which share a position, by the nearest number of records: of each class, or of
            all if a group has several.
    """
    units, at, sizes_of_units = np.unique(positions, return_inverse=True, return_counts=True)
    is_mixed = keep_groups and np.unique(np.stack([at, labels]), axis=1).shape[1] > len(units)
    classes = np.zeros_like(labels) if is_mixed else np.maximum(labels, -1)
    _, members, sizes = np.unique(classes, return_inverse=True, return_counts=True)
    if (sizes == 1).all():
        return positions < fraction
    is_large = (sizes >= _EXACT_BELOW) & (not keep_groups)
    shares = np.where((sizes > 1) & ~is_large, fraction * sizes, 0)
    counts = shares.astype(np.int64)
    left = max(1, round(shares.sum())) - counts.sum()
    counts[np.lexsort((-sizes, counts - shares))[:left]] += 1
    ranks = np.argsort(np.lexsort((positions, sizes_of_units[at] > counts[members], members)))
    middles = np.bincount(at, ranks + 0.5) / sizes_of_units  # by which whole groups come nearest
    is_test = (
        middles[at] - (np.cumsum(sizes) - sizes)[members] < np.minimum(counts, sizes - 1)[members]
    )
    if keep_groups:
        is_test = (is_test if is_test.any() else at == 0) & (at < len(units) - 1)
    return np.asarray(np.where(is_large[members], positions < fraction, is_test))


def with_drawn_splits(
    listing: Listing, data: DataConfig, files: ListingFiles, store: Store | None
) -> Listing:
    """Return a listing with exact shares of split test, or with the drawn splits of a store for the records it has.

    Args:
        listing: Listing of all records, whose splits are drawn by their hashes alone.
        data: Options of the data.
        files: Paths for a listing with other splits.
        store: Store that was packed before; None for a first packing.
    """
    fraction, positions = getattr(data, "test_fraction", 0), listing.positions()
    rows = np.flatnonzero(positions != NO_POSITION)
    if not len(rows):
        return listing
    hashed = positions[rows] < fraction
    is_first = np.ones(len(rows), bool)
    if store is not None:
        first, num_rows = store.manifest.packed_parts()[0], store.index.num_rows
        places = find_keys(store, listing)[1][rows]
        is_packed = (places >= 0) & (places < num_rows)
        ends = store.index.shards.starts[first.shards], num_rows + first.skipped
        is_first = is_packed & (places < ends[0]) | ~is_packed & (places >= 0) & (places < ends[1])
    drawn = hashed.copy()
    drawn[is_first] = choose_test(
        positions[rows[is_first]],
        listing.labels(rows[is_first]),
        fraction,
        keep_groups=getattr(data, "keep_groups", False),
    )
    if store is not None:
        packed = hashed.copy()
        packed[is_packed] = stored_splits(store, places[is_packed]) == TEST
        # Records that were left out have no split in the store; formerly, the hashes alone drew it.
        is_exact = np.array_equal(drawn[is_packed & is_first], packed[is_packed & is_first])
        drawn = np.where(~is_packed & is_exact, drawn, packed)
        # New records of a packed group, which has one position, go where it is.
        known, place = np.unique(np.append(positions[rows[is_packed]], 2), return_index=True)
        at = np.searchsorted(known, positions[rows])
        joins = ~is_packed & (known[at] == positions[rows])
        drawn[joins] = packed[is_packed][place[at[joins]]]
    changed = np.flatnonzero(drawn != hashed)
    if not len(changed):
        return listing
    splits = np.where(drawn[changed], TEST, TRAIN).tolist()
    return listing.with_splits(rows[changed], splits, files.part(1))
