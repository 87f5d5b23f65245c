"""Comparison of a folder's files with those that its manifests list."""

from __future__ import annotations

import hashlib
from array import array
from typing import TYPE_CHECKING

import numpy as np

from permafrost.core.files import (
    PARTIAL_SUFFIX,
    FileError,
    file_size,
    is_folder,
    iter_files,
    sha256_file,
)
from permafrost.core.lock import LOCK_NAME
from permafrost.store.journal import JOURNAL_SUFFIX
from permafrost.store.origin import ORIGIN_NAME

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from permafrost.core.files import RootedPath


class KnownFiles:
    """Paths that manifests list, as one number each."""

    def __init__(self) -> None:
        self._names = array("Q")
        self._sorted: NDArray[np.uint64] | None = None

    def add(self, name: str) -> None:
        """Add a path relative to the folder."""
        self._names.append(_hash(name))

    def __contains__(self, name: str) -> bool:
        if self._sorted is None or len(self._sorted) != len(self._names):
            self._sorted = np.sort(np.array(self._names, np.uint64))
        place = int(np.searchsorted(self._sorted, np.uint64(_hash(name))))
        return place < len(self._sorted) and int(self._sorted[place]) == _hash(name)


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def verify_file(
    folder: RootedPath, name: str, digest: str, known: KnownFiles, size: int | None = None
) -> Iterator[str]:
    """Compare a file with its digest and its size, if that is known, and count it as known."""
    known.add(name)
    try:
        found = file_size(folder / name)
        if found is None:
            yield f"{folder / name} is missing"
        elif size is not None and found != size:
            yield f"{folder / name} has {found} bytes, but its manifest lists {size}"
        elif (sha256 := sha256_file(folder / name)) != digest:
            yield f"{folder / name} has sha256 {sha256[:12]}, but its manifest lists {digest[:12]}"
    except FileError as error:
        yield str(error)


def unknown_files(
    folder: RootedPath, known: KnownFiles, ignored: tuple[str, ...] = ()
) -> Iterator[str]:
    """Name the files that no manifest lists, outside of the ignored folders."""
    for path in iter_files(folder, ignored):
        name = path.below(folder)
        if name in known or name in (LOCK_NAME, ORIGIN_NAME):
            continue
        if name.endswith((PARTIAL_SUFFIX, JOURNAL_SUFFIX)):
            yield f"{path} was left by a process that was killed; delete it"
        elif not is_folder(path):  # a link to a folder, where links are allowed
            yield f"{path} is not in any manifest"
