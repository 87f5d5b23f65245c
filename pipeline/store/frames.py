"""From a record's bytes to its canonical frame, the one that every teacher and every student sees."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torchvision.io import ImageReadMode, decode_image

from pipeline.store.images import ShardBytes

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.store.manifest import ShardEntry
    from pipeline.store.reader import Store


def read_frames(store: Store, shard: ShardEntry) -> Tensor:
    """Every frame of a shard in its order: u8 [records, 3, H, W]."""
    rows = store.index.slice(store.first_rows[shard.name], shard.records)
    data = ShardBytes(store.path / shard.path)
    extents = zip(rows["offset"].to_pylist(), rows["size"].to_pylist(), strict=True)
    return torch.stack([decode_frame(data.read(*extent), store.size) for extent in extents])


def decode_frame(data: bytes, size: tuple[int, int]) -> Tensor:
    """The whole image in the canonical frame of (height, width) `size`: u8 [3, H, W]."""
    return _decode(data, ImageReadMode.RGB, size)


def decode_mask(data: bytes, size: tuple[int, int]) -> Tensor:
    """A mask in the canonical frame: u8 [1, H, W], 0 is background."""
    return _decode(data, ImageReadMode.GRAY, size)


def _decode(data: bytes, mode: ImageReadMode, size: tuple[int, int]) -> Tensor:
    image: Tensor = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=mode)
    if image.shape[-2:] == size:
        return image
    resized = F.interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0]
    return resized.round().clamp(0, 255).to(torch.uint8)
