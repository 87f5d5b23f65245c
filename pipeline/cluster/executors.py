"""All that knows Ray, and the serial twins that import none of it.

An executor maps a picklable task over shards and yields results as they finish, in any order. On Ray
a task that fails does not stop the others, and the first failure is raised when all are done; the
serial executor stops where the debugger should.

Tasks that need nothing of each other run side by side; each ends in an outcome, and an error is one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipeline.config.cluster import ClusterConfig, Executor
    from pipeline.core.tasks import MapShards, RunTasks
    from pipeline.training.run import TrainingJob


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
        from pipeline.training.run import run_job

        run_job(job, count)
    else:
        from pipeline.cluster.train import train_on_ranks

        train_on_ranks(job, cluster, count)
    return epochs


# ---- tasks side by side --------------------------------------------------------------------------


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
