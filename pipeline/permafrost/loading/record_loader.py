"""The public data loader: a PyTorch DataLoader of selected records and their stored targets, under the same views."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from permafrost.config.augment import AugmentOptions
from permafrost.core.batches import (
    Batch,
    MixedLabels,
    Mixture,
    Targets,
    require_all_logits,
)
from permafrost.core.digests import derive_seed
from permafrost.core.errors import ConfigError, require
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.geometry import TargetRequest, view_images, view_targets
from permafrost.loading.loader import with_changes
from permafrost.loading.mixtures import labels_of, mix_targets, mixture_of_targets
from permafrost.loading.random_views import ViewSchedule
from permafrost.loading.recipes import PixelAugmentSchedule
from permafrost.loading.replayed_views import check_replayed
from permafrost.loading.sampler import EpochOrder, ReplayBatchSampler
from permafrost.loading.selected_records import SelectedRecords
from permafrost.loading.transfer import (
    check_shared_memory,
    iter_watched,
    map_leaves,
    move_batch,
    pack_batch,
    unpack_batch,
)

_OWN_ARGUMENTS = {
    "dataset": "pass the records instead",
    "collate_fn": "batches are read and collated at once; change them in your loop",
}
"""Arguments of DataLoader that do not fit, and the way out."""


@dataclass(frozen=True)
class ViewBatch:
    """Records of a step with their images and targets in one view each, drawn for the record and the epoch.

    Images and targets are computed from the stored values on first use, on the device of the batch, so a batch that is
    moved to a GPU is rendered there.
    """

    stored: Batch
    """The stored frames, targets and matrices of the views."""
    size: tuple[int, int]
    """Height and width of the images."""
    unread: tuple[str, ...] = ()
    """Names of several passes of which the loader reads none, because none was named."""

    def __len__(self) -> int:
        return len(self.stored.keys)

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the records."""
        return self.stored.keys

    @property
    def labels(self) -> Tensor:
        """Labels i64 [B], -1 where unknown; in a store of records with many labels f32 [B, K].

        Raises:
            ConfigError: If the images are mixtures, whose labels are `mixed_labels`.
        """
        labels = labels_of(self.stored)
        if isinstance(labels, MixedLabels):
            raise ConfigError("a mixture has the labels of two records; read mixed_labels")
        return labels

    @property
    def mixture(self) -> Mixture | None:
        """Partners, shares and boxes of mixtures, None if every image shows one record.

        Partners are rows of this batch, and of `stored.second` if a pass stores the mixtures.
        """
        augment = self.stored.pixel_augment
        return None if augment is None else augment.mixture

    @property
    def mixed_labels(self) -> MixedLabels:
        """Labels of both records of each mixture, with their shares.

        Raises:
            ConfigError: If the images are no mixtures.
        """
        labels = labels_of(self.stored)
        if isinstance(labels, MixedLabels):
            return labels
        raise ConfigError("the images are no mixtures; read labels")

    def _require_one_record(self, name: str, way_out: str) -> None:
        require(
            mixture_of_targets(self.stored) is None,
            f"ViewBatch.{name} are those of one record, and augment.mix shows two; read {way_out}",
        )

    @cached_property
    def images(self) -> Tensor:
        """Images in their views, f32 [B, 3, H, W] in [0, 1]; rows of a table f32 [B, d]."""
        return view_images(self.stored, self.size)

    def targets(self, grid: tuple[int, int] | None = None) -> tuple[Targets, ...]:
        """Return the targets of each teacher pass: logits f32 [B, K], maps f32 [B, E, A, h, w], warped like the images.

        Those of `augment.mix` are mixed by rules (docs/concepts/one-geometry.md): logits of both records with shares,
        and maps of the explained classes of both, with `class_weights` and `cell_weights`.

        Args:
            grid: (h, w) of the maps, such as that of the student's features; None is the grid on which they are stored.

        Raises:
            ConfigError: If the store has several passes, and the loader was told none.
        """
        require(
            not self.unread,
            "the store has several teacher passes; name one or more of them with teacher=, of: "
            + ", ".join(self.unread),
        )
        viewed: list[Targets] = []
        for target in self.stored.targets:
            size = grid or ((1, 1) if target.maps is None else target.maps.shape[-2:])
            request = TargetRequest((size[0], size[1]))
            viewed += view_targets(replace(self.stored, targets=(target,)), request)
        return tuple(map(mix_targets, viewed))

    @cached_property
    def _first(self) -> Targets:
        require(
            bool(self.stored.targets or self.unread),
            "the batch has no targets; name a pass of the store with teacher=",
        )
        return self.targets()[0]

    @property
    def logits(self) -> Tensor:
        """Logits of the first teacher, f32 [B, K].

        Raises:
            ConfigError: If the loader reads no pass, the pass stores only the largest logits, or images are mixtures.
        """
        self._require_one_record("logits", "targets()[0].logits.first, .second and .shares")
        return require_all_logits(self._first.logits, "ViewBatch.logits; targets()[0].logits")

    @property
    def maps(self) -> Tensor:
        """Explanation maps of the first teacher on their own grid, f32 [B, E, A, h, w].

        Raises:
            ConfigError: If the loader reads no pass, the pass has no maps, or the images are mixtures.
        """
        self._require_one_record(
            "maps", "targets()[0].maps with its class_weights and cell_weights"
        )
        maps = self._first.maps
        if maps is None:
            raise ConfigError(
                f"the pass {self._first.teacher} has no maps; add map to annotate.payloads of precompute"
            )
        return maps

    def to(self, device: torch.device | str) -> ViewBatch:
        """Return the batch on `device`. The copy is asynchronous if the loader pins memory (pin_memory=True).

        Images that were rendered, and may have been changed since, are copied, too.
        """
        moved = replace(self, stored=move_batch(self.stored, torch.device(device)))
        rendered = self.__dict__.get("images")
        if rendered is not None:
            moved.__dict__["images"] = rendered.to(device)
        return moved


