"""Order of an epoch and selections: the same as drawn over arrays of all records, without such arrays."""

import pickle
import tracemalloc
from functools import partial

import numpy as np
import pytest

from permafrost.core.digests import derive_seed
from permafrost.core.errors import ConfigError
from permafrost.loading.dataset import StoreDataset, iter_batches
from permafrost.loading.loader import TrainLoader
from permafrost.loading.sampler import (
    EpochOrder,
    GlobalBatchSampler,
    ReplayBatchSampler,
    draw_counts,
    expected_draws,
)
from permafrost.loading.subset import rows_of_split
from tests.support.synthetic import large_store, marker_of, store_of_rows, write_shards

LARGE = 14_197_122  # ImageNet-21k
SHARD = 512


def first_positions(records=LARGE, shard=SHARD):
    return np.append(np.arange(0, records, shard), records)


def order_over_all_records(sizes, seed, epoch, window):
    """Definition of the order: permuted shards, and permuted records within windows of them."""
    generator = np.random.default_rng(derive_seed(seed, "order", epoch))
    by_shard = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    by_shard = [shard for shard in by_shard if len(shard)]
    shards = [by_shard[number] for number in generator.permutation(len(by_shard))]
    windows = (shards[start : start + window] for start in range(0, len(shards), window))
    return np.concatenate([generator.permutation(np.concatenate(window)) for window in windows])


@pytest.mark.parametrize("seed", range(5))
def test_windows_are_the_order_over_all_records(seed):
    generator = np.random.default_rng(seed)
    sizes = generator.integers(0, 9, size=generator.integers(1, 60))
    sizes[0] += 1
    window = int(generator.integers(1, 8))
    order = EpochOrder(np.concatenate([[0], np.cumsum(sizes)]), seed, window)

    for epoch in range(3):
        expected = order_over_all_records(sizes, seed, epoch, window)
        np.testing.assert_array_equal(np.concatenate(list(order.windows(epoch))), expected)
        for first in generator.integers(len(expected), size=4):
            rest = np.concatenate(list(order.windows(epoch, int(first))))
            np.testing.assert_array_equal(rest, expected[first:])


@pytest.mark.slow
def test_of_14_million_records_each_is_visited_once_by_one_of_the_ranks():
    visited = np.zeros(LARGE, np.int8)
    batch = 3 * 8192

    ranks = [
        GlobalBatchSampler(EpochOrder(first_positions(), 3), batch, rank=rank, world_size=3)
        for rank in range(3)
    ]
    for sampler in ranks:
        sampler.set_position(2, 0)
        for places in sampler:
            visited[places.positions] += 1

    assert visited.max() == 1
    assert LARGE - visited.sum() == LARGE % batch  # the last partial batch is dropped


@pytest.mark.slow
def test_a_step_in_the_middle_of_14_million_records_continues_the_epoch_in_the_memory_of_a_window():
    def batches(first_step):
        sampler = GlobalBatchSampler(EpochOrder(first_positions(), 0), 4096)
        sampler.set_position(1, first_step)
        iterator = iter(sampler)
        return [next(iterator).positions.tolist() for _ in range(3)]

    whole = GlobalBatchSampler(EpochOrder(first_positions(), 0), 4096)
    whole.set_position(1, 0)
    expected = [batch.positions.tolist() for step, batch in enumerate(whole) if 2500 <= step < 2503]
    tracemalloc.start()
    found = batches(2500)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert found == expected
    assert peak < 8 * 2**20  # an array of all positions has 108 MiB


def test_first_views_of_14_million_records_are_one_byte_each_and_those_of_one_draw():
    sampler = ReplayBatchSampler(EpochOrder(first_positions(), 7), 4096, num_views=6, per_step=2)

    drawn = np.random.default_rng(derive_seed(7, "replay")).integers(6, size=LARGE)

    assert sampler.starts.dtype == np.uint8
    assert (sampler.starts == drawn).all()


def test_a_loader_process_receives_a_path_and_a_range_whatever_the_number_of_records(tmp_path):
    sizes = []
    for records in (1000, 20_000):
        store = large_store(tmp_path / str(records), {"train": records}, shard_size=100, classes=10)
        dataset = StoreDataset(store, rows_of_split(store.index, "train"))
        assert dataset.has_labels
        dataset.label_numbers, dataset.keys_at([0])  # what was read is not sent either
        sizes.append(len(pickle.dumps(dataset)))

    assert abs(sizes[0] - sizes[1]) < 50  # digits of the numbers, such as the size of each column
    assert sizes[0] < 4000
    copy = pickle.loads(pickle.dumps(dataset))  # noqa: S301
    assert copy.keys_at([7, 3]) == dataset.keys_at([7, 3])
    assert not dataset.label_numbers.flags.owndata  # a view of the mapped file


def test_a_split_of_scattered_shards_is_an_array_of_its_rows(tmp_path):
    def shards():
        for number, split in enumerate(["a", "b", "a"]):
            keys = [f"{number}-{row}" for row in range(4)]
            yield f"s{number}", split, marker_of(split, f"s{number}", keys, [0] * 4)

    store = write_shards(tmp_path / "store", shards(), rows_per_shard=4, classes=1)

    assert rows_of_split(store.index, "b") == range(4, 8)
    assert rows_of_split(store.index, "a").tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert (
        EpochOrder(
            StoreDataset(store, rows_of_split(store.index, "a")).first_positions(), 0
        ).num_records
        == 8
    )


