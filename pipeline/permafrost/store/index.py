"""Index of a store: a row per record in one `.npy` file per column, which all processes of a machine share.

Each column is mapped into memory as a NumPy array when it is first used. Opening therefore takes no time, a process
holds no private memory for the rows, and it reads from disk only what it uses.

Nothing reads a whole file before its first use. Opening a column compares its size, dtype and length with the manifest.
Reading refuses values that would end the process or select other records (docs/reference/store-format.md lists them).
`permafrost verify` compares the digest of every file.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from permafrost.core.digests import sha256_keys
from permafrost.core.errors import UserError, require
from permafrost.core.records import MAX_KEY_BYTES, NO_CLASS, NO_LABEL, mark_unknown
from permafrost.storage.files import file_at, map_file, open_size
from permafrost.storage.local_files import read_error
from permafrost.storage.rooted_paths import RootedPath
from permafrost.storage.untrusted import FormatError
from permafrost.store.codecs import npy_array
from permafrost.store.columns import DTYPES, LISTS, NUMBERS, OFFSETS
from permafrost.store.entries import REPAIR, REWRITE, ManifestError
from permafrost.store.manifest import StoreManifest

_FNV_PRIME = np.uint64(0x100000001B3)
_MIX_FACTORS = (np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53))

RowNumbers = range | NDArray[np.int64]
"""Rows of the index: a range, or any array of row numbers."""

CHECKED_COLUMNS = ("label", *LISTS)
"""Columns whose values are compared with the manifest, shard by shard, when they are first read."""


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix all bits of 64-bit values (fmix64 of MurmurHash3)."""
    shift = np.uint64(33)
    for factor in _MIX_FACTORS:
        values = (values ^ (values >> shift)) * factor
    return values ^ (values >> shift)


