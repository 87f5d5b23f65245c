"""Mean and standard deviation of a table's columns, with which a network standardizes its inputs.

Shape letters: n records, d columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from permafrost.store.frames import ShardFrames
from permafrost.store.reader import Store

_BATCH = 4096


def column_moments(store: Store, split: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over all records of a split, f64 [d] each.

    Moments of batches are merged (Chan et al. 1979), which is accurate for columns with a large mean and small spread.
    """
    count, mean, squares = 0, torch.zeros(()), torch.zeros(())
    for number in store.shards.splits[split].tolist():
        shard = store.shards[number]
        frames = ShardFrames(store, shard)
        for start in range(0, shard.records, _BATCH):
            rows = frames.read(start, min(start + _BATCH, shard.records)).frames.double()  # [n, d]
            own = rows.mean(dim=0)
            total = count + len(rows)
            squares = (
                squares
                + (rows - own).square().sum(dim=0)
                + (own - mean).square() * (count * len(rows) / total)
            )
            mean = mean + (own - mean) * (len(rows) / total)
            count = total
    return mean, (squares / count).sqrt()
