"""The public data loader: a PyTorch DataLoader of selected records and their stored targets, under the same views."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from threading import Lock
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import BatchSampler

from permafrost.config.augment import AugmentOptions
from permafrost.config.models import Picture
from permafrost.core.batches import (
    Batch,
    MixedLabels,
    Mixture,
    Targets,
    require_all_logits,
    require_maps,
)
from permafrost.core.errors import ConfigError, require
from permafrost.core.label_forms import as_independent, has_many
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.geometry import TargetRequest, view_images, view_targets
from permafrost.loading.loader import TrainLoader
from permafrost.loading.mixtures import labels_of, mix_targets, mixture_of_targets
from permafrost.loading.random_views import schedule_views
from permafrost.loading.recipes import PixelAugmentSchedule
from permafrost.loading.replayed_views import check_replayed
from permafrost.loading.sampler import (
    EpochOrder,
    GlobalBatchSampler,
    PlacedBatches,
    ReplayBatchSampler,
)
from permafrost.loading.selected_records import SelectedRecords
from permafrost.loading.transfer import move_batch
from permafrost.store.reader import Store, TeacherPass

logger = logging.getLogger("permafrost.loading")

_UNSUPPORTED = {
    "dataset": "pass the records instead",
    "collate_fn": "batches are read and collated at once; change them in your loop",
}
"""Arguments of DataLoader that do not fit, and what to do instead."""


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
        """Labels i64 [B], -1 where unknown; in a store of records with many labels f32 [B, K], 1 for each class of a
        record, 0 for every other and NaN where that is unknown, as `permafrost.bce_loss` takes them.

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
            ConfigError: If the images are not mixtures.
        """
        labels = labels_of(self.stored)
        if isinstance(labels, MixedLabels):
            return labels
        raise ConfigError("the images are not mixtures; read labels")

    def _require_one_record(self, name: str, remedy: str) -> None:
        require(
            mixture_of_targets(self.stored) is None,
            f"ViewBatch.{name} are those of one record, and augment.mix shows two; read {remedy}",
        )

    @cached_property
    def images(self) -> Tensor:
        """Images in their views, f32 [B, 3, H, W] in [0, 1]; rows of a table f32 [B, d]."""
        return view_images(self.stored, self.size)

    def targets(self, grid: tuple[int, int] | None = None) -> tuple[Targets, ...]:
        """Return the targets of each teacher pass: logits f32 [B, K], maps f32 [B, E, A, h, w], warped like the images.

        Those of `augment.mix` are mixed by rules (docs/concepts/one-geometry.md): logits of both records with shares,
        and maps of the target classes of both, with `class_weights` and `cell_weights`.

        Args:
            grid: (h, w) of the maps, such as that of the student's features; None is the grid on which they are stored.

        Raises:
            ConfigError: If the store has several passes, and the loader was given none.
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
        targets = tuple(map(mix_targets, viewed))
        if not has_many(self.stored.labels):
            return targets
        return tuple(replace(each, logits=as_independent(each.logits)) for each in targets)

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
        """Explanation maps of the first teacher on their own grid, f32 [B, E, A, h, w], relative to `map_scale`.

        Raises:
            ConfigError: If the loader reads no pass, the pass has no maps, or the images are mixtures.
        """
        self._require_one_record(
            "maps", "targets()[0].maps with its class_weights and cell_weights"
        )
        return require_maps(self._first).maps

    @property
    def map_scale(self) -> Tensor | None:
        """Scales f32 [B, E] that give `maps` the explainer's units, as maps * map_scale[:, :, None, None, None].

        None if the pass stores none.
        """
        return self.stored.targets[0].map_scale if self.stored.targets else None

    def to(self, device: torch.device | str) -> ViewBatch:
        """Return the batch on `device`. The copy is asynchronous if the loader pins memory (pin_memory=True).

        Images that were rendered, and may have been changed since, are copied, too.
        """
        moved = replace(self, stored=move_batch(self.stored, torch.device(device)))
        if (rendered := self.__dict__.get("images")) is not None:
            moved.__dict__["images"] = rendered.to(device)
        return moved


_SAMPLERS = {"sampler", "batch_sampler"}


