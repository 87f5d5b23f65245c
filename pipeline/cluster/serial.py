"""One after the other in this process: the debugger's executors, with the same results as Ray's."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from pipeline.core.tasks import run_task

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pipeline.core.tasks import ShardResult, ShardTask, Task, TaskOutcome


def map_shards_serially(task: ShardTask, shards: Sequence[Any]) -> Iterator[ShardResult]:
    """Results in the order of `shards`; an error stops at once, with its own traceback."""
    for shard in shards:
        yield task(shard)


def run_tasks_serially(
    tasks: Sequence[Task], on_report: Callable[[str, str], None]
) -> Iterator[TaskOutcome]:
    """Outcomes in the order of `tasks`."""
    for task in tasks:
        yield run_task(task, partial(on_report, task.name))
