"""Assignment of records to shards, planned before anything is read and independent of timing.

A plan names rows of a listing, so it is small however many records its shard has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from permafrost.core.digests import sha256_keys
from permafrost.core.errors import ConfigError, require
from permafrost.core.records import Record
from permafrost.storage.files import file_at, read_at
from permafrost.storage.local_files import PARTIAL_SUFFIX, described_errors, write_error
from permafrost.storage.rooted_paths import RootedPath
from permafrost.store.listing import Listing, open_listed, open_listing

_ROW = np.dtype("<i8")
_USUAL_SIZE, _MIN_SIZE, _FEW_SHARDS, _MAX_ROOM = 512, 64, 8, 1.25
"""Records of a shard, and the fewest of one that is made smaller; shards of the largest split below which that is done,
if shards have more room than this multiple of the records."""
_BLOCK = 2**18
"""Number of rows that are handled at once."""


class RepeatedKeyError(ConfigError):
    """Records with the same key."""

    def __init__(self, key: str, rows: Sequence[int], count: int) -> None:
        first, second, *_ = (row + 1 for row in sorted(rows))
        super().__init__(
            f"records {first} and {second} have the key {key!r}; keys must be unique over all splits"
        )
        self.key = key
        self.row = second - 1
        """Row of the second record with that key in the listing."""
        self.count = count
        """Number of keys that several records have."""


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """Planned shard: its position in the store, its name, and the rows of its records.

    Picklable and small. Records are loaded from the listing, while that exists.
    """

    position: int
    name: str
    split: str
    start: int
    stop: int
    listing: RootedPath
    order: RootedPath | None = None
    """File of row numbers; those from `start` to `stop` are the records. None takes the rows themselves."""
    reference: str | None = None
    """Path of an external tar that already contains the records and is indexed in place."""

    @property
    def num_records(self) -> int:
        """Number of planned records."""
        return self.stop - self.start

    @property
    def records(self) -> tuple[Record, ...]:
        """The records in order, loaded at every call."""
        return open_listing(self.listing).records(self._rows())

    @property
    def keys(self) -> list[str]:
        """The records' keys in order, loaded at every call."""
        return open_listing(self.listing).keys(self._rows())

    @property
    def labels(self) -> NDArray[np.int64]:
        """The records' labels in order, [num_records], loaded at every call."""
        return open_listing(self.listing).labels(self._rows())

    @property
    def keys_sha256(self) -> str:
        """SHA-256 of the planned keys, including those of records that cannot be packed."""
        return sha256_keys(self.keys)

    def _rows(self) -> NDArray[np.int64]:
        if self.order is None:
            return np.arange(self.start, self.stop, dtype=np.int64)
        with open_listed(self.order) as file:
            size = self.num_records * _ROW.itemsize
            return np.frombuffer(read_at(file, size, self.start * _ROW.itemsize), _ROW)


def plan_shards(
    listing: Listing,
    shard_size: int | None,
    rows: NDArray[np.int64] | None = None,
    tag: str = "",
) -> list[ShardPlan]:
    """Divide each split into shards along a global, seeded permutation of its keys.

    The permutation orders keys by a hash of (seed, key). A class-sorted source therefore gives mixed shards, and
    the plan depends neither on the source's order nor on any library's random numbers.

    Args:
        listing: Listing of all records, with their ranks.
        shard_size: Records of each shard but the last one of a split; None for `fitting_size`.
        rows: Rows of the records; None for all.
        tag: Part of the shards' names, after their split.

    Raises:
        ConfigError: If there are no records, or several have the same key (RepeatedKeyError).
    """
    order = _rank_order(listing)
    splits, codes = listing.split_codes()
    if rows is not None:
        is_planned = np.zeros(len(order), bool)
        is_planned[rows] = True
        order = order[is_planned[order]]
    sizes = np.bincount(codes[order], minlength=len(splits))
    shard_size = shard_size or fitting_size(sizes.tolist())
    path = listing.path.with_name(f"{listing.path.stem}.order{PARTIAL_SUFFIX}")
    _write_by_split(path, order, codes, sizes)
    named = (
        (split, f"{split}-{tag}{number:06d}", start, min(start + shard_size, end))
        for split, size, end in zip(splits, sizes.tolist(), np.cumsum(sizes).tolist(), strict=True)
        for number, start in enumerate(range(end - size, end, shard_size))
    )
    return [
        ShardPlan(position, name, split, start, stop, listing.path, path)
        for position, (split, name, start, stop) in enumerate(named)
    ]


