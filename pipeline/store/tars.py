"""Shards as plain tars: written byte for byte the same everywhere, read by offset without parsing."""

from __future__ import annotations

import os
import tarfile
from contextlib import suppress
from typing import TYPE_CHECKING

import google_crc32c

from pipeline.core.files import open_regular
from pipeline.store.manifest import REPAIR, REWRITE, ManifestError

if TYPE_CHECKING:
    from pathlib import Path

    from pipeline.core.files import HashingFile
    from pipeline.store.manifest import ShardEntry


class TarShard:
    """A tar whose bytes depend on its members alone, written by webdataset.TarWriter: no times, owners or modes."""

    def __init__(self, file: HashingFile) -> None:
        from webdataset.writer import TarWriter  # imports torch

        self._writer = TarWriter(file, user="", group="", mode=0o444, mtime=0, encoder=False)

    def __enter__(self) -> TarShard:
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self.close()
            return
        # Left open, its stream would write the rest when it is collected, long after the file was closed.
        with suppress(Exception):  # the error that led here says more
            self._writer.close()

    def close(self) -> None:
        """Write the end of the tar; a second time nothing."""
        self._writer.close()

    def add(self, key: str, suffix: str, data: bytes) -> int:
        """Append the member <key>.<suffix>; the offset of its data in the file."""
        self._writer.write({"__key__": key, suffix: data})
        blocks = -(-len(data) // tarfile.BLOCKSIZE)
        return int(self._writer.tarstream.offset) - blocks * tarfile.BLOCKSIZE


def recovery_hint(shard: ShardEntry, ours: str) -> str:
    """What to do about a shard's file, which may be somebody else's.

    ours  where it is the store's own
    """
    if not shard.referenced:
        return ours
    return (
        "it is not the store's own: restore it, or, where the tars lie elsewhere now, run stages.precompute "
        "with data.path=<their folder>"
    )


class ShardBytes:
    """A shard's tar, open: bytes by offset, without parsing, from any thread.

    Read, not mapped: mapped pages would count as this process's memory until the whole store is in it.
    The file closes with its last reference, in C: a Ctrl-C that meets a `__del__` would be swallowed there.
    """

    def __init__(self, store: Path, shard: ShardEntry) -> None:
        """Raises ManifestError where the file is missing or has another size than its manifest says."""
        self.path = store / shard.path
        self.shard = shard
        try:
            self._file = open_regular(self.path)
        except FileNotFoundError:
            raise ManifestError(f"{self.path} is missing; {recovery_hint(shard, REPAIR)}") from None
        found = os.fstat(self._file.fileno()).st_size
        if found != shard.bytes:
            raise ManifestError(
                f"{self.path} (shard {shard.name}) has {found} bytes, its manifest says {shard.bytes}; "
                f"{recovery_hint(shard, REWRITE)}"
            )

    def read(self, offset: int, size: int, crc32c: int, key: str) -> bytes:
        """Exactly `size` bytes from `offset`; ManifestError unless they are those that were packed.

        crc32c  of the bytes, as the index has it
        key     of the record, for messages
        """
        if not 0 <= offset <= offset + size <= self.shard.bytes:
            raise ManifestError(
                f"{self.path} (shard {self.shard.name}, record {key}): the index names bytes {offset} to "
                f"{offset + size} of {self.shard.bytes}; run stages.verify"
            )
        try:
            data = os.pread(self._file.fileno(), size, offset)
        except OSError as error:
            raise ManifestError(
                f"{self.path} cannot be read ({error}); {recovery_hint(self.shard, REWRITE)}"
            ) from error
        if len(data) != size or google_crc32c.value(data) != crc32c:
            raise ManifestError(
                f"{self.path} (shard {self.shard.name}, record {key}) is damaged: the bytes {offset} to "
                f"{offset + size} are not those that were packed; {recovery_hint(self.shard, REWRITE)}"
            )
        return data
