"""Selection of executors and task runners, on Ray or serial.

An executor maps a picklable task over shards and yields results as they finish, in any order. On Ray a failed task
does not stop the others, and the first failure is raised when all are done. The serial executor stops at the first
error, for debugging.

Independent tasks run in parallel. Each ends in an outcome, which may be an error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipeline.config.cluster import ClusterConfig, Executor
    from pipeline.core.tasks import MapShards, RunTasks
    from pipeline.training.run import TrainingJob


def build_executor(executor: Executor, cluster: ClusterConfig) -> MapShards:
    """Build the executor that `executor=` names."""
    if executor == "serial":
        from pipeline.cluster.serial import map_shards_serially

        return map_shards_serially
    from pipeline.cluster.data import RayDataExecutor

    return RayDataExecutor(cluster)


def run_training(
    job: TrainingJob, cluster: ClusterConfig, on_epoch: Callable[[int, str], None]
) -> int:
    """Finish a training in this process or on `trainer.ranks` of Ray Train, and return the epochs of this call."""
    epochs = 0

    def count(epoch: int, line: str) -> None:
        nonlocal epochs
        epochs += 1
        on_epoch(epoch, line)

    if job.trainer.ranks == 1:
        from pipeline.training.run import run_job

        run_job(job, count)
    else:
        from pipeline.cluster.train import train_on_ranks

        train_on_ranks(job, cluster, count)
    return epochs


# ---- parallel tasks ------------------------------------------------------------------------------


def build_task_runner(
    executor: Executor, cluster: ClusterConfig, at_once: int | None = None
) -> RunTasks:
    """Build the task runner that `executor=` names.

    at_once  maximum number of parallel tasks on Ray, None to limit it only by their resources
    """
    if executor == "serial":
        from pipeline.cluster.serial import run_tasks_serially

        return run_tasks_serially
    from pipeline.cluster.tasks import RayTaskRunner

    return RayTaskRunner(cluster, at_once)
