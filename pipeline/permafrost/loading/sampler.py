"""Samplers: the order of an epoch is a pure function of (seed, epoch), divided into global batches for any world size.

Shards are permuted, then records within windows of WINDOW_SHARDS shards, so a rank's memory and a node's cache do not
grow with the store. Every record occurs at most once per epoch. The last partial global batch is dropped, which
affects other records in each epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from permafrost.core.digests import derive_seed
from permafrost.core.errors import require

FOREIGN_LOADER = (
    "another loader has been made of the parts of a RecordLoader, which has its own order and views: leave it out of "
    "Accelerate's prepare(), set use_distributed_sampler=False of Lightning's Trainer, and give the RecordLoader "
    "sampler=DistributedSampler(range(len(records))) and a seed= for each process"
)
WINDOW_SHARDS = 16
_DRAWN_AT_ONCE = 2**18


@dataclass(frozen=True)
class EpochSlice:
    """Records of a batch, and their places in the order of an epoch, of which their random views are functions."""

    positions: Sequence[int] | NDArray[np.int64]
    """Positions of the records in the selection."""
    epoch: int
    first: int | NDArray[np.int64]
    """Place of the first record in the epoch's order, which the others follow; or the place of each."""
    views: NDArray[np.int64] | None = None
    """Stored view of each record to replay; None for views that are drawn."""


class EpochOrder:
    """Positions of a selection in the order of each epoch, one window of shards at a time."""

    def __init__(
        self,
        first_positions: NDArray[np.int64],
        seed: int | None,
        window: int = WINDOW_SHARDS,
        fetch: Callable[[NDArray[np.int64]], None] | None = None,
        *,
        least_records: int = 0,
    ) -> None:
        """Describe the shards of a selection whose records are in the order of the store.

        Args:
            first_positions: Position at which the records of each shard begin, and the number of all: [shards + 1].
            seed: Seed of the order of every epoch; None for the order of the store.
            window: Number of shards whose records are permuted together.
            fetch: Function that is told the numbers of the shards of a window before the window is drawn, and of the
                next one.
            least_records: Number of records of a window, which then has more shards if they are small.
        """
        sizes = np.diff(first_positions)
        self._numbers = np.flatnonzero(sizes > 0)
        self._starts = first_positions[:-1][sizes > 0]
        self._sizes = sizes[sizes > 0]
        self._fetch = fetch
        self.num_records = int(sizes.sum())
        self.seed = seed or 0
        self.is_drawn = seed is not None
        self.window, self.least_records = window, least_records

    def windows(self, epoch: int, first: int = 0) -> Iterator[NDArray[np.int64]]:
        """Iterate over the order of an epoch, with every position of the selection once, window by window.

        Args:
            epoch: Number of the epoch.
            first: Place in the order from which positions are returned; the windows before it are only drawn, which
                takes time but no memory.
        """
        generator = np.random.default_rng(derive_seed(self.seed, "order", epoch))
        permute = generator.permutation if self.is_drawn else np.arange
        shards = permute(len(self._sizes))
        begin, fetched = 0, False
        bounds = self._bounds(shards)
        for number, (start, stop) in enumerate(pairwise(bounds)):
            members = shards[start:stop]
            sizes = self._sizes[members]
            offsets = np.cumsum(sizes) - sizes
            drawn = permute(int(sizes.sum()))
            if (end := begin + len(drawn)) > first:
                if self._fetch is not None:
                    after = shards[stop : (*bounds, stop)[number + 2]]
                    self._fetch(self._numbers[after if fetched else np.r_[members, after]])
                    fetched = True
                shard = np.searchsorted(offsets, drawn, side="right") - 1
                positions = self._starts[members[shard]] + drawn - offsets[shard]
                yield positions[max(first - begin, 0) :]
            begin = end

    def _bounds(self, shards: NDArray[np.int64]) -> list[int]:
        """Return the places among the shards of an epoch at which its windows begin, and their number."""
        ends, bounds = np.cumsum(self._sizes[shards]), [0]
        while bounds[-1] < len(shards):
            start = bounds[-1]
            wanted = (ends[start - 1] if start else 0) + self.least_records
            full = int(np.searchsorted(ends, wanted)) + 1
            bounds.append(min(max(start + self.window, full), len(shards)))
        return bounds


