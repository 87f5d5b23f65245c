"""Executor on Ray: one call of an actor for each shard of a pass, and one task of Ray for each student.

Actors write data directly to disk and return only ShardResults. An error of a shard or a student is returned as well,
so the others continue. Where a process dies, a shard is given to a new actor, and Ray starts a task again, in both
cases at most `cluster.max_restarts` times.
"""

from __future__ import annotations

import logging
import os
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from permafrost.cluster.placement import ClusterGpus, count_actors, gpus_each, place_actors
from permafrost.cluster.session import (
    ClusterError,
    last_line,
    open_queue,
    ray_session,
    send_item,
    take_items,
)
from permafrost.config.cluster import ClusterConfig
from permafrost.core.errors import UserError, require
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
from permafrost.core.uploads import collected_uploads

_POLL_SECONDS = 0.5

logger = logging.getLogger("permafrost.ray")


class RayExecutor:
    """Executor on Ray, which the first work starts or joins, and `close` leaves."""

    name: ClassVar[str] = "ray"

    def __init__(
        self,
        config: ClusterConfig,
        *,
        uploads: bool = False,
        fallback: Executor | None = None,
    ) -> None:
        """Start nothing yet.

        Args:
            config: Options of `cluster=`.
            uploads: Whether shards are uploaded to a bucket while the next one is processed.
            fallback: Executor of the work if Ray cannot be started; None makes that an error.
        """
        self._config = config
        self._calls = 2 if uploads else 1
        self._fallback = fallback
        self._instead: Executor | None = None
        self._session = ExitStack()

    def close(self) -> None:
        """End Ray, if this executor has started it."""
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

    # ---- shards --------------------------------------------------------------------------------------

    def map_shards(
        self, task: ShardTask[Report], shards: Sequence[Any]
    ) -> Iterator[ShardResult[Report]]:
        """Iterate over results as they finish.

        Raises:
            ShardError: After the last result, if any shard failed or was lost; at once if all would fail alike.
            ClusterError: If Ray cannot be started or joined, or runs no actors.
        """
        if not shards:
            return
        if instead := self._start(self._num_actors * self._config.cpus_per_actor):
            yield from instead.map_shards(task, shards)
            return
        errors: list[str] = []
        finished = 0
        with closing(self._results(task, shards)) as results:
            for result in results:
                if isinstance(result, ShardResult):
                    finished += 1
                    yield result
                elif result.is_shared:
                    raise ShardError(f"{result.text} (the other shards would fail alike)")
                else:
                    errors.append(result.text)
        if errors:
            raise ShardError(
                f"{len(errors)} of {len(shards)} shards failed, the first with: {errors[0]}"
            )
        if finished < len(shards):
            raise ShardError(
                f"{len(shards) - finished} of {len(shards)} shards were lost with their actors; "
                "run the same command again to finish them"
            )

    def _results(
        self, task: ShardTask[Report], shards: Sequence[Any]
    ) -> Generator[ShardResult[Report] | _ShardFailure]:
        """Iterate over results and errors, without those of shards at which too many actors died."""
        waiting, unfinished = deque(range(len(shards))), len(shards)
        deaths: Counter[int | None] = Counter()
        options = {
            "num_cpus": self._config.cpus_per_actor,
            "num_gpus": self._gpus if task.needs_gpu else 0,
            "max_concurrency": self._calls,
        }
        with closing(_ActorPool(task, shards, self._num_actors, options)) as pool:
            while unfinished:
                number, answer = pool.wait()
                if answer is None:
                    deaths[number] += 1
                    if number is None:
                        self._check_starts(deaths[None])
                    elif deaths[number] <= self._config.max_restarts:
                        waiting.appendleft(number)
                    else:
                        unfinished -= 1
                elif number is None:
                    deaths[None] = 0
                while waiting and pool.free:
                    pool.give(waiting.popleft())
                if number is not None and answer is not None:
                    unfinished -= 1
                    yield answer

    def _check_starts(self, deaths: int) -> None:
        """Raise ClusterError if too many actors have died at their start, without one that did not."""
        if deaths > self._config.max_restarts * self._num_actors:
            raise ClusterError(
                f"{deaths} actors died while they were started, and none was started; see Ray's logs of their hosts, "
                "and run the same command again"
            )

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


class _ShardFailure(NamedTuple):
    """Error of a shard."""

    text: str
    is_shared: bool
    """True if every shard would fail in the same way."""


class _ShardActor:
    """Actor that runs the task on one shard at a time, and returns an error.

    Of two calls at once, the other one uploads what its shard has written.
    """

    def __init__(self, task: ShardTask[Any]) -> None:
        self._task = task
        self._work = threading.Lock()

    def run(self, shard: Any) -> ShardResult[Any] | _ShardFailure:
        try:
            with self._work, collected_uploads() as uploads:
                result = self._task(shard)
            uploads.send()
        except UserError as error:
            return _ShardFailure(str(error), error.is_shared)
        except BaseException:  # a SystemExit would end the actor
            return _ShardFailure(traceback.format_exc(), is_shared=False)
        return result


