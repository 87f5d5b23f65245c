"""Precompute on Ray Data: the planned shards are the dataset, and one actor call finishes one shard.

Data goes from the actor straight to disk; only ShardResults travel. Ray Data's own writers name files
at random and its checkpoints forget which record was in which block, so neither is used.
"""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING, Any

from pipeline.cluster import ShardError
from pipeline.cluster.session import ray_session

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pipeline.config import ClusterConfig
    from pipeline.shard_tasks import ShardResult


class _ShardActor:
    """Runs the task; an error becomes a row, because Ray Data would retry or hide it."""

    def __init__(self, task: Callable[[Any], ShardResult]) -> None:
        self.task = task

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"result": self.task(row["shard"]), "error": ""}
        except BaseException:  # a SystemExit here would hang the whole dataset (ray#62746)
            return {"result": None, "error": traceback.format_exc()}


class RayDataExecutor:
    """MapShards on an actor pool."""

    def __init__(self, config: ClusterConfig) -> None:
        self.config = config

    def __call__(
        self, task: Callable[[Any], ShardResult], shards: Sequence[Any]
    ) -> Iterator[ShardResult]:
        if not shards:
            return
        errors: list[str] = []
        finished = 0
        with ray_session(self.config):
            for row in self._dataset(task, shards).iter_rows():
                if row["error"]:
                    errors.append(row["error"])
                else:
                    finished += 1
                    yield row["result"]
        if errors:
            raise ShardError(f"{len(errors)} of {len(shards)} shards failed, the first with:\n{errors[0]}")
        if finished < len(shards):
            raise ShardError(
                f"{len(shards) - finished} of {len(shards)} shards were lost with their actors; "
                "run the same command again to finish them"
            )

    def _dataset(self, task: Callable[[Any], ShardResult], shards: Sequence[Any]) -> Any:
        import ray

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.verbose_stats_logs = False
        context.max_errored_blocks = len(shards)  # lost shards are counted, the others still finish
        rows = [{"shard": shard} for shard in shards]
        return ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            _ShardActor,
            fn_constructor_args=(task,),
            compute=ray.data.ActorPoolStrategy(size=min(self.config.actors, len(rows))),
            num_cpus=self.config.cpus_per_actor,
            num_gpus=self.config.gpus_per_actor,
            max_restarts=self.config.max_restarts,
            max_task_retries=self.config.max_restarts,
        )
