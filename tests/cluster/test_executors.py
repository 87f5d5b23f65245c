"""Executors: order, memory and results of a task do not depend on where it runs."""

import threading
from dataclasses import replace

import pytest
import torch

from pipeline.annotation.shard_tasks import AnnotateShard
from pipeline.cluster.executors import choose_executor, choose_task_runner
from pipeline.config.cluster import SMALL_STORE, ExistingClusterConfig, LocalClusterConfig
from pipeline.store.frames import ShardFrames
from tests.support.stores import frame_batches

NAMED = ExistingClusterConfig()


@pytest.mark.parametrize(
    ("executor", "cluster", "records", "chosen"),
    [
        ("auto", LocalClusterConfig(), SMALL_STORE, "serial"),
        ("auto", LocalClusterConfig(), SMALL_STORE + 1, "ray"),
        ("auto", LocalClusterConfig(actors=2), 1, "ray"),
        ("auto", NAMED, 1, "ray"),
        ("ray", LocalClusterConfig(), 1, "ray"),
        ("serial", NAMED, SMALL_STORE + 1, "serial"),
    ],
)
def test_a_small_pass_without_a_named_cluster_is_serial(executor, cluster, records, chosen):
    assert choose_executor(executor, cluster, records) == chosen


@pytest.mark.parametrize(
    ("cluster", "tasks", "parallel", "chosen"),
    [
        (LocalClusterConfig(), 1, None, "serial"),
        (LocalClusterConfig(), 5, 1, "serial"),
        (LocalClusterConfig(), 2, None, "ray"),
        (NAMED, 1, None, "ray"),
    ],
)
def test_one_task_without_a_named_cluster_is_serial(monkeypatch, cluster, tasks, parallel, chosen):
    monkeypatch.setattr("os.cpu_count", lambda: 2)

    assert choose_task_runner("auto", cluster, tasks, parallel) == chosen


def annotation(frozen, folder, **options):
    """Task of a pass over the frozen store, of which only the batches are read."""
    config = frozen.config
    return AnnotateShard(
        store_path=frozen.store.path,
        folder=folder,
        fields=None,
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

    next(batches)  # the teacher has only requested the first batch

    assert decoded[1].wait()
    assert not decoded[3].is_set()  # memory stays flat, as a shard is not decoded completely
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
