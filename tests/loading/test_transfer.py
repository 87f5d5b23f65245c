"""Batches on a device: what the host reads stays there, and a GPU receives batches ahead of its steps."""

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from permafrost.config.augment import AugmentOptions, OperationConfig
from permafrost.core.records import NO_CLASS
from permafrost.loading import transfer
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.geometry import TargetRequest
from permafrost.loading.loader import TrainLoader
from permafrost.loading.random_views import ViewSchedule
from permafrost.loading.regions import regions_of
from permafrost.loading.subset import rows_of_split
from permafrost.loading.transfer import move_batch, read_ahead
from permafrost.store.entries import ManifestError
from permafrost.store.reader import Store
from permafrost_papers.e2kd.guided import GuidanceSource
from permafrost_papers.e2kd.options import GuidedTeachingConfig
from tests.gpu.inputs import pack, precompute_config, write_images
from tests.gpu.scale import TINY
from tests.support.verbs import precompute

META = torch.device("meta")  # nothing can be read back from it


@pytest.fixture
def batch(frozen):
    store = frozen.store
    dataset = StoreDataset(store, np.arange(8), store.open_passes(), with_regions=True)
    return dataset.__getitems__(list(range(8)))


def test_all_but_boxes_and_a_copy_of_the_labels_moves(batch):
    moved = move_batch(batch, META)

    tensors = [moved.inputs, moved.labels, moved.masks, moved.groups, moved.targets[0].maps]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.boxes is batch.boxes
    assert torch.equal(moved.labels_on_host, batch.labels)
    assert batch.labels_on_host is batch.labels
    assert moved.keys == batch.keys
    assert move_batch(batch, torch.device("cpu")) is batch


@pytest.mark.parametrize("kind", ["boxes", "masks"])
@pytest.mark.parametrize("has_many_labels", [False, True])
def test_the_regions_of_a_guided_step_are_made_without_reading_from_the_device(
    batch, kind, has_many_labels
):
    if has_many_labels:
        numbers = (batch.labels + 1).to(torch.uint8)[:, None, None, None]
        masks = torch.where(batch.masks > 0, numbers, 0)
        batch = replace(batch, labels=torch.eye(10)[batch.labels], masks=masks)
    batch = replace(batch, canonical_from_view=torch.eye(3).expand(8, 3, 3))
    source = GuidanceSource(GuidedTeachingConfig(region=kind), 10, (16, 16))

    torch.manual_seed(0)
    (on_host,) = source(batch, TargetRequest((4, 4)))
    torch.manual_seed(0)
    (on_device,) = source(move_batch(batch, META), TargetRequest((4, 4)))

    assert on_host.regions.any()
    assert on_device.regions.device == on_device.target_class.device == META
    assert on_device.regions.shape == on_host.regions.shape
    assert on_device.target_class.shape == on_host.target_class.shape


def test_a_box_without_a_class_belongs_to_no_record_of_many_labels(batch):
    boxes = tuple(torch.cat([own, torch.tensor([[-1.0, -1, -1, 1, 1]])]) for own in batch.boxes)
    batch = replace(batch, labels=torch.eye(10)[batch.labels], boxes=boxes)

    regions = regions_of(batch, torch.full((8,), NO_CLASS), "boxes", (16, 16))

    assert not regions.any()


def numbered(batch, count, read, fails_at=None):
    for number in range(count):
        read.append(number)
        if number == fails_at:
            raise ManifestError(f"batch {number} is damaged")
        yield replace(batch, record_index=torch.full((8,), number))


def has_ended(before):
    """Wait until the threads that were not among those `before` have ended, and return True."""
    while set(threading.enumerate()) - before:
        time.sleep(0.01)
    return True


def test_batches_are_copied_in_order_by_a_thread_that_is_one_ahead(batch):
    read, threads = [], set(threading.enumerate())
    asked = threading.Semaphore(0)

    def copy(one):
        asked.release()
        return int(one.record_index[0]), threading.current_thread().name

    copies = read_ahead(numbered(batch, 4, read), copy)

    (first, copied) = next(copies)
    for _ in range(2):  # the second copy needs no further request
        assert asked.acquire()
    assert not asked.acquire(timeout=0.1)
    assert copied == (0, "read-ahead_0")
    assert first.record_index[0] == 0
    assert read == [0, 1]
    assert [number for _, (number, _) in copies] == [1, 2, 3]
    assert has_ended(threads)


