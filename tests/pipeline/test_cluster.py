"""Ray changes who computes a shard, never what is computed."""

from dataclasses import dataclass

import pytest

from pipeline.cluster import ShardError
from pipeline.cluster.data import RayDataExecutor
from pipeline.config import LocalClusterConfig
from pipeline.shard_tasks import ShardResult
from stages import precompute
from tests.conftest import precompute_config
from tests.pipeline.store.test_round_trip import tree_bytes


@pytest.mark.ray
@pytest.mark.parametrize("actors", [1, 2])
def test_ray_and_serial_write_the_same_bytes(tmp_path, frozen, actors):
    config = precompute_config(
        tmp_path / "store",
        frozen.config.teacher,
        executor="ray",
        cluster=LocalClusterConfig(actors=actors, cpus_per_actor=0.5),
    )

    result = precompute.run(config)

    assert (result.packed_records, result.teacher_records) == (72, 72)
    assert tree_bytes(tmp_path / "store") == tree_bytes(frozen.store.path)


@dataclass
class FailOnOdd:
    """Fails on odd shards, in both ways a task can."""

    def __call__(self, shard):
        if shard == 1:
            raise ValueError(f"shard {shard} is odd")
        if shard == 3:
            raise SystemExit(1)
        return ShardResult(name=str(shard), records=shard, seconds=0.0)


@pytest.mark.ray
def test_a_failing_shard_lets_the_others_finish_and_is_reported():
    results = RayDataExecutor(LocalClusterConfig(cpus_per_actor=0.5))(FailOnOdd(), range(5))

    finished = [next(results).name for _ in range(3)]

    assert sorted(finished) == ["0", "2", "4"]
    with pytest.raises(ShardError, match="2 of 5 shards failed"):
        next(results)
