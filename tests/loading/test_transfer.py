"""Batches on a device: what the host reads stays there."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.core.records import NO_CLASS
from pipeline.loading.dataset import StoreDataset
from pipeline.loading.regions import regions_of
from pipeline.loading.transfer import move_batch
from pipeline.training.guidance_targets import GuidanceSource

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
    source = GuidanceSource(kind, 10, (16, 16))

    torch.manual_seed(0)
    (on_host,) = source(batch, (4, 4))
    torch.manual_seed(0)
    (on_device,) = source(move_batch(batch, META), (4, 4))

    assert on_host.regions.any()
    assert on_device.regions.device == on_device.explained_class.device == META
    assert on_device.regions.shape == on_host.regions.shape
    assert on_device.explained_class.shape == on_host.explained_class.shape


def test_a_box_without_a_class_belongs_to_no_record_of_many_labels(batch):
    boxes = tuple(torch.cat([own, torch.tensor([[-1.0, -1, -1, 1, 1]])]) for own in batch.boxes)
    batch = replace(batch, labels=torch.eye(10)[batch.labels], boxes=boxes)

    regions = regions_of(batch, torch.full((8,), NO_CLASS), "boxes", (16, 16))

    assert not regions.any()
