"""Units of work and their executors, as protocols: a task for each shard, and tasks that run side by side.

The executors themselves stand in pipeline/cluster.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pipeline.core.errors import UserError
from pipeline.core.progress import progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


class ShardTask(Protocol):
    """What is done to a shard; picklable."""

    needs_gpu: ClassVar[bool]
    """Whether an actor that runs it takes its share of the GPUs."""

    def __call__(self, shard: Any, /) -> ShardResult:
        """Finish one shard."""


class MapShards(Protocol):
    """Run `task` on each of `shards`."""

    def __call__(self, task: ShardTask, shards: Sequence[Any]) -> Iterator[ShardResult]:
        """Results as they finish; ShardError after the last one if any shard failed."""


@dataclass(frozen=True, kw_only=True)
class ShardResult:
    """What a task tells the driver; the shard itself is already on disk."""

    name: str
    records: int
    seconds: float


def run_shards(
    title: str, map_shards: MapShards, task: Any, shards: Sequence[Any]
) -> tuple[int, float]:
    """Records finished, and the seconds that their shards took."""
    records, seconds = 0, 0.0
    with progress(title, total=len(shards), unit="shard") as bar:
        for result in map_shards(task, shards):
            records += result.records
            seconds += result.seconds
            bar.update(1)
    return records, seconds


class Task(Protocol):
    """One of many that need nothing of each other; picklable, and safe to begin again."""

    @property
    def name(self) -> str:
        """Unlike that of any other."""

    def __call__(self, report: Callable[[str], None], /) -> None:
        """Do it; `report` takes a line to whoever is watching."""


@dataclass(frozen=True, kw_only=True)
class TaskOutcome:
    """How a task ended."""

    name: str
    error: str = ""
    """Empty where it is done."""
    traceback: str = ""
    """Of an error that is none of the user's."""


class RunTasks(Protocol):
    """Run every one of `tasks`."""

    def __call__(
        self, tasks: Sequence[Task], on_report: Callable[[str, str], None]
    ) -> Iterator[TaskOutcome]:
        """Outcomes as they come; `on_report` gets a task's name and its line."""


class ShardError(UserError, RuntimeError):
    """Shards that could not be finished; the finished ones stay."""


def attempt(task: Task, report: Callable[[str], None]) -> TaskOutcome:
    """Run a task here."""
    try:
        task(report)
    except UserError as error:
        return TaskOutcome(name=task.name, error=str(error))
    except Exception as error:
        return TaskOutcome(name=task.name, error=repr(error), traceback=traceback.format_exc())
    return TaskOutcome(name=task.name)
