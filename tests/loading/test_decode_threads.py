"""Threads of the loader: a batch and its errors do not depend on their number."""

import copy
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from permafrost.config.training import TrainerOptions
from permafrost.core.distributed import DistributedContext
from permafrost.loading import dataset as dataset_module
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.decode_threads import (
    DecodeThreads,
    decode_threads_of,
    resolve_decode_threads,
)
from permafrost.loading.subset import rows_of_split
from permafrost.store.entries import ManifestError
from permafrost.store.frames import InputMemory
from permafrost.store.reader import Store
from permafrost.store.tars import ShardBytes
from permafrost.training.distill import StudentPlan
from tests.support.runs import TWO_RANKS, distill_config
from tests.support.stores import keys_of_shard, table_of_shard

POSITIONS = [5, 0, 17, 5, 30, 17, 2, 40, 5, 8]


@pytest.fixture(autouse=True)
def no_file_is_small(monkeypatch):
    """Decode the tiny images of the tests in threads."""
    monkeypatch.setattr(dataset_module, "_SMALL_FILE", 0)


def whole_dataset(store, threads, **options):
    rows = np.arange(store.index.num_rows)
    return StoreDataset(store, rows, store.open_passes(), decode_threads=threads, **options)


@pytest.mark.parametrize("threads", [2, 4, 16])
def test_any_number_of_threads_decodes_the_same_batch(frozen, threads):
    one = whole_dataset(frozen.store, 1).__getitems__(POSITIONS)

    several = whole_dataset(frozen.store, threads).__getitems__(POSITIONS)

    assert several.keys == one.keys
    assert several.inputs.dtype == torch.uint8
    assert torch.equal(several.inputs, one.inputs)
    assert len({frame.numpy().tobytes() for frame in one.inputs}) == len(set(POSITIONS))
    assert torch.equal(several.inputs[0], several.inputs[3])
    assert torch.equal(several.targets[0].maps, one.targets[0].maps)


@pytest.mark.parametrize(("small", "in_threads"), [(0, True), (2**20, False)])
def test_small_files_are_decoded_where_they_are_asked_for(frozen, monkeypatch, small, in_threads):
    monkeypatch.setattr(dataset_module, "_SMALL_FILE", small)
    threads = set()
    decode = InputMemory.decode
    monkeypatch.setattr(
        InputMemory,
        "decode",
        lambda *read: threads.add(threading.current_thread()) or decode(*read),
    )

    whole_dataset(frozen.store, 2).__getitems__(POSITIONS)

    assert (threading.current_thread() in threads) != in_threads


@pytest.fixture
def decoded(monkeypatch):
    """Names of the decoded records, in order."""
    names, decode = [], InputMemory.decode
    monkeypatch.setattr(
        InputMemory, "decode", lambda self, *read: names.append(read[-1]) or decode(self, *read)
    )
    return names


@pytest.mark.parametrize("threads", [1, 4])
def test_a_record_that_occurs_several_times_is_decoded_once(frozen, threads, decoded):
    whole_dataset(frozen.store, threads).__getitems__(POSITIONS)

    assert len(decoded) == len(set(decoded)) == len(set(POSITIONS))


@pytest.mark.parametrize(("kept", "epochs_decoded"), [(2**20, 1), (0, 2)])
def test_a_small_selection_is_decoded_in_the_first_epoch_only(
    frozen, decoded, kept, epochs_decoded
):
    dataset = whole_dataset(frozen.store, 2, keep_bytes=kept)
    batches = [POSITIONS, list(range(40, len(dataset))), list(range(45))]

    first = [dataset.__getitems__(batch) for batch in batches]
    for batch in first:
        batch.inputs.zero_()  # what a batch's user writes does not reach the next epoch
    second = [dataset.__getitems__(batch) for batch in batches]

    once = sum(len(set(batch)) for batch in batches)
    assert len(decoded) == (len(dataset) if kept else epochs_decoded * once)
    for batch, again in zip(batches, second, strict=True):
        expected = whole_dataset(frozen.store, 1).__getitems__(batch)
        assert torch.equal(again.inputs, expected.inputs)
        assert again.inputs.stride() == expected.inputs.stride()


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_of_several_damaged_records_the_first_is_named_for_any_number_of_threads(
    tmp_path, frozen, threads
):
    path = shutil.copytree(frozen.store.path, tmp_path / "store")
    store = Store(path)
    shard = store.manifest.shards[0]
    tar = path / shard.path
    data = bytearray(tar.read_bytes())
    for row in table_of_shard(store, shard).to_pylist()[3:8:4]:
        data[row["offset"] + 10] ^= 1
    tar.write_bytes(data)
    key = keys_of_shard(store, shard)[3]

    with pytest.raises(ManifestError, match=rf"{tar} .*record {key}\) is damaged"):
        whole_dataset(store, threads).__getitems__(list(range(12)))


