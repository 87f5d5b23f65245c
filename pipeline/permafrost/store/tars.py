"""Shards as plain tars, written byte for byte reproducibly and read by offset without parsing."""

from __future__ import annotations

import io
import tarfile
from contextlib import suppress

import google_crc32c

from permafrost.storage.bucket_files import RangedFile
from permafrost.storage.files import file_at, open_size, read_at, will_read
from permafrost.storage.local_files import HashingFile, read_error
from permafrost.storage.rooted_paths import RootedPath
from permafrost.store.entries import REPAIR, REWRITE, ManifestError, damage_error
from permafrost.store.image_decoding import MAX_IMAGE_BYTES
from permafrost.store.shards import ShardEntry


class TarShard:
    """Tar without times, owners or modes, so that its bytes depend on its members only (webdataset.TarWriter)."""

    def __init__(self, file: HashingFile) -> None:
        from webdataset.writer import TarWriter  # imports torch

        self._writer = TarWriter(file, user="", group="", mode=0o444, mtime=0, encoder=False)

    def __enter__(self) -> TarShard:
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self.close()
            return
        # An open stream would write the rest when it is garbage-collected, long after the file was closed.
        with suppress(Exception):  # the original error is more informative
            self._writer.close()

    def close(self) -> None:
        """Write the end of the tar; a second call writes nothing."""
        self._writer.close()

    def add(self, key: str, suffix: str, data: bytes) -> int:
        """Append a member.

        Args:
            key: Key of the record.
            suffix: Suffix of the member, without its first dot.
            data: Content of the member.

        Returns:
            The offset of its data in the file.
        """
        self._writer.write({"__key__": key, suffix: data})
        blocks = -(-len(data) // tarfile.BLOCKSIZE)
        return int(self._writer.tarstream.offset) - blocks * tarfile.BLOCKSIZE


def recovery_hint(shard: ShardEntry, ours: str) -> str:
    """Return the advice for a missing or damaged file of a shard, which may be an external tar.

    Args:
        shard: The shard.
        ours: Advice for a file of the store's own.
    """
    if not shard.referenced:
        return ours
    return (
        "it is not the store's own file: restore it, or, if the tars have moved, run permafrost precompute "
        "store.path=STORE data=webdataset data.path=FOLDER teacher=none with this store and their folder"
    )


class ShardBytes:
    """Open tar of a shard, read by offset from any thread without parsing.

    It is read, not mapped: mapped pages would count as this process's memory until the whole store is in it.
    The file closes with its last reference, in C, because a Ctrl-C during a `__del__` would be swallowed.
    """

    def __init__(self, store: RootedPath, shard: ShardEntry, *, reads_ranges: bool = False) -> None:
        """Open the file.

        Args:
            store: Folder of the store.
            shard: The shard.
            reads_ranges: Send a request for each read of a file in a bucket, for a few records; else it is downloaded
                whole.

        Raises:
            ManifestError: If the file is missing or does not have the size in its manifest.
        """
        self.path = shard.file(store)
        self.shard = shard
        try:
            self._file: io.FileIO | RangedFile = (
                file_at(self.path).open_ranges()
                if reads_ranges
                else file_at(self.path).open(shard.sha256)
            )
        except FileNotFoundError:
            raise ManifestError(f"{self.path} is missing; {recovery_hint(shard, REPAIR)}") from None
        if (size := open_size(self._file)) != shard.bytes:
            raise damage_error(
                self.path,
                shard.sha256,
                f"{self.path} (shard {shard.name}) has {size} bytes, but its manifest lists {shard.bytes}; "
                f"{recovery_hint(shard, REWRITE)}",
            )

    def will_read(self, offset: int, size: int) -> None:
        """Have these bytes read ahead, so that reading several records does not wait for each."""
        will_read(self._file, size, offset)

    def read(self, offset: int, size: int, crc32c: int, key: str) -> bytes:
        """Read exactly `size` bytes from `offset`, and check them.

        Args:
            offset: Offset of the first byte in the tar.
            size: Number of bytes.
            crc32c: CRC-32C of the bytes, from the index.
            key: Key of the record, for messages.

        Raises:
            ManifestError: If the bytes are not the packed ones, or cannot be read.
        """
        if not 0 <= offset <= offset + size <= self.shard.bytes:
            raise ManifestError(
                f"{self.path} (shard {self.shard.name}, record {key}): the index lists bytes {offset} to "
                f"{offset + size} of {self.shard.bytes}; run permafrost verify"
            )
        if size > MAX_IMAGE_BYTES:
            raise ManifestError(
                f"{self.path} (shard {self.shard.name}, record {key}): the index lists {size:,} bytes, more than the "
                f"{MAX_IMAGE_BYTES:,} that a record can have; run permafrost verify"
            )
        try:
            data = read_at(self._file, size, offset)
        except OSError as error:
            raise ManifestError(str(read_error(self.path, error))) from error
        if len(data) != size or google_crc32c.value(data) != crc32c:
            raise damage_error(
                self.path,
                self.shard.sha256,
                f"{self.path} (shard {self.shard.name}, record {key}) is damaged: the bytes {offset} to "
                f"{offset + size} are not those of the index; run permafrost verify, and if it names this file, "
                f"{recovery_hint(self.shard, REWRITE)}",
            )
        return data
