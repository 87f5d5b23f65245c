"""Listing of a source on disk, so that no process holds all records.

A listing is a temporary Arrow file of records in the source's order. It is mapped, not loaded: its readers hold row
numbers, and load the records of one shard when they need them. Its name marks it as a leftover if its run is killed.
"""

from __future__ import annotations

import hashlib
import io
import json
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from permafrost.core.digests import canonical_json
from permafrost.core.errors import ConfigError
from permafrost.core.records import (
    MAX_KEY_BYTES,
    NO_CLASS,
    NO_GROUP,
    NO_LABEL,
    NONE,
    Box,
    Record,
    mark_unknown,
)
from permafrost.storage.files import file_at, scratch_folder
from permafrost.storage.local_files import PARTIAL_SUFFIX, described_errors, write_error
from permafrost.storage.lock import LockedError
from permafrost.storage.rooted_paths import RootedPath
from permafrost.store.arrow_files import map_arrow

BATCH_RECORDS = 65_536
"""Largest number of records in a batch of the file."""
BATCH_BYTES = 2**25
"""Number of bytes of JSON above which a batch is written with fewer records."""
_JOINED_RECORDS = 4096
"""Number of records whose JSON is hashed at once."""
_NAME = ".listing"
_RANK_BYTES = 16
_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("split", pa.string()),
        ("label", pa.int64()),
        ("largest_label", pa.int64()),  # of the record's label and labels
        ("group", pa.int32()),
        ("position", pa.float64()),  # where the split was drawn
        ("rank", pa.binary(_RANK_BYTES)),
        ("json", pa.large_binary()),  # all of the record, as in the fingerprint of the data
    ]
)


# ---- files ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ListingFiles:
    """Paths of the temporary files of one listing."""

    folder: RootedPath
    token: str

    @property
    def records(self) -> RootedPath:
        """The listing itself."""
        return self.folder / f"{_NAME}.{self.token}{PARTIAL_SUFFIX}"

    def part(self, number: int) -> RootedPath:
        """Listing of one part of the source."""
        return self.folder / f"{_NAME}.{self.token}.{number:06d}{PARTIAL_SUFFIX}"


@contextmanager
def listing_files(store: RootedPath, *, is_locked: bool = True) -> Iterator[ListingFiles]:
    """Provide paths for a listing in the store's folder, and remove its files when the block ends.

    A folder that is read-only for this process has its listing in the machine's temporary folder: only a store without
    missing shards can be there, and no other machine reads the listing.

    Args:
        store: Folder of the store.
        is_locked: True if the caller holds its lock, so that other listings are of killed processes, and are removed.
    """
    if not file_at(store).is_writable():
        with scratch_folder() as folder, _removed_files(folder) as files:
            yield files
        return
    if is_locked:
        remove_listings(store)
    with _removed_files(store) as files:
        yield files


@contextmanager
def shared_listing(store: RootedPath) -> Iterator[ListingFiles]:
    """Provide paths for a listing that stays for other processes, until `remove_listings`, unless the block fails."""
    files = ListingFiles(store, secrets.token_hex(8))
    try:
        yield files
    except BaseException:
        _remove(store, f"{_NAME}.{files.token}*")
        raise


def remove_listings(store: RootedPath) -> None:
    """Remove all listings in a store's folder, and what killed processes have left there."""
    _remove(store, ".*")


@contextmanager
def _removed_files(folder: RootedPath) -> Iterator[ListingFiles]:
    files = ListingFiles(folder, secrets.token_hex(8))
    try:
        yield files
    finally:
        open_listing.cache_clear()
        _remove(folder, f"{_NAME}.{files.token}*")


def _remove(folder: RootedPath, pattern: str) -> None:
    for path in file_at(folder).paths(f"{pattern}{PARTIAL_SUFFIX}"):
        file_at(path).remove()


# ---- records as text -----------------------------------------------------------------------------


def record_json(record: Record) -> bytes:
    """Return the canonical JSON of what a record was listed with, for the fingerprint of the data."""
    return canonical_json(
        {
            "key": record.key,
            "split": record.split,
            "label": record.label,
            "labels": record.labels,
            "group": record.group,
            "boxes": [vars(box) for box in record.boxes],
            "boxes_in_pixels": record.boxes_in_pixels,
            "content": record.content,
            **({} if record.weight is None else {"weight": record.weight}),
        }
    )


