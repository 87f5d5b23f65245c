"""Tars listed one by one, by tasks, to the same store as at once."""

from dataclasses import replace

import numpy as np
import pytest

from permafrost.config.store import StoreOptions
from permafrost.core.tasks import SerialExecutor
from permafrost.sources.source import build_source, classes_of_source, list_source
from permafrost.store.reader import Store
from permafrost_sources.webdataset import WebDatasetSource
from tests.support.images import write_tar
from tests.support.listings import list_parts, listing_paths
from tests.support.sources import fingerprint
from tests.support.stores import precompute_config
from tests.support.tars import samples, tar_config
from tests.support.verbs import precompute


@pytest.fixture
def tars(tmp_path):
    for split, number, count in (("train", 0, 5), ("train", 1, 9), ("test", 0, 7)):
        first = 100 * number + 1000 * (split == "test")
        write_tar(tmp_path / f"tars/{split}-{number:06d}.tar", samples(count, first=first))
    write_tar(tmp_path / "tars/train-000002.tar", {})
    return tar_config(tmp_path / "tars")


def test_each_tar_is_one_task(tars):
    asked = []

    class Backwards(SerialExecutor):
        def map_shards(self, task, shards):
            asked.extend(shards)
            return super().map_shards(task, shards[::-1])  # they may finish in any order

    source = build_source(tars)
    listing, _ = list_source(source, listing_paths(), 0, Backwards())

    assert [name for _, name in asked] == list(source.tars)
    assert listing.part_sizes == (7, 5, 9, 0)
    assert listing.records(np.arange(21)) == tuple(source.records())
    assert classes_of_source(source, listing) == source.classes == ("0", "1", "2")


def test_shards_in_place_are_the_tars_with_records(tars):
    source = build_source(tars)
    listing = list_parts(source, StoreOptions(path="store"))

    plans = source.plan_in_place("original", listing)

    names = ["test-000000", "train-000000", "train-000001"]
    assert [plan.name for plan in plans] == names
    assert [plan.reference for plan in plans] == [f"{tars.path}/{name}.tar" for name in names]
    for plan, name in zip(plans, names, strict=True):
        assert plan.records == tuple(source.part_records(f"{name}.tar"))


def test_the_driver_lists_no_tar_itself(tmp_path, tars, monkeypatch):
    (tmp_path / "tars/classes.txt").write_text("0\n1\n2\n")
    expected = fingerprint(tars)

    def refuse(self):
        raise AssertionError("the driver lists all tars")

    monkeypatch.setattr(WebDatasetSource, "records", refuse)
    result = precompute.run(precompute_config(tmp_path / "store", data=tars))

    assert result.packed_records == 21
    manifest = Store(tmp_path / "store").manifest
    assert manifest.dataset.fingerprint == expected
    assert manifest.classes == ("0", "1", "2")


def test_a_subset_of_tars_has_the_records_of_its_classes(tmp_path, tars):
    config = precompute_config(tmp_path / "store", data=replace(tars, only_classes=("2", "0")))

    assert precompute.run(config).packed_records == 3 + 6 + 4
    assert Store(tmp_path / "store").manifest.classes == ("2", "0")