class _ActorPool:
    """Actors for one task; one that dies is replaced. No shard waits for an actor to be started."""

    def __init__(
        self, task: ShardTask[Any], shards: Sequence[Any], actors: int, options: dict[str, Any]
    ) -> None:
        """Start the actors.

        Args:
            task: Task of each actor.
            shards: Shards that `give` is given the numbers of.
            actors: Number of actors, if there are as many shards.
            options: Options of Ray for an actor: its resources and the number of its calls at once.
        """
        import ray

        kind = ray.remote(_ShardActor).options(
            max_restarts=0,  # of the actor itself, as a new one gets its shard
            scheduling_strategy="SPREAD",
            **options,
        )
        self._start_actor = partial(kind.remote, task)
        self._calls: int = options["max_concurrency"]
        self._shards = shards
        self._actors: list[Any] = []
        self._running: dict[Any, tuple[Any, int | None]] = {}
        self.free: deque[Any] = deque()
        """Actors that were started, each once for every shard that it can take."""
        for _ in range(min(actors, len(shards))):
            self._add_actor()

    def _add_actor(self) -> None:
        self._actors.append(self._start_actor())
        self._running[self._actors[-1].__ray_ready__.remote()] = self._actors[-1], None

    def give(self, number: int) -> None:
        """Give the shard with a number to a free actor."""
        actor = self.free.popleft()
        self._running[actor.run.remote(self._shards[number])] = actor, number

    def wait(self) -> tuple[int | None, Any]:
        """Return the number of a shard and its answer, None if its actor died. An actor's start has no number."""
        import ray

        (ref,), _ = ray.wait(list(self._running))
        actor, number = self._running.pop(ref)
        answer = _answer(ref)
        if actor not in self._actors:  # it died at another call
            return number, answer
        if answer is not None:
            self.free.extend([actor] * (self._calls if number is None else 1))
        else:
            ray.kill(actor)  # on a host that is not reached, it may still work
            self._actors.remove(actor)
            self.free = deque(free_actor for free_actor in self.free if free_actor != actor)
            self._add_actor()
        return number, answer

    def close(self) -> None:
        """End all actors."""
        import ray

        if ray.is_initialized():  # a caller that stopped early may have closed the executor
            for actor in self._actors:
                ray.kill(actor)


def _answer(ref: Any) -> Any:
    """Return the answer of an actor, None if it died. Raises ClusterError if it cannot be started or load the shard."""
    import ray
    from ray.exceptions import RayTaskError, RuntimeEnvSetupError

    try:
        return ray.get(ref)
    except ray.exceptions.RayError as error:
        is_raised = isinstance(error, (RayTaskError, RuntimeEnvSetupError))
        if is_raised or getattr(error, "actor_init_failed", False):
            raise ClusterError(f"no actor can do the work: {last_line(error)}") from error
        return None


# ---- tasks -----------------------------------------------------------------------------------------


def _outcomes(
    config: ClusterConfig,
    tasks: Sequence[Task],
    on_report: Callable[[str, str], None],
    limit: int,
) -> Iterator[TaskOutcome]:
    """Iterate over the outcomes of tasks on a running Ray, at most `limit` of them in parallel."""
    import ray

    reports = open_queue()
    run_on_ray, resources = ray.remote(_run_task), _resources(config)
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
                options = run_on_ray.options(name=task.name, **resources)
                running[options.remote(task, reports, str(Path.cwd()))] = task
            finished, _ = ray.wait(list(running), timeout=_POLL_SECONDS)
            for name, line in take_items(reports):
                on_report(name, line)
            for ref in finished:
                yield _outcome(ref, running.pop(ref))
    finally:
        if ray.is_initialized():
            for ref in running:
                ray.cancel(ref, force=True)


def _run_task(task: Task, reports: Any, folder: str) -> TaskOutcome:
    """Run a task in a Ray process, with relative paths resolved as in the driver."""
    if Path(folder).is_dir():  # on a machine without this folder, only absolute paths work
        os.chdir(folder)
    return run_task(task, lambda line: send_item(reports, (task.name, line)))


def _outcome(ref: Any, task: Task) -> TaskOutcome:
    import ray

    try:
        outcome: TaskOutcome = ray.get(ref)
    except ray.exceptions.RayError as error:  # its processes died or could not be started
        return TaskOutcome(name=task.name, error=f"{type(error).__name__}: {last_line(error)}")
    return outcome


def _resources(config: ClusterConfig) -> dict[str, Any]:
    gpus, of_cluster = gpus_each(config.gpus_per_student), ClusterGpus.read_session()
    require(
        gpus <= of_cluster.most,
        f"cluster.gpus_per_student={gpus:g}, and the cluster has no GPU ({of_cluster}); set it to null",
    )
    return {
        "num_cpus": config.cpus_per_student,
        "num_gpus": gpus,
        "max_retries": config.max_restarts,
    }
