"""A store as a map-style dataset: one record at a time, for any data loader, sampler or trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from permafrost.config.augment import AugmentOptions
from permafrost.core.batches import MapTargets, require_all_logits
from permafrost.core.errors import require
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.random_views import schedule_views
from permafrost.loading.recipes import PixelAugmentSchedule
from permafrost.loading.record_loader import ViewBatch, check_augment, open_named_passes
from permafrost.loading.sampler import EpochSlice
from permafrost.loading.selected_records import SelectedRecords

_KEPT_BLOCKS = 1024
"""Number of blocks of drawn views that are kept, for records in any order: those of a million, at most 0.1 GB."""


class StoreSample(NamedTuple):
    """A record with its targets, in one view. A value that the store does not have is an empty tensor."""

    image: Tensor
    """f32 [3, H, W] in [0, 1], or the row of a table f32 [d]."""
    label: Tensor
    """i64 [], -1 where unknown; with many labels f32 [K], NaN where unknown."""
    logits: Tensor
    """f32 [K]."""
    maps: Tensor
    """f32 [E, A, h, w], moved with the image."""
    key: str


class StoreSamples(Dataset[StoreSample]):
    """Records of a selection by number. A view is a pure function of (seed, epoch, number).

    `set_epoch` draws new views, also in the worker processes of a loader that runs. Records that are read together,
    as a DataLoader does, cost less than single ones.
    """

    def __init__(
        self,
        records: SelectedRecords,
        *,
        teacher: str | None = None,
        augment: AugmentOptions | None = None,
        seed: int = 0,
    ) -> None:
        """Select records and their targets.

        Args:
            records: Selected records, of `OpenStore.select`.
            teacher: Name of a pass; None reads the only one, and no targets if the store has none.
            augment: Random views, of `permafrost.augmentation`; None gives whole frames.
            seed: Seed of the views.

        Raises:
            ConfigError: If the views do not fit the records, mix them, or several passes are there and none is named.
            StoreMismatchError: If there is no such pass.
        """
        check_augment(augment, records)
        require(
            augment is None or not augment.mixes,
            "augment.mix mixes the records of a batch, which a map-style dataset does not know; use RecordLoader",
        )
        passes, unread = open_named_passes(records.store, teacher, None, augment, replay=False)
        require(
            not unread,
            f"{records.store.path} has several teacher passes; name one with teacher=, of: {', '.join(unread)}",
        )
        dataset = StoreDataset(records.store, records.rows, passes)
        self.size = records.store.size
        self._pixels: PixelAugmentSchedule | None = None
        views = None
        if augment is not None:
            self.size = self.size if augment.size is None else (augment.size, augment.size)
            views = schedule_views(dataset, augment, seed, kept_blocks=_KEPT_BLOCKS)
            self._pixels = PixelAugmentSchedule(augment, seed, kept_blocks=_KEPT_BLOCKS)
        self._dataset = dataset.in_views(views, self.size)
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]  # seen by worker processes

    def __len__(self) -> int:
        return len(self._dataset)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of which views are drawn, as DistributedSampler.set_epoch does for the order."""
        self._epoch.fill_(epoch)

    def __getitem__(self, number: int) -> StoreSample:
        count = len(self)
        require(-count <= number < count, f"record {number} of {count}", IndexError)
        return self.__getitems__([number % count])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[StoreSample]:
        """Read several records at once, as a DataLoader asks for the records of a batch."""
        at, epoch = np.asarray(numbers, np.int64), int(self._epoch)
        stored = self._dataset.__getitems__(EpochSlice(at, epoch, at))
        if self._pixels is not None:
            stored = replace(stored, pixel_augment=self._pixels.draw(epoch, at, len(at)))
        batch, absent = ViewBatch(stored, self.size), torch.empty(len(at), 0)
        logits, maps = absent, absent
        if stored.targets:
            (targets,) = batch.targets()
            if targets.logits is not None:
                logits = require_all_logits(targets.logits, "a sample")
            maps = targets.maps if isinstance(targets, MapTargets) else absent
        return [
            StoreSample(*values)
            for values in zip(batch.images, batch.labels, logits, maps, batch.keys, strict=True)
        ]
