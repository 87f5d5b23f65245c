"""Tasks side by side on Ray: one Ray task each, with CPUs and a share of the GPUs of its own.

A task's error is an outcome, so that the others go on; a process that dies is started again by Ray.
What a task says on its way goes through one small actor, which the driver empties now and then.
"""

from __future__ import annotations

import os
from collections import deque
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.cluster.session import gpus_each, ray_session
from pipeline.core.errors import require
from pipeline.core.tasks import TaskOutcome, run_task

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pipeline.config.cluster import ClusterConfig
    from pipeline.core.tasks import Task

_POLL_SECONDS = 0.5


class RayTaskRunner:
    """RunTasks on Ray tasks."""

    def __init__(self, config: ClusterConfig, at_once: int | None = None) -> None:
        self.config = config
        self.at_once = at_once

    def __call__(
        self, tasks: Sequence[Task], on_report: Callable[[str, str], None]
    ) -> Iterator[TaskOutcome]:
        """Outcomes as they come; what is still running is canceled when the caller stops."""
        if not tasks:
            return
        at_once = min(
            self.at_once or 1, len(tasks)
        )  # None: what a machine of this size has room for
        with ray_session(self.config, at_once * self.config.cpus_per_student):
            yield from self._outcomes(tasks, on_report)

    def _outcomes(
        self, tasks: Sequence[Task], on_report: Callable[[str, str], None]
    ) -> Iterator[TaskOutcome]:
        import ray

        # max_restarts is for the actor's own process: a lost line costs a step of a bar, not a run.
        board = (
            ray.remote(_ReportQueue)
            .options(num_cpus=0, max_restarts=-1, max_task_retries=-1)
            .remote()
        )
        run_task, resources = ray.remote(_run_task), _resources(self.config)
        limit = self.at_once or len(tasks)
        waiting = deque(tasks)
        running: dict[Any, Task] = {}
        try:
            while waiting or running:
                while waiting and len(running) < limit:
                    task = waiting.popleft()
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
    """Lines that tasks have reported and nobody has read."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def add(self, name: str, line: str) -> None:
        self.lines.append((name, line))

    def take(self) -> list[tuple[str, str]]:
        lines, self.lines = self.lines, []
        return lines


def _run_task(task: Task, board: Any, folder: str) -> TaskOutcome:
    """In a process of Ray; relative paths mean what they mean where the driver was started."""
    if Path(folder).is_dir():  # another machine without it can do what has absolute paths only
        os.chdir(folder)
    return run_task(task, partial(board.add.remote, task.name))


def _outcome(ref: Any, task: Task) -> TaskOutcome:
    import ray

    try:
        outcome: TaskOutcome = ray.get(ref)
    except ray.exceptions.RayError as error:  # its processes died, or could not be started
        reason = str(error).strip().splitlines()[-1]
        return TaskOutcome(name=task.name, error=f"{type(error).__name__}: {reason}")
    return outcome


def _resources(config: ClusterConfig) -> dict[str, Any]:
    import ray

    gpus, known = gpus_each(config.gpus_per_student), ray.cluster_resources().get("GPU", 0)
    require(
        gpus <= known,
        f"cluster.gpus_per_student={gpus:g}, but there are {known:g} GPUs; null takes what there is",
    )
    return {
        "num_cpus": config.cpus_per_student,
        "num_gpus": gpus,
        "max_retries": config.max_restarts,
    }
