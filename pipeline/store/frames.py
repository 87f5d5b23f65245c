"""Canonical frames, the single form in which all networks receive images; for tables, their rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.core.labels import multi_hot_of_lists
from pipeline.store.arrays import decode_npy
from pipeline.store.file_entry import ManifestError
from pipeline.store.pixels import decode_rgb, open_image
from pipeline.store.table_rows import decode_row
from pipeline.store.tars import ShardBytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.store.index import Rows
    from pipeline.store.reader import Store
    from pipeline.store.shards import ShardEntry


def decode_input(data: bytes, store: Store, where: str) -> Tensor:
    """Decode a record's frame, u8 [3, H, W], or its row of a table, f32 [d].

    where  the file and the record, for messages
    Raises ManifestError for bytes that do not match the store's manifest.
    """
    if store.is_table:
        return decode_row(data, store.size[1], where)
    canonical = store.manifest.canonical
    assert canonical is not None
    if canonical.format == "raw":
        frame = decode_npy(data, "uint8", (*store.size, 3), where)
        return torch.from_numpy(frame.copy()).permute(2, 0, 1)
    try:
        return decode_frame(data, store.size)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise many types of exceptions for damaged bytes
        raise ManifestError(
            f"{where} cannot be decoded ({error}); run permafrost verify"
        ) from error


def decode_frame(data: bytes, size: tuple[int, int]) -> Tensor:
    """Decode the whole image in the canonical frame of (height, width) `size`: u8 [3, H, W]."""
    return resize_frame(decode_rgb(data), size)


def resize_frame(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize pixels u8 [3, H, W] to another (height, width): bilinear with antialiasing, rounded."""
    if image.shape[-2:] == size:
        return image
    resized = F.interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0]
    return resized.round().clamp(0, 255).to(torch.uint8)


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
    """u8 [n, 3, H, W]; for a table its rows, f32 [n, d]."""
    heights: Tensor
    """f32 [n]: heights of the original images, `widths` likewise; NO_SIZE for a table."""
    widths: Tensor
    labels: Tensor
    """As in Batch: i64 [n], or f32 [n, K] in a store with several labels per record."""


class ShardFrames:
    """Frames of one shard, in the order of its rows, readable from several threads."""

    def __init__(
        self, store: Store, shard: ShardEntry, rows: NDArray[np.int64] | None = None
    ) -> None:
        """rows  rows of the shard, ascending; None takes all"""
        here = store.rows_of_shard(store.shards.number_of(shard.name))
        index, taken = store.index, here if rows is None else here.start + rows
        self._columns = index.take(("offset", "size", "image_crc32c", "height", "width"), taken)
        self._keys = index.keys(taken)
        self._rows = taken
        self._bytes = ShardBytes(store.path, shard)
        self._store = store

    def read(self, start: int, stop: int) -> FrameBatch:
        """Read the frames of the rows start .. stop."""
        columns = {name: column[start:stop] for name, column in self._columns.items()}
        places = zip(
            *(columns[name].tolist() for name in ("offset", "size", "image_crc32c")),
            self._keys[start:stop],
            strict=True,
        )
        inputs = [
            decode_input(self._bytes.read(*place), self._store, f"{self._bytes.path}: {place[-1]}")
            for place in places
        ]
        heights, widths = (
            torch.tensor(columns[name], dtype=torch.float32) for name in ("height", "width")
        )
        labels = labels_of_rows(self._store, self._rows[start:stop])
        return FrameBatch(torch.stack(inputs), heights, widths, labels)


def labels_of_rows(store: Store, rows: Rows) -> Tensor:
    """Read the labels of rows of the index: i64 [n], or f32 [n, K] in a store with several labels per record."""
    if store.manifest.multi_label:
        labels, lengths = store.index.label_lists(rows)
        return multi_hot_of_lists(labels, lengths, len(store.manifest.classes))
    return torch.from_numpy(store.index.values("label", rows).astype(np.int64))
