"""RecordLoader: the public DataLoader has the batches and the views of a training, with any arguments of PyTorch."""

import copy
import gc
import json
import os
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DistributedSampler, SequentialSampler

from permafrost import RecordLoader, UserError, augmentation, open_store
from permafrost.core.errors import ConfigError
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.geometry import TargetRequest, view_images, view_targets
from permafrost.loading.loader import BatchMessage, TrainLoader
from permafrost.loading.random_views import ViewSchedule
from permafrost.loading.record_loader import ViewBatch
from permafrost.storage.fetch_ahead import FetchAhead
from tests.support.processes import environment, fork_server, run_program
from tests.support.ranks import run_on_ranks
from tests.support.stores import precompute_config
from tests.support.verbs import precompute


@pytest.fixture(scope="module")
def store(frozen):
    return open_store(frozen.store.path)


def test_batches_and_views_are_those_of_a_training(store):
    augment = augmentation("pad_crop_flip")
    records = store.select("train")
    loader = RecordLoader(records, augment=augment, batch_size=8, seed=5)
    dataset = StoreDataset(store, records.rows, store.open_passes())
    trained = TrainLoader(dataset, ViewSchedule(augment, store.size, 5), batch_size=8, seed=5)

    for epoch in range(2):
        batches, expected = list(loader), list(trained.epoch(epoch))

        assert len(batches) == len(loader) == len(records) // 8
        for batch, other in zip(batches, expected, strict=True):
            (targets,) = view_targets(other, TargetRequest((2, 2)))
            assert batch.keys == other.keys
            assert torch.equal(batch.images, view_images(other, store.size))
            assert torch.equal(batch.targets((2, 2))[0].maps, targets.maps)
            assert torch.equal(batch.logits, targets.logits)
            assert torch.equal(batch.labels, other.labels)


def test_each_iteration_is_a_new_epoch_that_set_epoch_repeats(store):
    loader = RecordLoader(store.select(), augment=augmentation("pad_crop"), batch_size=8)
    first, second = ([batch.keys for batch in loader] for _ in range(2))

    loader.set_epoch(0)

    assert first != second
    assert [batch.keys for batch in loader] == first


def test_a_loop_over_images_goes_on_when_the_store_gets_a_second_pass(own):
    records = open_store(own.store.path).select("test")
    before = next(iter(RecordLoader(records, batch_size=4)))
    teacher = replace(own.config.teacher, weights="random", sha256=None)
    precompute.run(
        replace(
            own.config, store=replace(own.config.store, path=str(own.store.path)), teacher=teacher
        )
    )

    batch = next(iter(RecordLoader(records, batch_size=4)))

    names = [folder.name for folder in own.store.pass_folders()]
    assert len(names) == 2
    assert torch.equal(batch.images, before.images)
    assert torch.equal(batch.labels, before.labels)
    for read in (lambda: batch.logits, lambda: batch.maps, batch.targets):
        with pytest.raises(ConfigError, match=rf"several .* teacher=, of: {names[0]}, {names[1]}"):
            read()
    named = next(iter(RecordLoader(records, batch_size=4, teacher=before._first.teacher)))
    assert torch.equal(named.logits, before.logits)
    with pytest.raises(UserError, match="several"):
        RecordLoader(records, output="attention")


