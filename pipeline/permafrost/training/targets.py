"""The protocol of target sources, which provide stored or live targets to a loss."""

from __future__ import annotations

from typing import Protocol

from permafrost.core.records import Batch, Guidance, Targets


class TargetSource(Protocol):
    """Source of the teachers' targets for a batch under its views, stored or computed live."""

    def __call__(
        self,
        batch: Batch,
        grid: tuple[int, int],
        map_control: str = "none",
        *,
        with_maps: bool = True,
    ) -> tuple[Targets | Guidance, ...]:
        """Return one set of targets per teacher, with maps on the student's (h, w) `grid`."""
