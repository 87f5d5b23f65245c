"""Loader: records stay with their targets, and the order depends on (seed, epoch) alone."""

import gc
import secrets
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from permafrost.config.augment import AugmentOptions, OperationConfig
from permafrost.config.builder import build_config, to_plain_dict
from permafrost.config.store import SubsetOptions
from permafrost.core.errors import ConfigError
from permafrost.loading import dataset as dataset_module
from permafrost.loading.dataset import StoreDataset, iter_batches
from permafrost.loading.loader import TrainLoader
from permafrost.loading.random_views import ViewSchedule
from permafrost.loading.sampler import EpochOrder, GlobalBatchSampler
from permafrost.loading.subset import rows_of_split, select_holdout_rows, select_training_rows
from permafrost.runs.folder import identity
from permafrost.store.reader import Store, TeacherPass
from tests.support.index_table import index_table
from tests.support.stores import frame_batches, keys_of_shard, precompute_config
from tests.support.synthetic import store_of_rows
from tests.support.verbs import precompute

FIRST_POSITIONS = np.arange(41) * 25  # 1,000 records in 40 shards of 25


def batches_of(epoch, *, batch_size=64, rank=0, world_size=1, seed=0, first_step=0):
    batches = GlobalBatchSampler(
        EpochOrder(FIRST_POSITIONS, seed), batch_size, rank=rank, world_size=world_size
    )
    batches.epoch, batches.first_step = epoch, first_step
    places = list(batches)
    share = batch_size // world_size
    for step, batch in enumerate(places, start=first_step):
        assert (batch.epoch, batch.first) == (epoch, step * batch_size + rank * share)
    return [batch.positions.tolist() for batch in places]


# ---- order ---------------------------------------------------------------------------------------


def test_an_epoch_visits_every_record_at_most_once_and_drops_only_the_last_partial_batch():
    visited = [position for batch in batches_of(0) for position in batch]

    assert len(visited) == 15 * 64
    assert len(set(visited)) == len(visited)


def test_every_record_is_visited_over_a_few_epochs():
    visited = {position for epoch in range(8) for batch in batches_of(epoch) for position in batch}

    assert visited == set(range(1000))


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_share_the_global_batches_of_one_process(world_size):
    ranks = [batches_of(3, rank=rank, world_size=world_size) for rank in range(world_size)]

    joined = [[p for part in step for p in part] for step in zip(*ranks, strict=True)]

    assert joined == batches_of(3)


def test_another_epoch_or_seed_is_another_order():
    assert batches_of(0) == batches_of(0)
    assert batches_of(0) != batches_of(1)
    assert batches_of(0) != batches_of(0, seed=1)


def test_starting_at_a_step_continues_the_same_epoch():
    assert batches_of(2, first_step=7) == batches_of(2)[7:]


