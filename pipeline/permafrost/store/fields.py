"""Fields of a pass: their interface, the values of an entry, and the backend webdataset.

The backend writes one tar <pass>/<shard>.tar per image shard, with one member {key}.<field>.npy per record and field,
in the order of the image shard's keys.
"""

from __future__ import annotations

import io
import math
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from permafrost.core.errors import require
from permafrost.core.records import (
    MIXTURE_FIELD,
    MOVE_FIELD,
    NO_CLASS,
    PARTNER_FIELD,
    VIEW_FIELD,
    WINDOW_FIELD,
    FieldSpec,
)
from permafrost.storage.files import file_at, open_size, read_at
from permafrost.storage.rooted_paths import RootedPath
from permafrost.store.codecs import decode_npy, decode_unit, encode_npy
from permafrost.store.entries import REPAIR, REWRITE, FileEntry, ManifestError, damage_error
from permafrost.store.row_reader import Rows
from permafrost.store.tars import TarShard

Values = dict[str, "NDArray[Any]"]
"""Values of one shard: field -> [rows, V, *shape]."""


@dataclass(frozen=True, kw_only=True)
class WrittenShard:
    """Description of a shard's files for its commit marker."""

    files: tuple[FileEntry, ...]
    chunk_crc32c: list[list[int]]
    """CRC-32C of the inner chunks that contain each row (PASS_MARKER_SCHEMA); empty lists without inner
    chunks."""


@dataclass(frozen=True, kw_only=True)
class StoredShard:
    """Shard of a committed pass, as its manifest and its commit marker describe it."""

    position: int
    """Position among the shards of the pass."""
    name: str
    keys: Sequence[str]
    files: Mapping[str, FileEntry]
    """Files by their path in the pass's folder."""
    chunk_crc32c: NDArray[np.uint32] = field(default_factory=lambda: np.empty((0, 0), np.uint32))
    """[rows, inner chunks per row]; used only by fields that are divided into inner chunks."""


@dataclass(frozen=True)
class PassFields(ABC):
    """Fields of one pass in one backend. Picklable; opens nothing before its first use."""

    folder: RootedPath
    """Folder of the pass."""
    fields: tuple[FieldSpec, ...]
    num_shards: int
    rows_per_shard: int
    """Rows of each shard in the arrays, including unused ones."""
    num_views: int

    def create(self) -> dict[str, str]:
        """Write the files that all shards share, once, before any shard; return the SHA-256 of each by its path."""
        return {}

    def shared_files(self) -> list[str]:
        """Return the paths of the files that `create` writes."""
        return []

    @abstractmethod
    def shard_files(self, position: int, name: str) -> list[str]:
        """Return the paths of the files of one shard, relative to the pass.

        Args:
            position: Position of the shard among those of the pass.
            name: Name of the shard.
        """

    def inner_chunks_of_a_row(self) -> int:
        """Return the number of inner chunks per row, over all fields that are divided into inner chunks."""
        return 0

    @abstractmethod
    def check_shared_files(self) -> None:
        """Check that the shared files describe the arrays that are read.

        Raises:
            ManifestError: If they do not.
        """

    @abstractmethod
    def write_shard(
        self, position: int, name: str, keys: Sequence[str], values: Values
    ) -> WrittenShard:
        """Write one whole shard; exactly one process writes it.

        Args:
            position: Position of the shard among those of the pass.
            name: Name of the shard.
            keys: Keys of the records, in the order of the rows.
            values: Array of each field, [records, V, *shape].
        """

    def files_of_fields(self, fields: Container[str], position: int, name: str) -> list[str]:
        """Return the paths of the files of a shard that have the given fields; a backend with one file has all.

        Args:
            fields: Names of the fields.
            position: Position of the shard among those of the pass.
            name: Name of the shard.
        """
        return self.shard_files(position, name)

    @abstractmethod
    def read_shard(self, shard: StoredShard) -> Values:
        """Read all fields of one shard: [records, V, *shape] each.

        Raises:
            ManifestError: If a file is missing, or has another size or other bytes than in the manifest.
        """

    @abstractmethod
    def open_shard(
        self, shard: StoredShard, fields: Container[str] | None = None
    ) -> dict[str, Rows]:
        """Open the given fields of one shard, large ones as rows that are read on demand.

        Args:
            shard: The shard as the pass describes it.
            fields: Names of the fields; None opens all.

        Raises:
            ManifestError: If a file is missing, or has another size or other bytes than in the manifest.
        """


