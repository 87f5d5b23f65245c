"""A store as a data set of Ray: one read task for each shard, with numbers of rows and sizes that Ray knows before.

A read task imports torch only where images must be resized. Ray cancels reads that it does not need, and a process in
which the import was canceled can never import it again, so there a thread imports it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from ray.data import Dataset, Datasource, ReadTask, read_datasource
from ray.data.block import BlockMetadata
from ray.data.extensions import ArrowTensorArray

from permafrost.core.errors import require
from permafrost.storage.addresses import is_address
from permafrost.storage.rooted_paths import RootedPath
from permafrost.store.reader import Store, TeacherPass
from permafrost.store.shard_records import ShardRecords, open_same_store, shard_table

_INPUT, _CONTENT = "input", "bytes"
"""Columns of what records are decoded to, and of their stored bytes."""
_FACT_BYTES = 64
"""Bytes of a key or a label, about."""
_BLOCK_BYTES = 64 * 2**20
"""Bytes of a block, about, into which a larger shard is divided."""


def ray_dataset(
    store: str | Path | Store,
    *,
    teacher: str | None = None,
    split: str | None = None,
    columns: Sequence[str] | None = None,
) -> Dataset:
    """Return a store as a data set of Ray, with a block or more for each shard.

    Ray keeps the order of the store if `preserve_order` is set in its execution options.

    Args:
        store: A store, its folder, which all hosts must have at the same place, or its address in a bucket.
        teacher: Name of a pass; None for the only one.
        split: Name of the split; None for all.
        columns: Columns, of: key; split; label (int32, -1 where unknown), or labels (lists of classes) where records
            have several; input, the canonical frames u8 [3, H, W], or rows of a table f32 [d]; bytes, the content of
            records as it is stored, such as a JPEG; and fields of the pass in its canonical view and in the units of
            the network, such as logits or map, as float32 tensors. None for key, the labels, input, and logits if a
            pass has any. Records that the pass does not cover are left out if a field is read.

    Raises:
        ConfigError: If there is no such split or column.
        StoreMismatchError: If there is no such pass, or several and none is named.
        ManifestError: If the store is damaged; and when a damaged shard is read.
    """
    if not isinstance(store, Store):
        store = Store(store if is_address(str(store)) else Path(store).absolute())
    splits = store.shards.splits
    require(
        split is None or split in splits,
        f"split={split!r} must be one of those of {store.path}: {', '.join(splits)}",
    )
    label = "labels" if store.index.has_many_labels else "label"
    facts = ("key", "split", label, _INPUT, _CONTENT)
    is_needed = store.pass_folders() if columns is None else not {*columns} <= {*facts}
    reader = store.open_passes([teacher] if teacher else ())[0] if teacher or is_needed else None
    known = {} if reader is None else {spec.name: spec.shape for spec in reader.manifest.fields}
    if columns is None:
        columns = ["key", label, _INPUT, *(name for name in known if name == "logits")]
    absent = [name for name in columns if name not in (*facts, *known)]
    require(not absent, f"columns={absent} must be of: {', '.join([*facts, *known])}")
    sizes = {_INPUT: store.form.record_bytes}
    sizes |= {name: 4 * int(np.prod(shape)) for name, shape in known.items()}
    shapes = {name: known[name] for name in columns if name in known}
    read = ReadShard(
        store.folder,
        store.manifest.fingerprint,
        None if reader is None or not shapes else reader.name,
        tuple(columns),
        shapes,
        sum(sizes.get(name, _FACT_BYTES) for name in columns),
    )
    numbers = np.sort(np.concatenate([*splits.values()]) if split is None else splits[split])
    source = _StoreSource(read, store, reader if shapes else None, numbers)
    return read_datasource(source, override_num_blocks=max(1, len(source.rows)))


@dataclass(frozen=True)
class ReadShard:
    """Read of a shard into blocks of a data set, picklable."""

    folder: RootedPath
    fingerprint: str
    teacher: str | None
    columns: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    """Shapes of the fields of the pass among the columns."""
    record_bytes: int

    def __call__(self, number: int) -> Iterator[pa.Table]:
        store = open_same_store(self.folder, self.fingerprint)
        reader = None if self.teacher is None else store.open_pass(self.teacher)
        table = shard_table(store, number, reader, list(self.shapes))
        table = table.append_column("row", pa.array(np.arange(len(table))))
        for name in self.shapes:
            table = table.filter(pa.compute.is_valid(table[name]))
        reads_content = not {_INPUT, _CONTENT}.isdisjoint(self.columns)
        records = ShardRecords(store, store.shards[number]) if reads_content else None
        if _INPUT in self.columns and store.has_larger_images:
            _import_apart("torch")
        rows_each = max(1, _BLOCK_BYTES // self.record_bytes)
        for start in range(0, len(table), rows_each):
            part = table.slice(start, rows_each)
            rows = part["row"].to_numpy()
            yield pa.table({name: self._column(name, part, records, rows) for name in self.columns})

    def _column(
        self, name: str, table: pa.Table, records: ShardRecords | None, rows: NDArray[np.int64]
    ) -> Any:
        """Return a column of a block. Records are opened if a column has their content."""
        if records is not None and name == _CONTENT:
            return pa.array([data for data, _ in records.contents(rows)], pa.large_binary())
        if records is not None and name == _INPUT:
            values = records.decode(rows)
            return ArrowTensorArray.from_numpy(
                np.moveaxis(values, -1, 1) if records.store.form.has_places else values
            )
        if name in self.shapes:
            flat = table[name].combine_chunks().flatten().to_numpy()
            return ArrowTensorArray.from_numpy(flat.reshape(-1, *self.shapes[name]))
        return table[name].cast(pa.string()) if name == "split" else table[name]


def _import_apart(module: str) -> None:
    """Import a module in a thread, whose import goes on if this one is interrupted."""
    thread = Thread(target=import_module, args=(module,))
    thread.start()
    thread.join()


class _StoreSource(Datasource):  # type: ignore[misc]
    """Source of Ray Data with a read task for each shard that has records."""

    def __init__(
        self, read: ReadShard, store: Store, reader: TeacherPass | None, numbers: NDArray[np.int64]
    ) -> None:
        super().__init__()
        self._read, self.rows = read, dict[int, int]()
        """Number of records of each shard that has any."""
        for number in numbers.tolist():
            shard = store.shards[number]
            rows = (
                shard.records
                if reader is None or reader.covers_shard(shard)
                else len(reader.shard_keys(shard))
            )
            if rows:
                self.rows[number] = rows

    def get_name(self) -> str:
        """Return the name in Ray's displays."""
        return "Permafrost"

    def estimate_inmemory_data_size(self) -> int:
        """Return the bytes of all rows."""
        return sum(self.rows.values()) * self._read.record_bytes

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """Return a task for each shard, whatever the parallelism."""
        return [
            ReadTask(
                partial(self._read, number),
                BlockMetadata(
                    num_rows=rows,
                    size_bytes=rows * self._read.record_bytes,
                    input_files=None,
                    exec_stats=None,
                ),
                per_task_row_limit=per_task_row_limit,
            )
            for number, rows in self.rows.items()
        ]