def test_all_calls_have_ended_when_an_error_is_raised():
    ended = []

    def work(number):
        if number in (3, 11):
            raise ValueError(number)
        ended.append(number)

    with pytest.raises(ValueError, match=r"^3$"):
        DecodeThreads(4).run(work, 12)

    assert sorted(ended) == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]


def test_threads_start_with_the_first_batch_and_a_copy_as_in_a_loader_process_has_its_own():
    threads = DecodeThreads(2)
    before = set(threading.enumerate())
    named = set()

    def started():
        return len(set(threading.enumerate()) - before)

    def work(number):
        named.add(threading.current_thread().name.rpartition("_")[0])

    threads.run(work, 8)
    assert named == {"decode"}
    assert started() == 2
    copied = copy.copy(threads)
    assert started() == 2
    copied.run(work, 8)

    assert started() == 4


def test_torch_has_one_thread_in_each_and_keeps_its_number_elsewhere():
    before = torch.get_num_threads()
    found = []
    try:
        torch.set_num_threads(2)
        DecodeThreads(3).run(lambda number: found.append(torch.get_num_threads()), 12)

        assert found == [1] * 12
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("cores", "asked", "processes", "threads"),
    [
        (1, None, 1, 1),
        (6, None, 1, 6),
        (64, None, 1, 8),
        (16, None, 3, 5),
        (2, None, 4, 1),
        (2, 12, 4, 12),
    ],
)
def test_processes_share_the_cores(monkeypatch, cores, asked, processes, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))

    assert resolve_decode_threads(asked, processes) == threads


@pytest.mark.parametrize(
    ("options", "distributed", "threads"),
    [
        ({}, None, 8),
        ({"loader_processes": 4}, None, 4),
        ({"loader_processes": 4}, DistributedContext(1, 2), 2),
        ({"loader_processes": 4}, DistributedContext(5, 8, local_world_size=2), 2),
        ({}, DistributedContext(5, 8, local_world_size=1), 8),
        ({"decode_threads": 3}, DistributedContext(5, 8, local_world_size=1), 3),
    ],
)
def test_only_the_ranks_of_one_machine_share_its_cores(monkeypatch, options, distributed, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))

    assert decode_threads_of(TrainerOptions(**options), distributed) == threads


@pytest.mark.parametrize("processes", [0, 2])
def test_a_students_plan_has_the_threads_of_its_rank(frozen, monkeypatch, processes):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    trainer = replace(TWO_RANKS, loader_processes=processes)
    job = StudentPlan(distill_config(frozen, trainer=trainer), Path())
    alone, other = DistributedContext(1, 2, local_world_size=1), DistributedContext(1, 2)

    threads = [job.spec(ranks).dataset.decode_threads.count for ranks in (alone, other)]

    assert threads == [8 // max(processes, 1), 4 // max(processes, 1)]


def test_large_files_of_a_batch_are_read_ahead_and_small_ones_are_not(frozen, monkeypatch):
    dataset = StoreDataset(frozen.store, rows_of_split(frozen.store.index, "train"), keep_bytes=0)
    ahead, will_read = [], ShardBytes.will_read
    monkeypatch.setattr(
        ShardBytes,
        "will_read",
        lambda file, *extent: ahead.append(extent) or will_read(file, *extent),
    )
    monkeypatch.setattr(dataset_module, "_SMALL_FILE", 10**9)
    small = dataset.__getitems__([0, 1, 2])
    assert ahead == []

    monkeypatch.setattr(dataset_module, "_SMALL_FILE", 0)
    large = dataset.__getitems__([0, 1, 2])

    assert len(ahead) == len(set(ahead)) == 3
    assert torch.equal(large.inputs, small.inputs)
