"""Records of one shard: their contents, and a table of them with the outputs of a teacher. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from functools import lru_cache
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from permafrost.core.errors import require
from permafrost.core.records import NO_CLASS
from permafrost.storage.rooted_paths import RootedPath
from permafrost.store.codecs import decode_scaled
from permafrost.store.entries import StoreMismatchError
from permafrost.store.index import RowNumbers
from permafrost.store.reader import Store, TeacherPass
from permafrost.store.shards import ShardEntry
from permafrost.store.tars import ShardBytes


class ShardRecords:
    """Contents of the records of one shard, in the order of its rows, readable from several threads.

    Another process that is sent them opens the files itself, and receives no more of the index than the rows.
    """

    def __init__(
        self, store: Store, shard: ShardEntry, rows: NDArray[np.int64] | None = None
    ) -> None:
        """Select rows of a shard.

        Args:
            store: Store that has the shard.
            shard: Shard to read.
            rows: Rows of the shard, ascending; None takes all.

        Raises:
            ManifestError: If the shard's file is missing or has another size, or the index is damaged.
        """
        here = store.rows_of_shard(store.shards.number_of(shard.name))
        index, taken = store.index, here if rows is None else here.start + rows
        self.store, self._shard, self._first = store, shard, here.start
        self.columns = index.take(("offset", "size", "image_crc32c", "height", "width"), taken)
        self._keys = index.keys(taken)
        self.rows = taken
        """Their rows of the index."""
        self._bytes = ShardBytes(store.folder, shard)

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_records, (
            type(self),
            (self.store.folder, self.store.manifest.fingerprint),
            self._shard,
            np.asarray(self.rows) - self._first,
        )

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, rows: slice) -> Self:
        """Return some of the selected rows, with the same open file."""
        part = copy(self)
        part.columns = {name: values[rows] for name, values in self.columns.items()}
        part._keys, part.rows = self._keys[rows], self.rows[rows]
        return part

    def contents(self, rows: RowNumbers) -> Iterator[tuple[bytes, str]]:
        """Iterate over the bytes of some of the selected rows, and their file and key for messages.

        Raises:
            ManifestError: If a record's bytes are not the packed ones.
        """
        columns = (self.columns[name][rows].tolist() for name in ("offset", "size", "image_crc32c"))
        keys = (self._keys[row] for row in rows)
        yield from (
            (self._bytes.read(offset, size, crc32c, key), f"{self._bytes.path}: {key}")
            for offset, size, crc32c, key in zip(*columns, keys, strict=True)
        )

    def decode(self, rows: RowNumbers) -> NDArray[Any]:
        """Decode some of the selected rows: frames u8 [n, H, W, 3], or rows of a table f32 [n, d].

        Raises:
            ManifestError: If a record's bytes are not the packed ones, or cannot be decoded.
        """
        memory = self.store.form.memory(len(rows))
        for number, (data, where) in enumerate(self.contents(rows)):
            self.store.form.decode(data, memory[number], where)
        return memory


def content_of(store: Store, row: int) -> bytes:
    """Return the bytes of the record of a row of the index.

    Raises:
        ManifestError: If they are not the packed ones.
    """
    number = int(store.index.shard_numbers(np.array([row]))[0])
    place = np.array([row - store.rows_of_shard(number).start])
    ((data, _),) = ShardRecords(store, store.shards[number], place).contents(range(1))
    return data


@lru_cache(maxsize=1)
def open_same_store(folder: RootedPath, fingerprint: str) -> Store:
    """Open the store, or the generations of it, that has a fingerprint, once in a process.

    Raises:
        StoreMismatchError: If the folder has another store by now.
    """
    if (store := Store(folder).part_with(fingerprint)).manifest.fingerprint != fingerprint:
        raise StoreMismatchError(f"{folder} was written anew while it was read; open it again")
    return store


def _open_records(
    kind: type[ShardRecords],
    identity: tuple[RootedPath, str],
    shard: ShardEntry,
    rows: NDArray[np.int64],
) -> ShardRecords:
    return kind(open_same_store(*identity), shard, rows)


def shard_table(
    store: Store, number: int, reader: TeacherPass | None, fields: Sequence[str] | None
) -> pa.Table:
    """Read keys, split, labels and fields of a shard, a row per record and null where the pass does not cover it.

    Args:
        store: The store.
        number: Number of the shard.
        reader: Pass of the fields; None if there are none.
        fields: Fields of the pass, each a column of fixed-size lists, in the canonical view and in the units of the
            network; None takes all but the scales, which are applied.

    Raises:
        ConfigError: If the pass does not have such a field.
    """
    rows, entry = store.rows_of_shard(number), store.shards[number]
    columns: dict[str, Any] = {
        "key": pa.array(store.index.keys(rows)),
        "split": pa.array([entry.split] * len(rows)).dictionary_encode(),
    }
    if store.index.has_many_labels:
        labels, lengths = store.index.label_lists(rows)
        is_class = labels > NO_CLASS
        owners = np.repeat(np.arange(len(lengths)), lengths)
        sizes = np.bincount(owners[is_class], minlength=len(lengths))
        offsets = pa.array(
            np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32),
            mask=np.append(lengths == 0, False),
        )
        columns["labels"] = pa.ListArray.from_arrays(offsets, labels[is_class].astype(np.int32))
    else:
        columns["label"] = pa.array(store.index.values("label", rows).astype(np.int32))
    if reader is None:
        return pa.table(columns)
    specs = {spec.name: spec for spec in reader.manifest.fields}
    if fields is None:
        fields = [name for name in specs if not name.endswith("_scale")]
    absent = [name for name in fields if name not in specs]
    require(
        not absent,
        f"the pass {reader.name} has no field {', '.join(absent)}; it has {', '.join(sorted(specs))}",
    )
    places = reader.rows_of(entry)
    covered = places >= 0
    wanted = {*fields, *(f"{name}_scale" for name in fields)} & specs.keys()
    values = {
        name: np.asarray(array[places[covered], np.zeros(covered.sum(), np.int64)])
        for name, array in (reader.open_shard(entry, wanted) if covered.any() else {}).items()
    }
    for name in fields:
        decoded = np.zeros((len(rows), int(np.prod(specs[name].shape))), np.float32)
        if name in values:
            scaled = decode_scaled(values[name], values.get(f"{name}_scale"))
            network_values = scaled.reshape(len(scaled), -1)
            decoded = decoded.astype(network_values.dtype, copy=False)
            decoded[covered] = network_values
        columns[name] = pa.FixedSizeListArray.from_arrays(
            pa.array(decoded.ravel()),
            decoded.shape[1],
            mask=None if covered.all() else pa.array(~covered),
        )
    return pa.table(columns)
