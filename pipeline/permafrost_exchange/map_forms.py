"""Forms of maps that an explainer makes impossible: another grid, or values below 0.

GradCAM is rectified, so maps with negative values were made by something else, whatever their network. Other forms are
compared with the maps that the named explainer makes of the named network.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from permafrost.config.explainers import EXPLAINERS
from permafrost.core.errors import require
from permafrost.store.codecs import decode_unit
from permafrost.store.fields import Values
from permafrost_exchange.target_reader import TargetError

OTHER = "other"
"""Explainer of maps that only the teacher can make."""
NAME_MAKER = (
    "name what made them: an explainer of yours with plugins=, or format.explainer=other with name="
)
NEGATIVE = "of their values are negative"
_ROUNDING = 1e-3
"""Size of a negative value, relative to the map's largest one, that rounding explains."""
_SIGNED = 0.05
"""Fraction of negative values from which an explainer's maps are signed."""
_MAX_COARSER = 4
"""Pixels of the frame per cell from which a map is not one at the pixels of a teacher's input."""


class MapForm(NamedTuple):
    """Form that maps of one kind have in common."""

    shape: tuple[int, ...]
    """(channels, rows, columns)."""
    below: float
    """Fraction of values below 0."""

    @classmethod
    def of(cls, maps: NDArray[np.generic]) -> MapForm:
        """Return the form of stored maps [n, V, E, channels, rows, columns]."""
        return cls(maps.shape[-3:], float((decode_unit(maps) < -_ROUNDING).mean()))

    def describe(self, below: str) -> str:
        """Describe the grid and the values, as in "8x8 and none below 0"; `below` says what these are."""
        channels, rows, columns = self.shape
        grid = f"{rows}x{columns}" + f" with {channels} channels" * (channels > 1)
        return f"{grid} and {f'{self.below:.0%}' if self.below else 'none'} {below}"

    def differs(self, other: MapForm) -> bool:
        """Return whether maps of this form cannot be among those of another form."""
        signs = self.below and not other.below, other.below > _SIGNED and not self.below
        return self.shape != other.shape or any(signs)


def require_possible(
    values: Values, explainer: dict[str, Any], where: str, frame: tuple[int, int]
) -> None:
    """Check that maps have a form that their explainer can give.

    GradCAM is never negative, and explainers at the pixels have one channel and no coarse grid.

    Args:
        values: Stored fields of some records.
        explainer: Entry of a manifest about the maps.
        where: Path of the targets, for the message.
        frame: (height, width) of the store's frames.

    Raises:
        TargetError: If they have not.
    """
    if "map" not in values or (kind := explainer["kind"]) not in EXPLAINERS:
        return
    options = EXPLAINERS[kind]
    channels, rows, columns = values["map"].shape[-3:]
    if options.implementation.startswith("permafrost") and kind != OTHER:
        at_pixels = ", and a value for each pixel" if options.reads == "images" else ""
        is_fine = not at_pixels or _MAX_COARSER * min(rows, columns) > min(frame)
        require(
            channels == options.channels and is_fine,
            f"{where}: format.explainer={kind}: the maps are {rows}x{columns} with {channels} channels on images of "
            f"{frame[0]}x{frame[1]}, but {kind} gives {options.channels} channels{at_pixels}; {NAME_MAKER}",
            TargetError,
        )
    if kind == "gradcam" and explainer.get("sign") != "signed":
        require(
            not (form := MapForm.of(values["map"])).below,
            f"{where}: format.explainer=gradcam: the maps are {form.describe(NEGATIVE)}, but GradCAM gives none below "
            f"0; {NAME_MAKER}",
            TargetError,
        )