class RecordIndex:
    """Rows of a store's index, mapped into memory column by column."""

    def __init__(self, folder: RootedPath, manifest: StoreManifest, num_classes: int) -> None:
        self.shards = manifest.shards
        self.num_classes = num_classes
        """Number of classes of the labels that are stored, of which those from `classes` on are read as unknown."""
        self._folder, self._manifest = folder, manifest
        self._columns: dict[str, NDArray[Any]] = {}
        self._checked = {name: np.zeros(len(self.shards), bool) for name in CHECKED_COLUMNS}

    @cached_property
    def num_rows(self) -> int:
        """Number of records."""
        return int(self.shards.starts[-1])

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in label order."""
        return self._manifest.classes

    @property
    def has_many_labels(self) -> bool:
        """True if records list their classes in `labels`; `label` is then not read."""
        return self._manifest.multi_label

    @property
    def has_generations(self) -> bool:
        """True if records were appended to those of the first packing."""
        return bool(self._manifest.generations)

    def _column(self, name: str) -> NDArray[Any]:
        """Return a column, with the rows of these shards; the values of lists are those of all shards.

        Weights are 1 in a store without this column.
        """
        if name not in self._columns:
            values = (
                self._map(name)
                if name in self._manifest.index
                else np.broadcast_to(np.float32(1), self.shards.rows_of_file)
            )
            if name not in LISTS:
                first, stop = self.shards.first_row, self.shards.first_row + self.num_rows
                values = values[first : stop + name.endswith(OFFSETS)]
            self._columns[name] = values
        return self._columns[name]

    def _map(self, name: str) -> NDArray[Any]:
        """Map the file of a column into memory.

        Raises:
            ManifestError: If the file is missing, or has another size, dtype or length than its manifest says.
        """
        path, file = self._path(name), self._manifest.index[name]
        rows = self.shards.rows_of_file + name.endswith(OFFSETS)
        length = int(self._map(f"{name}{OFFSETS}")[-1]) if name in LISTS else rows
        try:
            with file_at(path).open(file.sha256) as opened:
                if (size := open_size(opened)) != file.bytes:
                    raise FormatError(f"has {size} bytes, but its manifest lists {file.bytes}")
                data = map_file(opened)
            dtype = DTYPES[name]
            return npy_array(data, dtype.base, (length, *dtype.shape))
        except FileNotFoundError:
            raise ManifestError(f"{path} is missing; {REPAIR}") from None
        except UserError:
            raise
        except OSError as error:
            raise read_error(path, error) from error
        except ValueError as error:
            raise self._damaged(name, f"it {error}") from error

    def _path(self, name: str) -> RootedPath:
        return self._folder / self._manifest.index[name].path

    def _damaged(self, name: str, fault: str) -> ManifestError:
        """Return the error to raise for a damaged column.

        Raises:
            FileError: If only a copy of its file is damaged.
        """
        for file in self._manifest.index.values():
            file_at(self._folder / file.path).refuse_damaged_copy(file.sha256)
        names = (name, f"{name}{OFFSETS}") if name in LISTS else (name,)  # either may be wrong
        paths = " or ".join(str(self._path(each)) for each in names)
        return ManifestError(f"{paths} is damaged: {fault}; {REWRITE}")

    # ---- reading -------------------------------------------------------------------------------------

    def shard_numbers(self, rows: RowNumbers) -> NDArray[np.int64]:
        """Return the number of each row's shard."""
        return np.searchsorted(self.shards.starts, rows, side="right") - 1

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
            ManifestError: If the column is damaged.
        """
        return self.take((name,), rows)[name]

    def take(self, names: tuple[str, ...], rows: RowNumbers) -> dict[str, NDArray[Any]]:
        """Return several columns of numbers for these rows.

        Args:
            names: Names of the columns.
            rows: Rows of the index; of a range the columns are views of the mapped files, which are read-only.

        Raises:
            ManifestError: If a column is damaged.
        """
        self.require_possible(rows, set(names) & {"label"})
        where: Any = slice(rows.start, rows.stop) if isinstance(rows, range) else rows
        columns = {name: self._column(name)[where] for name in names}
        if "label" in names and len(self.classes) < self.num_classes:
            is_known = columns["label"] < len(self.classes)
            columns["label"] = np.where(is_known, columns["label"], np.int32(NO_LABEL))
        return columns

    def later_labels(self, rows: RowNumbers) -> NDArray[np.int64]:
        """Return the place after `classes` of each row's class, -1 for rows of these classes; none of many labels."""
        if len(self.classes) == self.num_classes:
            return np.broadcast_to(np.int64(-1), (len(rows),))
        labels = self._column("label")[np.asarray(rows)].astype(np.int64)
        return np.asarray(np.maximum(labels - len(self.classes), -1))

    def label_lists(self, rows: RowNumbers) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return the labels of these rows, as in `Record.labels`, one after another, and their number for each row."""
        return self._take_lists("labels", rows)

    def boxes(self, rows: RowNumbers) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return boxes, f32 [n, 5] with label, x0, y0, x1, y1, one row after another, and their number per row."""
        return self._take_lists("boxes", rows)

    def list_lengths(self, name: str, rows: RowNumbers) -> NDArray[np.int64]:
        """Return the length of each row's list: i64 [n].

        Args:
            name: Column of lists, `labels` or `boxes`.
            rows: Rows of the index.

        Raises:
            ManifestError: If the column is damaged in a shard of these rows.
        """
        self.require_possible(rows, (name,))
        offsets = self._column(f"{name}{OFFSETS}")
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

    def _take_lists(self, name: str, rows: RowNumbers) -> tuple[NDArray[Any], NDArray[np.int64]]:
        lengths = self.list_lengths(name, rows)
        offsets, values = self._column(f"{name}{OFFSETS}"), self._column(name)
        if isinstance(rows, range):
            first, last = (offsets[rows.start], offsets[rows.stop]) if rows else (0, 0)
            return values[first:last], lengths
        ends = np.cumsum(lengths)
        total = int(ends[-1]) if len(ends) else 0
        at = np.repeat(offsets[rows] - (ends - lengths), lengths) + np.arange(total)
        return values[at], lengths

    def keys(self, rows: RowNumbers) -> list[str]:
        """Return the keys of these rows."""
        offsets, text = self._keys(rows)
        return [text[offsets[row] : offsets[row + 1]].tobytes().decode() for row in rows]

    def _keys(self, rows: RowNumbers) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Return the offsets and the text of all keys; those of these rows are checked."""
        self.require_possible(rows, ("key",))
        return self._column(f"key{OFFSETS}"), self._column("key")

    def key_column(self, rows: NDArray[np.int64]) -> pa.Array:
        """Return the keys of these rows as an Arrow column, without an object for each key."""
        keys = pa.LargeStringArray.from_buffers(self.num_rows, *map(pa.py_buffer, self._keys(rows)))
        return keys.take(pa.array(rows))

    def key_order(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the order that sorts these rows by their keys, as code points."""
        order: NDArray[np.int64] = (
            pc.sort_indices(self.key_column(rows)).to_numpy().astype(np.int64)
        )
        return order

    def image_digests(self) -> pa.Array:
        """Return the SHA-256 of the images of all rows, 32 bytes each."""
        digests = pa.py_buffer(self._column("image_sha256"))
        return pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), self.num_rows, [None, digests])

    def key_digests(self, rows: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
        """Return a digest of the seed and each row's key, u64 [n], without an object for each key.

        It is FNV-1a of the key's bytes from a digest of the seed, mixed by the last step of MurmurHash3, so it depends
        on nothing but its arguments.
        """
        offsets, data = self._keys(rows)
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

    def shard_keys(self, number: int) -> list[str]:
        """Return the keys of a shard in its order, compared with their digest.

        Args:
            number: Number of the shard in the index.

        Raises:
            ManifestError: If the keys are not those of the digest.
        """
        offsets, text = self._lists_of_shard("key", number)
        keys: list[str] = []
        try:
            require(
                len(text) <= MAX_KEY_BYTES * (len(offsets) - 1), "its keys are too long", ValueError
            )
            data = text.tobytes()
            keys = [data[begin:end].decode() for begin, end in pairwise(offsets.tolist())]
        except ValueError as error:
            raise self._other_values("key", number) from error
        if sha256_keys(keys) != self.shards.keys_sha256(number):
            raise self._other_values("key", number)
        self._checked["key"][number] = True
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
            of_shard = enumerate(self.shard_keys(number), start=int(self.shards.starts[number]))
            row_of_key |= {key: row for row, key in of_shard if key in keys and row in rows}
        return row_of_key

    def image_sha256(self, number: int) -> list[str]:
        """Return the SHA-256 of each image of a shard, in its order; only `permafrost verify` compares them.

        Args:
            number: Number of the shard in the index.
        """
        start, stop = self.shards.starts[number : number + 2].tolist()
        return [digest.tobytes().hex() for digest in self._column("image_sha256")[start:stop]]

    def columns_of_shard(self, number: int) -> dict[str, NDArray[Any]]:
        """Return all columns of a shard, with offsets from 0; their values are not checked.

        Args:
            number: Number of the shard in the index.

        Raises:
            ManifestError: If the values of a list are not in their column.
        """
        start, stop = self.shards.starts[number : number + 2].tolist()
        columns = {
            name: self._column(name)[start:stop] for name in (*NUMBERS, "weight", "image_sha256")
        }
        for name in LISTS:
            columns[f"{name}{OFFSETS}"], columns[name] = self._lists_of_shard(name, number)
        return columns

    # ---- checks --------------------------------------------------------------------------------------

    def require_possible(self, rows: RowNumbers, names: Iterable[str] = CHECKED_COLUMNS) -> None:
        """Check the values of columns in the shards of these rows. Each shard is checked once.

        Args:
            rows: Rows of the index.
            names: Columns, of CHECKED_COLUMNS.

        Raises:
            ManifestError: If a shard has keys of another digest, lists beyond their values, or classes that the
                manifest does not have.
        """
        for name in names:
            numbers = self.shards_of(rows)
            for number in numbers[~self._checked[name][numbers]].tolist():
                if name == "key":
                    self.shard_keys(number)
                elif not self._are_possible(name, number):
                    raise self._other_values(name, number)
                self._checked[name][number] = True

    def _are_possible(self, name: str, number: int) -> bool:
        """Return whether a shard's values of a column agree with the manifest."""
        classes = self.num_classes
        if name == "label":
            start, stop = self.shards.starts[number : number + 2].tolist()
            label = self._column(name)[start:stop]
            return bool(((label >= NO_LABEL) & (label < classes)).all())
        offsets, values = self._lists_of_shard(name, number)
        if name != "labels":
            return True
        lengths = np.diff(offsets)
        is_none = (values == NO_CLASS) & np.repeat(lengths == 1, lengths)
        numbers = np.where(values < NO_CLASS, mark_unknown(values), values)
        known = bool((((numbers >= 0) & (numbers < classes)) | is_none).all())
        return known and (self._manifest.multi_label or len(values) == 0)

    def _lists_of_shard(self, name: str, number: int) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """Return the offsets, from 0, and the values of a shard's lists.

        Raises:
            ManifestError: If they are not in their column.
        """
        start, stop = self.shards.starts[number : number + 2].tolist()
        offsets, values = self._column(f"{name}{OFFSETS}")[start : stop + 1], self._column(name)
        if (offsets[1:] < offsets[:-1]).any() or offsets[0] < 0 or offsets[-1] > len(values):
            raise self._other_values(f"{name}{OFFSETS}", number)
        return offsets - offsets[0], values[offsets[0] : offsets[-1]]

    def _other_values(self, name: str, number: int) -> ManifestError:
        shard = self.shards[number].name
        return self._damaged(name, f"its values of shard {shard} contradict the manifest")
