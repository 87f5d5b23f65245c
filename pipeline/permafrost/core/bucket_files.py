"""Files of a bucket that are no copies: those in the making on this machine, and those that are read by ranges."""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from typing import IO, TYPE_CHECKING

from permafrost.core import buckets
from permafrost.core.errors import FileError
from permafrost.core.object_cache import scratch_folder_of
from permafrost.core.rooted_paths import bucket_of

if TYPE_CHECKING:
    from permafrost.core.rooted_paths import RootedPath


def scratch_file_of(path: RootedPath) -> IO[bytes]:
    """Open a file without a name on this machine for what is to be uploaded. Raises FileError."""
    try:
        return tempfile.TemporaryFile(dir=scratch_folder_of(bucket_of(path)))
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"{path} cannot be written ({error.strerror or error})") from error


class UploadedFile(io.BufferedRandom):
    """File of this machine that is uploaded when it is closed."""

    def __init__(self, path: RootedPath) -> None:
        with scratch_file_of(path) as scratch:
            descriptor = os.dup(scratch.fileno())
        super().__init__(io.FileIO(descriptor, "r+b"))
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


class RangedFile:
    """File of a bucket of which ranges are read as they are asked for, without a copy in the cache."""

    def __init__(self, path: RootedPath) -> None:
        """Raises FileNotFoundError or FileError."""
        self.address = str(path)
        facts = buckets.object_facts(self.address)
        if facts is None:
            raise buckets.MissingObjectError(f"{path} does not exist")
        self.size = facts.size
