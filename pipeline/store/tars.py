"""Shards as plain tars: written byte for byte the same everywhere, read by offset without parsing."""

from __future__ import annotations

import io
import os
import tarfile
from typing import TYPE_CHECKING, cast

from pipeline.store.manifest import REPAIR, ManifestError

if TYPE_CHECKING:
    from pathlib import Path

    from pipeline.store.files import HashingFile


class TarShard:
    """A tar whose bytes depend on its members alone: no times, owners or modes of this machine."""

    def __init__(self, file: HashingFile) -> None:
        self._tar = tarfile.open(  # noqa: SIM115, closed by __exit__
            fileobj=cast("io.BytesIO", file), mode="w", format=tarfile.PAX_FORMAT
        )

    def __enter__(self) -> TarShard:
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self._tar.close()

    def add(self, name: str, data: bytes) -> int:
        """Append a member; the offset of its data in the file."""
        member = tarfile.TarInfo(name)
        member.size = len(data)
        member.mode = 0o444
        self._tar.addfile(member, io.BytesIO(data))
        blocks = -(-len(data) // tarfile.BLOCKSIZE)
        return self._tar.offset - blocks * tarfile.BLOCKSIZE


class ShardBytes:
    """A shard's tar, open: bytes by offset, without parsing, from any thread.

    Read, not mapped: mapped pages would count as this process's memory until the whole store is in it.
    The file closes with its last reference, in C: a Ctrl-C that meets a `__del__` would be swallowed there.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file = path.open("rb", buffering=0)
        except FileNotFoundError:
            raise ManifestError(f"{path} is missing; {REPAIR}") from None
        self.path = path

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`."""
        data = os.pread(self._file.fileno(), size, offset)
        if len(data) != size:
            raise ManifestError(f"{self.path} ends before byte {offset + size}; run stages.verify")
        return data
