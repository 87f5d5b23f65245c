"""Files of a bucket that are no copies: those in the making on this machine, and those that are read by ranges."""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from contextlib import contextmanager
from contextvars import ContextVar
from typing import IO, TYPE_CHECKING, Any

from permafrost.storage import buckets
from permafrost.core.errors import FileError
from permafrost.storage.object_cache import scratch_folder_of
from permafrost.storage.rooted_paths import bucket_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import ExitStack

    from permafrost.storage.rooted_paths import RootedPath


def scratch_file_of(path: RootedPath) -> IO[bytes]:
    """Open a file without a name on this machine for what is to be uploaded. Raises FileError."""
    try:
        return tempfile.TemporaryFile(dir=scratch_folder_of(bucket_of(path)))
    except FileError:
        raise
    except OSError as error:
        raise _write_error(path, error) from error


def _write_error(path: RootedPath, error: OSError) -> FileError:
    """Return the error to raise if this machine has no file for what is to be uploaded to a path."""
    return FileError(
        f"{path} cannot be written ({error.strerror or error}, at its copy in the cache of this machine); free some "
        "space, or choose another folder with store.cache or PERMAFROST_CACHE"
    )


class UploadedFile(io.BufferedRandom):
    """File of this machine that is uploaded when it is closed."""

    def __init__(self, path: RootedPath) -> None:
        with scratch_file_of(path) as scratch:
            descriptor = os.dup(scratch.fileno())
        super().__init__(io.FileIO(descriptor, "r+b"))
        self._path = path

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise _write_error(self._path, error) from error

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            raise _write_error(self._path, error) from error

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


class Uploads:
    """Files of this machine that are still to be uploaded, in the order in which they were written."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Callable[[], None], ExitStack]] = []

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, put: Callable[[], None], opened: ExitStack) -> None:
        """Add the upload of a file, which is closed afterwards."""
        self._waiting.append((put, opened))

    def send(self) -> None:
        """Upload the files one after the other, in any thread. Raises FileError at the first that fails."""
        try:
            for put, opened in self._waiting:
                put()
                opened.close()
        finally:
            self.close()

    def close(self) -> None:
        """Close all files."""
        for _, opened in self._waiting:
            opened.close()


_collected: ContextVar[Uploads | None] = ContextVar("collected", default=None)


def collecting_uploads() -> Uploads | None:
    """Return the uploads that a block of this thread collects, None outside of such a block."""
    return _collected.get()


@contextmanager
def collected_uploads() -> Iterator[Uploads]:
    """Collect the files that this thread writes atomically into a bucket in the block, instead of uploading them.

    Files that make others valid (`commit_file`), and removals, are not put off.
    """
    uploads = Uploads()
    token = _collected.set(uploads)
    try:
        yield uploads
    except BaseException:
        uploads.close()
        raise
    finally:
        _collected.reset(token)


class RangedFile:
    """File of a bucket of which ranges are read as they are asked for, without a copy in the cache."""

    def __init__(self, path: RootedPath) -> None:
        """Raises FileNotFoundError or FileError."""
        self.address = str(path)
        facts = buckets.object_facts(self.address)
        if facts is None:
            raise buckets.MissingObjectError(f"{path} does not exist")
        self.size = facts.size
