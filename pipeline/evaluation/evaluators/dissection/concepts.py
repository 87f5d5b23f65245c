"""A set of images with concepts: what dissection reads, whatever it comes from.

Shape letters: L label images of one picture, s t their height and width, C labels of the set (0 is none).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

NO_CONCEPT = 0
"""The label of a pixel that has none."""


@dataclass(frozen=True, kw_only=True)
class ConceptImage:
    """One picture and what is known of it."""

    image: Tensor
    """u8 [3, H, W]."""
    layers: NDArray[np.int32]
    """[L, s, t]: labels of pixels; a category may have several images, and a pixel several labels."""
    whole: tuple[int, ...] = ()
    """Labels of the image as a whole: each counts for all its s t pixels."""


@dataclass(frozen=True)
class Labels:
    """The concepts of a set."""

    names: tuple[str, ...]
    """[C], by label; the first is that of no concept."""
    categories: tuple[str, ...]
    category_of: tuple[int, ...]
    """[C]: place in `categories` of the one in which the label covers most."""


class ConceptSet(Protocol):
    """Pictures by their number; reading one is a function of the number alone."""

    @property
    def labels(self) -> Labels:
        """Its concepts."""

    def __len__(self) -> int: ...

    def read(self, number: int, *, with_labels: bool = True) -> ConceptImage:
        """One picture; without its labels where they are not needed, as they may be files of their own."""
