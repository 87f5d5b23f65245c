"""Index of a store: one row per record in two Arrow files, which all processes of a machine share.

`index.arrow` has the columns that training reads, `keys.arrow` the keys and SHA-256 digests. Each is an Arrow IPC file
of a single record batch. Every column is therefore one contiguous piece of the file, which is mapped into memory as a
NumPy array without a copy: opening takes no time, a process holds no private memory for the rows, and it reads from
disk only what it uses. Files of many small batches lose all three (docs/development/decisions.md has the figures).

Nothing reads the whole file before its first use, so a digest of the file would not protect it. The table of shards has
a CRC-32C for each shard and column, and a digest of each shard's keys. They are compared when rows of the shard are
first read. `permafrost verify` compares the digests of both files as well.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from permafrost.core.digests import sha256_keys
from permafrost.core.errors import UserError
from permafrost.core.records import MAX_KEY_BYTES, NO_CLASS, NO_LABEL, mark_unknown
from permafrost.storage.files import open_regular, open_size
from permafrost.storage.rooted_paths import RootedPath
from permafrost.store.arrow_files import map_batch, table_schema
from permafrost.store.entries import REPAIR, REWRITE, FileEntry, ManifestError, damage_error
from permafrost.store.receipts import BOX, RECEIPT_SCHEMA

if TYPE_CHECKING:
    from permafrost.store.manifest import StoreManifest

INDEX_NAME = "index.arrow"
KEYS_NAME = "keys.arrow"
_PIECE = 2**20
"""Number of values whose checksum is computed at once."""
_BOXES_UNIT = "normalized canonical coordinates: the outer edges of the frame are -1 and 1"

_FNV_PRIME = np.uint64(0x100000001B3)
_MIX_FACTORS = (np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53))

RowNumbers = range | NDArray[np.int64]
"""Rows of the index: a range, or any array of row numbers."""

INDEX_SCHEMA = pa.unify_schemas(
    [
        table_schema(
            split=pa.dictionary(pa.int16(), pa.string()),
            shard=pa.dictionary(pa.int32(), pa.string()),
            row=RECEIPT_SCHEMA.field("row").type,
            array_row=pa.int64(),
        ),
        pa.schema([column for column in RECEIPT_SCHEMA if pa.types.is_integer(column.type)]),
        table_schema(labels=pa.large_list(pa.int32())),
    ]
).append(pa.field("boxes", pa.large_list(BOX), nullable=False, metadata={"unit": _BOXES_UNIT}))
"""Columns of index.arrow, as described in docs/reference/store-format.md."""

KEYS_SCHEMA = table_schema(key=pa.large_string(), image_sha256=pa.binary(32))
"""Columns of keys.arrow."""

CHECKED_COLUMNS = tuple(INDEX_SCHEMA.names[2:])
"""Columns with a checksum in the table of shards, in its order. The other two follow from that table itself."""
LIST_COLUMNS = ("labels", "boxes")
BOX_FIELDS = tuple(field.name for field in BOX)


def open_batch(path: RootedPath, file: FileEntry, schema: pa.Schema) -> pa.RecordBatch:
    """Map the single record batch of an Arrow file into memory.

    Raises:
        ManifestError: If the file is missing, or has another size or other columns than its manifest says.
    """
    try:
        with open_regular(path, file.sha256) as opened:
            size = open_size(opened)
            if size != file.bytes:
                raise damage_error(
                    path,
                    file.sha256,
                    f"{path} is damaged: it has {size} bytes, but its manifest lists {file.bytes}; {REWRITE}",
                )
            batch = map_batch(opened, schema)
        batch.validate()
    except FileNotFoundError:
        raise ManifestError(f"{path} is missing; {REPAIR}") from None
    except UserError:
        raise
    except (pa.ArrowException, OSError, ValueError, struct.error, MemoryError) as error:
        raise damage_error(
            path,
            file.sha256,
            f"{path} is damaged: it cannot be read as Arrow ({error}); {REWRITE}",
        ) from error
    return batch


def checksum(parts: Iterator[NDArray[Any]]) -> int:
    """Return the CRC-32C of the values of a column's rows."""
    crc = 0
    for part in parts:
        for start in range(0, len(part), _PIECE):
            crc = google_crc32c.extend(crc, part[start : start + _PIECE].tobytes())
    return crc


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix all bits of 64-bit values (fmix64 of MurmurHash3)."""
    shift = np.uint64(33)
    for factor in _MIX_FACTORS:
        values = (values ^ (values >> shift)) * factor
    return values ^ (values >> shift)


class RecordIndex:
    """Rows of a store's index, mapped into memory and checked shard by shard when they are first read."""

    def __init__(self, folder: RootedPath, manifest: StoreManifest) -> None:
        self.shards = manifest.shards
        self._path = folder / manifest.index.path
        self._keys_path = folder / manifest.keys.path
        self._manifest = manifest
        self._sound = np.zeros((len(self.shards), len(CHECKED_COLUMNS) + 1), bool)

    @cached_property
    def num_rows(self) -> int:
        """Number of records."""
        return int(self.shards.starts[-1])

    @property
    def has_many_labels(self) -> bool:
        """True if records list their classes in `labels`; `label` is then not read."""
        return self._manifest.multi_label

    @property
    def has_generations(self) -> bool:
        """True if records were appended to those of the first packing."""
        return bool(self._manifest.generations)

    @cached_property
    def _columns(self) -> dict[str, pa.Array]:
        batch = self._open(self._path, self._manifest.index, INDEX_SCHEMA)
        return dict(zip(batch.schema.names, batch.columns, strict=True))

    @cached_property
    def _numbers(self) -> dict[str, NDArray[Any]]:
        """Columns of numbers as arrays that lie in the mapped file."""
        return {
            name: self._columns[name].to_numpy()
            for name in CHECKED_COLUMNS
            if name not in LIST_COLUMNS
        }

    @cached_property
    def _lists(self) -> dict[str, tuple[NDArray[np.int64], tuple[NDArray[Any], ...]]]:
        """Offsets and values of the columns of lists; a list of structures has one array for each field."""
        lists = {}
        for name in LIST_COLUMNS:
            column = self._columns[name]
            values = column.values
            parts = values.flatten() if pa.types.is_struct(values.type) else [values]
            lists[name] = column.offsets.to_numpy(), tuple(part.to_numpy() for part in parts)
        return lists

    @cached_property
    def _keys_batch(self) -> pa.RecordBatch:
        return self._open(self._keys_path, self._manifest.keys, KEYS_SCHEMA)

    @cached_property
    def _keys(self) -> tuple[NDArray[np.int64], pa.Buffer]:
        _, offsets, text = self._keys_batch.column(0).buffers()
        first = self.shards.first_row * np.dtype(np.int64).itemsize  # slices have all of the file
        count = self.num_rows + 1
        whole = np.frombuffer(offsets, np.int64, count, first) if self.num_rows else [0]
        return np.asarray(whole), text if text is not None else pa.py_buffer(b"")

    def _open(self, path: RootedPath, file: FileEntry, schema: pa.Schema) -> pa.RecordBatch:
        """Map a file of the index, which must have a row for each record."""
        batch = open_batch(path, file, schema)
        first = self.shards.first_row
        has_all = self.shards.rows == slice(None)
        if batch.num_rows < first + self.num_rows or (has_all and batch.num_rows > self.num_rows):
            raise ManifestError(
                f"{path} has {batch.num_rows} rows, but the manifest lists {self.num_rows} records; "
                "run permafrost verify"
            )
        return batch.slice(first, self.num_rows)

    # ---- reading -------------------------------------------------------------------------------------

    def shard_numbers(self, rows: RowNumbers) -> NDArray[np.int64]:
        """Return the number of each row's shard."""
        numbers: NDArray[np.int64] = np.searchsorted(self.shards.starts, rows, side="right") - 1
        return numbers

    def shards_of(self, rows: RowNumbers) -> NDArray[np.int64]:
        """Return the numbers of the shards that contain the rows, ascending."""
        if isinstance(rows, range):
            if not rows:
                return np.empty(0, np.int64)
            first, last = self.shard_numbers(np.array([rows[0], rows[-1]]))
            return np.arange(first, last + 1)
        return np.unique(self.shard_numbers(rows))

    def values(self, name: str, rows: RowNumbers) -> NDArray[Any]:
        """Return a column of numbers for these rows; of a range a view of the mapped file, which is read-only.

        Raises:
            ManifestError: If the column is damaged in a shard of these rows.
        """
        return self.take((name,), rows)[name]

    def take(self, names: tuple[str, ...], rows: RowNumbers) -> dict[str, NDArray[Any]]:
        """Return several columns of numbers for these rows.

        Args:
            names: Names of the columns.
            rows: Rows of the index; of a range the columns are views of the mapped file, which are read-only.

        Raises:
            ManifestError: If a column is damaged in a shard of these rows.
        """
        self.require_sound(self.shards_of(rows), names)
        where: Any = slice(rows.start, rows.stop) if isinstance(rows, range) else rows
        return {name: self._numbers[name][where] for name in names}

    def label_lists(self, rows: RowNumbers) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return the labels of these rows, as in `Record.labels`, one after another, and their number for each row."""
        (values,), lengths = self._take_lists("labels", rows)
        return values, lengths

    def boxes(self, rows: RowNumbers) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return boxes, f32 [n, 5] with label, x0, y0, x1, y1, one row after another, and their number per row."""
        values, lengths = self._take_lists("boxes", rows)
        return np.stack([value.astype(np.float32) for value in values], axis=1), lengths

    def list_lengths(self, name: str, rows: RowNumbers) -> NDArray[np.int64]:
        """Return the length of each row's list: i64 [n].

        Args:
            name: Column of lists, `labels` or `boxes`.
            rows: Rows of the index.

        Raises:
            ManifestError: If the column is damaged in a shard of these rows.
        """
        self.require_sound(self.shards_of(rows), (name,))
        offsets, _ = self._lists[name]
        at: Any = slice(rows.start, rows.stop) if isinstance(rows, range) else rows
        after: Any = slice(rows.start + 1, rows.stop + 1) if isinstance(rows, range) else rows + 1
        lengths: NDArray[np.int64] = offsets[after] - offsets[at]
        return lengths

    def most_labels(self) -> int:
        """Return the largest number of labels of a record; 0 if no record has any."""
        rows = range(self.num_rows)
        if self._manifest.multi_label:
            values, lengths = self.label_lists(rows)
            owners = np.repeat(np.arange(len(lengths)), lengths)
            return int(np.bincount(owners[values > NO_CLASS]).max(initial=0))
        return int((self.values("label", rows) != NO_LABEL).any())

    def _take_lists(
        self, name: str, rows: RowNumbers
    ) -> tuple[tuple[NDArray[Any], ...], NDArray[np.int64]]:
        lengths = self.list_lengths(name, rows)
        offsets, values = self._lists[name]
        if isinstance(rows, range):
            first, last = (offsets[rows.start], offsets[rows.stop]) if rows else (0, 0)
            return tuple(value[first:last] for value in values), lengths
        ends = np.cumsum(lengths)
        total = int(ends[-1]) if len(ends) else 0
        at = np.repeat(offsets[rows] - (ends - lengths), lengths) + np.arange(total)
        return tuple(value[at] for value in values), lengths

    def keys(self, rows: RowNumbers) -> list[str]:
        """Return the keys of these rows."""
        self._require_sound_keys(self.shards_of(rows))
        offsets, text = self._keys
        return [text[offsets[row] : offsets[row + 1]].to_pybytes().decode() for row in rows]

    def key_column(self, rows: NDArray[np.int64]) -> pa.Array:
        """Return the keys of these rows as an Arrow column, without an object for each key."""
        self._require_sound_keys(self.shards_of(rows))
        offsets, text = self._keys
        keys = pa.LargeStringArray.from_buffers(self.num_rows, pa.py_buffer(offsets), text)
        return keys.take(pa.array(rows))

    def key_order(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the order that sorts these rows by their keys, as code points."""
        order: NDArray[np.int64] = (
            pc.sort_indices(self.key_column(rows)).to_numpy().astype(np.int64)
        )
        return order

    def image_digests(self) -> pa.Array:
        """Return the SHA-256 of the images of all rows, 32 bytes each."""
        return self._keys_batch.column(1)

    def key_digests(self, rows: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
        """Return a digest of the seed and each row's key, u64 [n], without an object for each key.

        It is FNV-1a of the key's bytes from a digest of the seed, mixed by the last step of MurmurHash3, so it depends
        on nothing but its arguments.
        """
        self._require_sound_keys(self.shards_of(rows))
        offsets, text = self._keys
        data = np.frombuffer(text, np.uint8)
        lengths = offsets[rows + 1] - offsets[rows]
        order = np.argsort(-lengths, kind="stable")  # keys that have a byte at a place come first
        starts, shortness = offsets[rows][order], -lengths[order]
        digests = _mix(np.full(len(rows), seed, np.uint64))
        for place in range(int(lengths.max(initial=0))):
            count = int(np.searchsorted(shortness, -place))
            prefix = digests[:count]
            prefix ^= data[starts[:count] + place]
            prefix *= _FNV_PRIME
        by_row = np.empty_like(digests)
        by_row[order] = _mix(digests)
        return by_row

    def _require_sound_keys(self, numbers: NDArray[np.int64]) -> None:
        for number in numbers[~self._sound[numbers, -1]].tolist():
            self.shard_keys(number)

    def shard_keys(self, number: int) -> list[str]:
        """Return the keys of a shard in its order, compared with their digest.

        Args:
            number: Number of the shard in the index.

        Raises:
            ManifestError: If the keys are not those of the digest.
        """
        start, stop = self.shards.starts[number : number + 2].tolist()
        offsets, text = self._keys
        ends = offsets[start : stop + 1]
        keys: list[str] = []
        try:
            if (np.diff(ends) < 0).any() or ends[0] < 0 or ends[-1] > text.size:
                raise ValueError("its texts overlap")
            if ends[-1] - ends[0] > MAX_KEY_BYTES * (stop - start):
                raise ValueError("its texts are too long")
            data = text[ends[0] : ends[-1]].to_pybytes()
            bounds = (ends - ends[0]).tolist()
            keys = [data[begin:end].decode() for begin, end in pairwise(bounds)]
        except ValueError as error:
            raise self._damaged(self._keys_path, "key", number) from error
        if sha256_keys(keys) != self.shards.keys_sha256(number):
            raise self._damaged(self._keys_path, "key", number)
        self._sound[number, -1] = True
        return keys

    def rows_of_keys(self, keys: set[str], rows: range) -> dict[str, int]:
        """Find the rows of a range that have these keys.

        Returns:
            The row of each key; keys that no row has are left out.
        """
        row_of_key: dict[str, int] = {}
        for number in self.shards_of(rows).tolist():
            if len(row_of_key) == len(keys):
                break
            start = int(self.shards.starts[number])
            of_shard = enumerate(self.shard_keys(number), start=start)
            row_of_key |= {key: row for row, key in of_shard if key in keys and row in rows}
        return row_of_key

    def image_sha256(self, number: int) -> list[str]:
        """Return the SHA-256 of each image of a shard, in its order; only `permafrost verify` compares them.

        Args:
            number: Number of the shard in the index.
        """
        start, stop = self.shards.starts[number : number + 2].tolist()
        digests = self._keys_batch.column(1).slice(start, stop - start)
        return [digest.hex() for digest in digests.to_pylist()]

    def table(self) -> pa.Table:
        """Return both files as one Arrow table that lies in the mapped files. Its values are not checked."""
        columns = dict(zip(KEYS_SCHEMA.names, self._keys_batch.columns, strict=True))
        columns |= self._columns
        return pa.table(columns)

    # ---- checks --------------------------------------------------------------------------------------

    def require_sound(self, numbers: NDArray[np.int64], names: tuple[str, ...]) -> None:
        """Check that columns have their checksums, and possible values, in these shards. Each is checked once.

        Args:
            numbers: Numbers of the shards.
            names: Columns, of CHECKED_COLUMNS.

        Raises:
            ManifestError: If a column is damaged.
        """
        for name in names:
            place = CHECKED_COLUMNS.index(name)
            for number in numbers[~self._sound[numbers, place]].tolist():
                self._check(name, place, number)
                self._sound[number, place] = True

    def _check(self, name: str, column: int, number: int) -> None:
        start, stop = self.shards.starts[number : number + 2].tolist()
        expected = self.shards.index_crc32c
        if expected.shape[1] != len(CHECKED_COLUMNS):
            raise ManifestError(f"{self.shards.path} does not have a checksum for each column")
        parts = list(self._parts(name, start, stop, number))
        if checksum(iter(parts)) != expected[number, column]:
            raise self._damaged(self._path, name, number)
        if not self._is_possible(name, parts, number):
            raise ManifestError(
                f"{self._path} has values in {name} (shard {self.shards[number].name}) that contradict its manifest; "
                "run permafrost verify"
            )

    def _parts(self, name: str, start: int, stop: int, number: int) -> Iterator[NDArray[Any]]:
        if name not in LIST_COLUMNS:
            yield self._numbers[name][start:stop]
            return
        offsets, values = self._lists[name]
        ends = offsets[start : stop + 1]
        lengths = np.diff(ends)
        if (lengths < 0).any() or ends[0] < 0 or ends[-1] > len(values[0]):
            raise self._damaged(self._path, name, number)
        yield lengths
        for value in values:
            yield value[ends[0] : ends[-1]]

    def _is_possible(self, name: str, parts: list[NDArray[Any]], number: int) -> bool:
        """Return whether a shard's values of a column agree with the manifest."""
        manifest, values = self._manifest, parts[-1]
        if name in ("row", "array_row"):
            place = manifest.place_in_generation(number)
            first = place * manifest.rows_per_shard if name == "array_row" else 0
            return np.array_equal(values, np.arange(first, first + len(values)))
        if name == "label":
            return bool(((values >= NO_LABEL) & (values < len(manifest.classes))).all())
        if name == "labels":
            lengths = parts[0]
            is_none = (values == NO_CLASS) & np.repeat(lengths == 1, lengths)
            classes = np.where(values < NO_CLASS, mark_unknown(values), values)
            known = bool((((classes >= 0) & (classes < len(manifest.classes))) | is_none).all())
            return known and (manifest.multi_label or len(values) == 0)
        return True

    def _damaged(self, path: RootedPath, column: str, number: int) -> ManifestError:
        """Return the error to raise for a damaged column.

        Raises:
            FileError: If only a copy of its file is damaged.
        """
        is_keys = path == self._keys_path
        file = self._manifest.keys if is_keys else self._manifest.index
        return damage_error(
            path,
            file.sha256,
            f"{path} is damaged: column {column} of shard {self.shards[number].name} is not what its manifest lists; "
            f"{REWRITE}",
        )
