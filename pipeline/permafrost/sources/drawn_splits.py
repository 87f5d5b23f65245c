"""Splits that data.test_fraction draws of images: exact for small classes, and those of a store once it is packed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from permafrost.config.data import DataConfig
from permafrost.core.records import NO_POSITION
from permafrost.sources.splits import TEST, TRAIN
from permafrost.store.generations import find_keys, splits_of
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
    fraction of their records together, at least one record. A class keeps a record in split train. Where no class has
    two records, or none of fewer than 1,000 groups, the hashes alone decide.

    Args:
        positions: Hash of each record's key, or of its group: f64 [n].
        labels: Label of each record; records without a single label form one class: i64 [n].
        fraction: Value of data.test_fraction.
        keep_groups: Choose whole groups, which share a position, by the nearest number of records.
    """
    drawn = positions < fraction
    if keep_groups:
        units, sizes = np.unique(positions, return_counts=True)
        ends = np.cumsum(sizes)[:-1]  # a group stays in split train
        if len(ends) and len(units) < _EXACT_BELOW:
            drawn = positions <= units[np.argmin(np.abs(ends - fraction * len(positions)))]
        return drawn
    _, members, sizes = np.unique(np.maximum(labels, -1), return_inverse=True, return_counts=True)
    shared = np.flatnonzero((sizes > 1) & (sizes < _EXACT_BELOW))
    if (sizes == 1).all():
        return drawn
    shares = fraction * sizes[shared]
    counts = np.zeros(len(sizes), np.int64)
    counts[shared] = shares
    left = max(1, round(shares.sum())) - counts.sum() if len(shared) else 0
    counts[shared[np.lexsort((-sizes[shared], counts[shared] - shares))[:left]]] += 1
    counts = np.minimum(counts, sizes - 1)
    order = np.lexsort((positions, members))
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.where(sizes[members] < _EXACT_BELOW, ranks < counts[members], drawn)


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
    positions = listing.positions()
    rows = np.flatnonzero(positions != NO_POSITION)
    fraction = getattr(data, "test_fraction", 0)
    hashed = positions[rows] < fraction

    def choose(some: NDArray[np.int64]) -> NDArray[np.bool_]:
        whole = getattr(data, "keep_groups", False)
        labels = listing.labels(rows[some])
        return choose_test(positions[rows[some]], labels, fraction, keep_groups=whole)

    if store is None:
        drawn = choose(np.arange(len(rows)))
    else:
        drawn, num_rows = hashed.copy(), store.index.num_rows
        first = store.manifest.packed_parts()[0]
        places = find_keys(store, listing)[1][rows]
        packed = np.flatnonzero((places >= 0) & (places < num_rows))
        drawn[packed] = splits_of(store, places[packed]) == TEST
        left_out = (places >= num_rows) & (places < num_rows + first.skipped)
        if left_out.any():  # records that the store has no split of
            stop = store.index.shards.starts[first.shards]
            some = np.flatnonzero(left_out | ((places >= 0) & (places < stop)))
            chosen, is_packed = choose(some), ~left_out[some]
            if np.array_equal(chosen[is_packed], drawn[some[is_packed]]):
                drawn[some] = chosen
    changed = np.flatnonzero(drawn != hashed)
    if not len(changed):
        return listing
    splits = np.where(drawn[changed], TEST, TRAIN).tolist()
    return listing.moved(rows[changed], splits, files.part(1))
