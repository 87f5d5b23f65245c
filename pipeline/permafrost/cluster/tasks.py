"""Parallel tasks on Ray: one Ray task each, with separate CPUs and GPU shares.

The error of a task is an outcome, so the others continue. A process that dies is restarted by Ray. Progress lines of
tasks are queued in one small actor, which the driver polls.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from permafrost.cluster.session import gpus_each, ray_session
from permafrost.core.errors import require
from permafrost.core.tasks import TaskOutcome, run_task

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from permafrost.config.cluster import ClusterConfig
    from permafrost.core.tasks import Task

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

        # Restarting the actor may lose progress lines, which only affects the progress bar.
        board = (
            ray.remote(_ReportQueue)
            .options(num_cpus=0, max_restarts=-1, max_task_retries=-1)
            .remote()
        )
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
                for name, line in ray.get(board.take.remote()):
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
