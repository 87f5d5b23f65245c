"""Canonical frames, the single form in which all networks receive images; for tables, their rows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from permafrost.core.label_forms import multi_hot_of_lists
from permafrost.store.image_decoding import open_image
from permafrost.store.index import RowNumbers
from permafrost.store.reader import Store
from permafrost.store.record_form import RecordForm
from permafrost.store.shard_records import ShardRecords


class InputMemory:
    """Memory for inputs; records are decoded into it one by one, from any thread."""

    def __init__(self, form: RecordForm, records: int) -> None:
        self._form = form
        self._values = form.memory(records)

    def decode(self, slot: int, data: bytes, where: str) -> None:
        """Decode a record's content into a slot of the memory, as `RecordForm.decode` does.

        Args:
            slot: Position in the memory.
            data: Stored bytes of the record.
            where: File and record, for messages.

        Raises:
            ManifestError: If the bytes do not match the store's manifest.
        """
        self._form.decode(data, self._values[slot], where)

    def repeat(self, slots: NDArray[np.int64], decoded: NDArray[np.int64]) -> None:
        """Copy decoded records to other slots.

        Args:
            slots: Slots to fill.
            decoded: Slot that each of them is copied from.
        """
        self._values[slots] = self._values[decoded]

    def take(self, slots: NDArray[np.int64]) -> InputMemory:
        """Return a copy of the records in these slots."""
        taken = InputMemory(self._form, 0)
        taken._values = self._values[slots]
        return taken

    def tensor(self) -> Tensor:
        """Return the records without a copy: frames u8 [n, 3, H, W], or rows f32 [n, d]."""
        return self._form.tensor(self._values)


def decode_mask(data: bytes, size: tuple[int, int]) -> Tensor:
    """Decode a mask in the canonical frame: u8 [1, H, W], 0 is background; its values are never interpolated."""
    with open_image(data) as image:
        values = (
            image if image.mode == "P" else image.convert("L")
        )  # the indices of a palette are classes
        mask = torch.from_numpy(np.array(values))[None]
    return (
        mask
        if mask.shape[-2:] == size
        else F.interpolate(mask[None], size, mode="nearest-exact")[0]
    )


class FrameBatch(NamedTuple):
    """Consecutive frames of a shard."""

    frames: Tensor
    """u8 [n, 3, H, W]; for a table its rows, f32 [n, d]; in place of frames the windows of V views, u8
    [n, V, 3, h, w]."""
    heights: Tensor
    """f32 [n]: heights of the original images, `widths` likewise; NO_SIZE for a table."""
    widths: Tensor
    labels: Tensor
    """As in Batch: i64 [n], or f32 [n, K] in a store with several labels per record."""


class ShardFrames(ShardRecords):
    """Frames of one shard, in the order of its rows, readable from several threads."""

    def read(self, start: int, stop: int) -> FrameBatch:
        """Read the selected rows from `start` to `stop`, exclusive.

        Raises:
            ManifestError: If a record's bytes are not the packed ones, or cannot be decoded.
        """
        return self.batch(self.store.form.tensor(self.decode(range(start, stop))), start, stop)

    def batch(self, frames: Tensor, start: int, stop: int) -> FrameBatch:
        """Return frames or windows of the selected rows from `start` to `stop` with the facts of their records."""
        heights, widths = self.sizes(range(start, stop)).unbind(dim=1)
        return FrameBatch(
            frames, heights, widths, labels_of_rows(self.store, self.rows[start:stop])
        )

    def sizes(self, rows: RowNumbers) -> Tensor:
        """Return height and width of the original images of some of the selected rows, f32 [n, 2]."""
        columns = [self.columns[name][rows] for name in ("height", "width")]
        return torch.tensor(np.stack(columns, axis=1), dtype=torch.float32)


def labels_of_rows(store: Store, rows: RowNumbers) -> Tensor:
    """Read the labels of rows of the index: i64 [n], or f32 [n, K] in a store with several labels per record."""
    if store.manifest.multi_label:
        labels, lengths = store.index.label_lists(rows)
        hot = multi_hot_of_lists(labels, lengths, store.index.num_classes)
        hot = hot[:, : len(store.manifest.classes)]
        known = torch.from_numpy(store.known_classes(np.asarray(rows)))
        later = torch.arange(hot.shape[1]) >= known[:, None]  # classes that came with an append
        return hot.masked_fill(later, torch.nan)
    return torch.from_numpy(store.index.values("label", rows).astype(np.int64))