def parse_record(text: bytes) -> Record:
    """Return the record of a JSON text; lists in it become tuples."""
    values = json.loads(text)
    boxes = tuple(Box(**box) for box in values.pop("boxes"))
    return Record(boxes=boxes, **{name: _with_tuples(value) for name, value in values.items()})


def _with_tuples(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_with_tuples, value))
    if isinstance(value, dict):
        return {name: _with_tuples(member) for name, member in value.items()}
    return value


def rank_of(key: str, seed: int) -> bytes:
    """Return the position of a key in the global permutation of a seed: a hash of both."""
    salt = seed.to_bytes(8, "little")
    return hashlib.blake2b(key.encode(), digest_size=_RANK_BYTES, salt=salt).digest()


# ---- writing -------------------------------------------------------------------------------------


@contextmanager
def _batch_writer(path: RootedPath) -> Iterator[Callable[[pa.RecordBatch], None]]:
    """Provide a function that writes batches to an Arrow file, which is whole when the block ends.

    Errors of the disk name the file, and those of the source pass through.
    """
    file: Any = file_at(path).create()
    try:
        with described_errors(write_error, path):
            batches = pa.ipc.new_file(file, _SCHEMA)

        def write(batch: pa.RecordBatch) -> None:
            with described_errors(write_error, path):
                batches.write_batch(batch)

        yield write
        with described_errors(write_error, path):
            batches.close()
            file.close()
    except BaseException:
        with suppress(OSError):  # the original error is more informative
            file.close()
        raise


@dataclass
class RecordCounts:
    """Numbers of records by split and class, which are counted while the records are listed."""

    records: Counter[str] = field(default_factory=Counter)
    """Records of each split."""
    labeled: Counter[tuple[str, int]] = field(default_factory=Counter)
    """Records of each split and label; one with several labels counts for each."""
    unlabeled: Counter[str] = field(default_factory=Counter)
    """Records without a label of each split."""
    others: Counter[str] = field(default_factory=Counter)
    """Records with several labels (`labels`), none of them (`none`), boxes (`boxes`), a group (`groups`), and, of many
    labels, a box of a class that they do not have for certain (`boxes of other labels`)."""
    unknown: Counter[int] = field(default_factory=Counter)
    """Records of which others are known, by label that is not."""
    alone: Counter[int] = field(default_factory=Counter)
    """Records that may have several labels and have this one only, by label."""

    def add(self, record: Record, number: int = 1) -> None:
        """Count a record, or -1 of it."""
        self.records[record.split] += number
        labels = set(record.labels) or ({record.label} - {NO_LABEL})
        for label in labels:
            if label > NO_CLASS:
                self.labeled[record.split, label] += number
            elif label < NO_CLASS:
                self.unknown[mark_unknown(label)] += number
        if not labels:
            self.unlabeled[record.split] += number
        if record.labels == NONE:
            self.others["none"] += number
        if record.labels:
            self.others["labels"] += number
            present = [label for label in labels if label > NO_CLASS]
            if len(present) == 1:
                self.alone[present[0]] += number
        if record.boxes:
            self.others["boxes"] += number
            if record.labels:
                others = {box.label for box in record.boxes} - labels
                self.others["boxes of other labels"] += number * bool(others)
        if record.group != NO_GROUP:
            self.others["groups"] += number

    def merge(self, counts: RecordCounts) -> None:
        """Add other counts."""
        for name, counter in vars(counts).items():
            getattr(self, name).update(counter)


def write_listing(path: RootedPath, records: Iterable[Record], seed: int) -> RecordCounts:
    """Write the records of a source to a file.

    Args:
        path: File to write.
        records: Records in the source's order.
        seed: Value of store.seed, which determines the ranks.

    Returns:
        Numbers of the records by split and class.

    Raises:
        ConfigError: If a key is malformed.
    """
    counts = RecordCounts()
    with _batch_writer(path) as write:
        for batch in _batches(records, seed, counts):
            write(batch)
    pa.default_memory_pool().release_unused()
    return counts


