"""Files and folders in buckets.

A file is written to this machine first and is then uploaded whole (buckets.py). It is read from a copy in the node's
cache (object_cache.py), so that its readers seek in it and map it as they do with any file, or by ranges. There are no
folders other than the names of objects, and no links.
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import IO, NamedTuple, TypeVar

from permafrost.core.errors import FileError, require
from permafrost.core.uploads import put_off
from permafrost.storage import buckets
from permafrost.storage.local_files import (
    MAX_EXCHANGED_BYTES,
    AnyFile,
    HashingFile,
    NamedFile,
    described_errors,
    read_whole,
    write_error,
)
from permafrost.storage.object_cache import ObjectCache, cache_of, scratch_folder_of
from permafrost.storage.rooted_paths import AnyPath, RootedPath, bucket_of

T = TypeVar("T")
R = TypeVar("R")

_REQUESTS_AT_ONCE = 16


class _ScratchFile(NamedFile):
    """File of this machine for what is to be uploaded."""

    def describe(self, error: OSError) -> FileError:
        return _scratch_error(self.path, error)


def _scratch_error(path: AnyPath, error: OSError) -> FileError:
    """Return the error to raise if this machine has no file for what is to be uploaded to a path."""
    return FileError(
        f"{path} cannot be written ({error.strerror or error}, at its copy in the cache of this machine); free some "
        "space, or choose another folder with store.cache or PERMAFROST_CACHE"
    )


class UploadedFile(io.BufferedRandom):
    """File of this machine that is uploaded when it is closed."""

    def __init__(self, path: AnyPath, scratch: IO[bytes]) -> None:
        super().__init__(_ScratchFile(os.dup(scratch.fileno()), "r+b", path))
        self._path = path

    def close(self) -> None:
        if self.closed:
            return
        try:
            self.flush()
            self.seek(0)
            size = os.fstat(self.fileno()).st_size
            digest = hashlib.file_digest(self.raw, "sha256").hexdigest()
            self.seek(0)
            buckets.put_object(str(self._path), self, size, digest)
        finally:
            super().close()


class RangedFile(NamedTuple):
    """File in a bucket, read range by range on request, without a copy in the cache."""

    address: str
    size: int


# ---- operations ----------------------------------------------------------------------------------


_listed: dict[str, dict[str, int]] = {}
"""Sizes of the objects below some folders, by their names."""
_versions: dict[str, str] = {}
"""ETags of the objects that this process has read by `read_committed` or written by `commit`."""


class BucketFile(AnyFile):
    """Object or folder of a bucket. The methods are documented in local_files.py."""

    @property
    def address(self) -> str:
        """Address of the object."""
        return str(self.path)

    @property
    def _cache(self) -> ObjectCache:
        return cache_of(bucket_of(self.path))

    def exists(self) -> bool:
        return self.is_file() or self.is_folder()

    def is_folder(self) -> bool:
        return next(buckets.iter_objects(self.address), None) is not None

    def size(self) -> int | None:
        for folder, sizes in _listed.items():
            if self.address.startswith(f"{folder}/"):
                return sizes.get(self.address[len(folder) + 1 :])
        facts = buckets.object_facts(self.address)
        return None if facts is None else facts.size

    def stamp(self) -> tuple[int, int | str]:
        facts = buckets.object_facts(self.address)
        return (0, "") if facts is None else (facts.size, facts.e_tag)

    def folder_stamp(self) -> int:
        text = repr(buckets.list_entries(self.address))
        return int(hashlib.sha256(text.encode()).hexdigest()[:15], 16)

    def scan(self) -> Iterator[buckets.Entry]:
        return iter(buckets.list_entries(self.address))

    def peek(self, size: int) -> bytes:
        return b""  # it is not worth a request

    def is_writable(self) -> bool:
        return True  # which is seen when something is written

    @contextmanager
    def listing(self) -> Iterator[None]:
        if self.address in _listed:
            yield
            return
        _listed[self.address] = dict(buckets.iter_objects(self.address))
        try:
            yield
        finally:
            del _listed[self.address]

    def entries(self) -> list[tuple[str, str]]:
        return [(entry.name, entry.kind) for entry in buckets.list_entries(self.address)]

    def iter_files(self, ignored: Container[str] = ()) -> Iterator[RootedPath]:
        names = (name for name, _ in buckets.iter_objects(self.address))
        return (self.folder / name for name in names if name.partition("/")[0] not in ignored)

    def links(self) -> Iterator[RootedPath]:
        return iter(())

    def read_each(self, read: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
            waiting: deque[Future[R]] = deque()
            try:
                for item in items:
                    waiting.append(pool.submit(read, item))
                    if len(waiting) > _REQUESTS_AT_ONCE:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)

    @contextmanager
    def open_atomically(self) -> Iterator[HashingFile]:
        with ExitStack() as opened:
            scratch = opened.enter_context(self.scratch())
            file = HashingFile(scratch.fileno(), self.path)
            try:
                with described_errors(write_error, self.path):
                    yield file
                    file.flush()
            finally:
                file.detach()
            address = str(file.destination)
            put = partial(buckets.put_object, address, scratch, file.bytes, file.sha256)
            put_off(put, opened.pop_all())

    def commit(self, data: bytes) -> None:
        try:
            _versions[self.address] = buckets.create_object(
                self.address, data, _versions.get(self.address)
            )
        except buckets.ReplacedError as error:
            raise buckets.ReplacedError(
                f"{error}, with other content. Finished files are kept; run the same command again, which compares it"
            ) from None

    def exchange(self, data: bytes, replaces: bytes | None = None) -> None:
        e_tag = None
        if replaces is not None:
            with suppress(FileNotFoundError):
                content, facts = buckets.read_object(self.address, MAX_EXCHANGED_BYTES)
                e_tag = facts.e_tag if content == replaces else None
            require(
                e_tag is not None,
                f"{self.address} was written by another process in the meantime",
                buckets.ReplacedError,
            )
        buckets.create_object(self.address, data, e_tag)

    def read_committed(self, most: int) -> bytes:
        data, facts = buckets.read_object(self.address, most)
        _versions[self.address] = facts.e_tag
        return data

    def make_folder(self) -> None:
        """Do nothing, as a bucket has no folders."""

    def create(self) -> IO[bytes]:
        with self.scratch() as scratch:
            return UploadedFile(self.path, scratch)

    def move(self, destination: AnyPath) -> None:
        buckets.move_object(self.address, str(destination))

    def remove(self) -> None:
        buckets.remove_object(self.address)

    def remove_folder(self) -> None:
        """Do nothing, as a bucket has no folders."""

    def scratch(self) -> IO[bytes]:
        with described_errors(_scratch_error, self.path):
            return tempfile.TemporaryFile(dir=scratch_folder_of(bucket_of(self.path)))

    def open(self, sha256: str | None = None) -> io.FileIO:
        return self._cache.open(self.address, sha256)

    def open_ranges(self) -> RangedFile:
        return RangedFile(self.address, buckets.existing_facts(self.address).size)

    def read(self, most: int | None = None, sha256: str | None = None) -> bytes:
        if sha256 is None:
            return buckets.read_object(self.address, most)[0]
        with self.open(sha256) as file:
            return read_whole(file, self.path, most)

    def fetch(self, sha256: str) -> None:
        self._cache.fetch(self.address, sha256)

    def refuse_damaged_copy(self, sha256: str | None) -> None:
        if sha256 is not None and self._cache.remove_damaged(self.address, sha256):
            raise FileError(
                f"the copy of {self.path} in the cache {self._cache.folder} was damaged, and is removed; run the same "
                "command again, which downloads it"
            )

    def sha256(self) -> str:
        return buckets.object_sha256(self.address)
