"""Fields of a teacher pass on disk: the interface that both backends share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np

from permafrost.core.files import open_regular, open_size, read_at
from permafrost.store.file_entry import REPAIR, REWRITE, FileEntry, ManifestError

if TYPE_CHECKING:
    from collections.abc import Container, Mapping, Sequence

    from numpy.typing import NDArray

    from permafrost.core.files import RootedPath
    from permafrost.core.records import FieldSpec
    from permafrost.store.row_reader import (
        Rows,
    )

Values = dict[str, "NDArray[Any]"]
"""Values of one shard: field -> [rows, V, *shape]."""


@dataclass(frozen=True, kw_only=True)
class WrittenShard:
    """Description of a shard's files for its receipt."""

    files: tuple[FileEntry, ...]
    chunk_crc32c: list[list[int]]
    """CRC-32C of the inner chunks that contain each row (PASS_RECEIPT_SCHEMA); empty lists without inner
    chunks."""


@dataclass(frozen=True, kw_only=True)
class StoredShard:
    """Shard of a published pass, as its manifest and its receipt describe it."""

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

    @abstractmethod
    def create(self) -> dict[str, str]:
        """Write the files that all shards share, once, before any shard; return path in the pass -> sha256."""

    @abstractmethod
    def shared_files(self) -> list[str]:
        """Return the paths of the files that `create` writes."""

    @abstractmethod
    def shard_files(self, position: int, name: str) -> list[str]:
        """Return the paths of the files of one shard."""

    @abstractmethod
    def inner_chunks_of_a_row(self) -> int:
        """Return the number of inner chunks per row, over all fields that are divided into inner chunks."""

    @abstractmethod
    def check_shared_files(self) -> None:
        """Raise ManifestError unless the shared files describe the arrays that are read."""

    @abstractmethod
    def write_shard(
        self, position: int, name: str, keys: Sequence[str], values: Values
    ) -> WrittenShard:
        """Write one whole shard; exactly one process writes it."""

    @abstractmethod
    def read_shard(self, shard: StoredShard) -> Values:
        """Read all fields of one shard."""

    @abstractmethod
    def open_shard(
        self, shard: StoredShard, fields: Container[str] | None = None
    ) -> dict[str, Rows]:
        """Open the given fields of one shard (None: all), large ones as rows that are read on demand.

        Raises ManifestError if a file is missing, or has another size or other bytes than in the manifest.
        """


def read_entry(
    folder: RootedPath, entry: FileEntry, shard: str, most: int, own_checksum: int = 0
) -> bytes:
    """Read a file of a pass and compare it with the manifest's size and checksum.

    most          largest number of bytes that the fields can have in this file; a larger one is not read
    own_checksum  length of the CRC-32C at the end of the file, which the manifest's checksum does not cover
    """
    path = folder / entry.path
    if entry.bytes > most:
        raise ManifestError(
            f"{path} (shard {shard}) would have {entry.bytes:,} bytes, but its fields have at most {most:,}; {REWRITE}"
        )
    try:
        with open_regular(path) as file:
            size = open_size(file)
            data = read_at(file, size, 0) if size == entry.bytes else b""
    except FileNotFoundError:
        raise ManifestError(f"{path} (shard {shard}) is missing; {REPAIR}") from None
    if len(data) != entry.bytes:
        raise ManifestError(
            f"{path} (shard {shard}) has {size} bytes, but its manifest lists {entry.bytes}; {REWRITE}"
        )
    found = google_crc32c.value(data[: len(data) - own_checksum])
    if found != entry.crc32c:
        raise ManifestError(
            f"{path} (shard {shard}) is damaged: its crc32c is {found:08x}, but its manifest lists "
            f"{entry.crc32c:08x}; {REWRITE}"
        )
    return data


def entry_of(shard: StoredShard, path: str) -> FileEntry:
    if path not in shard.files:
        raise ManifestError(f"the manifest lists no file {path} of shard {shard.name}; {REPAIR}")
    return shard.files[path]
