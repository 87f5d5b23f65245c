"""Search for texts that come twice, with eight bytes of memory for each."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator


class Repeats:
    """Hashes of texts in their order."""

    def __init__(self) -> None:
        self._hashes = array("q")

    def add(self, text: str) -> None:
        """Add the next text."""
        self._hashes.append(hash(text))

    def candidates(self) -> Iterator[tuple[int, int]]:
        """Yield positions of two texts with one hash, the first and the second of each, which may still differ."""
        hashes = np.asarray(self._hashes, np.int64)
        order = np.argsort(hashes, kind="stable")
        equal = hashes[order[1:]] == hashes[order[:-1]]
        starts = np.flatnonzero(np.diff(equal, prepend=False) & equal)
        pairs = np.stack([order[starts], order[starts + 1]], axis=1)
        yield from pairs[np.argsort(pairs[:, 1])].tolist()