class GlobalBatchSampler:
    """Batch sampler of one rank for the steps of an epoch, whose whole state is (epoch, first step)."""

    def __init__(
        self,
        order: EpochOrder,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
    ) -> None:
        """Check that the batch size fits the ranks and the selection.

        Args:
            order: Order of each epoch.
            batch_size: Number of records of a global batch; each rank takes a contiguous slice.
            rank: Number of this rank.
            world_size: Number of ranks.
            drop_last: False for a last batch that is smaller, of a single rank.

        Raises:
            ConfigError: If the batch size is not a multiple of the number of ranks, the selection has fewer records, or
                another library makes a sampler of this kind of a sampler of its own.
        """
        require(isinstance(order, EpochOrder), FOREIGN_LOADER)
        num_records = order.num_records
        require(
            batch_size % world_size == 0,
            f"trainer.batch_size={batch_size} must be a multiple of {world_size}, the number of ranks",
        )
        if drop_last:
            require(
                num_records >= batch_size,
                f"the selection has {num_records} records, fewer than the {batch_size} of a batch; lower "
                "trainer.batch_size or trainer.ranks, or select more records",
            )
        self.order, self.batch_size = order, batch_size
        self.rank, self.world_size = rank, world_size
        self.drop_last = drop_last
        self.num_steps = num_records // batch_size if drop_last else -(-num_records // batch_size)
        self.epoch = 0
        self.first_step = 0

    def set_position(self, epoch: int, first_step: int) -> None:
        """Set the start of the next iteration."""
        self.epoch, self.first_step = epoch, first_step

    def __len__(self) -> int:
        return self.num_steps - self.first_step

    def __iter__(self) -> Iterator[EpochSlice]:
        return self._batches(self.epoch, self.first_step)  # as they are now

    def _batches(self, epoch: int, first_step: int) -> Iterator[EpochSlice]:
        taken = first_step * self.batch_size
        share = self.batch_size // self.world_size
        rest = np.empty(0, np.int64)
        for window in self.order.windows(epoch, taken):
            rest = np.concatenate([rest, window])
            while len(rest) >= self.batch_size:
                rank_positions = rest[self.rank * share : (self.rank + 1) * share]
                yield EpochSlice(rank_positions.copy(), epoch, taken + self.rank * share)
                rest = rest[self.batch_size :]
                taken += self.batch_size
        if len(rest) and not self.drop_last:
            yield EpochSlice(rest, epoch, taken)

    def first_position(self, step: int) -> int:
        """Return the start of this rank's slice of a step in the epoch's order."""
        return step * self.batch_size + self.rank * (self.batch_size // self.world_size)


class ReplayBatchSampler(GlobalBatchSampler):
    """Batch sampler of stored views: (position, view) pairs with `per_step` views of each record in a batch.

    The views of a record are used in cyclic order from a random start, all V of them within V / per_step epochs.
    """

    def __init__(
        self, order: EpochOrder, batch_size: int, num_views: int, per_step: int, **ranks: Any
    ) -> None:
        """Draw the first view of each record.

        Args:
            order: Order of each epoch.
            batch_size: Number of views of a global batch, which is that of batch_size / per_step records.
            num_views: Number of stored views of a record.
            per_step: Number of views of a record in one batch.
            ranks: `rank` and `world_size` of `GlobalBatchSampler`.

        Raises:
            ConfigError: If `per_step` does not divide the number of stored views, or the batch size does not fit.
        """
        require(
            num_views % per_step == 0,
            f"views.per_step={per_step} does not divide the {num_views} stored views of a record; choose a divisor",
        )
        super().__init__(order, batch_size // per_step, **ranks)
        self.num_views, self.per_step = num_views, per_step
        generator = np.random.default_rng(derive_seed(order.seed, "replay"))
        # One byte per record for up to 256 views. Drawing in blocks gives the numbers of a single draw.
        self.starts = np.empty(order.num_records, np.min_scalar_type(num_views - 1))
        for start in range(0, order.num_records, _DRAWN_AT_ONCE):
            block = self.starts[start : start + _DRAWN_AT_ONCE]
            block[:] = generator.integers(num_views, size=len(block))

    def _batches(self, epoch: int, first_step: int) -> Iterator[EpochSlice]:
        turns = epoch * self.per_step + np.arange(self.per_step)
        for part in super()._batches(epoch, first_step):
            starts = self.starts[part.positions].astype(np.int64)
            views = (starts[:, None] + turns) % self.num_views
            positions = np.repeat(part.positions, self.per_step)
            yield replace(part, positions=positions, views=views.ravel())


class PlacedBatches:
    """Batches of positions of another sampler, with their places in the order in which it yields them."""

    def __init__(self, batches: Iterable[Sequence[int]]) -> None:
        self.batches = batches
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the next epoch, also of the sampler and of the one that it makes batches of."""
        self.epoch = epoch
        for sampler in (self.batches, getattr(self.batches, "sampler", None)):
            if (set_epoch := getattr(sampler, "set_epoch", None)) is not None:
                set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[EpochSlice]:
        return self._slices(self.epoch, iter(self.batches))  # as they are now

    @staticmethod
    def _slices(epoch: int, batches: Iterator[Sequence[int]]) -> Iterator[EpochSlice]:
        first = 0
        for positions in batches:
            yield EpochSlice(positions, epoch, first)
            first += len(positions)
