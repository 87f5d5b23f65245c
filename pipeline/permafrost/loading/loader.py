"""The data loader of a training: a PyTorch DataLoader of an epoch's batches with their views, from any step on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from permafrost.core.batches import Batch, PixelAugment
from permafrost.core.digests import derive_seed
from permafrost.core.errors import ConfigError, require
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.random_views import ViewSchedule
from permafrost.loading.recipes import PixelAugmentSchedule
from permafrost.loading.sampler import (
    FOREIGN_LOADER,
    EpochOrder,
    GlobalBatchSampler,
    PlacedBatches,
    ReplayBatchSampler,
    draw_counts,
)
from permafrost.loading.transfer import (
    MAX_WAIT_SECONDS,
    ChangedBatch,
    check_shared_memory,
    iter_changed_on_device,
    iter_sent,
    map_leaves,
    pack_batch,
    unpack_batch,
)


class TrainLoader(DataLoader[Any]):
    """Data loader of an epoch's batches with their views, starting at any step."""

    workers_option = "trainer.loader_processes"
    """Name of the option that is the number of worker processes, for messages."""

    def __init__(
        self,
        dataset: StoreDataset,
        views: ViewSchedule | None,
        pixel_augment: PixelAugmentSchedule | None = None,
        *,
        view_size: tuple[int, int] | None = None,
        batch_size: int,
        seed: int,
        loader_processes: int = 0,
        views_per_step: int = 1,
        expand: Callable[[Batch], Batch] | None = None,
        sampling: str = "uniform",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Configure the loader.

        Args:
            dataset: Selection of records and the passes whose targets are read.
            views: Schedule of new views, None to replay the views stored in the dataset's passes.
            pixel_augment: Schedule of changes of pixels, after those of replayed views; None for none.
            view_size: Largest (height, width) of views that networks receive, the size of windows of original images;
                None for that of the canonical frame.
            batch_size: Number of rows of a global batch, over all ranks and views of a record.
            seed: Seed of the order of epochs, and of the first stored view of each record.
            loader_processes: Number of processes that load batches, 0 to load them in this one.
            views_per_step: Number of views of one record per step: stored ones, or those that `expand` makes.
            expand: Function that expands each new view into `views_per_step` views; None keeps the single view.
            sampling: Option trainer.sampling, by which records are drawn for an epoch.
            rank: Number of this rank.
            world_size: Number of ranks.

        Raises:
            ConfigError: If the batch size, `views_per_step` or the shared memory do not fit data, ranks and views.
        """
        dataset = dataset.in_views(views, view_size)
        order = EpochOrder(
            dataset.first_positions(),
            seed,
            fetch=dataset.fetch,
            least_records=dataset.least_window,
            counts=None
            if sampling == "uniform"
            else partial(draw_counts, dataset.classes_to_draw(sampling), sampling, seed),
        )
        ranks: dict[str, Any] = {"rank": rank, "world_size": world_size}
        batches = (
            GlobalBatchSampler(order, batch_size // views_per_step, **ranks)
            if views is not None
            else ReplayBatchSampler(
                order, batch_size, dataset.passes[0].num_views, views_per_step, **ranks
            )
        )
        self.views_per_step, self.expand = views_per_step, expand
        size = dataset.record_bytes * -(-batch_size // world_size)
        self._configure(
            dataset, batches, pixel_augment, seed, batch_bytes=size, num_workers=loader_processes
        )

    def _configure(
        self,
        dataset: StoreDataset,
        batches: GlobalBatchSampler | PlacedBatches,
        pixel_augment: PixelAugmentSchedule | None,
        seed: int,
        *,
        batch_bytes: int,
        num_workers: int,
        **options: Any,
    ) -> None:
        """Set up the schedules and PyTorch's loader."""
        self.batches, self.pixel_augment = batches, pixel_augment
        self._iteration: object = None
        if num_workers:
            context = options.setdefault("multiprocessing_context", "spawn")
            name = context if isinstance(context, str) else context.get_start_method()
            # A forked process that inherits zarr's event loop may hang.
            require(name != "fork", 'multiprocessing_context="fork" may hang; use "spawn"')
            options.setdefault("persistent_workers", True)
            check_shared_memory(batch_bytes, num_workers, self.workers_option)
        # Torch draws the seed of worker processes from the global generator otherwise.
        options.setdefault("generator", torch.Generator().manual_seed(derive_seed(seed, "workers")))
        super().__init__(
            dataset,
            batch_sampler=batches,  # type: ignore[arg-type]
            num_workers=num_workers,
            timeout=MAX_WAIT_SECONDS if num_workers else 0,
            collate_fn=BatchMessage.from_worker if num_workers else BatchMessage,  # type: ignore[arg-type]
            **options,
        )

    @property
    def num_steps(self) -> int:
        """Number of steps of an epoch, the same on every rank."""
        return self.batches.num_steps if isinstance(self.batches, GlobalBatchSampler) else len(self)

    def epoch(
        self, epoch: int, first_step: int = 0, device: torch.device | None = None
    ) -> Iterator[Batch]:
        """Iterate over the batches of an epoch's steps.

        Args:
            epoch: Number of the epoch.
            first_step: Step to start at.
            device: Target device of the batches, copied one step ahead on a GPU; None leaves them on the host.
        """
        if isinstance(self.batches, GlobalBatchSampler):
            self.batches.set_position(epoch, first_step)
        else:
            self.batches.set_epoch(epoch)
        read = self._read_batches(DataLoader.__iter__(self))
        changed = self._with_changes(read, epoch, first_step)
        return self._in_views(iter_changed_on_device(changed, device or torch.device("cpu")))

    def _with_changes(
        self, batches: Iterable[Batch], epoch: int, first_step: int
    ) -> Iterator[ChangedBatch]:
        """Iterate over batches and the changes that are drawn of the pixels of all their views."""
        start = 0
        per_step = self.views_per_step
        for step, batch in enumerate(batches, start=first_step):
            if isinstance(self.batches, GlobalBatchSampler):
                start = self.batches.first_position(step)
            drawn = None
            if self.pixel_augment is not None:
                views = len(batch.keys) * (1 if self.expand is None else per_step)
                drawn = self.pixel_augment.draw(epoch, start * per_step, views, per_step)
            start += len(batch.keys)
            yield batch, drawn

    def _in_views(self, batches: Iterator[ChangedBatch]) -> Iterator[Batch]:
        """Iterate over batches in all their views, with the changes of their pixels."""
        for batch, drawn in batches:
            expanded = batch if self.expand is None else self.expand(batch)
            yield expanded if drawn is None else _with_changes(expanded, drawn)

    def _read_batches(self, messages: Any) -> Iterator[Batch]:
        """Return the iterator over what PyTorch's iterator of an epoch reads."""
        if not self.num_workers:
            return (message.unpack() for message in messages)
        self._iteration = token = object()
        return self._from_workers(messages, token)

    def _from_workers(self, messages: Any, token: object) -> Iterator[Batch]:
        """Iterate over what the worker processes send, as long as no other iteration has taken them over."""
        sent = iter_sent(messages, self.workers_option)
        try:
            while True:
                require(
                    self._iteration is token,
                    f"another iteration of this {type(self).__name__} has begun, and the processes of "
                    f"{self.workers_option}={self.num_workers} serve one at a time; use a loader for each, or "
                    f"{self.workers_option}=0",
                )
                try:
                    message = next(sent)
                except StopIteration:
                    return
                yield message.unpack()
        except RuntimeError as error:
            if "exited unexpectedly" not in str(error):
                raise
            raise ConfigError(
                f"a process of {self.workers_option}={self.num_workers} ended ({error}). "
                f"{self._describe_program()}"
            ) from error

    def _describe_program(self) -> str:
        """Say why the processes of a program may end at once, with the fix."""
        path = getattr(sys.modules.get("__main__"), "__file__", None)
        if path is None or not Path(path).exists():
            return (
                "Each imports the program that starts it, and one that is read from a pipe or typed has no file: write "
                f"it to a file, or set {self.workers_option}=0"
            )
        return (
            'Each imports the program that starts it: put its loop below `if __name__ == "__main__":`, or set '
            f"{self.workers_option}=0"
        )


def _with_changes(batch: Batch, augment: PixelAugment) -> Batch:
    """Return a batch whose pixels are changed or mixed, after the changes of its replayed views."""
    replayed = batch.pixel_augment or PixelAugment()
    assert replayed.mixture is None or augment.mixture is None
    both = PixelAugment(
        changes=(*replayed.changes, *augment.changes),
        mixture=replayed.mixture or augment.mixture,
    )
    return replace(batch, pixel_augment=both)


class BatchMessage:
    """Batch on its way from a worker, which PyTorch pins if it is asked to."""

    def __init__(self, batch: Batch, *, is_packed: bool = False) -> None:
        self.batch, self.is_packed = batch, is_packed

    @classmethod
    def from_worker(cls, batch: Batch) -> BatchMessage:
        """Pack a batch in a worker process."""
        return cls(pack_batch(batch), is_packed=True)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # of protocols, such as those of copies
            raise AttributeError(name)
        raise ConfigError(FOREIGN_LOADER)

    def unpack(self) -> Batch:
        """Return the batch."""
        return unpack_batch(self.batch) if self.is_packed else self.batch

    def pin_memory(self) -> BatchMessage:
        """Return the batch in pinned memory."""
        pinned = map_leaves(
            self.unpack(),
            lambda leaf: leaf.pin_memory() if isinstance(leaf, torch.Tensor) else leaf,
        )
        return BatchMessage(pinned)
