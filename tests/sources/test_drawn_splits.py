"""Exact shares of split test, and packed records that keep the split that was drawn."""

from dataclasses import replace

import numpy as np
import pytest

from permafrost.config.data import ImageTableDataConfig
from permafrost.core.tasks import SerialExecutor
from permafrost.sources import source as source_module
from permafrost.sources.drawn_splits import choose_test
from permafrost.sources.source import list_data
from permafrost.store.reader import Store
from permafrost.store.verification import verify_store
from tests.support.image_sets import folder_config, write_images
from tests.support.listings import listing_paths
from tests.support.previews import preview_of
from tests.support.stores import precompute_config
from tests.support.verbs import precompute


def drawn(*sizes, fraction=0.2, seed=0, keep_groups=False):
    """Records of split test of each class."""
    labels = np.repeat(np.arange(len(sizes)) - 1, sizes)
    positions = np.random.default_rng(seed).random(len(labels))
    is_test = choose_test(positions, labels, fraction, keep_groups=keep_groups)
    assert all(
        positions[(labels == label) & is_test].max(initial=-1)
        < positions[(labels == label) & ~is_test].min(initial=2)
        for label in np.unique(labels)
    )
    return [int(is_test[labels == label].sum()) for label in range(-1, len(sizes) - 1)]


@pytest.mark.parametrize("seed", [0, 1])
def test_small_classes_give_exact_shares_and_keep_a_record(seed):
    assert drawn(12, 12, 12, 12, seed=seed) == [3, 3, 2, 2]  # 9.6 of 48
    assert drawn(50, 50, 50, 50, seed=seed) == [10, 10, 10, 10]
    assert drawn(1, 7, 8, seed=seed) == [0, 1, 2]  # 3 of 15
    assert drawn(2, 2, seed=seed) == [1, 0]  # at least one
    assert drawn(2, fraction=0.9, seed=seed) == [1]
    assert drawn(999, 10, seed=seed) == [200, 2]


def test_large_classes_and_classes_of_one_record_are_drawn_by_their_hashes():
    positions = np.random.default_rng(0).random(2000)
    for labels in (np.zeros(2000, int), np.arange(2000)):
        assert np.array_equal(
            choose_test(positions, labels, 0.2, keep_groups=False), positions < 0.2
        )
    assert drawn(2000, 5)[1] == 1


@pytest.mark.parametrize(("sizes", "count"), [([5] * 6, 5), ([10, 10], 10), ([4, 4, 4], 4)])
def test_whole_groups_come_as_near_as_they_can(sizes, count):
    positions = np.repeat(np.random.default_rng(0).random(len(sizes)), sizes)
    is_test = choose_test(positions, np.zeros(len(positions)), 0.2, keep_groups=True)
    assert is_test.sum() == count
    assert not set(positions[is_test]) & set(positions[~is_test])


CLASSES = [f"{name}/{number}.jpg" for name in "abcd" for number in range(12)]


@pytest.fixture
def root(tmp_path):
    write_images(tmp_path / "set", *CLASSES)
    return tmp_path


def config_of(root, append=False, **options):
    data = folder_config(root / "set", test_fraction=0.2, **options)
    config = precompute_config(root / "store", data=data)
    return replace(config, store=replace(config.store, append=append, relist=True))


def splits_in(store):
    table, index = Store(store).shards.table["split"].to_numpy(), Store(store).index
    rows = np.arange(index.num_rows)
    return dict(zip(index.keys(rows), table[index.shard_numbers(rows)].tolist(), strict=True))


def test_a_preview_shows_the_split_that_is_packed_and_then_that_of_the_store(root):
    config = config_of(root)
    shown = preview_of(config.data).counts.records
    precompute.run(config)
    write_images(root / "set", *(f"b/new{number}.jpg" for number in range(20)))
    others = preview_of((config.data, str(root / "store"))).counts.records
    precompute.run(config_of(root, append=True))

    assert shown == {"test": 10, "train": 38}
    assert others == Store(root / "store").manifest.records


def test_packed_records_keep_their_split_when_listed_again_and_when_others_are_appended(root):
    precompute.run(config_of(root))
    before = splits_in(root / "store")
    assert Store(root / "store").manifest.records == {"test": 10, "train": 38}

    assert precompute.run(config_of(root)).packed_records == 0
    write_images(root / "set", *(f"a/new{number}.jpg" for number in range(60)))
    assert precompute.run(config_of(root, append=True)).packed_records == 60
    after = splits_in(root / "store")
    assert precompute.run(config_of(root, append=True)).packed_records == 0

    assert before == {key: after[key] for key in before}
    assert {after[key] for key in after.keys() - before.keys()} == {"train", "test"}
    assert not list(verify_store(root / "store"))


def damage(root):
    """Damage 8 images, and return the options that leave them out."""
    for number in range(8):
        (root / f"set/b/{number}.jpg").write_bytes(b"no image")
    return {"on_error": "skip", "max_skipped": 8, "accept": ("damaged_files",)}


@pytest.mark.parametrize("damaged", [False, True])
def test_a_store_that_was_drawn_by_hashes_alone_is_kept(root, monkeypatch, damaged):
    options = damage(root) if damaged else {}  # of records that were left out, there is no split
    with monkeypatch.context() as patched:
        patched.setattr(source_module, "with_drawn_splits", lambda listing, *_: listing)
        precompute.run(config_of(root, **options))
    before = splits_in(root / "store")

    assert precompute.run(config_of(root, **options)).packed_records == 0

    assert splits_in(root / "store") == before
    assert sum(split == "test" for split in before.values()) != 10 - 2 * damaged


def test_records_that_were_left_out_are_drawn_again_as_at_the_first_packing(root):
    options = damage(root)
    precompute.run(config_of(root, **options))

    assert precompute.run(config_of(root, **options)).packed_records == 0


def test_counts_splits_and_texts_of_a_listing_agree_and_named_splits_stay(tmp_path):
    names = [f"{number}.jpg" for number in range(30)]
    write_images(tmp_path, *names)
    rows = [f"{name},{int(name[:-4]) % 3},{'val' if i < 6 else ''}" for i, name in enumerate(names)]
    (tmp_path / "t.csv").write_text("\n".join(["path,label,split", *rows]))
    data = ImageTableDataConfig(path=str(tmp_path / "t.csv"), split="split", test_fraction=0.25)

    listed = list_data(data, listing_paths(), 0, lambda _: SerialExecutor()).listing
    splits = [record.split for record in listed.records(np.arange(30))]
    names, codes = listed.split_codes()

    assert splits[:6] == ["val"] * 6
    assert [names[code] for code in codes] == splits
    assert listed.counts.records == {"val": 6, "test": 6, "train": 18}
    assert [listed.counts.labeled["test", label] for label in range(3)] == [2, 2, 2]
