"""A store as a map-style dataset: values, views as functions of (seed, epoch, number), loaders and samplers."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler

import permafrost
from permafrost.loading.recipes import BLOCK_SIZE
from permafrost.loading.store_samples import StoreSamples

VIEWS = permafrost.augmentation("pad_crop_flip")
COLOR = permafrost.augmentation("pad_crop_flip_color")


@pytest.fixture(scope="module")
def path(frozen):
    return frozen.store.path


def test_a_sample_has_what_the_record_loader_reads(path):
    samples = permafrost.load_store(path)
    records = permafrost.open_store(path).select("train")
    (batch,) = permafrost.RecordLoader(records, batch_size=len(records), drop_last=False)

    assert len(samples) == len(records)
    for number, sample in enumerate(samples[place] for place in range(len(samples))):
        place = batch.keys.index(sample.key)
        assert sample.image.equal(batch.images[place])
        assert sample.label.equal(batch.labels[place])
        assert sample.logits.equal(batch.logits[place])
        assert sample.maps.equal(batch.maps[place])
        assert samples[number - len(samples)].key == sample.key
    with pytest.raises(IndexError, match="record 40 of 40"):
        _ = samples[len(samples)]


@pytest.mark.parametrize("views", [VIEWS, COLOR])
def test_a_view_depends_on_seed_epoch_and_number_alone(path, views):
    samples = permafrost.load_store(path, augment=views, seed=3)
    alone = samples[7]
    for together in ([7], [30, 7, 2], list(range(39, 6, -1))):
        sample = samples.__getitems__(together)[together.index(7)]
        assert sample.image.equal(alone.image)
        assert sample.maps.equal(alone.maps)

    others = [permafrost.load_store(path, augment=views, seed=4), deepcopy(samples)]
    others[1].set_epoch(1)
    for other in others:
        assert any(not other[n].image.equal(samples[n].image) for n in range(8))
    samples.set_epoch(1)
    assert samples[7].image.equal(others[1][7].image)


def test_a_map_moves_with_its_image(path):
    flip = permafrost.augmentation(
        "none", operations=[{"kind": "horizontal_flip", "p": 1.0}], edges="image"
    )
    moved, still = permafrost.load_store(path, augment=flip), permafrost.load_store(path)

    for number in range(8):
        torch.testing.assert_close(moved[number].image, still[number].image.flip(-1))
        torch.testing.assert_close(moved[number].maps, still[number].maps.flip(-1))


def test_views_are_those_of_places_in_any_order(path):
    """Positions may be of several blocks, each of which is drawn as a whole."""
    records = permafrost.open_store(path).select("train")
    schedule = StoreSamples(records, augment=VIEWS)._dataset._schedule
    places = np.array([3 * BLOCK_SIZE + 5, 2, BLOCK_SIZE, 1])
    sizes = torch.full((4, 2), 16.0)

    together = schedule.views(2, places, sizes).canonical_from_view

    for place, matrix in zip(places.tolist(), together, strict=True):
        (alone,) = schedule.views(2, place, sizes[:1]).canonical_from_view
        assert matrix.equal(alone)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_worker_processes_give_the_same_samples_and_see_the_epoch(path, start):
    samples = permafrost.load_store(path, augment=VIEWS)
    loader = DataLoader(
        samples, batch_size=8, num_workers=2, multiprocessing_context=start, persistent_workers=True
    )
    for epoch in range(2):
        samples.set_epoch(epoch)
        images = torch.cat([batch.image for batch in loader])
        expected = torch.stack([sample.image for sample in samples.__getitems__(range(40))])
        assert images.equal(expected)


def test_samplers_of_torch_choose_records(path):
    samples = permafrost.load_store(path, augment=VIEWS)
    ranks = [
        [
            key
            for batch in DataLoader(samples, 4, sampler=DistributedSampler(samples, 2, rank))
            for key in batch.key
        ]
        for rank in range(2)
    ]
    shuffled = DataLoader(samples, 8, sampler=RandomSampler(samples))

    assert sorted(ranks[0] + ranks[1]) == sorted(samples[number].key for number in range(40))
    batch = next(iter(shuffled))
    assert type(batch).__name__ == "StoreSample"
    assert batch.logits.shape == (8, 10)
    assert batch.maps.shape == (8, 1, 1, 4, 4)


def test_what_a_sample_cannot_have_is_refused(path, frozen):
    mix = permafrost.augmentation("none", mix=[{"kind": "mixup", "alpha": 1.0}])

    with pytest.raises(permafrost.UserError, match=r"augment\.mix mixes the records of a batch"):
        permafrost.load_store(path, augment=mix)
    with pytest.raises(permafrost.UserError, match="has no split"):
        permafrost.load_store(path, "nowhere")
