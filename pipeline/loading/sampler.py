"""Samplers: the order of an epoch is a pure function of (seed, epoch), divided into global batches for any world size.

Shards are permuted, then records within windows of WINDOW_SHARDS shards, so memory and a node's cache do not grow with
the store. Every record occurs at most once per epoch. The last partial global batch is dropped, which affects other
records in each epoch.
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
        """Group the positions of the selection by shard.

        shard_of_record  [n]: the shard of each position of the selection
        """
        by_shard = np.argsort(shard_of_record, kind="stable")
        _, starts = np.unique(shard_of_record[by_shard], return_index=True)
        self.by_shard = np.split(by_shard, starts[1:])
        self.seed = seed
        self.window = window

    def positions(self, epoch: int) -> NDArray[np.int64]:
        """Order of an epoch, with every position of the selection once, [n]."""
        generator = np.random.default_rng(derive_seed(self.seed, "order", epoch))
        shards = [self.by_shard[i] for i in generator.permutation(len(self.by_shard))]
        windows = (
            shards[start : start + self.window] for start in range(0, len(shards), self.window)
        )
        return np.concatenate([generator.permutation(np.concatenate(window)) for window in windows])


class GlobalBatchSampler:
    """Batch sampler of one rank for the steps of an epoch, whose whole state is (epoch, first step)."""

    def __init__(
        self, order: EpochOrder, batch_size: int, *, rank: int = 0, world_size: int = 1
    ) -> None:
        """Check that the batch size fits the ranks and the selection.

        batch_size  number of records of a global batch, of which each rank takes a contiguous slice
        """
        num_records = sum(map(len, order.by_shard))
        if batch_size % world_size:
            raise ConfigError(
                f"trainer.batch_size={batch_size} must be a multiple of {world_size}, the number of ranks"
            )
        if num_records < batch_size:
            raise ConfigError(
                f"the selection has {num_records} records, fewer than trainer.batch_size={batch_size}; "
                "lower trainer.batch_size or select more records"
            )
        self.order = order
        self.batch_size = batch_size
        self.rank, self.world_size = rank, world_size
        self.num_steps = num_records // batch_size
        self.epoch = 0
        self.first_step = 0

    def set_position(self, epoch: int, first_step: int) -> None:
        """Set the start of the next iteration."""
        self.epoch, self.first_step = epoch, first_step

    def __len__(self) -> int:
        return self.num_steps - self.first_step

    def __iter__(self) -> Iterator[list[int]]:
        positions = self.order.positions(self.epoch)
        for step in range(self.first_step, self.num_steps):
            start = self.first_position(step)
            yield positions[start : start + self.batch_size // self.world_size].tolist()

    def first_position(self, step: int) -> int:
        """Start of this rank's slice of a step in the epoch's order."""
        return step * self.batch_size + self.rank * (self.batch_size // self.world_size)


class ReplayBatchSampler:
    """Batch sampler of stored views: (position, view) pairs with `per_step` views of each record in a batch.

    The views of a record are used in cyclic order from a random start, all V of them within V / per_step epochs.
    """

    def __init__(
        self, order: EpochOrder, batch_size: int, num_views: int, per_step: int, **ranks: int
    ) -> None:
        """Draw the first view of each record.

        batch_size  number of views of a global batch
        """
        if num_views % per_step:
            raise ConfigError(
                f"views.per_step={per_step} does not divide the {num_views} stored views of a record; choose a divisor"
            )
        self.records = GlobalBatchSampler(order, batch_size // per_step, **ranks)
        self.num_views, self.per_step = num_views, per_step
        generator = np.random.default_rng(derive_seed(order.seed, "replay"))
        self.starts = generator.integers(num_views, size=sum(map(len, order.by_shard)))

    @property
    def num_steps(self) -> int:
        """Number of steps of an epoch."""
        return self.records.num_steps

    def set_position(self, epoch: int, first_step: int) -> None:
        """Set the start of the next iteration."""
        self.records.set_position(epoch, first_step)

    def first_position(self, step: int) -> int:
        """Start of this rank's slice of a step in the epoch's order."""
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
