"""Backend webdataset: one tar <pass>/<shard>.tar per image shard.

It contains one member {key}.<field>.npy per record and field, in the order of the image shard's keys.
"""

from __future__ import annotations

import io
import math
import tarfile
from typing import TYPE_CHECKING

import numpy as np

from permafrost.core.files import open_atomically
from permafrost.store.arrays import decode_npy, encode_npy
from permafrost.store.fields import (
    PassFields,
    StoredShard,
    Values,
    WrittenShard,
    entry_of,
    read_entry,
)
from permafrost.store.file_entry import REWRITE, FileEntry, ManifestError
from permafrost.store.tars import TarShard

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    from permafrost.core.files import RootedPath
    from permafrost.core.records import FieldSpec
    from permafrost.store.row_reader import (
        Rows,
    )


_MEMBER_BYTES = 8 * tarfile.BLOCKSIZE
"""Upper bound of the bytes of a member besides its values: headers of the tar and of npy, and padding."""
_END_BYTES = 2 * tarfile.RECORDSIZE


class WebDatasetFields(PassFields):
    """Fields in one tar per shard, for tools that read WebDataset and combine it with the images."""

    def create(self) -> dict[str, str]:
        return {}

    def shared_files(self) -> list[str]:
        return []

    def shard_files(self, position: int, name: str) -> list[str]:
        return [f"{name}.tar"]

    def inner_chunks_of_a_row(self) -> int:
        return 0

    def check_shared_files(self) -> None:
        pass

    def write_shard(
        self, position: int, name: str, keys: Sequence[str], values: Values
    ) -> WrittenShard:
        path = f"{name}.tar"
        with open_atomically(self.folder / path) as file, TarShard(file) as tar:
            for row, key in enumerate(keys):
                for spec in self.fields:
                    tar.add(key, f"{spec.name}.npy", encode_npy(values[spec.name][row]))
        entry = FileEntry(path=path, bytes=file.bytes, sha256=file.sha256, crc32c=file.crc32c)
        return WrittenShard(files=(entry,), chunk_crc32c=[[] for _ in keys])

    def read_shard(self, shard: StoredShard) -> Values:
        return self._read(shard, self.fields)

    def open_shard(
        self, shard: StoredShard, fields: Container[str] | None = None
    ) -> dict[str, Rows]:
        wanted = [spec for spec in self.fields if fields is None or spec.name in fields]
        return dict(self._read(shard, wanted))

    def _read(self, shard: StoredShard, fields: Sequence[FieldSpec]) -> Values:
        (name,) = self.shard_files(shard.position, shard.name)
        path = self.folder / name
        values_bytes = [
            self.num_views * math.prod(spec.shape) * np.dtype(spec.dtype).itemsize
            for spec in self.fields
        ]
        most = len(shard.keys) * sum(size + _MEMBER_BYTES for size in values_bytes) + _END_BYTES
        data = read_entry(self.folder, entry_of(shard, name), shard.name, most)
        if len(shard.keys) * sum(values_bytes) > len(data):
            raise ManifestError(
                f"{path} (shard {shard.name}) is too small for its fields; {REWRITE}"
            )
        places = _list_members(data, path)
        values = {}
        for spec in fields:
            shape = (self.num_views, *spec.shape)
            array = np.empty((len(shard.keys), *shape), spec.dtype)
            for row, key in zip(array, shard.keys, strict=True):
                member = f"{key}.{spec.name}.npy"
                if member not in places:
                    raise ManifestError(f"{path} has no member {member}; run permafrost verify")
                offset, size = places[member]
                row[...] = decode_npy(
                    data[offset : offset + size], spec.dtype, shape, f"{path}: {member}"
                )
            values[spec.name] = array
        return values


def _list_members(data: bytes, path: RootedPath) -> dict[str, tuple[int, int]]:
    """Return offset and size of the members of a tar, by name."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            return {m.name: (m.offset_data, m.size) for m in tar if m.isreg()}
    except (OSError, ValueError, OverflowError, tarfile.TarError) as error:
        raise ManifestError(
            f"{path} cannot be read as a tar ({error}); run permafrost verify"
        ) from error