def test_memory_stays_flat_since_a_step_reads_one_window_of_shards():
    order = EpochOrder(FIRST_POSITIONS, seed=0, window=4)

    windows = list(order.windows(0))

    assert [len(window) for window in windows] == [100] * 10
    assert all(len(set(window // 25)) == 4 for window in windows)


def test_neighbors_in_the_store_do_not_stay_neighbors():
    order = np.concatenate(list(EpochOrder(FIRST_POSITIONS, seed=0).windows(0)))
    place = np.argsort(order)

    # With windows of 16 of 40 shards, this is far above the 1/1000 of an unshuffled store.
    assert np.abs(np.diff(place)).mean() / 1000 > 0.1


def test_a_batch_larger_than_the_selection_or_uneven_over_ranks_is_refused():
    with pytest.raises(ConfigError, match="1000 records"):
        GlobalBatchSampler(EpochOrder(FIRST_POSITIONS, 0), 1001)
    with pytest.raises(ConfigError, match="must be a multiple of 3"):
        GlobalBatchSampler(EpochOrder(FIRST_POSITIONS, 0), 64, world_size=3)


# ---- selection -----------------------------------------------------------------------------------


def labels_of(index, rows):
    return index.values("label", np.asarray(rows))


def test_shots_are_class_balanced_nested_and_fixed_by_their_own_seed(frozen):
    index = frozen.store.index
    smallest = np.bincount(labels_of(index, rows_of_split(index, "train")), minlength=10)
    shots = int(smallest[smallest > 0].min())

    one = select_training_rows(index, "train", SubsetOptions(shots=1))
    more = select_training_rows(index, "train", SubsetOptions(shots=shots))
    other = [
        select_training_rows(index, "train", SubsetOptions(shots=1, seed=s)) for s in range(1, 9)
    ]

    assert np.bincount(labels_of(index, one)).max() == 1
    assert set(one) <= set(more)
    assert any(set(one) != set(rows) for rows in other)


def test_held_out_records_are_never_trained_on(frozen):
    index = frozen.store.index
    everything = set(rows_of_split(index, "train"))
    held_out = everything - set(select_training_rows(index, "train", SubsetOptions(holdout=1)))

    assert len(held_out) == len(np.unique(labels_of(index, sorted(everything))))


def test_of_many_labels_a_record_counts_for_each_of_its_classes(index_of):
    generator = np.random.default_rng(0)
    sets = [sorted(generator.permutation(5)[: generator.integers(1, 4)]) for _ in range(60)]
    index = index_of([(f"k{n}", -1, labels) for n, labels in enumerate(sets)])

    def counts(rows):
        return np.bincount([label for row in rows for label in sets[row]], minlength=5)

    subset = SubsetOptions(holdout=2, shots=3, seed=1)
    holdout = select_holdout_rows(index, "train", subset)
    shots = select_training_rows(index, "train", subset)
    more = select_training_rows(index, "train", replace(subset, shots=6))
    rest = select_training_rows(index, "train", replace(subset, shots=None))
    assert counts(holdout).min() >= 2
    assert counts(shots).min() >= 3
    assert len(shots) <= 5 * 3
    assert not set(shots) & set(holdout)
    assert set(shots) <= set(more) <= set(rest)
    assert sorted([*holdout, *rest]) == list(range(60))
    assert not np.array_equal(shots, select_training_rows(index, "train", replace(subset, seed=2)))
    with pytest.raises(ConfigError, match=r"shots=50, but class '0' .* after the holdout"):
        select_training_rows(index, "train", replace(subset, shots=50))


@pytest.mark.parametrize("shots", [None, 1])
@pytest.mark.parametrize(
    ("records", "holdout", "fits"),
    [
        ([*[[0]] * 9, *[[1]] * 4], 4, 3),
        ([*[[0, 1]] * 4, *[[2]] * 9], 3, 2),  # each of two classes holds out records of both
    ],
)
def test_a_holdout_that_leaves_no_record_of_a_class_is_refused(
    index_of, records, holdout, fits, shots
):
    many = len(records[0]) > 1
    rows = [
        (f"k{n}", -1 if many else names[0], names if many else [])
        for n, names in enumerate(records)
    ]
    index, subset = index_of(rows), SubsetOptions(holdout=holdout, shots=shots)

    for select in (select_training_rows, select_holdout_rows):
        with pytest.raises(
            ConfigError, match=rf"{holdout} holds out all 4 .* subset\.holdout={fits} or less"
        ):
            select(index, "train", subset)

    left = select_training_rows(index, "train", replace(subset, holdout=fits, shots=None))
    assert {label for row in left for label in records[row]} == {
        label for names in records for label in names
    }


def test_a_class_that_any_holdout_empties_is_named(index_of, caplog):
    rows = [(f"k{n}", int(n == 8), []) for n in range(9)]

    select_training_rows(index_of(rows), "train", SubsetOptions(holdout=2))

    assert (
        "no training record of 1 small classes of split train, whatever its value: '1'"
        in caplog.text
    )


def test_sets_of_one_label_are_chosen_as_single_labels_are(index_of):
    labels = np.random.default_rng(0).integers(0, 4, 40).tolist()
    one = index_of([(f"k{n}", label, []) for n, label in enumerate(labels)])
    sets = index_of([(f"k{n}", -1, [label]) for n, label in enumerate(labels)])

    for options in ({"shots": 3}, {"holdout": 2}, {"shots": 2, "holdout": 1}):
        subset = SubsetOptions(**options)
        chosen = select_training_rows(one, "train", subset)
        assert np.array_equal(select_training_rows(sets, "train", subset), chosen)


def test_a_record_of_which_no_label_is_known_belongs_to_no_class(index_of):
    for first in (("a", -1, []), ("a", -1, [0])):
        index = index_of([first, ("b", 1, []), ("c", 1, [])])

        with pytest.raises(
            ConfigError, match="need labels, but split 'train' has unlabeled records"
        ):
            select_training_rows(index, "train", SubsetOptions(shots=1))


# ---- selection by key ----------------------------------------------------------------------------


BY_KEY = SubsetOptions(shots=4, holdout=2, seed=3, rule="by_key")


def rows_of_classes(first, classes, records=12):
    return [
        (f"{label}/{n:03d}.png", label, [])
        for label in classes
        for n in range(first, first + records)
    ]


def chosen_keys(index, subset):
    """Keys of the chosen and of the held-out records."""
    return [
        index.keys(select(index, "train", subset))
        for select in (select_training_rows, select_holdout_rows)
    ]


def digest_by_hand(key, seed):
    """FNV-1a from the mixed seed, and fmix64, in Python's integers."""
    bits = 2**64 - 1

    def mix(value):
        for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            value = (value ^ value >> 33) * factor & bits
        return value ^ value >> 33

    value = mix(seed)
    for byte in key.encode():
        value = (value ^ byte) * 0x100000001B3 & bits
    return mix(value)


def test_digests_of_keys_are_those_by_hand_whatever_their_lengths_and_order(index_of):
    keys = ["a", "aa", "b" * 90, "\u00fc/\u6f22", *(f"img{n}" for n in range(40))]
    index = index_of([(key, 0, []) for key in keys])
    rows = np.random.default_rng(0).permutation(len(keys))

    for seed in (0, 1, 2**32 - 1):
        expected = [digest_by_hand(key, seed) for key in index.keys(rows)]
        assert index.key_digests(rows, seed).tolist() == expected
    assert len(set(index.key_digests(rows, 0).tolist())) == len(keys)


def test_by_key_other_classes_in_the_store_change_no_selection(index_of):
    """Control: a permutation is another one, as the numbers of the classes are others."""
    small = rows_of_classes(0, (1, 2))
    others = rows_of_classes(0, (0, 3, 4, 5, 6, 7, 8, 9))
    alone = index_of([(key, label - 1, []) for key, label, _ in small])
    beside = index_of(small + others)

    def of_small(keys):
        return {key for key in keys if key[0] in "12"}

    for subset, is_same in ((BY_KEY, True), (replace(BY_KEY, rule="permutation"), False)):
        one, more = chosen_keys(alone, subset), chosen_keys(beside, subset)
        assert [len(keys) for keys in one] == [8, 4]
        assert ([set(keys) for keys in one] == [of_small(keys) for keys in more]) == is_same


def test_by_key_other_records_of_a_class_displace_some_and_reorder_none(index_of):
    small = index_of(rows_of_classes(0, (0,)))
    large = index_of(rows_of_classes(0, (0,), records=60))

    def order(index, most):
        """Keys in the order in which more and more shots choose them."""
        subsets = [SubsetOptions(shots=n, rule="by_key") for n in range(1, most + 1)]
        chosen = [set(index.keys(select_training_rows(index, "train", s))) for s in subsets]
        return [(now - before).pop() for before, now in zip([set(), *chosen], chosen, strict=False)]

    own, beside = order(small, 12), order(large, 60)

    assert [key for key in beside if key in own] == own
    assert beside[:12] != own
    for shots in (5, 20, 40):
        kept = [key for key in beside[:shots] if key in own]
        assert kept == own[: len(kept)]


def test_by_key_every_record_is_as_likely_as_every_other(index_of):
    index = index_of(rows_of_classes(0, (0,), records=60))
    counts = np.zeros(60)
    for seed in range(400):
        subset = SubsetOptions(shots=15, seed=seed, rule="by_key")
        counts[select_training_rows(index, "train", subset)] += 1

    assert counts.sum() == 400 * 15
    assert abs(counts / 400 - 1 / 4).max() < 5 * np.sqrt(3 / 16 / 400)


def test_an_identity_has_the_rule_only_if_it_is_not_that_of_earlier_runs():
    values = to_plain_dict(SubsetOptions(shots=3))

    assert identity(values, SubsetOptions) == {"shots": 3, "seed": 0, "holdout": 0}
    by_key = to_plain_dict(replace(BY_KEY, shots=3))
    assert identity(by_key, SubsetOptions)["rule"] == "by_key"
    earlier = {"shots": 3, "seed": 0, "holdout": 0}
    assert build_config(SubsetOptions, earlier) == SubsetOptions(shots=3)


@pytest.fixture
def index_of(tmp_path):
    """Function that makes an index of rows of (key, label, labels)."""

    def write(rows):
        return store_of_rows(tmp_path / secrets.token_hex(4), rows).index

    return write


def test_the_holdout_is_class_balanced_and_apart_from_training_whatever_the_shots(frozen):
    index = frozen.store.index
    everything = rows_of_split(index, "train")
    holdout = select_holdout_rows(index, "train", SubsetOptions(holdout=1, seed=3))
    rest = select_training_rows(index, "train", SubsetOptions(holdout=1, seed=3))
    few = SubsetOptions(holdout=1, seed=3, shots=1)

    assert sorted([*holdout, *rest]) == sorted(everything)
    assert sorted(labels_of(index, holdout)) == sorted(set(labels_of(index, everything)))
    assert np.array_equal(select_holdout_rows(index, "train", few), holdout)
    assert set(holdout) != set(select_holdout_rows(index, "train", SubsetOptions(holdout=1)))


@pytest.mark.parametrize(
    ("holdout", "message"),
    [
        (0, "subset.holdout=0 holds out no"),
        (1000, r"holdout=1000 holds out all \d+ .* set subset\.holdout=\d+ or less"),
    ],
)
def test_a_holdout_of_nothing_or_of_more_than_there_is_is_refused(frozen, holdout, message):
    with pytest.raises(ConfigError, match=message):
        select_holdout_rows(frozen.store.index, "train", SubsetOptions(holdout=holdout))


def test_more_shots_than_there_are_is_refused_with_the_class(frozen):
    with pytest.raises(
        ConfigError, match=r"subset\.shots=1000, but class '.*; lower subset\.shots"
    ):
        select_training_rows(frozen.store.index, "train", SubsetOptions(shots=1000))


def test_a_split_that_does_not_exist_lists_those_that_do(frozen):
    with pytest.raises(ConfigError, match="teacher, test, test_swapped, train"):
        rows_of_split(frozen.store.index, "valid")


# ---- records with their targets ------------------------------------------------------------------


def targets_by_key(store):
    """Read the targets directly from the stored columns, without a dataset."""
    teacher = store.open_passes()[0]
    by_key = {}
    for shard in store.manifest.shards:
        values = teacher.read_shard(shard)
        for row, key in enumerate(keys_of_shard(store, shard)):
            by_key[key] = {name: array[row, 0] for name, array in values.items()}
    return by_key


def pixels_by_key(store):
    return {
        key: frame
        for shard in store.manifest.shards
        for batch in frame_batches(store, shard, shard.records)
        for key, frame in zip(keys_of_shard(store, shard), batch.frames, strict=True)
    }


@pytest.mark.parametrize(
    "subset", [SubsetOptions(), SubsetOptions(shots=1), SubsetOptions(holdout=1)]
)
def test_image_logits_class_and_map_stay_together_under_any_selection_rank_and_resume(
    frozen, subset
):
    store = frozen.store
    expected, pixels = targets_by_key(store), pixels_by_key(store)
    labels = dict(
        zip(
            index_table(store)["key"].to_pylist(),
            index_table(store)["label"].to_pylist(),
            strict=True,
        )
    )
    rows = select_training_rows(store.index, "train", subset)
    seen = 0

    for rank in range(2):
        dataset = StoreDataset(store, rows, [store.open_passes()[0]])
        views = ViewSchedule(AugmentOptions(), store.size, 0)
        stream = TrainLoader(dataset, views, batch_size=4, seed=0, rank=rank, world_size=2)
        for batch in stream.epoch(1, first_step=1):
            for i, key in enumerate(batch.keys):
                stored = expected[key]
                assert torch.equal(batch.inputs[i], pixels[key])
                assert batch.labels[i] == labels[key]
                targets = batch.targets[0]
                np.testing.assert_array_equal(
                    targets.logits[i], stored["logits"].astype(np.float32)
                )
                np.testing.assert_array_equal(targets.maps[i], stored["map"].astype(np.float32))
                assert targets.target_class[i].tolist() == stored["target_class"].tolist()
                assert index_table(store)["key"][int(rows[batch.record_index[i]])].as_py() == key
                seen += 1
    assert seen == (len(rows) // 4 - 1) * 4


def test_evaluation_sees_every_record_exactly_once(frozen):
    rows = rows_of_split(frozen.store.index, "train")
    dataset = StoreDataset(frozen.store, rows)

    keys = [key for batch in iter_batches(dataset, 7) for key in batch.keys]

    assert sorted(keys) == sorted(frozen.store.index.keys(rows))


def test_views_belong_to_positions_so_ranks_and_batch_sizes_change_nothing(frozen):
    rows = rows_of_split(frozen.store.index, "train")
    augment = AugmentOptions(operations=(OperationConfig(kind="pad_crop", padding=2),))
    found = {}

    for batch_size, world_size in ((8, 1), (8, 2), (8, 4)):
        views = ViewSchedule(augment, frozen.store.size, 5)
        for rank in range(world_size):
            stream = TrainLoader(
                StoreDataset(frozen.store, rows),
                views,
                batch_size=batch_size,
                seed=5,
                rank=rank,
                world_size=world_size,
            )
            for batch in stream.epoch(2):
                for key, view in zip(batch.keys, batch.canonical_from_view, strict=True):
                    assert torch.equal(found.setdefault(key, view), view)


@pytest.mark.slow
def test_loader_processes_change_nothing(frozen):
    rows = rows_of_split(frozen.store.index, "train")
    views = ViewSchedule(AugmentOptions(), frozen.store.size, 0)
    streams = [
        TrainLoader(
            StoreDataset(frozen.store, rows, [frozen.store.open_passes()[0]]),
            views,
            batch_size=8,
            seed=0,
            loader_processes=n,
        )
        for n in (0, 1)
    ]

    epochs = [
        [(b.keys, b.inputs, b.targets[0].maps) for b in stream.epoch(0)] for stream in streams
    ]

    assert len(epochs[0]) == 5
    for (keys, inputs, maps), (other_keys, other_inputs, other_maps) in zip(*epochs, strict=True):
        assert keys == other_keys
        assert torch.equal(inputs, other_inputs)
        assert torch.equal(maps, other_maps)


def test_a_store_without_a_teacher_serves_labels(frozen):
    dataset = StoreDataset(frozen.store, rows_of_split(frozen.store.index, "teacher"))

    batch = dataset.__getitems__([3, 0])

    assert batch.targets == ()
    assert batch.keys[1] == dataset.__getitems__([0]).keys[0]


def test_regions_are_read_on_demand(frozen):
    rows = rows_of_split(frozen.store.index, "test")
    dataset = StoreDataset(frozen.store, rows, with_regions=True)

    batch = dataset.__getitems__([0, 1])

    assert batch.masks.shape == (2, 1, 16, 16)
    assert [tuple(boxes.shape) for boxes in batch.boxes] == [(1, 5), (1, 5)]
    assert [int(boxes[0, 0]) for boxes in batch.boxes] == batch.labels.tolist()


def test_files_held_open_are_bounded_whatever_the_number_of_shards(frozen, monkeypatch):
    monkeypatch.setattr(dataset_module, "_OPEN_SHARDS", 1)
    dataset = StoreDataset(frozen.store, rows_of_split(frozen.store.index, "train"))
    assert len(dataset.store.index.shards_of(dataset.rows)) > 2

    def tars_open():
        links = (link.readlink() for link in Path("/proc/self/fd").iterdir() if link.is_symlink())
        return sum(str(link).startswith(str(frozen.store.path)) for link in links)

    gc.collect()  # files of earlier tests' datasets are closed now, and not below
    before = tars_open()
    batch = dataset.__getitems__(list(range(len(dataset))))

    assert len(batch.keys) == len(dataset)
    assert tars_open() - before == 1


@pytest.mark.parametrize(
    ("budget", "opened_again"), [pytest.param(2**20, False, marks=pytest.mark.slow), (0, True)]
)
def test_few_records_of_many_shards_are_read_once(
    tmp_path, tiny_teacher, monkeypatch, budget, opened_again
):
    """The records of a few-shot student are spread over more shards than a window contains."""
    config = precompute_config(tmp_path / "store", tiny_teacher, shard_size=2)
    precompute.run(config)
    store = Store(tmp_path / "store")
    opened = []
    read = TeacherPass.open_shard
    monkeypatch.setattr(
        TeacherPass, "open_shard", lambda *asked: opened.append(asked[1].name) or read(*asked)
    )
    monkeypatch.setattr(dataset_module, "_KEPT_BYTES", budget)
    monkeypatch.setattr(dataset_module, "_CACHED_SHARDS", 2)
    rows = rows_of_split(store.index, "train")
    dataset = StoreDataset(store, rows, store.open_passes())

    for _ in range(2):
        for batch in iter_batches(dataset, 5):
            assert batch.targets

    assert len(set(opened)) > 2
    assert (len(opened) > len(set(opened))) == opened_again
