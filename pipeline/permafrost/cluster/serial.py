"""Serial executors in this process, for debugging, with the same results as those on Ray."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from permafrost.core.tasks import run_task

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from permafrost.core.tasks import ShardResult, ShardTask, Task, TaskOutcome


def map_shards_serially(task: ShardTask, shards: Sequence[Any]) -> Iterator[ShardResult]:
    """Iterate over results in the order of `shards`. An error stops immediately, with its traceback."""
    for shard in shards:
        yield task(shard)


def run_tasks_serially(
    tasks: Sequence[Task], on_report: Callable[[str, str], None]
) -> Iterator[TaskOutcome]:
    """Iterate over outcomes in the order of `tasks`."""
    for task in tasks:
        yield run_task(task, partial(on_report, task.name))