def fitting_size(splits: Sequence[int]) -> int:
    """Choose the records of a shard: the usual number, or fewer if small splits would leave much room empty.

    Args:
        splits: Number of records of each split, one of them above 0.
    """

    def room(size: int) -> int:
        return sum(-(-records // size) * size for records in splits)

    largest = max(splits)
    if largest > _FEW_SHARDS * _USUAL_SIZE or room(_USUAL_SIZE) <= _MAX_ROOM * sum(splits):
        return _USUAL_SIZE
    sizes = range(min(_MIN_SIZE, largest), min(_USUAL_SIZE, largest) + 1)
    return min(sizes, key=lambda size: (room(size), -size))


def find_unmixed_shard(plans: Sequence[ShardPlan]) -> ShardPlan | None:
    """Return the first shard with less than half of the classes expected in a random draw from its split, else None."""
    by_split: dict[str, list[ShardPlan]] = {}
    for plan in plans:
        by_split.setdefault(plan.split, []).append(plan)
    for members in by_split.values():
        counts = Counter[int]()
        for plan in members:
            labels, times = np.unique(plan.labels, return_counts=True)
            counts.update(dict(zip(labels.tolist(), times.tolist(), strict=True)))
        shares = np.array(list(counts.values())) / counts.total()
        for plan in members:
            if len(np.unique(plan.labels)) < (1 - (1 - shares) ** plan.num_records).sum() / 2:
                return plan
    return None


def check_keys(listing: Listing) -> None:
    """Check that there are records and that every key is unique.

    Raises:
        ConfigError: If there are no records, or several have the same key (RepeatedKeyError).
    """
    _rank_order(listing)


def _rank_order(listing: Listing) -> NDArray[np.int64]:
    """Return the rows in the order of their ranks, [num_records], after the checks of `check_keys`."""
    require(listing.num_records > 0, "the source lists no records; check data.path")
    high = listing.high_ranks()
    order = np.argsort(high)
    first: tuple[str, list[int]] | None = None
    count = 0
    for start, stop in _equal_runs(high, order):
        rows = np.sort(order[start:stop])
        order[start:stop] = rows[sorted(range(len(rows)), key=listing.ranks(rows).__getitem__)]
        keys = listing.keys(rows)
        twice = sorted(key for key, times in Counter(keys).items() if times > 1)
        count += len(twice)
        if twice and (first is None or twice[0] < first[0]):
            places = [place for place, key in enumerate(keys) if key == twice[0]]
            first = twice[0], rows[places].tolist()
    if first is not None:
        raise RepeatedKeyError(*first, count)
    return order


def _equal_runs(high: NDArray[np.uint64], order: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield the first and last place, exclusive, of each run of equal values in this order."""
    repeats = []
    for start in range(0, len(order) - 1, _BLOCK):
        values = high[order[start : start + _BLOCK + 1]]
        repeats.append(np.flatnonzero(values[1:] == values[:-1]) + start)
    places = np.concatenate(repeats) if repeats else np.empty(0, np.int64)
    yield from (
        (int(run[0]), int(run[-1]) + 2)
        for run in np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
        if len(run)
    )


def _write_by_split(
    path: RootedPath,
    order: NDArray[np.int64],
    codes: NDArray[np.unsignedinteger],
    sizes: NDArray[np.int64],
) -> None:
    """Write the row numbers split by split, each in this order."""
    places = np.cumsum(sizes) - sizes
    with described_errors(write_error, path), file_at(path).create() as file:
        for start in range(0, len(order), _BLOCK):
            rows = order[start : start + _BLOCK]
            of_rows = codes[rows]
            for code in np.unique(of_rows).tolist():
                split_rows = rows[of_rows == code]
                file.seek(int(places[code]) * _ROW.itemsize)
                file.write(split_rows.astype(_ROW).tobytes())
                places[code] += len(split_rows)
