"""Samples of a pass's records, for measurements with the teacher beside its shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from permafrost.core.rooted_paths import RootedPath
from permafrost.store.frames import FrameBatch, ShardFrames
from permafrost.store.reader import Store
from permafrost.store.shards import ShardEntry

Sample = list[tuple[ShardEntry, int]]
"""Shards, and the number of records at the start of each."""
_SAMPLE_SHARDS = 8


def select_sample(shards: Sequence[ShardEntry], records: int) -> Sample:
    """Select shards at equal distances that are not empty, with about this number of records in all."""
    filled = [shard for shard in shards if shard.records]
    numbers = np.unique(
        np.linspace(0, len(filled) - 1, min(len(filled), _SAMPLE_SHARDS)).astype(int)
    )
    chosen = [filled[number] for number in numbers.tolist()]
    each = -(-records // max(1, len(chosen)))
    return [(shard, min(shard.records, each)) for shard in chosen]


def iter_sample(
    store_path: RootedPath, sample: Sequence[tuple[ShardEntry, int]], batch_size: int
) -> Iterator[tuple[FrameBatch, list[str]]]:
    """Iterate over the frames of a sample and their keys, a batch in memory at a time."""
    store = Store(store_path)
    for shard, count in sample:
        keys = store.index.shard_keys(store.shards.number_of(shard.name))
        frames = ShardFrames(store, shard, np.arange(count))
        for start in range(0, count, batch_size):
            stop = min(start + batch_size, count)
            yield frames.read(start, stop), list(keys[start:stop])