def open_files():
    return sorted(os.path.realpath(file) for file in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize("backend", ["zarr", "webdataset"])
def test_a_loader_that_is_dropped_closes_its_files_without_the_garbage_collector(
    tmp_path, tiny_teacher, backend
):
    precompute.run(precompute_config(tmp_path / "store", tiny_teacher, backend=backend))
    records = open_store(tmp_path / "store").select("train")
    gc.collect()
    gc.disable()
    try:
        opened = []
        for _ in range(3):
            loader = RecordLoader(records, augment=augmentation("pad_crop_flip"), batch_size=8)
            batch = next(iter(loader))
            assert len(batch.images) == len(batch.logits)
            assert any(name.endswith(".tar") for name in open_files())
            del loader, batch
            opened.append(open_files())
    finally:
        gc.enable()
    assert opened[0] == opened[1] == opened[2]
    assert not any(name.endswith(".tar") for name in opened[0])


def test_threads_that_fetch_shards_end_with_their_loader():
    before = set(threading.enumerate())
    fetch = FetchAhead()
    fetch.ask([])
    threads = set(threading.enumerate()) - before
    del fetch
    for thread in threads:
        thread.join(60)
    assert threads
    assert not any(thread.is_alive() for thread in threads)


def test_maps_without_a_grid_are_on_their_own(store):
    (batch, *_) = RecordLoader(store.select("test"), shuffle=False, batch_size=4)
    (spec,) = [s for s in store.open_passes()[0].manifest.fields if s.name == "map"]

    assert batch.maps.shape == (4, *spec.shape)
    assert torch.equal(batch.maps, batch.targets(spec.shape[-2:])[0].maps)


@pytest.mark.parametrize(
    ("workers", "context"),
    [(0, None), (2, fork_server), pytest.param(2, lambda: "spawn", marks=pytest.mark.slow)],
    ids=["no worker", "forked", "spawned"],
)
def test_an_ordered_pass_has_every_record_once_with_any_number_from_workers(
    store, workers, context
):
    records = store.select("train")
    loader = RecordLoader(
        records,
        shuffle=False,
        batch_size=7,
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        multiprocessing_context=context and context(),
    )

    keys = [key for batch in loader for key in batch.keys]

    assert len(loader) == -(-len(records) // 7)
    assert keys == records.keys_at()


def test_a_shuffled_epoch_without_drop_last_has_every_record_once(store):
    records = store.select("train")
    loader = RecordLoader(records, batch_size=7, shuffle=True, drop_last=False)

    keys = [key for batch in loader for key in batch.keys]

    assert keys != records.keys_at()
    assert sorted(keys) == sorted(records.keys_at())


def test_a_sampler_of_pytorch_chooses_positions_and_learns_the_epoch(store):
    records = store.select("train")
    halves = []
    for rank in range(2):
        sampler = DistributedSampler(range(len(records)), num_replicas=2, rank=rank, drop_last=True)
        loader = RecordLoader(records, sampler=sampler, batch_size=4, drop_last=False, seed=rank)
        halves.append([[key for batch in loader for key in batch.keys] for _ in range(2)])

    for epoch in range(2):
        assert not set(halves[0][epoch]) & set(halves[1][epoch])
    assert halves[0][0] != halves[0][1]


def read_on_rank(rank, path, folder):
    before = RecordLoader(open_store(path).select("train"), batch_size=4)
    dist.init_process_group("gloo", f"file://{folder}/group", rank=rank, world_size=2)
    try:
        records = open_store(path).select("train")
        for read in (lambda: RecordLoader(records, batch_size=4), lambda: next(iter(before))):
            with pytest.raises(ConfigError, match=r"add sampler=DistributedSampler\(range\(len"):
                read()
        sampler = DistributedSampler(range(len(records)), drop_last=True)
        divided = RecordLoader(records, sampler=sampler, batch_size=4, seed=rank, teacher=())
        everything = RecordLoader(records, sampler=range(len(records)), batch_size=4, teacher=())
        keys = [[key for batch in loader for key in batch.keys] for loader in (divided, everything)]
        (folder / f"{rank}.json").write_text(json.dumps(keys))
    finally:
        dist.destroy_process_group()


def test_ranks_without_a_sampler_are_refused_and_with_one_read_disjoint_records(store, tmp_path):
    run_on_ranks(read_on_rank, store.path, tmp_path)

    (first, all_of_first), (second, all_of_second) = (
        json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)
    )
    assert sorted(first + second) == sorted(all_of_first) == sorted(all_of_second)


def test_targets_of_no_pass_are_an_error_that_names_the_argument(store):
    (batch, *_) = RecordLoader(store.select("test"), teacher=(), batch_size=4)

    assert batch.images.shape == (4, 3, *store.size)
    with pytest.raises(ConfigError, match="teacher="):
        _ = batch.logits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"collate_fn": list}, "collate_fn"),
        ({"batch_size": None}, "batch_size=None"),
        ({"batch_size": 10**6, "shuffle": True}, "batch_size=1000000, but"),
        ({"replay": True}, "stored views"),
        ({"batch_size": 8, "num_workers": 1, "multiprocessing_context": "fork"}, "fork"),
        ({"teacher": "nobody"}, r"nobody.*\(in Python, the argument teacher=\)"),
        ({"augment": "pad_crop_flip"}, r"augment='pad_crop_flip' must be random views"),
    ],
)
def test_arguments_that_do_not_fit_are_named(store, options, message):
    with pytest.raises(UserError, match=message):
        RecordLoader(store.select(), **options)


def test_without_views_every_record_comes_once_in_order(store):
    """The last batch of a training is left out if it is smaller, that of an evaluation is not."""
    records = store.select("train")

    keys = [key for batch in RecordLoader(records, batch_size=7) for key in batch.keys]
    in_training = RecordLoader(records, augment=augmentation("none"), batch_size=7)

    assert keys == records.keys_at()
    assert [key for batch in in_training for key in batch.keys] != keys[:35]
    assert len(in_training) == len(records) // 7


def test_a_store_in_place_of_records_is_an_error_with_the_way_out(store):
    with pytest.raises(
        ConfigError, match=r"open_store\(\.\.\.\)\.select\('train'\), not OpenStore"
    ):
        RecordLoader(store)


@pytest.mark.slow
def test_processes_of_a_program_without_a_guard_end_in_one_sentence(frozen, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import permafrost\n"
        f"records = permafrost.open_store({str(frozen.store.path)!r}).select('train')\n"
        "for batch in permafrost.RecordLoader(records, batch_size=8, num_workers=1):\n"
        "    pass\n"
    )

    ended = run_program([sys.executable, str(program)], env=environment())

    assert ended.returncode == 1
    assert 'put its loop below `if __name__ == "__main__":`' in ended.stderr.splitlines()[-1]


def test_shuffle_beside_a_sampler_is_left_to_pytorch(store):
    records = store.select()
    loader = RecordLoader(records, sampler=SequentialSampler(range(4)), batch_size=2)

    assert [key for batch in loader for key in batch.keys] == records.keys_at([0, 1, 2, 3])


def test_what_a_worker_sends_is_what_it_read(store):
    """Small tensors are sent as bytes. Pinning keeps values (without a GPU, PyTorch does not pin)."""
    records = store.select("train")
    dataset = StoreDataset(store, records.rows, store.open_passes())
    batch = dataset.__getitems__([3, 1])

    sent = copy.deepcopy(BatchMessage.from_worker(batch)).unpack()

    assert sent.keys == batch.keys
    assert torch.equal(sent.inputs, batch.inputs)
    assert torch.equal(sent.targets[0].maps, batch.targets[0].maps)
    assert ViewBatch(sent, store.size).to("cpu").images.dtype == torch.float32