def _batches(
    records: Iterable[Record], seed: int, counts: RecordCounts
) -> Iterator[pa.RecordBatch]:
    rows: list[tuple[Any, ...]] = []
    size = 0
    for record in records:
        # A key is the name of a member of a tar.
        if (
            not (key := record.key)
            or len(key.encode()) > MAX_KEY_BYTES
            or "." in key
            or "/" in key
            or "\\" in key
        ):
            raise ConfigError(
                f"record key {key!r} must have 1 to {MAX_KEY_BYTES} bytes and no dots or slashes"
            )
        counts.add(record)
        text = record_json(record)
        largest = max(record.label, *record.labels) if record.labels else record.label
        rank = rank_of(record.key, seed)
        columns = record.key, record.split, record.label, largest, record.group, record.position
        rows.append((*columns, rank, text))
        size += len(text)
        if len(rows) >= BATCH_RECORDS or size >= BATCH_BYTES:
            yield _batch(rows)
            rows, size = [], 0
    if rows:
        yield _batch(rows)


def _batch(rows: list[tuple[Any, ...]]) -> pa.RecordBatch:
    columns = [
        pa.array(values, spec.type)
        for values, spec in zip(zip(*rows, strict=True), _SCHEMA, strict=True)
    ]
    return pa.record_batch(columns, schema=_SCHEMA)


def join_listings(parts: Iterable[RootedPath], path: RootedPath) -> Listing:
    """Join the listings of a source's parts to one file, in their order, and remove them.

    Args:
        parts: Listings of the parts.
        path: File to write.
    """
    sizes: list[int] = []
    waiting: list[pa.RecordBatch] = []
    with _batch_writer(path) as write:

        def flush() -> None:
            for batch in pa.Table.from_batches(waiting, _SCHEMA).combine_chunks().to_batches():
                write(batch)
            waiting.clear()

        for part in parts:
            listing = Listing(part)
            sizes.append(listing.num_records)
            for batch in listing.batches:
                waiting.append(batch)
                if (
                    sum(batch.num_rows for batch in waiting) >= BATCH_RECORDS
                    or sum(batch.nbytes for batch in waiting) >= BATCH_BYTES
                ):
                    flush()
            file_at(part).remove()
        flush()
    pa.default_memory_pool().release_unused()
    return Listing(path, tuple(sizes))


# ---- reading -------------------------------------------------------------------------------------


def open_listed(path: RootedPath) -> io.FileIO:
    """Open a temporary file of a listing.

    Raises:
        LockedError: If another writer has removed it, where no lock holds.
    """
    try:
        return file_at(path).open()
    except FileNotFoundError:
        raise LockedError(
            f"{path} was removed by another process that writes to {path.parent}. Finished files are kept. Wait until "
            "it has finished, and run the same command again"
        ) from None


