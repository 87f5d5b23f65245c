"""A teacher pass's fields on disk: what both backends have in common, values in and values out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np

from pipeline.core.files import read_regular
from pipeline.store.manifest import REPAIR, REWRITE, FileEntry, ManifestError

if TYPE_CHECKING:
    from collections.abc import Container, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from pipeline.core.records import FieldSpec
    from pipeline.store.row_reader import (
        Rows,
    )

Values = dict[str, "NDArray[Any]"]
"""Of one shard: field -> [rows, V, *shape]."""


@dataclass(frozen=True, kw_only=True)
class WrittenShard:
    """What a shard's receipt says of its files."""

    files: tuple[FileEntry, ...]
    chunk_crc32c: list[list[int]]
    """By row: CRC-32C of the inner chunks that hold it (PASS_RECEIPT_SCHEMA); empty lists where there are none."""


@dataclass(frozen=True, kw_only=True)
class StoredShard:
    """One shard of a published pass, as its manifest and its receipt describe it."""

    position: int
    """Among the shards of the pass."""
    name: str
    keys: Sequence[str]
    files: Mapping[str, FileEntry]
    """By path in the pass's folder."""
    chunk_crc32c: NDArray[np.uint32] = field(default_factory=lambda: np.empty((0, 0), np.uint32))
    """[rows, inner chunks of a row]; read only by fields that are cut into inner chunks."""


@dataclass(frozen=True)
class PassFields(ABC):
    """The fields of one pass in one backend; picklable, and opens nothing until it is used."""

    folder: Path
    """The pass's own."""
    fields: tuple[FieldSpec, ...]
    num_shards: int
    rows_per_shard: int
    """Rows of each shard in the arrays, be they filled or not."""
    num_views: int

    @abstractmethod
    def create(self) -> dict[str, str]:
        """Write what all shards share, once, before any shard: path in the pass -> sha256."""

    @abstractmethod
    def shared_files(self) -> list[str]:
        """Paths of what `create` writes."""

    @abstractmethod
    def shard_files(self, position: int, name: str) -> list[str]:
        """Paths of the files of one shard."""

    @abstractmethod
    def inner_chunks_of_a_row(self) -> int:
        """How many inner chunks hold a row, of all fields that are cut into them."""

    @abstractmethod
    def check_shared_files(self) -> None:
        """ManifestError unless the files that all shards share describe the arrays that are read."""

    @abstractmethod
    def write_shard(
        self, position: int, name: str, keys: Sequence[str], values: Values
    ) -> WrittenShard:
        """Write one whole shard; exactly one process writes it."""

    @abstractmethod
    def read_shard(self, shard: StoredShard) -> Values:
        """All fields of one shard."""

    @abstractmethod
    def open_shard(
        self, shard: StoredShard, fields: Container[str] | None = None
    ) -> dict[str, Rows]:
        """Those fields of one shard (None: all), large ones as rows that are read when they are asked for.

        Raises ManifestError where a file is missing, has another size or other bytes than the manifest says.
        """


def read_entry(folder: Path, entry: FileEntry, shard: str, own_checksum: int = 0) -> bytes:
    """The bytes of a file of a pass, compared with its manifest's size and checksum.

    own_checksum  bytes of a CRC-32C with which the file ends and which the manifest's does not cover
    """
    path = folder / entry.path
    try:
        data = read_regular(path)
    except FileNotFoundError:
        raise ManifestError(f"{path} (shard {shard}) is missing; {REPAIR}") from None
    if len(data) != entry.bytes:
        raise ManifestError(
            f"{path} (shard {shard}) has {len(data)} bytes, its manifest says {entry.bytes}; {REWRITE}"
        )
    found = google_crc32c.value(data[: len(data) - own_checksum])
    if found != entry.crc32c:
        raise ManifestError(
            f"{path} (shard {shard}) is damaged: its crc32c is {found:08x}, its manifest says "
            f"{entry.crc32c:08x}; {REWRITE}"
        )
    return data


def entry_of(shard: StoredShard, path: str) -> FileEntry:
    if path not in shard.files:
        raise ManifestError(f"the manifest has no file {path} of shard {shard.name}; {REPAIR}")
    return shard.files[path]