class RecordLoader(DataLoader[ViewBatch]):
    """PyTorch DataLoader of `ViewBatch`es, whose every iteration is an epoch with new views.

    The order and the views are a pure function of `seed` and the epoch, whatever the number of workers. With `augment`,
    batches of an epoch are those of a training by `distill` with the same seed and options.

    >>> import permafrost
    >>> records = permafrost.open_store(path).select("train")
    >>> batch = next(iter(RecordLoader(records, batch_size=8)))
    >>> batch.images.shape, batch.logits.shape, batch.maps.shape
    (torch.Size([8, 3, 16, 16]), torch.Size([8, 10]), torch.Size([8, 1, 1, 4, 4]))
    """

    def __init__(
        self,
        records: SelectedRecords,
        *,
        teacher: str | Sequence[str] | None = None,
        augment: AugmentOptions | None = None,
        replay: bool = False,
        payload: str | None = None,
        batch_size: int = 64,
        shuffle: bool | None = None,
        drop_last: bool | None = None,
        seed: int = 0,
        num_workers: int = 0,
        decode_threads: int = 1,
        **options: Any,
    ) -> None:
        """Configure the loader.

        Args:
            records: Records of `OpenStore.select`.
            teacher: Names of passes whose targets are read; None for the only pass of the store, () for none. If the
                store has several, None reads images and labels, and targets are an error.
            augment: Random views (`permafrost.augmentation`); None shows whole frames.
            replay: True replays the views that a pass stores, instead of drawing new ones.
            payload: Payload to read besides logits and maps, such as "attention" or "class_maps".
            batch_size: Number of records of a batch.
            shuffle: True draws the order of each epoch anew; None: with `augment` or `replay`, as for a training.
            drop_last: True leaves out the last batch if it is smaller; None: as `shuffle`.
            seed: Seed of the order of epochs, the views and the changes to pixels.
            num_workers: Number of processes that load batches, 0 to load them in this one.
            decode_threads: Threads that decode a batch, in each worker.
            options: Any other argument of torch.utils.data.DataLoader. A `sampler` or `batch_sampler` gives positions
                among the records; each process of a distributed training needs a `seed` of its own.

        Raises:
            ConfigError: If an argument does not fit.
        """
        require(
            isinstance(records, SelectedRecords),
            f"RecordLoader takes selected records, as of open_store(...).select('train'), not {type(records).__name__}",
        )
        require(
            augment is None or isinstance(augment, AugmentOptions),
            f"augment={augment!r} must be random views, as of permafrost.augmentation('pad_crop_flip')",
        )
        unknown = options.keys() - inspect.signature(DataLoader.__init__).parameters.keys()
        require(
            not unknown,
            f"RecordLoader and torch.utils.data.DataLoader take no {', '.join(sorted(unknown))}=; they take "
            f"{', '.join(_arguments())}",
        )
        has_places = records.store.form.has_places
        require(
            has_places or augment is None or not (augment.operations or augment.mixes),
            "augment changes images, but the records of this store are rows of a table; leave it out",
        )
        require(
            not (shuffle and {"sampler", "batch_sampler"} & options.keys()),
            "shuffle=True and a sampler both decide the order; leave one of them out",
        )
        if shuffle is None:
            shuffle = replay or augment is not None
        store = records.store
        for name, way_out in _OWN_ARGUMENTS.items():
            require(name not in options, f"RecordLoader takes no {name}=; {way_out}")
        is_number = isinstance(batch_size, (int, np.integer)) and not isinstance(batch_size, bool)
        require(
            is_number and batch_size > 0,
            f"batch_size={batch_size!r} must be a positive whole number of records",
        )
        batch_size = int(batch_size)
        drawn = {"sampler", "batch_sampler"} & options.keys()
        require(not (replay and drawn), "replay=True draws the order itself; leave out the sampler")
        names = (teacher,) if isinstance(teacher, str) else teacher
        self._unread: tuple[str, ...] = ()
        if names is None and payload is None and not replay and len(store.pass_folders()) > 1:
            names, self._unread = (), tuple(folder.name for folder in store.pass_folders())
        passes = [] if names == () else store.open_passes(tuple(names or ()), stored_views=replay)
        require(bool(passes) or not replay, "replay=True needs a pass of stored views; name it")
        dataset = StoreDataset(
            store,
            records.rows,
            passes,
            payload=payload,
            decode_threads=decode_threads,
            blanks_maps=augment is not None and augment.blanks_maps,
        )
        self._views = (
            ViewSchedule(augment, store.size, seed, one_aspect=dataset.has_frame_aspect)
            if augment is not None and not replay
            else None
        )
        fresh = augment
        if replay:
            for each in passes:
                require(
                    each.views == passes[0].views,
                    f"replay=True: {each.name} and {passes[0].name} have different views; name passes of the same ones",
                )
                check_replayed(augment or AugmentOptions(), each)
        if augment is not None and replay:
            fresh = replace(augment, operations=())  # the rest is that of the stored views
        self._pixels = None if fresh is None else PixelAugmentSchedule(fresh, seed)
        side = None if augment is None else augment.size
        self.size = store.size if side is None else (side, side)
        self._epoch = 0
        self._lock = Lock()
        self._iteration: object = None
        drop_last = shuffle if drop_last is None else drop_last
        if drawn:
            if "batch_sampler" not in options:
                options |= {"batch_size": batch_size, "drop_last": bool(drop_last)}
                sampler = options["sampler"]
                if drop_last and hasattr(sampler, "__len__"):
                    _require_batch(len(sampler), batch_size)
        elif replay:
            order = EpochOrder(dataset.first_positions(), seed, fetch=dataset.fetch)
            _require_batch(len(dataset), batch_size)
            options["batch_sampler"] = ReplayBatchSampler(order, batch_size, passes[0].num_views, 1)
        else:
            if drop_last:
                _require_batch(len(dataset), batch_size)
            options["batch_sampler"] = _BatchSampler(
                dataset, batch_size, seed if shuffle else None, drop_last=drop_last
            )
        if num_workers:
            context = options.setdefault("multiprocessing_context", "spawn")
            name = context if isinstance(context, str) else context.get_start_method()
            # A forked process that inherits zarr's event loop may hang.
            require(name != "fork", 'multiprocessing_context="fork" may hang; use "spawn"')
            options.setdefault("persistent_workers", True)
            check_shared_memory(dataset.record_bytes * batch_size, num_workers, "num_workers")
        # Torch draws the seed of worker processes from the global generator otherwise.
        options.setdefault("generator", torch.Generator().manual_seed(derive_seed(seed, "workers")))
        super().__init__(
            dataset,  # type: ignore[arg-type]
            num_workers=num_workers,
            collate_fn=_Message.from_worker if num_workers else _Message,  # type: ignore[arg-type]
            **options,
        )

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the next epoch, as after a restart; a sampler with a `set_epoch` is told, too."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[ViewBatch]:  # type: ignore[override]
        with self._lock:  # of several threads that begin an epoch, each has its own
            epoch, self._epoch = self._epoch, self._epoch + 1
            for sampler in (self.batch_sampler, self.sampler):
                if isinstance(sampler, (_BatchSampler, ReplayBatchSampler)):
                    sampler.set_position(epoch, 0)
                elif (set_epoch := getattr(sampler, "set_epoch", None)) is not None:
                    set_epoch(epoch)
            messages = self._messages(super().__iter__())
        return self._views_of(epoch, messages)

    def _views_of(self, epoch: int, messages: Iterator[_Message]) -> Iterator[ViewBatch]:
        """Iterate over the batches of an epoch under its views."""
        start = 0
        for message in messages:
            batch = message.unpack()
            if self._views is not None:
                views = self._views.views(epoch, start, batch.aspects)
                batch = replace(batch, canonical_from_view=views)
            if self._pixels is not None:
                changes = self._pixels.draw(epoch, start, len(batch.keys))
                if changes is not None:
                    batch = with_changes(batch, changes)
            start += len(batch.keys)
            yield ViewBatch(batch, self.size, self._unread)

    def _messages(self, batches: Any) -> Iterator[_Message]:
        """Return the iterator over what torch's iterator of an epoch reads."""
        if not self.num_workers:
            return iter(batches)
        self._iteration = token = object()
        return self._from_workers(batches, token)

    def _from_workers(self, batches: Any, token: object) -> Iterator[_Message]:
        """Iterate over what the worker processes send, as long as no other iteration has taken them over."""
        watched = iter_watched(batches, "num_workers")
        try:
            while True:
                require(
                    self._iteration is token,
                    f"another iteration of this RecordLoader has begun, and the processes of num_workers="
                    f"{self.num_workers} serve one at a time; use a RecordLoader for each, or num_workers=0",
                )
                try:
                    message = next(watched)
                except StopIteration:
                    return
                yield message
        except RuntimeError as error:
            if "exited unexpectedly" not in str(error):
                raise
            raise ConfigError(
                f"a process of num_workers={self.num_workers} ended ({error}). {_describe_program()}"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        # A copy starts worker processes of its own.
        return self.__dict__ | {"_iterator": None, "_lock": None, "_iteration": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"_lock": Lock()})


