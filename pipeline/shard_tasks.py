"""The two tasks that run on a cluster, one shard at a time: pack images, ask the teacher.

Both are picklable, open nothing until they are called, and commit a shard by its receipt; running one
again writes the same bytes.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from pipeline.store.images import receipt_path, write_image_shard
from pipeline.store.index import PASS_RECEIPT_SCHEMA, write_table
from pipeline.store.reader import Store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pipeline.annotate import TeacherAnnotator
    from pipeline.config import ExplainerConfig, ModelConfig, PassConfig
    from pipeline.sources import Source
    from pipeline.store.columns import Columns
    from pipeline.store.manifest import ShardEntry
    from pipeline.store.plan import ShardPlan


@dataclass(frozen=True, kw_only=True)
class ShardResult:
    """What a task tells the driver; the shard itself is already on disk."""

    name: str
    records: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class PackShard:
    """ShardPlan -> its tar and its receipt."""

    store: Path
    source: Source
    dataset_fingerprint: str

    def __call__(self, plan: ShardPlan) -> ShardResult:
        started = time.monotonic()
        entry = write_image_shard(self.store, plan, self.source, self.dataset_fingerprint)
        return ShardResult(
            name=entry.name, records=entry.records, seconds=time.monotonic() - started
        )


@dataclass(frozen=True)
class AnnotateShard:
    """ShardEntry -> its rows in the pass's columns and their receipt."""

    store_path: Path
    folder: Path
    columns: Columns
    fingerprint: str
    teacher: ModelConfig
    num_classes: int
    explainer: ExplainerConfig
    config: PassConfig
    num_threads: int

    def __call__(self, shard: ShardEntry) -> ShardResult:
        import pyarrow as pa

        from pipeline.store.frames import read_frames

        started = time.monotonic()
        store = self._store
        keys = store.shard_keys(shard)
        # The number of threads may change the last bits of a sum; so it is the same everywhere.
        with torch_threads(self.num_threads):
            values, fidelity = self._annotator.annotate(read_frames(store, shard), keys)
        position = store.manifest.shards.index(shard)
        files = self.columns.write_shard(position, shard.name, keys, values)
        write_table(
            receipt_path(self.folder, shard.name),
            pa.Table.from_pydict(
                {"key": keys, "row": range(len(keys))}, schema=PASS_RECEIPT_SCHEMA
            ),
            {
                "name": shard.name,
                "rows": len(keys),
                "keys_sha256": shard.keys_sha256,
                "files": [asdict(entry) for entry in files],
                "fidelity": fidelity,
                "fingerprint": self.fingerprint,
            },
        )
        return ShardResult(name=shard.name, records=len(keys), seconds=time.monotonic() - started)

    @cached_property
    def _store(self) -> Store:
        return Store(self.store_path)

    @cached_property
    def _annotator(self) -> TeacherAnnotator:
        from pipeline.annotate import TeacherAnnotator

        return TeacherAnnotator(self.teacher, self.num_classes, self.explainer, self.config)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Torch with `count` CPU threads inside the block."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