class RecordLoader(TrainLoader):
    """PyTorch DataLoader of `ViewBatch`es, whose every iteration is an epoch with new views.

    The order and the views are a pure function of `seed` and the epoch, whatever the number of workers. With `augment`,
    batches of an epoch are those of a training by `distill` with the same seed and options.

    >>> import permafrost
    >>> records = permafrost.open_store(path).select("train")
    >>> batch = next(iter(RecordLoader(records, batch_size=8)))
    >>> batch.images.shape, batch.logits.shape, batch.maps.shape
    (torch.Size([8, 3, 16, 16]), torch.Size([8, 10]), torch.Size([8, 1, 1, 4, 4]))
    """

    workers_option = "num_workers"

    def __init__(
        self,
        records: SelectedRecords,
        *,
        teacher: str | Sequence[str] | None = None,
        augment: AugmentOptions | None = None,
        frame: Picture | None = None,
        replay: bool = False,
        output: str | None = None,
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
            frame: Picture in which a network is evaluated (`load_student(run).picture`), in place of random views.
            replay: True replays the views that a pass stores, instead of drawing new ones.
            output: Output to read besides logits and maps, such as "attention" or "class_maps".
            batch_size: Number of records of a batch.
            shuffle: True draws the order of each epoch anew; None: with `augment` or `replay`, as for a training.
            drop_last: True leaves out the last batch if it is smaller; None: as `shuffle`.
            seed: Seed of the order of epochs, the views and the changes to pixels.
            num_workers: Number of processes that load batches, 0 to load them in this one.
            decode_threads: Threads that decode a batch, in each worker.
            options: Any other argument of torch.utils.data.DataLoader. A `sampler` or `batch_sampler` gives positions
                among the records. Each rank of torch.distributed needs a sampler, as the loader does not divide the
                records, and a `seed` of its own.

        Raises:
            ConfigError: If an argument does not fit.
            TypeError: If DataLoader has no such argument.
        """
        require(
            isinstance(records, SelectedRecords),
            f"RecordLoader takes selected records, as of open_store(...).select('train'), not {type(records).__name__}",
        )
        check_augment(augment, records)
        require(
            frame is None or (isinstance(frame, Picture) and augment is None and not replay),
            f"frame={frame!r} shows each image as in an evaluation, so it must be a permafrost.Picture, as that of "
            "load_student(run).picture, and augment and replay are left out",
        )
        _check_options(options, shuffle=shuffle, replay=replay)
        if not _SAMPLERS & options.keys():
            _require_one_rank(replay=replay)
        is_number = isinstance(batch_size, (int, np.integer)) and not isinstance(batch_size, bool)
        require(
            is_number and batch_size > 0,
            f"batch_size={batch_size!r} must be a positive whole number of records",
        )
        if shuffle is None:
            shuffle = replay or augment is not None
        drop_last = shuffle if drop_last is None else drop_last
        passes, self._unread = open_named_passes(
            records.store, teacher, output, augment, replay=replay
        )
        dataset = StoreDataset(
            records.store,
            records.rows,
            passes,
            output=output,
            decode_threads=decode_threads,
            blanks_maps=augment is not None and augment.blanks_maps,
            scaled_maps=True,
        )
        size, views, pixels = records.store.size, None, None
        if augment is not None:
            size = size if augment.size is None else (augment.size, augment.size)
            if not replay:
                views = schedule_views(dataset, augment, seed)
            # The operations of a replay are those of the stored views.
            pixels = PixelAugmentSchedule(
                replace(augment, operations=()) if replay else augment, seed
            )
        self.size, self._epoch, self._lock = size, 0, Lock()
        self.views_per_step, self.expand = 1, None
        dataset = dataset.in_views(views, size)
        if frame is not None:
            records.store.warn_of_other_picture(frame)
            self.size = frame.size
            dataset = dataset.in_picture(records.store.picture_of(frame))
        self._configure(
            dataset,
            _batches(dataset, passes, int(batch_size), seed, options, shuffle, drop_last, replay),
            pixels,
            seed,
            batch_bytes=dataset.record_bytes * int(batch_size),
            num_workers=num_workers,
            **options,
        )

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the next epoch, as after a restart; a sampler with a `set_epoch` is set, too."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[ViewBatch]:  # type: ignore[override]
        if not isinstance(self.batches, PlacedBatches):
            _require_one_rank(replay=isinstance(self.batches, ReplayBatchSampler))
        with self._lock:  # of several threads that begin an epoch, each has its own
            epoch, self._epoch = self._epoch, self._epoch + 1
            batches = self.epoch(epoch)
        return (ViewBatch(batch, self.size, self._unread) for batch in batches)

    def __getstate__(self) -> dict[str, Any]:
        # A copy starts worker processes of its own.
        return self.__dict__ | {"_iterator": None, "_lock": None, "_iteration": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"_lock": Lock()})


def check_augment(augment: AugmentOptions | None, records: SelectedRecords) -> None:
    """Raise ConfigError unless the views are options of this package that fit the records."""
    require(
        augment is None or isinstance(augment, AugmentOptions),
        f"augment={augment!r} must be random views, as of permafrost.augmentation('pad_crop_flip')",
    )
    require(
        records.store.form.has_places
        or augment is None
        or not (augment.operations or augment.mixes),
        "augment changes images, but the records of this store are rows of a table; leave it out",
    )


def _check_options(options: Mapping[str, Any], *, shuffle: bool | None, replay: bool) -> None:
    """Raise ConfigError for arguments of DataLoader that do not fit."""
    for name, fix in _UNSUPPORTED.items():
        require(name not in options, f"RecordLoader takes no {name}=; {fix}")
    has_sampler = bool(_SAMPLERS & options.keys())
    require(
        not (shuffle and has_sampler),
        "shuffle=True and a sampler both decide the order; leave one of them out",
    )
    require(
        not (replay and has_sampler), "replay=True draws the order itself; leave out the sampler"
    )


def _require_one_rank(*, replay: bool) -> None:
    """Raise ConfigError if several ranks would read the same records, as no sampler divides them."""
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    require(
        ranks == 1 or replay,
        f"each of {ranks} ranks would read all records; add sampler=DistributedSampler(range(len(records))) of "
        "torch.utils.data, and seed=torch.distributed.get_rank() (or sampler=range(len(records)) to read all on each)",
    )
    if ranks > 1:  # a replay takes no sampler
        logger.warning("replay=True: each of %d ranks reads all records that it selected", ranks)


def open_named_passes(
    store: Store,
    teacher: str | Sequence[str] | None,
    output: str | None,
    augment: AugmentOptions | None,
    *,
    replay: bool,
) -> tuple[list[TeacherPass], tuple[str, ...]]:
    """Open the passes to read, and return the names of those of which none was named."""
    names = (teacher,) if isinstance(teacher, str) else teacher
    if names is None and output is None and not replay and len(store.pass_folders()) > 1:
        return [], tuple(folder.name for folder in store.pass_folders())
    passes = [] if names == () else store.open_passes(tuple(names or ()), stored_views=replay)
    require(bool(passes) or not replay, "replay=True needs a pass of stored views; name it")
    if replay:
        for each in passes:
            require(
                each.views == passes[0].views,
                f"replay=True: {each.name} and {passes[0].name} have different views; name passes of the same ones",
            )
            check_replayed(augment or AugmentOptions(), each)
    return passes, ()


def _batches(
    dataset: StoreDataset,
    passes: Sequence[TeacherPass],
    batch_size: int,
    seed: int,
    options: dict[str, Any],
    shuffle: bool,
    drop_last: bool,
    replay: bool,
) -> GlobalBatchSampler | PlacedBatches:
    """Return the sampler of batches, made of that of the options if they have one, which is taken out of them."""
    if "batch_sampler" in options:
        return PlacedBatches(options.pop("batch_sampler"))
    sampler, records = options.pop("sampler", None), len(dataset)
    if sampler is not None:
        records = len(sampler) if hasattr(sampler, "__len__") else batch_size
    require(
        records >= batch_size or not (drop_last or replay),
        f"batch_size={batch_size}, but {records} records are selected; lower it, or set drop_last=False",
    )
    if sampler is not None:
        return PlacedBatches(BatchSampler(sampler, batch_size, bool(drop_last)))
    order = EpochOrder(
        dataset.first_positions(),
        seed if shuffle or replay else None,
        fetch=dataset.fetch,
        least_records=dataset.least_window,
    )
    if replay:
        return ReplayBatchSampler(order, batch_size, passes[0].num_views, 1)
    return GlobalBatchSampler(order, batch_size, drop_last=drop_last)
