"""Protocols of units of work and their executors, for tasks per shard and for independent tasks.

The executors themselves are implemented in permafrost/cluster.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from permafrost.core.errors import UserError
from permafrost.core.interrupts import check_interrupted
from permafrost.core.progress import progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


class ShardTask(Protocol):
    """Picklable operation on one shard."""

    needs_gpu: ClassVar[bool]
    """True if an actor that runs the task reserves its share of the GPUs."""

    def __call__(self, shard: Any, /) -> ShardResult:
        """Process one shard and commit its result to disk."""


class MapShards(Protocol):
    """Executor that runs `task` on each of `shards`."""

    def __call__(self, task: ShardTask, shards: Sequence[Any]) -> Iterator[ShardResult]:
        """Yield results as shards finish. Raise ShardError after the last one if any shard failed."""


SAMPLE = "sample"
"""Name in the result of a task on a sample of the records, which writes no shard."""


@dataclass(frozen=True, kw_only=True)
class ShardResult:
    """Report of a task to the driver. The shard itself is already on disk."""

    name: str
    records: int
    seconds: float
    labeled: int = 0
    """Records with a label of the teacher's classes."""
    correct: int = 0
    """Labeled records whose largest logit is that of their label."""
    report: str = ""
    """Other values as JSON, for a task that reports any."""


def run_shards(
    title: str,
    map_shards: MapShards,
    task: Any,
    shards: Sequence[Any],
    on_result: Callable[[ShardResult], None] | None = None,
) -> tuple[int, float]:
    """Run `task` on all shards and return the number of finished records and the summed seconds of their shards.

    on_result  receives each result as its shard finishes
    """
    records, seconds = 0, 0.0
    with progress(title, total=len(shards), unit="shard") as bar:
        for result in map_shards(task, shards):
            records += result.records
            seconds += result.seconds
            if on_result is not None:
                on_result(result)
            bar.update(1)
            check_interrupted()
    return records, seconds


class Task(Protocol):
    """Independent task, picklable and safe to restart."""

    @property
    def name(self) -> str:
        """Unique name."""

    @property
    def after(self) -> Sequence[str]:
        """Names of tasks that must end before this one starts, if they are among the tasks."""

    def __call__(self, report: Callable[[str], None], /) -> None:
        """Run the task. `report` passes one line of progress to the driver."""


@dataclass(frozen=True, kw_only=True)
class TaskOutcome:
    """Outcome of a task."""

    name: str
    error: str = ""
    """Error message; empty if the task succeeded."""
    traceback: str = ""
    """Traceback of an error that is not a UserError; empty otherwise."""


class RunTasks(Protocol):
    """Executor that runs all of `tasks`, in which every task comes after those that it waits for."""

    def __call__(
        self, tasks: Sequence[Task], on_report: Callable[[str, str], None]
    ) -> Iterator[TaskOutcome]:
        """Yield outcomes as tasks end. `on_report` receives the name of a task and its line of progress."""


class ShardError(UserError, RuntimeError):
    """Shards that could not be processed. Finished shards are kept."""


def run_task(task: Task, report: Callable[[str], None]) -> TaskOutcome:
    """Run a task in this process and return its outcome."""
    try:
        task(report)
    except UserError as error:
        return TaskOutcome(name=task.name, error=str(error))
    except Exception as error:
        return TaskOutcome(name=task.name, error=repr(error), traceback=traceback.format_exc())
    return TaskOutcome(name=task.name)
