"""Stores in a bucket: the bytes of a local store, and nothing lost or silent when requests fail or bytes change."""

import contextlib
from pathlib import Path

import numpy as np
import obstore
import pytest

from permafrost.config.augment import AugmentOptions
from permafrost.config.data import ImageFolderDataConfig
from permafrost.config.store import StoreOptions
from permafrost.core.errors import ConfigError, FileError, UserError
from permafrost.loading.dataset import StoreDataset, iter_batches
from permafrost.loading.loader import TrainLoader
from permafrost.loading.random_views import ViewSchedule
from permafrost.loading.subset import rows_of_split
from permafrost.storage import buckets, lock
from permafrost.storage.rooted_paths import rooted
from permafrost.store import deaths
from permafrost.store.reader import Store
from permafrost.store.verification import verify_store
from permafrost_sources.options import WebDatasetDataConfig
from tests.support.buckets import contents, count_downloads, files_below, memory_buckets, stop_after
from tests.support.kills import Killed
from tests.support.slow import slow
from tests.support.stores import precompute_config
from tests.support.verbs import precompute

ADDRESS = "s3://bucket/store"


@pytest.fixture(scope="module")
def local(tmp_path_factory, tiny_teacher):
    """A store of this machine, with a pass."""
    folder = tmp_path_factory.mktemp("local") / "store"
    precompute.run(precompute_config(folder, tiny_teacher))
    return folder


@pytest.fixture
def bucket(tmp_path):
    with memory_buckets(tmp_path / "cache"):
        yield buckets._client("s3://bucket")


def upload(bucket, folder: Path, name: str = "store") -> None:
    """Copy a folder to the bucket, as other programs do."""
    for path, data in files_below(folder).items():
        obstore.put(bucket, f"{name}/{path}", data)


@pytest.mark.parametrize("backend", ["zarr", slow("webdataset")])
def test_a_store_made_in_a_bucket_has_the_bytes_of_a_local_one(
    bucket, tmp_path, tiny_teacher, backend
):
    result = precompute.run(precompute_config(ADDRESS, tiny_teacher, backend=backend))
    precompute.run(precompute_config(tmp_path / "own", tiny_teacher, backend=backend))
    assert result.store == ADDRESS
    assert contents(bucket, "store") == files_below(tmp_path / "own")
    assert list(verify_store(rooted(ADDRESS))) == []
    again = precompute.run(precompute_config(ADDRESS, tiny_teacher, backend=backend))
    assert (again.packed_records, again.teacher_records) == (0, 0)


def test_a_store_that_stock_tools_copied_to_a_bucket_and_back_verifies_at_each_stop(
    bucket, tmp_path, local
):
    upload(bucket, local)
    assert list(verify_store(rooted(ADDRESS))) == []
    for name, data in contents(bucket, "store").items():
        path = tmp_path / "back" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    assert list(verify_store(tmp_path / "back")) == []


def batches_of(store: Store, **options):
    dataset = StoreDataset(store, rows_of_split(store, "train"), store.open_passes(), **options)
    return [
        (
            batch.keys,
            batch.inputs.numpy(),
            batch.targets[0].logits.numpy(),
            batch.targets[0].maps.numpy(),
        )
        for batch in iter_batches(dataset, 7)
    ]


