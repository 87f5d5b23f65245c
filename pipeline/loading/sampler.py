"""The order of an epoch: a pure function of (seed, epoch), cut into the same global batches for any ranks.

Shards are permuted, then records inside windows of WINDOW_SHARDS shards, so that memory and a node's
cache stay flat whatever the store's size. Every record comes at most once an epoch; the last partial
global batch is dropped, other records each epoch.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import ConfigError
from pipeline.core.seeds import derive_seed

WINDOW_SHARDS = 16


class EpochOrder:
    """Positions of a selection in the order of each epoch."""

    def __init__(
        self, shard_of_record: NDArray[np.int64], seed: int, window: int = WINDOW_SHARDS
    ) -> None:
        """shard_of_record  [n]: for each position of the selection, the shard that holds it"""
        self.by_shard = [
            np.flatnonzero(shard_of_record == shard) for shard in np.unique(shard_of_record)
        ]
        self.seed = seed
        self.window = window

    def positions(self, epoch: int) -> NDArray[np.int64]:
        """Every position of the selection once, [n]."""
        generator = np.random.default_rng(derive_seed(self.seed, "order", epoch))
        shards = [self.by_shard[i] for i in generator.permutation(len(self.by_shard))]
        windows = (
            shards[start : start + self.window] for start in range(0, len(shards), self.window)
        )
        return np.concatenate([generator.permutation(np.concatenate(window)) for window in windows])


class GlobalBatchSampler:
    """One epoch's steps for one rank: a batch sampler whose whole state is (epoch, first step)."""

    def __init__(
        self, order: EpochOrder, batch_size: int, *, rank: int = 0, world_size: int = 1
    ) -> None:
        """batch_size  records of a global batch; each rank takes its contiguous slice"""
        num_records = sum(map(len, order.by_shard))
        if batch_size % world_size:
            raise ConfigError(
                f"trainer.batch_size={batch_size} is not a multiple of {world_size} ranks"
            )
        if num_records < batch_size:
            raise ConfigError(
                f"the selection has {num_records} records, fewer than trainer.batch_size={batch_size}; "
                "choose a smaller batch or more records"
            )
        self.order = order
        self.batch_size = batch_size
        self.rank, self.world_size = rank, world_size
        self.num_steps = num_records // batch_size
        self.epoch = 0
        self.first_step = 0

    def set_position(self, epoch: int, first_step: int) -> None:
        """Where the next iteration begins."""
        self.epoch, self.first_step = epoch, first_step

    def __len__(self) -> int:
        return self.num_steps - self.first_step

    def __iter__(self) -> Iterator[list[int]]:
        positions = self.order.positions(self.epoch)
        for step in range(self.first_step, self.num_steps):
            start = self.first_position(step)
            yield positions[start : start + self.batch_size // self.world_size].tolist()

    def first_position(self, step: int) -> int:
        """Where in the epoch's order this rank's slice of a step begins."""
        return step * self.batch_size + self.rank * (self.batch_size // self.world_size)


class ReplayBatchSampler:
    """Global batches of stored views: (position, view) pairs, `per_step` views of each record together.

    A record's views come in turn, from a start of its own: all V of them in V / per_step epochs.
    """

    def __init__(
        self, order: EpochOrder, batch_size: int, num_views: int, per_step: int, **ranks: int
    ) -> None:
        """batch_size  views of a global batch"""
        if num_views % per_step:
            raise ConfigError(
                f"views.per_step={per_step} does not divide the {num_views} stored views of a record"
            )
        self.records = GlobalBatchSampler(order, batch_size // per_step, **ranks)
        self.num_views, self.per_step = num_views, per_step
        generator = np.random.default_rng(derive_seed(order.seed, "replay"))
        self.starts = generator.integers(num_views, size=sum(map(len, order.by_shard)))

    @property
    def num_steps(self) -> int:
        """Of an epoch."""
        return self.records.num_steps

    def set_position(self, epoch: int, first_step: int) -> None:
        """Where the next iteration begins."""
        self.records.set_position(epoch, first_step)

    def first_position(self, step: int) -> int:
        """Where in the epoch's order this rank's slice of a step begins."""
        return self.records.first_position(step)

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        turn = self.records.epoch * self.per_step
        for positions in self.records:
            yield [
                (position, int(self.starts[position] + turn + number) % self.num_views)
                for position in positions
                for number in range(self.per_step)
            ]
