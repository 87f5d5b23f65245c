"""The data loader of a training: batches in the order of a sampler (sampler.py), with their views."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from torch.utils.data import DataLoader

from permafrost.core.batches import Batch, PixelAugment
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.random_views import ViewSchedule
from permafrost.loading.recipes import PixelAugmentSchedule
from permafrost.loading.sampler import EpochOrder, GlobalBatchSampler, ReplayBatchSampler
from permafrost.loading.transfer import (
    check_shared_memory,
    copy_to,
    iter_on_device,
    iter_watched,
    move_values,
    pack_batch,
    unpack_batch,
)


class TrainLoader:
    """Data loader of an epoch's batches with their views, starting at any step."""

    def __init__(
        self,
        dataset: StoreDataset,
        views: ViewSchedule | None,
        pixel_augment: PixelAugmentSchedule | None = None,
        *,
        batch_size: int,
        seed: int,
        loader_processes: int = 0,
        views_per_step: int = 1,
        expand: Callable[[Batch], Batch] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Configure the loader.

        Args:
            dataset: Selection of records and the passes whose targets are read.
            views: Schedule of new views, None to replay the views stored in the dataset's passes.
            pixel_augment: Schedule of changes of pixels, after those of replayed views; None for none.
            batch_size: Number of rows of a global batch, over all ranks and views of a record.
            seed: Seed of the order of epochs, and of the first stored view of each record.
            loader_processes: Number of processes that load batches, 0 to load them in this one.
            views_per_step: Number of views of one record per step: stored ones, or those that `expand` makes.
            expand: Function that makes so many views of each new one, None to have that one alone.
            rank: Number of this rank.
            world_size: Number of ranks.

        Raises:
            ConfigError: If the batch size does not fit the ranks or the selection, the stored views are no multiple of
                `views_per_step`, or batches do not fit into shared memory.
        """
        order = EpochOrder(dataset.first_positions(), seed, fetch=dataset.fetch)
        ranks = {"rank": rank, "world_size": world_size}
        self.batches = (
            GlobalBatchSampler(order, batch_size // views_per_step, **ranks)
            if views is not None
            else ReplayBatchSampler(
                order, batch_size, dataset.passes[0].num_views, views_per_step, **ranks
            )
        )
        self.views = views
        self.views_per_step = views_per_step
        self.expand = expand
        self.pixel_augment = pixel_augment
        rank_batch = -(-batch_size // world_size)
        check_shared_memory(
            dataset.record_bytes * rank_batch, loader_processes, "trainer.loader_processes"
        )
        self.loader: DataLoader[Batch] = DataLoader(
            dataset,
            batch_sampler=cast("Any", self.batches),
            collate_fn=cast("Any", pack_batch if loader_processes else _same),
            num_workers=loader_processes,
            # A forked process that inherits zarr's event loop may hang.
            multiprocessing_context="spawn" if loader_processes else None,
            persistent_workers=loader_processes > 0,
        )

    @property
    def num_steps(self) -> int:
        """Number of steps of an epoch, the same on every rank."""
        return self.batches.num_steps

    def epoch(
        self, epoch: int, first_step: int = 0, device: torch.device | None = None
    ) -> Iterator[Batch]:
        """Iterate over the batches of an epoch's steps.

        Args:
            epoch: Number of the epoch.
            first_step: Step to start at.
            device: Device to which batches are copied, on a GPU one step ahead; None leaves them on the host.
        """
        self.batches.set_position(epoch, first_step)
        batches = self._from_processes() if self.loader.num_workers else iter(self.loader)
        pairs = iter_on_device(batches, device or torch.device("cpu"))
        for step, (read, batch) in enumerate(pairs, start=first_step):
            start = self.batches.first_position(step)
            if self.views is not None:
                drawn_views = self.views.views(epoch, start, read.aspects)
                if drawn_views is not None:
                    drawn_views = copy_to(drawn_views, batch.inputs.device)
                batch = replace(batch, canonical_from_view=drawn_views)
                if self.expand is not None:
                    batch = self.expand(batch)
            if self.pixel_augment is not None:
                per_step = self.views_per_step
                drawn = self.pixel_augment.draw(epoch, start * per_step, len(batch.keys), per_step)
                if drawn is not None:
                    batch = with_changes(batch, move_values(drawn, batch.inputs.device))
            yield batch

    def _from_processes(self) -> Iterator[Batch]:
        yield from map(unpack_batch, iter_watched(iter(self.loader), "trainer.loader_processes"))


def with_changes(batch: Batch, augment: PixelAugment) -> Batch:
    """Return a batch whose pixels are changed or mixed, after the changes of its replayed views."""
    replayed = batch.pixel_augment or PixelAugment()
    assert replayed.mixture is None or augment.mixture is None
    both = PixelAugment(
        changes=(*replayed.changes, *augment.changes),
        mixture=replayed.mixture or augment.mixture,
    )
    return replace(batch, pixel_augment=both)


def _same(batch: Batch) -> Batch:
    return batch