class Listing:
    """Mapped listing. Rows are int64 [n], numbers of records in the source's order."""

    def __init__(self, path: RootedPath, part_sizes: tuple[int, ...] = ()) -> None:
        self.path = path
        self.part_sizes = part_sizes
        """Number of records of each part of the source, in their order; empty where it was listed at once."""
        self.counts = RecordCounts()
        """Counts of the records, in the process that had them listed."""
        with open_listed(path) as file:
            reader = map_arrow(file)
        self.batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        self._stops = np.cumsum([batch.num_rows for batch in self.batches], dtype=np.int64)

    @property
    def num_records(self) -> int:
        """Number of records."""
        return int(self._stops[-1]) if len(self._stops) else 0

    @property
    def largest_label(self) -> int:
        """Largest label of all records; NO_LABEL, which is -1, if none has one."""
        largest = (pc.max(batch.column("largest_label")).as_py() for batch in self.batches)
        return max(largest, default=-1)

    def records(self, rows: NDArray[np.int64]) -> tuple[Record, ...]:
        """Load some records."""
        return tuple(map(parse_record, self._take("json", rows).to_pylist()))

    def keys(self, rows: NDArray[np.int64]) -> list[str]:
        """Load the keys of some records."""
        return cast("list[str]", self._take("key", rows).to_pylist())

    def labels(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Load the labels of some records: i64 [n]."""
        return cast("NDArray[np.int64]", self._take("label", rows).to_numpy())

    def ranks(self, rows: NDArray[np.int64]) -> list[bytes]:
        """Load the ranks of some records."""
        return cast("list[bytes]", self._take("rank", rows).to_pylist())

    def high_ranks(self) -> NDArray[np.uint64]:
        """Load the high 64 bits of all ranks: u64 [num_records]."""
        high = np.empty(self.num_records, np.uint64)
        for batch, stop in zip(self.batches, self._stops.tolist(), strict=True):
            words = np.frombuffer(batch.column("rank").buffers()[1], ">u8", 2 * batch.num_rows)
            high[stop - batch.num_rows : stop] = words[::2]
        return high

    def split_codes(self) -> tuple[list[str], NDArray[np.unsignedinteger[Any]]]:
        """Return the sorted names of the splits, and the position of each record's split in them."""
        names = sorted(
            {name for batch in self.batches for name in batch.column("split").unique().to_pylist()}
        )
        codes = np.empty(self.num_records, np.min_scalar_type(len(names)))
        for batch, stop in zip(self.batches, self._stops.tolist(), strict=True):
            positions = pc.index_in(batch.column("split"), pa.array(names, pa.string()))
            codes[stop - batch.num_rows : stop] = positions.to_numpy(zero_copy_only=False)
        return names, codes

    def groups(self) -> NDArray[np.int32]:
        """Load the groups of all records: i32 [num_records], NO_GROUP for a record without one."""
        return self._column("group", np.int32)

    def positions(self) -> NDArray[np.float64]:
        """Load the hashes that have drawn the splits: f64 [num_records]; NO_POSITION where none was drawn."""
        return self._column("position", np.float64)

    def _column(self, name: str, dtype: Any) -> NDArray[Any]:
        cells = [batch.column(name).to_numpy() for batch in self.batches]
        return np.concatenate([np.empty(0, dtype), *cells])

    def with_splits(self, rows: NDArray[np.int64], splits: list[str], path: RootedPath) -> Listing:
        """Write the listing with other splits of some records to another file, and return it.

        Args:
            rows: Rows of the records, ascending.
            splits: Their splits.
            path: File to write.
        """
        counts, before = deepcopy(self.counts), self.records(rows)
        after = [replace(record, split=split) for record, split in zip(before, splits, strict=True)]
        for number, records in ((-1, before), (1, after)):
            for record in records:
                counts.add(record, number)
        for name, counter in vars(counts).items():
            setattr(counts, name, +counter)  # without zeros
        names, texts = pa.array(splits), pa.array(map(record_json, after), pa.large_binary())
        with _batch_writer(path) as write:
            for batch, stop in zip(self.batches, self._stops.tolist(), strict=True):
                start = stop - batch.num_rows
                first, last = np.searchsorted(rows, (start, stop))
                mask = pa.array(np.isin(np.arange(start, stop), rows[first:last]))
                columns = dict(zip(_SCHEMA.names, batch.columns, strict=True))
                for name, values in (("split", names), ("json", texts)):
                    values = values[first:last]
                    columns[name] = pc.replace_with_mask(columns[name], mask, values)
                write(pa.record_batch(list(columns.values()), schema=_SCHEMA))
        listing = Listing(path, self.part_sizes)
        listing.counts = counts
        return listing

    def json_by_key(self, rows: NDArray[np.int64] | None = None) -> Iterator[bytes]:
        """Yield the JSON of records in the order of their keys, many at a time, separated by commas.

        Args:
            rows: Rows of the records; None for all.
        """
        keys = pa.chunked_array([batch.column("key") for batch in self.batches], pa.string())
        keys = keys if rows is None else keys.take(pa.array(rows))
        order = pc.sort_indices(keys)  # UTF-8 sorts as code points do
        for start in range(0, len(order), _JOINED_RECORDS):
            places = order.slice(start, _JOINED_RECORDS).to_numpy().astype(np.int64)
            some = places if rows is None else rows[places]
            yield b",".join(self._take("json", some).to_pylist())
        del order
        pa.default_memory_pool().release_unused()

    def _take(self, name: str, rows: NDArray[np.int64]) -> pa.Array:
        """Load the cells of a column in some rows, batch by batch, as a take of the whole copies all of its text."""
        numbers = np.searchsorted(self._stops, rows, side="right")
        order = np.argsort(numbers, kind="stable")
        cells = [pa.array([], _SCHEMA.field(name).type)]
        for group in np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1):
            if len(group):
                batch = self.batches[numbers[group[0]]]
                places = rows[group] - self._stops[numbers[group[0]]] + batch.num_rows
                cells.append(batch.column(name).take(pa.array(places)))
        return pa.concat_arrays(cells).take(pa.array(np.argsort(order)))


@lru_cache(maxsize=1)
def open_listing(path: RootedPath) -> Listing:
    """Map a listing, once per process for the shards of one plan."""
    return Listing(path)