def test_an_error_of_the_reader_is_raised_after_the_batches_before_it(batch):
    threads = set(threading.enumerate())
    copies = read_ahead(numbered(batch, 4, [], fails_at=2), lambda one: None)

    assert len([next(copies), next(copies)]) == 2
    with pytest.raises(ManifestError, match="batch 2 is damaged"):
        next(copies)
    assert has_ended(threads)


def test_the_thread_ends_with_an_epoch_that_is_not_read_to_its_end(batch):
    read, threads = [], set(threading.enumerate())
    copies = read_ahead(numbered(batch, 4, read), lambda one: None)
    next(copies)

    copies.close()

    assert has_ended(threads)
    assert len(read) <= 2


def train_loader(store, operations):
    dataset = StoreDataset(store, rows_of_split(store.index, "train"), store.open_passes())
    views = ViewSchedule(AugmentOptions(operations=operations), store.size, 0)
    return TrainLoader(dataset, views, batch_size=8, seed=0)


@pytest.mark.parametrize("operations", [(), (OperationConfig(kind="pad_crop", padding=2),)])
def test_batches_that_are_copied_ahead_have_the_views_of_the_others(
    frozen, operations, monkeypatch
):
    monkeypatch.setattr(
        transfer,
        "copy_ahead",
        lambda batches, device: (
            moved
            for _, moved in read_ahead(batches, lambda pair: (move_batch(pair[0], META), pair[1]))
        ),
    )
    on_host = list(train_loader(frozen.store, operations).epoch(1, 1))
    copied = list(train_loader(frozen.store, operations).epoch(1, 1, torch.device("cuda")))

    assert [batch.keys for batch in copied] == [batch.keys for batch in on_host]
    assert {batch.inputs.device for batch in copied} == {META}
    for batch, here in zip(copied, on_host, strict=True):
        views = batch.canonical_from_view
        assert views is None if not operations else views.device == META
        assert views is None if not operations else views.shape == here.canonical_from_view.shape


@pytest.mark.parametrize("device", [None, torch.device("cpu")])
def test_nothing_is_read_ahead_for_a_cpu(frozen, device, monkeypatch):
    monkeypatch.setattr(transfer, "copy_ahead", None)

    (first, *_) = train_loader(frozen.store, ()).epoch(0, 0, device)

    assert first.inputs.device.type == "cpu"


def annotated_store(folder):
    """Store of 32 JPEGs with a pass, of made-up images."""
    store = folder / "store"
    pack(write_images(folder / "images", TINY.images, TINY.distinct, TINY.side), store, TINY)
    precompute.run(precompute_config(store, TINY, teacher=TINY.teacher))
    return Store(store)


def test_the_store_of_the_test_on_a_gpu_has_batches_with_maps(tmp_path):
    batches = list(train_loader(annotated_store(tmp_path), ()).epoch(0))

    assert sum(len(batch.keys) for batch in batches) == TINY.images
    assert all(batch.targets[0].maps is not None for batch in batches)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_receives_the_batches_of_the_host(tmp_path, monkeypatch):
    """`make gpu` runs this without the fixtures of the suite."""
    monkeypatch.chdir(tmp_path)
    store = annotated_store(tmp_path)
    operations = (OperationConfig(kind="pad_crop", padding=2),)
    on_host = list(train_loader(store, operations).epoch(1))

    copied = train_loader(store, operations).epoch(1, 0, torch.device("cuda"))

    for batch, wanted in zip(copied, on_host, strict=True):
        assert batch.inputs.device.type == batch.canonical_from_view.device.type == "cuda"
        assert torch.equal(batch.inputs.cpu(), wanted.inputs)
        assert torch.equal(batch.canonical_from_view.cpu(), wanted.canonical_from_view)
        assert torch.equal(batch.targets[0].maps.cpu(), wanted.targets[0].maps)


def test_small_tensors_are_copied_in_one_piece_of_memory():
    tensors = [
        torch.arange(7, dtype=torch.int64),
        torch.tensor([True, False, True]),
        torch.tensor(2.5, dtype=torch.float64),
        torch.rand(2, 3, 3),
        torch.rand(5).half(),
        torch.arange(6)[::6],  # one element, with a stride
        torch.tensor([[-3, 4]], dtype=torch.int8),
    ]
    copies = transfer._copy_together(tensors, torch.device("cpu"))
    for copied, tensor in zip(copies, tensors, strict=True):
        assert copied.dtype == tensor.dtype
        assert copied.shape == tensor.shape
        assert torch.equal(copied, tensor)
        assert copied.data_ptr() % copied.element_size() == 0
    assert len({copied.untyped_storage().data_ptr() for copied in copies}) == 1
    assert transfer._copy_together([], torch.device("cpu")) == []