def assert_equal(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one[0] == other[0]
        for a, b in zip(one[1:], other[1:], strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("keep_bytes", [0, 2**30])
def test_readers_of_a_bucket_have_the_records_of_a_local_store(bucket, local, keep_bytes):
    upload(bucket, local)
    assert_equal(
        batches_of(Store(ADDRESS), keep_bytes=keep_bytes), batches_of(Store(local), keep_bytes=0)
    )


@pytest.mark.parametrize("backend", [pytest.param("zarr", marks=pytest.mark.slow), "webdataset"])
def test_a_damaged_copy_in_the_cache_is_never_used_and_the_store_is_not_blamed(
    bucket, tmp_path, tiny_teacher, backend
):
    precompute.run(precompute_config(tmp_path / "own", tiny_teacher, backend=backend))
    upload(bucket, tmp_path / "own")
    expected = batches_of(Store(ADDRESS), keep_bytes=0)
    copies = [path for path in (tmp_path / "cache").rglob("??/*") if path.is_file()]
    refused = 0
    columns = {file.sha256 for file in Store(ADDRESS).manifest.index.values()}
    for copy in copies:
        whole = copy.read_bytes()
        middle = len(whole) // 2
        if copy.name in columns:  # whose values are compared by verify alone
            copy.write_bytes(whole[:-1] + b"?")
            (problem,) = verify_store(Store(ADDRESS).folder)
            assert "the copy of s3://bucket/store/index/" in problem
            assert not copy.exists()
            copy.write_bytes(whole[:-1])
            with pytest.raises(FileError, match="the copy of s3://bucket/store/index/"):
                batches_of(Store(ADDRESS), keep_bytes=0)
            refused += 2 * (not copy.exists())
            continue
        for damaged in (whole[:middle], whole[:middle] + bytes(len(whole) - middle)):
            copy.write_bytes(damaged)
            with contextlib.suppress(FileError):
                # What a batch does not read, such as padding of a tar, is not compared.
                assert_equal(batches_of(Store(ADDRESS), keep_bytes=0), expected)
                copy.write_bytes(whole)
            refused += not copy.exists()
            assert_equal(batches_of(Store(ADDRESS), keep_bytes=0), expected)
            assert copy.read_bytes() == whole
    assert refused > len(copies)


def test_few_records_of_a_shard_are_read_by_ranges_and_many_from_one_download(
    bucket, local, monkeypatch
):
    upload(bucket, local)
    store = Store(ADDRESS)
    ranges, read_range = [], buckets.read_range
    monkeypatch.setattr(
        buckets, "read_range", lambda *words: ranges.append(words) or read_range(*words)
    )
    rows = np.array([r for r in rows_of_split(store, "train") if r % 8 == 0])
    few = StoreDataset(store, rows, store.open_passes())
    for _ in range(2):  # decoded once, so asked for once
        list(iter_batches(few, 3))
    assert len(ranges) == len(few) > 1
    assert all(address.endswith(".tar") for address, _, _ in ranges)
    ranges.clear()
    list(iter_batches(StoreDataset(store, rows_of_split(store, "train"), store.open_passes()), 3))
    assert ranges == []


def test_an_epoch_fetches_its_shards_ahead_and_a_second_one_sends_no_request_for_them(
    bucket, local, monkeypatch
):
    upload(bucket, local)
    store = Store(ADDRESS)
    dataset = StoreDataset(store, rows_of_split(store, "train"), store.open_passes(), keep_bytes=0)
    asked = []
    monkeypatch.setattr(
        "permafrost.storage.fetch_ahead.FetchAhead.ask", lambda _, files: asked.extend(files)
    )
    views = ViewSchedule(AugmentOptions(), store.size, 0)
    loader = TrainLoader(dataset, views, batch_size=8, seed=0)
    first = [batch.keys for batch in loader.epoch(0)]
    shards = {shard.path for shard in store.shards if shard.split == "train"}
    assert {str(file.path).removeprefix(f"{ADDRESS}/") for file in asked} >= shards
    downloads = count_downloads(monkeypatch)
    fresh = StoreDataset(store, rows_of_split(store, "train"), store.open_passes(), keep_bytes=0)
    loader = TrainLoader(fresh, views, batch_size=8, seed=0)
    assert [batch.keys for batch in loader.epoch(0)] == first
    assert downloads == []


def test_a_cache_smaller_than_two_windows_of_shards_is_refused_with_the_number(bucket, local):
    upload(bucket, local)
    options = StoreOptions(path=ADDRESS, cache_bytes=30_000)
    store = Store(options.folder)
    with pytest.raises(ConfigError, match=r"store\.cache_bytes=30000 must be >= \d+") as error:
        StoreDataset(store, rows_of_split(store, "train"), store.open_passes())
    enough = int(str(error.value).split(">= ")[1].split(":")[0])
    store = Store(StoreOptions(path=ADDRESS, cache_bytes=enough).folder)
    assert_equal(batches_of(store, keep_bytes=0), batches_of(Store(local)))


def test_options_of_a_cache_without_a_bucket_are_refused():
    with pytest.raises(ConfigError, match="are for buckets"):
        StoreOptions(path="stores/demo", cache_bytes=1000)


# ---- damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_every_object_that_is_damaged_or_missing_is_named_by_verify(bucket, local, every):
    upload(bucket, local)
    whole = contents(bucket, "store")
    others = (".origin.json", "facts.json")  # no parts of the store
    whole = {
        name: data
        for name, data in whole.items()
        if not name.startswith("thumbnails/") and not name.endswith(others)
    }
    for name, data in list(whole.items())[::every]:
        middle = len(data) // 2
        obstore.put(
            bucket, f"store/{name}", data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        )
        assert any(
            name in line or Path(name).stem in line for line in verify_store(rooted(ADDRESS))
        ), name
        obstore.delete(bucket, f"store/{name}")
        assert any(
            name in line or Path(name).stem in line for line in verify_store(rooted(ADDRESS))
        ), name
        obstore.put(bucket, f"store/{name}", data)
    assert list(verify_store(rooted(ADDRESS))) == []


def test_a_store_that_is_replaced_under_its_address_is_read_anew(
    bucket, local, tmp_path, tiny_teacher
):
    upload(bucket, local)
    batches_of(Store(ADDRESS))  # fills the cache
    precompute.run(precompute_config(tmp_path / "other", tiny_teacher, image_size=24))
    for name in contents(bucket, "store"):
        obstore.delete(bucket, f"store/{name}")
    upload(bucket, tmp_path / "other")
    assert_equal(batches_of(Store(ADDRESS)), batches_of(Store(tmp_path / "other")))


# ---- interrupted writers -------------------------------------------------------------------------


@pytest.mark.parametrize("every", [slow(1), 29])
def test_a_writer_that_ends_at_any_request_loses_nothing(
    tmp_path, local, tiny_teacher, monkeypatch, every
):
    monkeypatch.setattr(lock, "EXPIRY_SECONDS", 0.0)  # the dead writer's lease
    points = 0
    while True:
        with memory_buckets(tmp_path / "cache"):
            bucket = buckets._client("s3://bucket")
            with monkeypatch.context() as patch, contextlib.suppress(Killed):
                left = stop_after(patch, points)
                precompute.run(precompute_config(ADDRESS, tiny_teacher))
            if left[0] > 0:
                break
            made = contents(bucket, "store")
            if any(n.startswith("teachers") and n.endswith("manifest.json") for n in made):
                assert list(verify_store(rooted(ADDRESS))) == []
            precompute.run(precompute_config(ADDRESS, tiny_teacher))
            made = contents(bucket, "store")
            made.pop(".lock", None)  # of a writer that had ended but for it, whose lease is over
            assert made == files_below(local)
        points += every
    assert points >= 29 * 2


def test_three_preemptions_at_one_shard_are_no_poison(bucket, local, tiny_teacher, monkeypatch):
    tried, find_fatal = [], deaths.find_fatal
    monkeypatch.setattr(
        deaths, "find_fatal", lambda keys, work: tried.append(len(keys)) or find_fatal(keys, work)
    )
    obstore.put(bucket, "store/commits/.train-000001.deaths", b"3\n")
    precompute.run(precompute_config(ADDRESS, tiny_teacher))
    assert tried == [16]  # the records of that shard, each alone
    assert contents(bucket, "store") == files_below(local)


def test_a_manifest_of_another_writer_is_never_replaced(bucket, tiny_teacher, monkeypatch):
    from permafrost.store import commit

    write = commit.write_manifest

    def meanwhile(folder, manifest):
        obstore.put(bucket, "store/manifest.json", b"another writer's")
        write(folder, manifest)

    monkeypatch.setattr(commit, "write_manifest", meanwhile)
    with pytest.raises(FileError, match=r"s3://bucket/store/manifest\.json was written by another"):
        precompute.run(precompute_config(ADDRESS))
    assert bytes(obstore.get(bucket, "store/manifest.json").bytes()) == b"another writer's"


# ---- sources -------------------------------------------------------------------------------------


def test_images_in_folders_of_a_bucket_are_packed_as_those_of_a_local_folder(bucket, tmp_path):
    from PIL import Image

    for number in range(6):
        path = tmp_path / "photos" / f"class {number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (number, 0, 0)).save(path)
    upload(bucket, tmp_path / "photos", "photos")
    for path, data in (("local", str(tmp_path / "photos")), (ADDRESS, "s3://bucket/photos")):
        precompute.run(precompute_config(path, data=ImageFolderDataConfig(path=data)))
    made, own = contents(bucket, "store"), files_below(Path("local"))
    assert {n for n in own if made.get(n) != own[n]} <= {".origin.json"}
    again = precompute.run(
        precompute_config(ADDRESS, data=ImageFolderDataConfig(path="s3://bucket/photos"))
    )
    assert again.packed_records == 0
    Image.new("RGB", (16, 16)).save(tmp_path / "new.png")
    obstore.put(bucket, "photos/class 0/new.png", (tmp_path / "new.png").read_bytes())
    with pytest.raises(UserError, match="contains data"):
        precompute.run(
            precompute_config(ADDRESS, data=ImageFolderDataConfig(path="s3://bucket/photos"))
        )


def test_tars_of_a_bucket_are_indexed_where_they_are(bucket, local):
    tars = sorted((local / "images").glob("train-*.tar"))
    for path in tars:
        obstore.put(bucket, f"data/{path.name}", path.read_bytes())
    obstore.put(bucket, "data/classes.txt", "\n".join(Store(local).manifest.classes).encode())
    data = WebDatasetDataConfig(path="s3://bucket/data", reference="always", key_prefix="none")
    precompute.run(precompute_config(ADDRESS, data=data))
    store = Store(ADDRESS)
    assert [shard.path for shard in store.shards] == [f"s3://bucket/data/{p.name}" for p in tars]
    dataset = StoreDataset(store, range(store.index.num_rows))
    local_store = Store(local)
    own = StoreDataset(local_store, rows_of_split(local_store, "train"))
    (batch,), (expected,) = (list(iter_batches(each, 1000)) for each in (dataset, own))
    order = np.argsort(batch.keys), np.argsort(expected.keys)
    np.testing.assert_array_equal(batch.inputs.numpy()[order[0]], expected.inputs.numpy()[order[1]])
    assert list(verify_store(rooted(ADDRESS))) == []
    with pytest.raises(ConfigError, match=r"names no \.tar"):
        precompute.run(
            precompute_config("s3://bucket/x", data=WebDatasetDataConfig(path="s3://bucket/none"))
        )
