"""All that knows Ray, and the serial twin that imports none of it.

An executor maps a picklable task over shards and yields results as they finish, in any order. On Ray
a task that fails does not stop the others, and the first failure is raised when all are done; the
serial executor stops where the debugger should.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pipeline.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pipeline.config import ClusterConfig, Executor
    from pipeline.shard_tasks import ShardResult


class ShardError(UserError, RuntimeError):
    """Shards that could not be finished; the finished ones stay."""


class ShardTask(Protocol):
    """What is done to a shard; picklable."""

    needs_gpu: ClassVar[bool]
    """Whether an actor that runs it takes its share of the GPUs."""

    def __call__(self, shard: Any, /) -> ShardResult:
        """Finish one shard."""


class MapShards(Protocol):
    """Run `task` on each of `shards`."""

    def __call__(self, task: ShardTask, shards: Sequence[Any]) -> Iterator[ShardResult]:
        """Results as they finish; ShardError after the last one if any shard failed."""


def build_executor(executor: Executor, cluster: ClusterConfig) -> MapShards:
    """The executor that `executor=` names."""
    if executor == "serial":
        from pipeline.cluster.serial import map_shards_serially

        return map_shards_serially
    from pipeline.cluster.data import RayDataExecutor

    return RayDataExecutor(cluster)
