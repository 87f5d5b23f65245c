"""Choice of the executor, Ray, a job array or this process, which `executor=auto` leaves to the size of the work."""

from __future__ import annotations

from collections.abc import Callable

from permafrost.cluster.array_executor import ArrayExecutor
from permafrost.cluster.ray_executor import RayExecutor
from permafrost.config.cluster import SMALL_STORE, ClusterConfig, SharedExecutorName
from permafrost.core.machine import usable_cores
from permafrost.core.tasks import Executor, SerialExecutor

_START_SECONDS = 60.0
"""Seconds of a core below which students are trained in this process. Ray and its processes take as long to start."""


class ExecutorChoice:
    """Choice of the executor of each part of a command's work. A context, whose end also ends a Ray that was started.

    With executor=auto and cluster=local, small work is done in this process, and so is all work if Ray does not start.
    """

    def __init__(self, option: SharedExecutorName, cluster: ClusterConfig) -> None:
        """Start nothing yet.

        Args:
            option: Value of `executor=`.
            cluster: Options of `cluster=`.
        """
        self._option, self._cluster = option, cluster
        self._serial = SerialExecutor()
        falls_back = option == "auto" and cluster.kind == "local"
        self._ray = RayExecutor(cluster, fallback=self._serial if falls_back else None)
        self._array = ArrayExecutor(cluster)

    def __enter__(self) -> ExecutorChoice:
        return self

    def __exit__(self, *error: object) -> None:
        self._ray.close()

    def for_records(self, records: int) -> Executor:
        """Return the executor of shards with this many records in total."""
        return self._choose(is_small=self._cluster.actors in (None, 1) and records <= SMALL_STORE)

    def for_tasks(
        self, tasks: int, at_once: int | None, estimate_seconds: Callable[[], float]
    ) -> tuple[Executor, str]:
        """Return the executor of independent tasks, and why it was chosen, empty if an option names it.

        Args:
            tasks: Number of tasks.
            at_once: Largest number of tasks in parallel; None for no limit.
            estimate_seconds: Function that estimates the seconds of all tasks on one core, called only if they decide.
        """
        if self._option != "auto" or self._cluster.kind != "local":
            return self._choose(is_small=False), ""
        if tasks <= 1 or at_once == 1 or usable_cores() == 1:
            return self._serial, "one student at a time"
        if (seconds := estimate_seconds()) < _START_SECONDS:
            return self._serial, f"about {seconds:.0f} s of work, less than Ray takes to start"
        return self._ray, "several students at once"

    def _choose(self, *, is_small: bool) -> Executor:
        if self._option == "array":
            return self._array
        is_serial = self._option == "serial" or (
            self._option == "auto" and self._cluster.kind == "local" and is_small
        )
        return self._serial if is_serial else self._ray
