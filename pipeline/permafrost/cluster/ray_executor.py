"""Executor on Ray: one call of an actor for each shard of a pass, and one task of Ray for each student.

Actors write data directly to disk and return only ShardResults. An error of a shard or a student is returned as well,
so the others continue. Where a process dies, a shard is given to a new actor, and Ray starts a task again, in both
cases at most `cluster.max_restarts` times.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from permafrost.cluster.placement import (
    ClusterError,
    Request,
    Wait,
    count_actors,
    gpus_each,
    place_actors,
)
from permafrost.cluster.session import (
    last_line,
    open_queue,
    ray_session,
    send_item,
    take_items,
)
from permafrost.cluster.shard_rows import ShardRows
from permafrost.config.cluster import ClusterConfig
from permafrost.core.tasks import (
    Executor,
    Report,
    ShardError,
    ShardResult,
    ShardTask,
    Task,
    TaskOutcome,
    run_task,
)

_POLL_SECONDS = 0.5

logger = logging.getLogger("permafrost.ray")


class RayExecutor:
    """Executor on Ray, which the first work starts or joins, and `close` leaves."""

    name: ClassVar[str] = "ray"

    def __init__(
        self,
        config: ClusterConfig,
        *,
        fallback: Executor | None = None,
    ) -> None:
        """Start nothing yet.

        Args:
            config: Options of `cluster=`.
            fallback: Executor of the work if Ray cannot be started; None makes that an error.
        """
        self._config, self._fallback = config, fallback
        self._instead: Executor | None = None
        self._session = ExitStack()
        self._rows: ShardRows | None = None

    def close(self) -> None:
        """End all actors, and Ray, if this executor has started it."""
        self._close_rows()
        self._session.close()

    def _start(self, cpus: float) -> Executor | None:
        """Start or join Ray, or return the executor in its place. Raises ClusterError if there is none."""
        if self._instead is None:
            try:
                self._session.enter_context(ray_session(self._config, cpus))
            except ClusterError as error:
                if self._fallback is None:
                    raise
                logger.warning("executor=auto continues in this process, without Ray: %s", error)
                self._instead = self._fallback
        return self._instead

    @cached_property
    def _num_actors(self) -> int:
        return count_actors(self._config)

    @cached_property
    def _gpus(self) -> float:
        """GPUs of each teacher."""
        return place_actors(self._config, self._num_actors)

    def alone(self, folder: Any, work: str) -> AbstractContextManager[None]:
        """Do the work of the block, in the driver."""
        return nullcontext()

    # ---- shards --------------------------------------------------------------------------------------

    def map_shards(
        self, task: ShardTask[Report], shards: Sequence[Any], following: int = 0
    ) -> Iterator[ShardResult[Report]]:
        """Iterate over results as they finish.

        Args:
            task: The task.
            shards: Shards, as the task takes them.
            following: Largest number of shards of further calls, for which the same processes are kept.

        Raises:
            ShardError: After the last result, if any shard failed; at once if all would fail alike.
            ClusterError: If Ray cannot be started or joined, or runs no actors.
        """
        if not shards:
            return
        if instead := self._start(self._num_actors * self._config.cpus_per_actor):
            yield from instead.map_shards(task, shards, following)
            return
        errors: list[str] = []
        rows = self._rows_for(task, len(shards), following)
        try:
            for result in rows.map(task, shards):
                if isinstance(result, ShardResult):
                    yield result
                elif result.is_shared:
                    raise ShardError(f"{result.text} (the other shards would fail alike)")
                else:
                    errors.append(result.text)
        except BaseException:  # shards that were not begun are not begun any more
            self._close_rows()
            raise
        if errors:
            raise ShardError(
                f"{len(errors)} of {len(shards)} shards failed, the first with: {errors[0]}"
            )

    def _rows_for(self, task: ShardTask[Any], shards: int, following: int) -> ShardRows:
        """Return the running execution if it has room, else start one with room for the shards that follow."""
        gpus = self._gpus if task.needs_gpu else 0.0
        request = Request("actor", self._config.cpus_per_actor, gpus, self._config.actor)
        if self._rows is None or self._rows.left < shards or self._rows.request != request:
            self._close_rows()
            count = shards + following
            actors = min(self._num_actors, count)
            self._rows = ShardRows(self._config, task.subject, count, actors, request)
        return self._rows

    def _close_rows(self) -> None:
        if self._rows is not None:
            self._rows.close()
            self._rows = None

    # ---- tasks ---------------------------------------------------------------------------------------

    def run_tasks(
        self,
        tasks: Sequence[Task],
        on_report: Callable[[str, str], None],
        at_once: int | None = None,
    ) -> Iterator[TaskOutcome]:
        """Iterate over outcomes as they finish. Running tasks are canceled when the caller stops.

        Raises:
            ClusterError: If Ray cannot be started or joined.
        """
        if not tasks:
            return
        cpus = min(at_once or 1, len(tasks)) * self._config.cpus_per_student  # None: as many as fit
        if instead := self._start(cpus):
            yield from instead.run_tasks(tasks, on_report, at_once)
            return
        yield from _outcomes(self._config, tasks, on_report, at_once or len(tasks))


# ---- tasks -----------------------------------------------------------------------------------------


def _outcomes(
    config: ClusterConfig,
    tasks: Sequence[Task],
    on_report: Callable[[str, str], None],
    limit: int,
) -> Iterator[TaskOutcome]:
    """Iterate over the outcomes of tasks on a running Ray, at most `limit` of them in parallel."""
    import ray

    request = Request(
        "student", config.cpus_per_student, gpus_each(config.gpus_per_student), config.student
    )
    request.await_node()
    wait, started = Wait(request, 1, config.max_wait_seconds), False
    reports = open_queue()
    run_on_ray = ray.remote(_run_task)
    waiting = {task.name: task for task in tasks}
    running: dict[Any, Task] = {}
    try:
        while waiting or running:
            unfinished = {*waiting, *(task.name for task in running.values())}
            ready = [task for task in waiting.values() if unfinished.isdisjoint(task.after)]
            if not ready and not running:  # they wait for each other
                ready = list(waiting.values())[:1]
            for task in ready[: limit - len(running)]:
                del waiting[task.name]
                options = run_on_ray.options(
                    name=task.name, max_retries=config.max_restarts, **request.ray_options
                )
                running[options.remote(task, reports, str(Path.cwd()))] = task
            finished, _ = ray.wait(list(running), timeout=_POLL_SECONDS)
            for name, line in take_items(reports):
                started = True
                if line:
                    on_report(name, line)
            if wait.note(int(started)) > config.max_wait_seconds and not started:
                raise ClusterError(wait.describe_end())
            yield from (_outcome(ref, running.pop(ref)) for ref in finished)
    finally:
        if ray.is_initialized():
            for ref in running:
                ray.cancel(ref, force=True)


def _run_task(task: Task, reports: Any, folder: str) -> TaskOutcome:
    """Run a task in a Ray process, with relative paths resolved as in the driver."""
    if Path(folder).is_dir():  # on a machine without this folder, only absolute paths work
        os.chdir(folder)
    send_item(reports, (task.name, ""))  # it has started
    return run_task(task, lambda line: send_item(reports, (task.name, line)))


def _outcome(ref: Any, task: Task) -> TaskOutcome:
    import ray

    try:
        outcome: TaskOutcome = ray.get(ref)
    except ray.exceptions.RayError as error:  # its processes died or could not be started
        return TaskOutcome(name=task.name, error=f"{type(error).__name__}: {last_line(error)}")
    return outcome
