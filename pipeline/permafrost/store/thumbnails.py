"""Thumbnails of a store's images, by which copies in other bytes are recognized: gray, 16x16, 256 bytes a record.

They are in thumbnails/, a file for each image shard with a row for each record and then their CRC-32C. They are not
part of the store: without them copies are recognized by their bytes alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from permafrost.core.errors import FileError
from permafrost.storage.files import file_at
from permafrost.storage.rooted_paths import RootedPath
from permafrost.store.image_decoding import THUMBNAIL_SIDE

if TYPE_CHECKING:
    from permafrost.store.reader import Store

THUMBNAILS_FOLDER = "thumbnails"
THUMBNAIL_BYTES = THUMBNAIL_SIDE**2
"""Bytes of the thumbnail of a record."""


def write_thumbnails(store: RootedPath, shard: str, thumbnails: Sequence[bytes]) -> None:
    """Write the thumbnails of a shard, in the order of its records."""
    data = b"".join(thumbnails)
    file_at(_path(store, shard)).write(data + _checksum(data))


def read_thumbnails(store: Store, number: int) -> NDArray[np.uint8] | None:
    """Return the thumbnails of a shard, u8 [records, 256]; None if they are missing or damaged.

    Args:
        store: The store.
        number: Number of the shard in the index.
    """
    shard = store.shards[number]
    size = shard.records * THUMBNAIL_BYTES
    path = _path(store.folder, shard.name)
    try:
        data = file_at(path).read(size + 4) if file_at(path).exists() else b""
    except FileError:
        return None
    if len(data) != size + 4 or data[size:] != _checksum(data[:size]):
        return None
    return np.frombuffer(data, np.uint8, size).reshape(-1, THUMBNAIL_BYTES)


def _checksum(data: bytes) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(4, "big")


def _path(store: RootedPath, shard: str) -> RootedPath:
    return store / THUMBNAILS_FOLDER / f"{shard}.gray16"
