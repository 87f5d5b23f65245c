"""Precompute on Ray Data: the planned shards are the dataset, and one actor call finishes one shard.

Actors write data directly to disk and return only ShardResults. Ray Data's writers use random file names, and its
checkpoints do not record which record was in which block, so neither is used.
"""

from __future__ import annotations

import logging
import traceback
import warnings
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from permafrost.cluster.session import ray_session
from permafrost.core.errors import UserError
from permafrost.core.tasks import ShardError, ShardResult

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from permafrost.config.cluster import ClusterConfig
    from permafrost.core.tasks import ShardTask


class _ShardActor:
    """Actor that runs the task and returns errors as rows, because Ray Data would retry or hide them."""

    def __init__(self, task: ShardTask) -> None:
        self.task = task

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            import ray.cloudpickle

            result = self.task(ray.cloudpickle.loads(row["shard"]))
            return {**asdict(result), "error": ""}
        except UserError as error:
            return _failed(str(error))
        except BaseException:  # a SystemExit here would hang the whole dataset (ray#62746)
            return _failed(traceback.format_exc())


def _failed(error: str) -> dict[str, Any]:
    return {"name": "", "records": 0, "seconds": 0.0, "error": error}


class RayDataExecutor:
    """Implementation of MapShards on an actor pool. As a context it keeps one Ray session for all of its calls."""

    def __init__(self, config: ClusterConfig) -> None:
        self.config = config
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
                compute=ray.data.ActorPoolStrategy(size=min(self.config.actors, len(rows))),
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
