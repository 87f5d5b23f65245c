"""One shard after the other in this process: the debugger's executor, with the same results as Ray's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pipeline.cluster import ShardTask
    from pipeline.shard_tasks import ShardResult


def map_shards_serially(task: ShardTask, shards: Sequence[Any]) -> Iterator[ShardResult]:
    """Results in the order of `shards`; an error stops at once, with its own traceback."""
    for shard in shards:
        yield task(shard)
