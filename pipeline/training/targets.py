"""The protocol of target sources: what a loss compares the student with, stored or computed now."""

from __future__ import annotations

from typing import Protocol

from pipeline.core.records import Batch, Guidance, Targets


class TargetSource(Protocol):
    """What the teachers say about a batch under its views: stored, or asked now."""

    def __call__(
        self,
        batch: Batch,
        grid: tuple[int, int],
        map_control: str = "none",
        *,
        with_maps: bool = True,
    ) -> tuple[Targets | Guidance, ...]:
        """One a teacher, maps on the student's (h, w) `grid`."""
