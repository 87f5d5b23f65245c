"""Check that no key occurs twice, in memory that does not grow with the number of keys."""

from __future__ import annotations

import hashlib
from typing import IO, TYPE_CHECKING

import numpy as np

from permafrost.core.files import scratch_file

if TYPE_CHECKING:
    from collections.abc import Sequence

_HASHES_PER_FILE = 2**17
_MOST_FILES = 400
"""Limit of open files; beyond 52 million keys, more than _HASHES_PER_FILE are sorted at once."""


class UniqueHashes:
    """128-bit hashes of keys in temporary files, divided by their remainders.

    Two different keys have the same hash with a probability of 1e-24 among 14 million.
    """

    def __init__(self, expected: int) -> None:
        """expected  number of keys"""
        self._buckets = min(max(1, -(-expected // _HASHES_PER_FILE)), _MOST_FILES)
        self._files = [scratch_file() for _ in range(self._buckets)]

    def add(self, keys: Sequence[str]) -> None:
        """Add keys."""
        if not keys:
            return
        digests = b"".join(hashlib.blake2b(key.encode(), digest_size=16).digest() for key in keys)
        pairs = np.frombuffer(digests, "<u8").reshape(-1, 2)
        bucket = pairs[:, 0] % np.uint64(self._buckets)
        for number in np.unique(bucket).tolist():
            self._files[number].write(pairs[bucket == number].tobytes())

    def are_unique(self) -> bool:
        """Return whether all keys differ, and remove the files."""
        return sum(self._has_duplicate(file) for file in self._files) == 0

    @staticmethod
    def _has_duplicate(file: IO[bytes]) -> bool:
        with file:
            file.seek(0)
            pairs = np.frombuffer(file.read(), "<u8").reshape(-1, 2)
        ordered = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
        return bool((ordered[1:] == ordered[:-1]).all(axis=1).any())
