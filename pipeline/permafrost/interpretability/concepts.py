"""The interface of a set of images labeled with concepts, as dissection reads it.

Shape letters: L label images of one picture, s t their height and width, C labels of the set (0 is none).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

NO_CONCEPT = 0
"""Label of a pixel without a concept."""


@dataclass(frozen=True, kw_only=True)
class ConceptImage:
    """One picture and its labels."""

    image: Tensor
    """Picture u8 [3, H, W]."""
    layers: NDArray[np.int32]
    """Pixel labels [L, s, t]. A category may have several label images, and a pixel several labels."""
    whole: tuple[int, ...] = ()
    """Labels of the whole image, each of which counts for all its s t pixels."""


@dataclass(frozen=True)
class Labels:
    """The concepts of a set."""

    names: tuple[str, ...]
    """Names [C] by label. The first stands for no concept."""
    categories: tuple[str, ...]
    category_of: tuple[int, ...]
    """Index [C] into `categories` of the category in which the label's coverage is highest."""


class ConceptSet(Protocol):
    """Pictures by their number. A picture depends only on its number."""

    @property
    def labels(self) -> Labels:
        """Concepts of the set."""

    def __len__(self) -> int: ...

    def read(self, number: int, *, with_labels: bool = True) -> ConceptImage:
        """Read one picture. Without labels, separate label files are not read."""