def test_keys_are_found_at_their_positions(tmp_path):
    store = store_of_rows(tmp_path / "store", [(f"k{n}", 0, []) for n in range(30)])
    dataset = StoreDataset(store, range(5, 25))

    assert dataset.positions_of(["k5", "k24", "k4", "k25", "none"]) == {"k5": 0, "k24": 19}


def test_rows_out_of_order_can_be_read_but_not_ordered(frozen):
    rows = np.array([9, 3, 20])
    dataset = StoreDataset(frozen.store, rows)

    keys = [key for batch in iter_batches(dataset, 2) for key in batch.keys]

    assert keys == frozen.store.index.keys(rows)
    with pytest.raises(ValueError, match="ascending"):
        dataset.first_positions()


SIZES = np.array([10, 43, 147])
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(3), SIZES))


def records_of(labels, groups=-1):
    return {"label": np.array(labels, np.int32), "group": np.full(len(labels), groups, np.int32)}


RECORDS = records_of(LABELS)


def order_of(sampling):
    counts = partial(draw_counts, RECORDS, sampling, 3)
    return EpochOrder(first_positions(200, 9), 3, 4, counts=counts)


def test_expected_draws_are_in_proportion_to_a_power_of_the_number_of_records():
    sizes = np.array([1, 4, 25])

    assert expected_draws(sizes, "uniform").tolist() == [1, 4, 25]
    assert expected_draws(sizes, "sqrt").tolist() == [3.75, 7.5, 18.75]
    assert expected_draws(sizes, "balanced").tolist() == [10, 10, 10]
    assert draw_counts(records_of(np.arange(21) % 3), "balanced", 0, 0).tolist() == [1] * 21


@pytest.mark.parametrize("sampling", ["uniform", "sqrt", "balanced"])
def test_each_class_has_its_number_of_draws_and_its_records_share_them_equally(sampling):
    drawn = [draw_counts(RECORDS, sampling, 3, epoch) for epoch in range(40)]

    for counts in drawn:
        assert counts.sum() == 200
        assert (abs(np.bincount(LABELS, counts) - expected_draws(SIZES, sampling)) < 1).all()
        assert all(np.ptp(counts[label == LABELS]) <= 1 for label in range(3))
    assert drawn[0].dtype == np.uint8
    assert (drawn[1] == draw_counts(RECORDS, sampling, 3, 1)).all()
    assert (np.sum(drawn, axis=0) > 0).all()  # others are left out in each epoch


def test_groups_share_the_draws_of_their_class_equally():
    groups = [-2] * 100 + [-1] * 8 + [-2] * 4  # a burst in two classes, and single records

    records = records_of([0] * 104 + [1] * 8, groups)
    counts = draw_counts(records, "balanced", 0, 0).astype(int)

    assert 11 <= counts[:100].sum() <= 12  # a fifth of 56 draws, as each of the four single ones
    assert set(counts[100:104]) <= {11, 12}
    assert 11 <= counts[108:].sum() <= 12


@pytest.mark.parametrize("sampling", ["sqrt", "balanced"])
def test_an_epoch_has_the_drawn_records_in_one_order_for_all_ranks_and_steps(sampling):
    order = order_of(sampling)
    windows = list(order.windows(2))
    repeats, positions = np.divmod(np.concatenate(windows), 200)

    assert (np.bincount(positions, minlength=200) == draw_counts(RECORDS, sampling, 3, 2)).all()
    assert len({*zip(positions, repeats, strict=True)}) == 200
    within = [{*(window % 200).tolist()} for window in windows]
    assert sum(map(len, within)) == len(set.union(*within))  # no record is in two windows
    assert (np.concatenate(list(order.windows(2, 77))) == np.concatenate(windows)[77:]).all()
    ranks = [GlobalBatchSampler(order, 12, rank=rank, world_size=3) for rank in range(3)]
    for sampler in ranks:
        sampler.set_position(2, 5)
    batches = [part.positions for step in zip(*ranks, strict=True) for part in step]
    assert (np.concatenate(batches) == positions[60:192]).all()


def test_repeats_of_a_record_are_in_different_stored_views():
    sampler = ReplayBatchSampler(order_of("balanced"), 20, num_views=16, per_step=2)
    pairs = [pair for part in sampler for pair in zip(part.positions, part.views, strict=True)]

    assert len(set(pairs)) == len(pairs) == 200 * 2


def test_data_without_classes_or_with_several_per_record_are_refused(tmp_path):
    for name, row in {"no": ("a", -1, []), "several": ("a", -1, [0, 2])}.items():
        dataset = StoreDataset(store_of_rows(tmp_path / name, [row]), range(1))
        with pytest.raises(ConfigError, match=rf"sampling=sqrt .*{name}.*data\.weight="):
            TrainLoader(dataset, None, batch_size=1, seed=0, sampling="sqrt")