def read_entry(
    folder: RootedPath, entry: FileEntry, shard: str, most: int, own_checksum: int = 0
) -> bytes:
    """Read a file of a pass and compare it with the manifest's size and checksum.

    Args:
        folder: Folder of the pass.
        entry: The file in the manifest.
        shard: Name of the shard, for messages.
        most: Largest number of bytes that the fields can have in this file; a larger one is not read.
        own_checksum: Length of the CRC-32C at the end of the file, which the manifest's checksum does not cover.

    Raises:
        ManifestError: If the file is missing, or has another size or checksum.
        FileError: If only the local copy of the file is damaged.
    """
    path = folder / entry.path
    require(
        entry.bytes <= most,
        f"{path} (shard {shard}) would have {entry.bytes:,} bytes, but its fields have at most {most:,}; {REWRITE}",
        ManifestError,
    )
    try:
        with file_at(path).open(entry.sha256) as file:
            size = open_size(file)
            data = read_at(file, size, 0) if size == entry.bytes else b""
    except FileNotFoundError:
        raise ManifestError(f"{path} (shard {shard}) is missing; {REPAIR}") from None
    if len(data) != entry.bytes:
        raise damage_error(
            path,
            entry.sha256,
            f"{path} (shard {shard}) has {size} bytes, but its manifest lists {entry.bytes}; {REWRITE}",
        )
    if (checksum := google_crc32c.value(data[: len(data) - own_checksum])) != entry.crc32c:
        raise damage_error(
            path,
            entry.sha256,
            f"{path} (shard {shard}) is damaged: its crc32c is {checksum:08x}, but its manifest lists "
            f"{entry.crc32c:08x}; {REWRITE}",
        )
    return data


def entry_of(shard: StoredShard, path: str) -> FileEntry:
    require(
        path in shard.files,
        f"the manifest lists no file {path} of shard {shard.name}; {REPAIR}",
        ManifestError,
    )
    return shard.files[path]


# ---- tar fields ------------------------------------------------------------------------------------


_MEMBER_BYTES = 8 * tarfile.BLOCKSIZE
"""Upper bound of the bytes of a member besides its values: headers of the tar and of npy, and padding."""
_END_BYTES = 2 * tarfile.RECORDSIZE


class WebDatasetFields(PassFields):
    """Fields in one tar per shard, for tools that read WebDataset and combine it with the images."""

    def shard_files(self, position: int, name: str) -> list[str]:
        return [f"{name}.tar"]

    def check_shared_files(self) -> None:
        pass

    def write_shard(
        self, position: int, name: str, keys: Sequence[str], values: Values
    ) -> WrittenShard:
        path = f"{name}.tar"
        with file_at(self.folder / path).open_atomically() as file, TarShard(file) as tar:
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
        require(
            len(shard.keys) * sum(values_bytes) <= len(data),
            f"{path} (shard {shard.name}) is too small for its fields; {REWRITE}",
            ManifestError,
        )
        places = _list_members(data, path)
        values = {}
        for spec in fields:
            shape = (self.num_views, *spec.shape)
            array = np.empty((len(shard.keys), *shape), spec.dtype)
            for row, key in zip(array, shard.keys, strict=True):
                if (member := f"{key}.{spec.name}.npy") not in places:
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
            return {
                member.name: (member.offset_data, member.size) for member in tar if member.isreg()
            }
    except (OSError, ValueError, OverflowError, tarfile.TarError) as error:
        raise ManifestError(
            f"{path} cannot be read as a tar ({error}); run permafrost verify"
        ) from error


# ---- ranges ----------------------------------------------------------------------------------------


def in_range(spec: FieldSpec, values: NDArray[Any], num_classes: int) -> NDArray[np.bool_]:
    """Return which records of a field have values that it can have: bool [n].

    Args:
        spec: The field.
        values: Its stored values, [n, V, *shape].
        num_classes: Number of the teacher's classes.
    """
    good: NDArray[np.bool_] = np.isfinite(values)
    if spec.name == "target_class":
        good = (values >= NO_CLASS) & (values < num_classes)
    elif spec.codec == "maxabs":
        good &= np.abs(decode_unit(values)) <= 1
    elif spec.name == MIXTURE_FIELD.name:
        good &= (values >= 0) & (values <= 1)
    elif spec.name == PARTNER_FIELD.name:
        good = values >= 0
    rows = np.asarray(good.all(axis=tuple(range(1, values.ndim))))
    if spec.name == WINDOW_FIELD.name:
        sides: NDArray[np.bool_] = (values[..., :2] != 0).all(axis=(1, 2))
        return rows & sides
    if (
        spec.name in (VIEW_FIELD.name, MOVE_FIELD.name) and rows.any()
    ):  # matrices, which warping inverts
        finite = rows.reshape(-1, *[1] * (values.ndim - 1))
        matrices = np.where(finite, values, 0).astype(np.float64)
        square = matrices if spec.shape == (3, 3) else matrices[..., :2, :2]
        rows = rows & (np.linalg.det(square) != 0).all(axis=tuple(range(1, values.ndim - 2)))
    return rows
