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
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import IO, NamedTuple, TypeVar

from permafrost.core.errors import FileError
from permafrost.core.uploads import put_off
from permafrost.storage import buckets
from permafrost.storage.local_files import (
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


class BucketFiles:
    """Files of buckets. The methods are documented in files.py."""

    def __init__(self) -> None:
        self._listed: dict[str, dict[str, int]] = {}
        """Sizes of the objects below some folders, by their names."""
        self._versions: dict[str, str] = {}
        """ETags of the objects that this process has read by `read_committed` or written by `commit`."""

    def exists(self, path: AnyPath) -> bool:
        return self.size(path) is not None or self.is_folder(path)

    def is_folder(self, path: AnyPath) -> bool:
        return next(buckets.iter_objects(str(path)), None) is not None

    def size(self, path: AnyPath) -> int | None:
        address = str(path)
        for folder, sizes in self._listed.items():
            if address.startswith(f"{folder}/"):
                return sizes.get(address[len(folder) + 1 :])
        facts = buckets.object_facts(address)
        return None if facts is None else facts.size

    def stamp(self, path: AnyPath) -> tuple[int, int | str]:
        facts = buckets.object_facts(str(path))
        return (0, "") if facts is None else (facts.size, facts.e_tag)

    def folder_stamp(self, folder: AnyPath) -> int:
        text = repr(buckets.list_entries(str(folder)))
        return int(hashlib.sha256(text.encode()).hexdigest()[:15], 16)

    def scan(self, folder: AnyPath) -> Iterator[buckets.Entry]:
        return iter(buckets.list_entries(str(folder)))

    def peek(self, path: AnyPath, size: int) -> bytes:
        return b""  # it is not worth a request

    def is_writable(self, folder: AnyPath) -> bool:
        return True  # which is seen when something is written

    @contextmanager
    def listing(self, folder: RootedPath) -> Iterator[None]:
        address = str(folder)
        if address in self._listed:
            yield
            return
        self._listed[address] = dict(buckets.iter_objects(address))
        try:
            yield
        finally:
            del self._listed[address]

    def entries(self, folder: AnyPath) -> list[tuple[str, str]]:
        return [(entry.name, entry.kind) for entry in buckets.list_entries(str(folder))]

    def iter_files(self, folder: RootedPath, ignored: Container[str]) -> Iterator[RootedPath]:
        names = (name for name, _ in buckets.iter_objects(str(folder)))
        return (folder / name for name in names if name.partition("/")[0] not in ignored)

    def links(self, folder: RootedPath) -> Iterator[RootedPath]:
        return iter(())

    def read_each(
        self, read: Callable[[T], R], items: Iterable[T], folder: RootedPath
    ) -> Iterator[R]:
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
    def open_atomically(self, path: AnyPath) -> Iterator[HashingFile]:
        with ExitStack() as opened:
            scratch = opened.enter_context(self.scratch(path))
            file = HashingFile(scratch.fileno(), path)
            try:
                with described_errors(write_error, path):
                    yield file
                    file.flush()
            finally:
                file.detach()
            address = str(file.destination)
            put = partial(buckets.put_object, address, scratch, file.bytes, file.sha256)
            put_off(put, opened.pop_all())

    def commit(self, path: AnyPath, data: bytes) -> None:
        address = str(path)
        try:
            self._versions[address] = buckets.create_object(
                address, data, self._versions.get(address)
            )
        except buckets.ReplacedError as error:
            raise buckets.ReplacedError(
                f"{error}, with other content. Finished files are kept; run the same command again, which compares it"
            ) from None

    def read_committed(self, path: AnyPath, most: int | None) -> bytes:
        data, facts = buckets.read_object(str(path), most)
        self._versions[str(path)] = facts.e_tag
        return data

    def make_folder(self, path: AnyPath) -> None:
        """Do nothing, as a bucket has no folders."""

    def create(self, path: AnyPath) -> IO[bytes]:
        with self.scratch(path) as scratch:
            return UploadedFile(path, scratch)

    def move(self, path: AnyPath, destination: AnyPath) -> None:
        buckets.move_object(str(path), str(destination))

    def remove(self, path: AnyPath) -> None:
        buckets.remove_object(str(path))

    def remove_folder(self, path: AnyPath) -> None:
        pass

    def scratch(self, folder: AnyPath) -> IO[bytes]:
        with described_errors(_scratch_error, folder):
            return tempfile.TemporaryFile(dir=scratch_folder_of(bucket_of(folder)))

    def open_regular(self, path: AnyPath, sha256: str | None = None) -> io.FileIO:
        return _cache_of(path).open(str(path), sha256)

    def open_ranges(self, path: AnyPath, sha256: str | None = None) -> RangedFile:
        return RangedFile(str(path), buckets.existing_facts(str(path)).size)

    def read(self, path: AnyPath, most: int | None, sha256: str | None = None) -> bytes:
        if sha256 is None:
            return buckets.read_object(str(path), most)[0]
        with self.open_regular(path, sha256) as file:
            return read_whole(file, path, most)

    def fetch(self, path: AnyPath, sha256: str) -> None:
        _cache_of(path).fetch(str(path), sha256)

    def refuse_damaged_copy(self, path: AnyPath, sha256: str) -> None:
        cache = _cache_of(path)
        if cache.remove_damaged(str(path), sha256):
            raise FileError(
                f"the copy of {path} in the cache {cache.folder} was damaged, and is removed; run the same command "
                "again, which downloads it"
            )

    def sha256(self, path: AnyPath) -> str:
        return buckets.object_sha256(str(path))


def _cache_of(path: AnyPath) -> ObjectCache:
    return cache_of(bucket_of(path))
