"""Options of an estimate (`estimate=`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge

from permafrost.config.options import Options
from permafrost.core.errors import require


@dataclass(frozen=True, kw_only=True)
class EstimateOptions(Options):
    """Size of the sample that an estimate measures, and the questions that it answers."""

    section: ClassVar[str] = "estimate"

    shards: Annotated[int, Ge(1)] = 3
    """Number of shards to measure, drawn at random by store.seed; at least one is of `split`. If the data have
    fewer, some are measured in parts of shard_records."""
    shard_records: Annotated[int | None, Ge(1)] = 128
    """Largest number of records to measure of each of these shards; null takes all. A slow teacher needs few."""
    rounds: Annotated[int, Ge(1)] = 5
    """Number of steps to measure of a student with stored targets and, in turn, of one with a live teacher. On a
    GPU each measurement takes several steps."""
    records: Annotated[int | None, Ge(1)] = None
    """Number of records to estimate for, such as those of a set that is not here; null takes those of the data."""
    workers: tuple[int, ...] = (1, 4, 16)
    """Numbers of workers for which hours are printed. A worker is an actor on a machine like this one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            len(self.workers) > 0 and min(self.workers) >= 1,
            f"estimate.workers={list(self.workers)} must list at least one number, each >= 1, as in "
            "estimate.workers=[1,4,16]",
        )
