"""Samplers: the order of an epoch is a pure function of (seed, epoch), divided into global batches for any world size.

Shards are permuted, then records within windows of WINDOW_SHARDS shards, so a rank's memory and a node's cache do not
grow with the store. Every record occurs at most once per epoch, or as often as it is drawn (`draw_counts`), always in
the same window; these counts are a small integer per record. The last partial global batch is dropped, which affects
other records in each epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from permafrost.core.digests import derive_seed
from permafrost.core.errors import require
from permafrost.core.records import NO_GROUP

FOREIGN_LOADER = (
    "another loader has been made of the parts of a RecordLoader, which has its own order and views: leave it out of "
    "Accelerate's prepare(), set use_distributed_sampler=False of Lightning's Trainer, and give the RecordLoader "
    "sampler=DistributedSampler(range(len(records))) and a seed= for each process"
)
WINDOW_SHARDS = 16
_DRAWN_AT_ONCE = 2**18


def expected_draws(sizes: NDArray[np.int64], sampling: str) -> NDArray[np.float64]:
    """Compute the expected draws of each class in an epoch, N n_c^p / sum n_c^p, of which the sum is N = sum n_c.

    Args:
        sizes: Number of records of each class, n_c.
        sampling: Option trainer.sampling, which says p.
    """
    weights = sizes ** {"uniform": 1.0, "sqrt": 0.5, "balanced": 0.0}[sampling]
    return np.asarray(sizes.sum() * weights / weights.sum())


def draw_counts(
    records: Mapping[str, NDArray[np.integer[Any]]], sampling: str, seed: int, epoch: int
) -> NDArray[np.unsignedinteger[Any]]:
    """Draw how often each record occurs in an epoch, [n] in the smallest dtype, as a function of these arguments alone.

    A class has its expected number of draws, rounded up or down by a systematic draw. Its groups share them equally,
    and so do the records of a group; what is left over goes to others in each epoch. Records without a group are
    groups of their own, and those without a label a class.

    Args:
        records: Class and group of each record, `label` and `group`, [n].
        sampling: Option trainer.sampling.
        seed: Seed of the training.
        epoch: Number of the epoch.
    """
    generator = np.random.default_rng(derive_seed(seed, "sampling", epoch))
    _, classes, sizes = np.unique(records["label"], return_inverse=True, return_counts=True)
    ends = np.floor(np.cumsum(expected_draws(sizes, sampling)).round(6) + generator.random())
    groups = np.where(
        records["group"] == NO_GROUP, -(2**31) - 1 - np.arange(len(classes)), records["group"]
    )
    _, first, units = np.unique(
        groups * len(sizes) + classes, return_index=True, return_inverse=True
    )
    counts = _divide(
        _divide(np.diff(ends, prepend=0).astype(np.int64), classes[first], generator),
        units,
        generator,
    )
    return counts.astype(np.min_scalar_type(counts.max()))


def _divide(
    totals: NDArray[np.int64], parents: NDArray[np.int64], generator: np.random.Generator
) -> NDArray[np.int64]:
    """Divide totals among their members as equally as whole numbers are, the rest at random: i64 [members].

    Args:
        totals: Number to divide, [parents].
        parents: Total of which each member has a part, [members].
        generator: Generator of the draws.
    """
    order = np.lexsort((generator.random(len(parents)), parents))
    sizes = np.bincount(parents, minlength=len(totals))
    ranks = np.argsort(order) - (np.cumsum(sizes) - sizes)[parents]
    return totals[parents] // sizes[parents] + (ranks < totals[parents] % sizes[parents])


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
    repeats: NDArray[np.int64] | int = 0
    """Number of each record among its repeats in the epoch."""


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
        counts: Callable[[int], NDArray[np.unsignedinteger[Any]]] | None = None,
    ) -> None:
        """Describe the shards of a selection whose records are in the order of the store.

        Args:
            first_positions: Position at which the records of each shard begin, and the number of all: [shards + 1].
            seed: Seed of the order of every epoch; None for the order of the store.
            window: Number of shards whose records are permuted together.
            fetch: Function that is told the numbers of the shards of a window before the window is drawn, and of the
                next one.
            least_records: Number of records of a window, which then has more shards if they are small.
            counts: Function of the epoch that returns how often each record occurs in it, as many in all as there are
                records; None for once.
        """
        sizes = np.diff(first_positions)
        self._numbers = np.flatnonzero(sizes > 0)
        self._starts = first_positions[:-1][sizes > 0]
        self._sizes = sizes[sizes > 0]
        self._fetch, self._counts = fetch, counts
        self.num_records = int(sizes.sum())
        self.seed = seed or 0
        self.is_drawn = seed is not None
        self.window, self.least_records = window, least_records

    def windows(self, epoch: int, first: int = 0) -> Iterator[NDArray[np.int64]]:
        """Iterate over the order of an epoch, with every position of the selection once, window by window.

        If records are drawn, one occurs as position + r * num_records for each of its repeats r from 0.

        Args:
            epoch: Number of the epoch.
            first: Place in the order from which positions are returned; the windows before it are only drawn, which
                takes time but no memory.
        """
        generator = np.random.default_rng(derive_seed(self.seed, "order", epoch))
        permute = generator.permutation if self.is_drawn else np.arange
        shards = permute(len(self._sizes))
        counts = None if self._counts is None else self._counts(epoch)
        begin, fetched = 0, False
        bounds = self._bounds(shards)
        for number, (start, stop) in enumerate(pairwise(bounds)):
            members = shards[start:stop]
            sizes = self._sizes[members]
            offsets = np.cumsum(sizes) - sizes
            positions = np.repeat(self._starts[members] - offsets, sizes) + np.arange(sizes.sum())
            if counts is not None:
                here = counts[positions].astype(np.int64)
                repeats = np.arange(here.sum()) - np.repeat(np.cumsum(here) - here, here)
                positions = np.repeat(positions, here) + repeats * self.num_records
            drawn = permute(len(positions))
            if (end := begin + len(drawn)) > first:
                if self._fetch is not None:
                    after = shards[stop : (*bounds, stop)[number + 2]]
                    self._fetch(self._numbers[after if fetched else np.r_[members, after]])
                    fetched = True
                yield positions[drawn[max(first - begin, 0) :]]
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
                rank_rows = rest[self.rank * share : (self.rank + 1) * share]
                repeats, positions = np.divmod(rank_rows, self.order.num_records)
                yield EpochSlice(positions, epoch, taken + self.rank * share, repeats=repeats)
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
            starts = self.starts[part.positions] + part.repeats * np.int64(self.per_step)
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
