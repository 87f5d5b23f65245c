"""All that knows Ray, and the serial twins that import none of it.

An executor maps a picklable task over shards and yields results as they finish, in any order. On Ray
a task that fails does not stop the others, and the first failure is raised when all are done; the
serial executor stops where the debugger should.

Tasks that need nothing of each other run side by side; each ends in an outcome, and an error is one.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pipeline.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pipeline.config import ClusterConfig, Executor
    from pipeline.shard_tasks import ShardResult
    from pipeline.training_run import TrainingJob


class ShardError(UserError, RuntimeError):
    """Shards that could not be finished; the finished ones stay."""


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


def build_executor(executor: Executor, cluster: ClusterConfig) -> MapShards:
    """The executor that `executor=` names."""
    if executor == "serial":
        from pipeline.cluster.serial import map_shards_serially

        return map_shards_serially
    from pipeline.cluster.data import RayDataExecutor

    return RayDataExecutor(cluster)


def run_training(
    job: TrainingJob, cluster: ClusterConfig, on_epoch: Callable[[int, str], None]
) -> int:
    """Finish a training, in this process or on `trainer.ranks` of Ray Train; the epochs it took now."""
    epochs = 0

    def count(epoch: int, line: str) -> None:
        nonlocal epochs
        epochs += 1
        on_epoch(epoch, line)

    if job.trainer.ranks == 1:
        from pipeline.training_run import run_job

        run_job(job, count)
    else:
        from pipeline.cluster.train import train_on_ranks

        train_on_ranks(job, cluster, count)
    return epochs


# ---- tasks side by side --------------------------------------------------------------------------


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


def build_task_runner(
    executor: Executor, cluster: ClusterConfig, at_once: int | None = None
) -> RunTasks:
    """The runner that `executor=` names.

    at_once  most tasks that Ray runs side by side; None leaves it to the resources that each takes
    """
    if executor == "serial":
        from pipeline.cluster.serial import run_tasks_serially

        return run_tasks_serially
    from pipeline.cluster.tasks import RayTaskRunner

    return RayTaskRunner(cluster, at_once)


def attempt(task: Task, report: Callable[[str], None]) -> TaskOutcome:
    """Run a task here."""
    try:
        task(report)
    except UserError as error:
        return TaskOutcome(name=task.name, error=str(error))
    except Exception as error:
        return TaskOutcome(name=task.name, error=repr(error), traceback=traceback.format_exc())
    return TaskOutcome(name=task.name)
