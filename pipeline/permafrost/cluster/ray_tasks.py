"""Work on Ray: one actor call for each shard of a pass (Ray Data), and one task for each student.

Shards are the dataset of Ray Data. Actors write data directly to disk and return only ShardResults. Ray Data's writers
use random file names, and its checkpoints do not record which record was in which block, so neither is used.

The error of a student's task is an outcome, so the others continue. A process that dies is restarted by Ray. Progress
lines of tasks are queued in one small actor, which the driver polls.
"""

from __future__ import annotations

import logging
import os
import threading
import traceback
import warnings
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from permafrost.cluster.session import ask_helper, gpus_each, ray_session, start_helper
from permafrost.core.errors import UserError, require
from permafrost.core.tasks import ShardError, ShardResult, TaskOutcome, run_task
from permafrost.storage.bucket_files import collected_uploads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from permafrost.config.cluster import ClusterConfig
    from permafrost.core.tasks import ShardTask, Task


_TWO_CALLS = {"enable_true_multi_threading": True, "max_concurrent_calls_per_actor": 2}
"""Options of an actor pool whose actors take two calls at once."""


class _ShardActor:
    """Actor that runs the task and returns errors as rows, because Ray Data would retry or hide them.

    It works on one shard at a time. Of two calls at once, the other one uploads what its shard has written.
    """

    def __init__(self, task: ShardTask) -> None:
        self.task = task
        self._work = threading.Lock()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            import ray.cloudpickle

            shard = ray.cloudpickle.loads(row["shard"])
            with self._work, collected_uploads() as uploads:
                result = self.task(shard)
            uploads.send()
            return {**asdict(result), "error": ""}
        except UserError as error:
            return _failed(str(error))
        except BaseException:  # a SystemExit here would hang the whole dataset (ray#62746)
            return _failed(traceback.format_exc())


def _failed(error: str) -> dict[str, Any]:
    return {"name": "", "records": 0, "seconds": 0.0, "error": error}


class RayDataExecutor:
    """Implementation of MapShards on an actor pool. As a context it keeps one Ray session for all of its calls."""

    def __init__(self, config: ClusterConfig, *, uploads: bool = False) -> None:
        """Arguments are those of `open_executor`."""
        self.config = config
        self._calls = _TWO_CALLS if uploads else {}
        self._session = ExitStack()

    def __enter__(self) -> RayDataExecutor:
        return self

    def __exit__(self, *error: object) -> None:
        self._session.close()

    def start(self, shards: int) -> None:
        """Start or join Ray for work on so many shards. Raises ClusterError if that fails."""
        cpus = self.config.actors * self.config.cpus_per_actor
        self._session.enter_context(ray_session(self.config, cpus))

    def __call__(self, task: ShardTask, shards: Sequence[Any]) -> Iterator[ShardResult]:
        """Iterate over results as they finish. Raises ShardError after the last one if any shard failed or was lost."""
        if not shards:
            return
        errors: list[str] = []
        finished = 0
        self.start(len(shards))
        for row in self._dataset(task, shards).iter_rows():
            if error := row.pop("error"):
                errors.append(error)
            else:
                finished += 1
                yield ShardResult(**row)
        if errors:
            raise ShardError(
                f"{len(errors)} of {len(shards)} shards failed, the first with: {errors[0]}"
            )
        if finished < len(shards):
            raise ShardError(
                f"{len(shards) - finished} of {len(shards)} shards were lost with their actors; "
                "run the same command again to finish them"
            )

    def _dataset(self, task: ShardTask, shards: Sequence[Any]) -> Any:
        import ray
        import ray.cloudpickle

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.verbose_stats_logs = False
        context.max_errored_blocks = len(
            shards
        )  # lost shards are counted, and the others still finish
        rows = [{"shard": ray.cloudpickle.dumps(shard)} for shard in shards]
        with warnings.catch_warnings():
            # Ray 2.60 deprecates these two arguments without a replacement. Without them an actor that dies is
            # restarted, and its shard retried, forever. pyproject.toml requires Ray below 2.64.
            warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
            dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
                _ShardActor,
                fn_constructor_args=(task,),
                compute=ray.data.ActorPoolStrategy(
                    size=min(self.config.actors, len(rows)), **self._calls
                ),
                num_cpus=self.config.cpus_per_actor,
                num_gpus=gpus_per_actor(self.config) if task.needs_gpu else 0,
                max_restarts=self.config.max_restarts,
                # Until a lost node is detected, each retry on its actor fails immediately. The number of retries is
                # still limited, because an actor that has died too often fails its tasks permanently.
                max_task_retries=-1,
            )
        _limit_to_errors(logging.getLogger("ray.data"))
        return dataset


