"""Ray changes who computes a shard, never what is computed."""

import threading
from dataclasses import dataclass, replace

import pytest
import torch

from pipeline.annotation.shard_tasks import AnnotateShard
from pipeline.cluster.data import RayDataExecutor
from pipeline.config.cluster import LocalClusterConfig
from pipeline.core.tasks import ShardError, ShardResult
from pipeline.store.frames import ShardFrames
from stages import precompute
from tests.conftest import frame_batches, precompute_config
from tests.pipeline.store.test_round_trip import tree_bytes


@pytest.mark.ray
@pytest.mark.parametrize("actors", [pytest.param(1, marks=pytest.mark.slow), 2])
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


def annotation(frozen, folder, **options):
    """The task of a pass over the frozen store that writes nothing."""
    config = frozen.config
    return AnnotateShard(
        store_path=frozen.store.path,
        folder=folder,
        columns=None,
        fingerprint="",
        teacher=config.teacher,
        num_classes=10,
        explainer=config.explainer,
        config=replace(config.annotate, batch_size=4),
        num_threads=1,
        **options,
    )


def test_the_next_batches_are_decoded_while_the_teacher_works(tmp_path, frozen, monkeypatch):
    decoded = [threading.Event() for _ in range(4)]
    read = ShardFrames.read

    def note(self, start, stop):
        batch = read(self, start, stop)
        decoded[start // 4].set()
        return batch

    monkeypatch.setattr(ShardFrames, "read", note)
    shard = next(shard for shard in frozen.store.manifest.shards if shard.records == 16)
    batches = annotation(frozen, tmp_path)._batches(shard)

    next(batches)  # the teacher has the first batch, and asks for no other

    assert decoded[1].wait(timeout=10)
    assert not decoded[3].is_set()  # but memory stays flat: not the whole shard is decoded ahead
    batches.close()


@pytest.mark.parametrize("threads", [1, 3])
def test_batches_come_in_order_whatever_the_number_of_decoding_threads(tmp_path, frozen, threads):
    task = annotation(frozen, tmp_path, decode_threads=threads)

    for shard in frozen.store.manifest.shards:
        (whole,) = frame_batches(frozen.store, shard, shard.records)
        batches = list(task._batches(shard))
        assert [len(batch.frames) for batch in batches[:-1]] == [4] * (len(batches) - 1)
        assert torch.equal(torch.cat([batch.frames for batch in batches]), whole.frames)
        assert torch.equal(torch.cat([batch.heights for batch in batches]), whole.heights)


@dataclass
class FailOnOdd:
    """Fails on odd shards, in both ways a task can."""

    needs_gpu = False

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