def _describe_program() -> str:
    """Say why the processes of a program may end at once, with the way out."""
    path = getattr(sys.modules.get("__main__"), "__file__", None)
    if path is None or not Path(path).exists():
        return (
            "Each imports the program that starts it, and one that is read from a pipe or typed has no file: write it "
            "to a file, or set num_workers=0"
        )
    return (
        'Each imports the program that starts it: put its loop below `if __name__ == "__main__":`, or set '
        "num_workers=0"
    )


def _arguments() -> list[str]:
    """Return the names of the arguments that a loader takes."""
    loader_arguments = [*inspect.signature(RecordLoader.__init__).parameters]
    torchs = [*inspect.signature(DataLoader.__init__).parameters]
    left_out = {"self", "options", *_OWN_ARGUMENTS}
    return [name for name in dict.fromkeys([*loader_arguments, *torchs]) if name not in left_out]


def _require_batch(records: int, batch_size: int) -> None:
    require(
        records >= batch_size,
        f"batch_size={batch_size}, but {records} records are selected; lower it, or set drop_last=False",
    )


class _BatchSampler(Sampler[list[int]]):
    """Batches of positions, in the order of the epoch or ascending."""

    def __init__(
        self,
        dataset: StoreDataset,
        batch_size: int,
        seed: int | None = None,
        *,
        drop_last: bool,
    ) -> None:
        """Configure the sampler.

        Args:
            seed: Seed of the order of epochs; None is ascending.

        Raises:
            ConfigError: If another library makes a sampler of this kind of a sampler of its own.
        """
        require(isinstance(dataset, StoreDataset), FOREIGN_LOADER)
        self.order = None
        if seed is not None:
            self.order = EpochOrder(dataset.first_positions(), seed, fetch=dataset.fetch)
        self.num_records = len(dataset)
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.epoch = 0

    def set_position(self, epoch: int, first_step: int) -> None:
        """Set the epoch of the next iteration, which starts at its first step."""
        assert first_step == 0
        self.epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(self.num_records, self.batch_size)
        return whole if self.drop_last or not rest else whole + 1

    def __iter__(self) -> Iterator[list[int]]:
        return self._batches(
            self.epoch
        )  # the epoch is that of now, whenever the first batch is asked for

    def _batches(self, epoch: int) -> Iterator[list[int]]:
        rest: list[int] = []
        for window in self._windows(epoch):
            rest += window
            ends = range(self.batch_size, len(rest) + 1, self.batch_size)
            for end in ends:
                yield rest[end - self.batch_size : end]
            rest = rest[len(ends) * self.batch_size :]
        if rest and not self.drop_last:
            yield rest

    def _windows(self, epoch: int) -> Iterator[list[int]]:
        if self.order is not None:
            yield from (window.tolist() for window in self.order.windows(epoch))
        else:
            for start in range(0, self.num_records, self.batch_size):
                yield list(range(start, min(start + self.batch_size, self.num_records)))


FOREIGN_LOADER = (
    "another loader has been made of the parts of a RecordLoader, which has its own order and views: leave it out of "
    "Accelerate's prepare(), set use_distributed_sampler=False of Lightning's Trainer, and give each process a seed= "
    "of its own, or records of its own"
)


class _Message:
    """Batch on its way from a worker, which PyTorch pins if it is asked to."""

    def __init__(self, batch: Batch, *, is_packed: bool = False) -> None:
        self.batch = batch
        self.is_packed = is_packed

    @classmethod
    def from_worker(cls, batch: Batch) -> _Message:
        return cls(pack_batch(batch), is_packed=True)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # of protocols, such as those of copies
            raise AttributeError(name)
        raise ConfigError(FOREIGN_LOADER)

    def unpack(self) -> Batch:
        return unpack_batch(self.batch) if self.is_packed else self.batch

    def pin_memory(self) -> _Message:
        """Return the batch in pinned memory."""
        pinned = map_leaves(
            self.unpack(),
            lambda leaf: leaf.pin_memory() if isinstance(leaf, torch.Tensor) else leaf,
        )
        return _Message(pinned)