def gpus_per_actor(config: ClusterConfig) -> float:
    """GPUs of an actor: the option, or its share of the cluster's GPUs, at most one."""
    import ray

    if config.gpus_per_actor is not None:
        return config.gpus_per_actor
    share: float = ray.cluster_resources().get("GPU", 0) / config.actors
    return min(1.0, share)


def _limit_to_errors(logger: logging.Logger) -> None:
    """Limit terminal output to errors. Ray's log files contain everything."""
    for handler in logger.handlers:
        if not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.ERROR)


# ---- tasks -----------------------------------------------------------------------------------------


_POLL_SECONDS = 0.5


class RayTaskRunner:
    """Implementation of RunTasks with Ray tasks. A context, which keeps the Ray that its first call starts."""

    def __init__(self, config: ClusterConfig, at_once: int | None = None) -> None:
        self.config = config
        self.at_once = at_once
        self._stack = ExitStack()

    def __enter__(self) -> RayTaskRunner:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def start(self, tasks: int) -> None:
        """Start or join Ray for so many tasks. Raises ClusterError if that fails."""
        at_once = min(self.at_once or 1, tasks)  # None is limited by the size of the machine
        self._stack.enter_context(ray_session(self.config, at_once * self.config.cpus_per_student))

    def __call__(
        self, tasks: Sequence[Task], on_report: Callable[[str, str], None]
    ) -> Iterator[TaskOutcome]:
        """Iterate over outcomes as they finish. Running tasks are canceled when the caller stops."""
        if not tasks:
            return
        self.start(len(tasks))
        yield from self._outcomes(tasks, on_report)

    def _outcomes(
        self, tasks: Sequence[Task], on_report: Callable[[str, str], None]
    ) -> Iterator[TaskOutcome]:
        import ray

        board = start_helper(_ReportQueue)
        run_task, resources = ray.remote(_run_task), _resources(self.config)
        limit = self.at_once or len(tasks)
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
                    options = run_task.options(name=task.name, **resources)
                    ref = options.remote(task, board, str(Path.cwd()))
                    running[ref] = task
                finished, _ = ray.wait(list(running), timeout=_POLL_SECONDS)
                for name, line in ask_helper(board.take.remote(), []):
                    on_report(name, line)
                for ref in finished:
                    yield _outcome(ref, running.pop(ref))
        finally:
            for ref in running:
                ray.cancel(ref, force=True)


class _ReportQueue:
    """Queue of progress lines that have not been read."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def add(self, name: str, line: str) -> None:
        self.lines.append((name, line))

    def take(self) -> list[tuple[str, str]]:
        lines, self.lines = self.lines, []
        return lines


def _run_task(task: Task, board: Any, folder: str) -> TaskOutcome:
    """Run a task in a Ray process, with relative paths resolved as in the driver."""
    if Path(folder).is_dir():  # on a machine without this folder, only absolute paths work
        os.chdir(folder)
    return run_task(task, partial(board.add.remote, task.name))


def _outcome(ref: Any, task: Task) -> TaskOutcome:
    import ray

    try:
        outcome: TaskOutcome = ray.get(ref)
    except ray.exceptions.RayError as error:  # its processes died or could not be started
        reason = str(error).strip().splitlines()[-1]
        return TaskOutcome(name=task.name, error=f"{type(error).__name__}: {reason}")
    return outcome


def _resources(config: ClusterConfig) -> dict[str, Any]:
    import ray

    gpus, known = gpus_each(config.gpus_per_student), ray.cluster_resources().get("GPU", 0)
    require(
        gpus <= known,
        f"cluster.gpus_per_student={gpus:g} must be <= {known:g}, the number of GPUs; lower it or set it to null",
    )
    return {
        "num_cpus": config.cpus_per_student,
        "num_gpus": gpus,
        "max_retries": config.max_restarts,
    }
