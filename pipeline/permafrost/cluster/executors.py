"""Executors of the work, on Ray or serial in this process, which `executor=auto` leaves to the work's size.

An executor maps a picklable task over shards and yields results as they finish, in any order. On Ray a failed task
does not stop the others, and the first failure is raised when all are done. The serial executor stops at the first
error, for debugging, with the same results.

Independent tasks run in parallel. Each ends in an outcome, which may be an error.
"""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from permafrost.config.cluster import SMALL_STORE
from permafrost.core.tasks import run_task
from permafrost.runs.folder import read_cost
from permafrost.storage.bucket_files import Uploads, collected_uploads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from concurrent.futures import Future
    from pathlib import Path

    from permafrost.cluster.ray_tasks import RayDataExecutor, RayTaskRunner
    from permafrost.cluster.ray_training import RankedJob
    from permafrost.config.cluster import ClusterConfig, Executor
    from permafrost.core.tasks import MapShards, RunTasks, ShardResult, ShardTask, Task, TaskOutcome


def map_shards_serially(task: ShardTask, shards: Sequence[Any]) -> Iterator[ShardResult]:
    """Iterate over results in the order of `shards`. An error stops immediately, with its traceback.

    What a shard writes into a bucket is uploaded beside the work on the next one, and its result follows.
    """
    with ThreadPoolExecutor(1) as uploader:
        uploading: Future[ShardResult] | None = None
        for shard in shards:
            with collected_uploads() as uploads:
                result = task(shard)
            if uploading is not None:
                yield uploading.result()
            uploading = uploader.submit(_send, uploads, result) if uploads else None
            if uploading is None:
                yield result
        if uploading is not None:
            yield uploading.result()


def _send(uploads: Uploads, result: ShardResult) -> ShardResult:
    uploads.send()
    return result


def run_tasks_serially(
    tasks: Sequence[Task], on_report: Callable[[str, str], None]
) -> Iterator[TaskOutcome]:
    """Iterate over outcomes in the order of `tasks`."""
    for task in tasks:
        yield run_task(task, partial(on_report, task.name))


# ---- executors -------------------------------------------------------------------------------------


logger = logging.getLogger("permafrost.ray")


def choose_executor(executor: Executor, cluster: ClusterConfig, records: int) -> Executor:
    """Return the executor of a pass over `records`, which is `executor` itself unless it is auto."""
    if executor != "auto":
        return executor
    is_small = cluster.kind == "local" and cluster.actors == 1 and records <= SMALL_STORE
    return "serial" if is_small else "ray"


def choose_task_runner(
    executor: Executor, cluster: ClusterConfig, tasks: int, parallel: int | None
) -> Executor:
    """Return the executor of `tasks` independent tasks, which is `executor` itself unless it is auto."""
    if executor != "auto":
        return executor
    is_alone = tasks <= 1 or parallel == 1 or os.cpu_count() == 1
    return "serial" if cluster.kind == "local" and is_alone else "ray"


@contextmanager
def open_executor(
    executor: Executor,
    cluster: ClusterConfig,
    *,
    falls_back: bool = False,
    uploads: bool = False,
) -> Iterator[MapShards]:
    """Provide the executor, whose Ray is started by its first work and kept until the block ends.

    falls_back  work in this process if a local Ray cannot be started
    uploads     shards are written into a bucket
    """
    if executor == "serial":
        yield map_shards_serially
        return
    from permafrost.cluster.ray_tasks import RayDataExecutor

    with RayDataExecutor(cluster, uploads=uploads) as map_shards:
        if falls_back and cluster.kind == "local":
            yield cast("MapShards", _RayOrSerial(map_shards))
        else:
            yield map_shards


class _RayOrSerial:
    """Implementation of MapShards and RunTasks on Ray, or in this process once a local Ray could not be started."""

    def __init__(self, on_ray: RayDataExecutor | RayTaskRunner) -> None:
        self._on_ray = on_ray
        self._failed = False

    def __call__(self, *work: Any) -> Iterator[Any]:
        """Iterate over the results of the work, whose arguments are those of either protocol."""
        from permafrost.cluster.ray_tasks import RayDataExecutor
        from permafrost.cluster.session import ClusterError

        of_shards = isinstance(self._on_ray, RayDataExecutor)
        units = len(work[1] if of_shards else work[0])
        if units and not self._failed:
            try:
                self._on_ray.start(units)
            except ClusterError as error:
                self._failed = True
                logger.warning("executor=auto goes on in this process, without Ray: %s", error)
        if not self._failed:
            yield from self._on_ray(*work)
        elif of_shards:
            yield from map_shards_serially(*work)
        else:
            yield from run_tasks_serially(*work)


class Executors:
    """Executors of one command, each chosen by the size of its work and opened at most once. A context."""

    def __init__(
        self, executor: Executor, cluster: ClusterConfig, *, uploads: bool = False
    ) -> None:
        """Arguments are those of `open_executor`."""
        self._executor = executor
        self._cluster = cluster
        self._uploads = uploads
        self._stack = ExitStack()
        self._opened: dict[Executor, MapShards] = {}

    def __enter__(self) -> Executors:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def choose(self, records: int) -> Executor:
        """Return the name of the executor for work on so many records."""
        return choose_executor(self._executor, self._cluster, records)

    def open(self, records: int) -> MapShards:
        """Return that executor, which is open until the context ends."""
        name = self.choose(records)
        if name not in self._opened:
            opened = open_executor(
                name,
                self._cluster,
                falls_back=self._executor == "auto",
                uploads=self._uploads,
            )
            self._opened[name] = self._stack.enter_context(opened)
        return self._opened[name]


@dataclass(kw_only=True)
class TrainingProgress:
    """Progress of one call of a training."""

    epochs: int = 0
    """Number of epochs trained by this call."""
    last_line: str = ""
    """Line of progress of the last epoch."""

    def rate(self, folder: Path) -> str:
        """Records per second over all calls of the run, empty if this call did nothing."""
        cost = read_cost(folder) if self.epochs else None
        return f"{cost['records'] / cost['seconds']:,.0f}" if cost and cost["seconds"] else ""


def run_training(
    job: RankedJob, cluster: ClusterConfig, on_epoch: Callable[[int, str], None]
) -> TrainingProgress:
    """Finish a training in this process or on `trainer.ranks` of Ray Train, and return the progress of this call."""
    progress = TrainingProgress()

    def count(epoch: int, line: str) -> None:
        progress.epochs += 1
        progress.last_line = line
        on_epoch(epoch, line)

    if job.trainer.ranks == 1:
        job.train(count)
    else:
        from permafrost.cluster.ray_training import train_on_ranks

        train_on_ranks(job, cluster, count)
    return progress


# ---- parallel tasks ------------------------------------------------------------------------------


@contextmanager
def open_task_runner(
    executor: Executor,
    cluster: ClusterConfig,
    at_once: int | None = None,
    *,
    falls_back: bool = False,
) -> Iterator[RunTasks]:
    """Provide the task runner that `executor=` names, whose Ray is started by its first tasks.

    at_once     maximum number of parallel tasks on Ray, None to limit it only by their resources
    falls_back  work in this process if a local Ray cannot be started
    """
    if executor == "serial":
        yield run_tasks_serially
        return
    from permafrost.cluster.ray_tasks import RayTaskRunner

    with RayTaskRunner(cluster, at_once) as run_tasks:
        if falls_back and cluster.kind == "local":
            yield cast("RunTasks", _RayOrSerial(run_tasks))
        else:
            yield run_tasks
