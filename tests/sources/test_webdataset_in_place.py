"""Tars written elsewhere: listed one by one by tasks, downloaded, indexed in place or repacked."""

import http.server
import io
import tarfile
import threading
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from permafrost.config.store import StoreOptions
from permafrost.core.errors import ConfigError
from permafrost.core.tasks import SerialExecutor
from permafrost.loading.dataset import StoreDataset
from permafrost.sources.source import build_source, classes_of_source, list_source
from permafrost.storage.files import file_at
from permafrost.store.reader import Store
from permafrost.store.verification import verify_store
from permafrost_sources.downloads import DownloadError, download
from permafrost_sources.webdataset import WebDatasetSource
from tests.support.images import png, write_tar
from tests.support.index_table import index_table
from tests.support.listings import list_parts, listing_paths
from tests.support.paths import SHARED_DATA
from tests.support.sources import fingerprint
from tests.support.stores import precompute_config
from tests.support.tars import samples, tar_config
from tests.support.verbs import precompute

CIFAR = SHARED_DATA / "cifar10"


# ---- from the network ----------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    """Ask the servers of this machine directly, whatever proxy its environment names."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody answers there
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server(tmp_path):
    """Local HTTP server of <tmp_path>/served, whose responses to paths below /cut and /chunked end early."""
    served, asked = tmp_path / "served", []
    served.mkdir()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            how, _, name = self.path[1:].partition("/")
            data = (served / name.partition("?")[0]).read_bytes() if how != "gone" else None
            if data is None:
                self.send_error(404)
                return
            self.send_response(200)
            if how == "chunked":
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self.wfile.write(b"1000\r\n" + data[:100])
                return
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if how == "cut" else data)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", served, asked
        running.shutdown()
        thread.join()


def test_tars_of_an_address_are_kept_and_asked_for_once(tmp_path, server):
    address, served, asked = server
    for number in range(2):
        write_tar(served / f"train-{number:02d}.tar", samples(3, first=10 * number))
    config = tar_config(
        f"{address}/whole/train-{{00..01}}.tar?key=1", cache=str(tmp_path / "cache")
    )

    source = build_source(config)

    assert [record.key for record in source.records()] == [
        f"train-{n:04d}" for n in (0, 1, 2, 10, 11, 12)
    ]
    assert source.read(list(source.records())[4]).image == png(11)
    (kept,) = (tmp_path / "cache").iterdir()
    assert sorted(path.name for path in kept.glob("[!.]*")) == ["train-00.tar", "train-01.tar"]
    assert fingerprint(config) == fingerprint(replace(config, path=str(kept)))
    assert len(asked) == 2
    # The store contains a copy, as the cache may be cleared.
    assert source.plan_in_place("original", list_parts(source, StoreOptions(path="store"))) is None


@pytest.mark.parametrize(
    ("first", "other"), [("a.tar", "x/../a.tar"), ("a.tar?set=1", "a.tar?set=2")]
)
def test_files_of_one_name_from_two_addresses_are_two_files(tmp_path, server, first, other):
    address, served, asked = server
    write_tar(served / "a.tar", samples(3))

    (served / "x").mkdir()
    first = download(f"{address}/whole/{first}", tmp_path / "cache")
    other = download(f"{address}/whole/{other}", tmp_path / "cache")

    assert first != other
    assert len(asked) == 2


def test_a_download_that_was_changed_is_named(tmp_path, server):
    address, served, _ = server
    write_tar(served / "train-00.tar", samples(3))
    config = tar_config(f"{address}/whole/train-00.tar", cache=str(tmp_path / "cache"))
    list(build_source(config).records())
    (kept,) = (tmp_path / "cache").glob("*/train-00.tar")
    data = bytearray(kept.read_bytes())
    data[600] ^= 1
    kept.write_bytes(bytes(data))

    with pytest.raises(DownloadError, match=r"train-00\.tar is not the file that was downloaded"):
        list(build_source(config).records())


@pytest.mark.parametrize("how", ["cut", "chunked", "gone"])
def test_a_download_is_whole_or_not_at_all(tmp_path, server, how):
    address, served, _ = server
    write_tar(served / "a.tar", samples(3))

    with pytest.raises(DownloadError, match=rf"/{how}/a\.tar"):
        download(f"{address}/{how}/a.tar", tmp_path / "cache")

    assert [path for path in tmp_path.glob("cache/**/*") if path.is_file()] == []
    kept = download(f"{address}/whole/a.tar", tmp_path / "cache")
    assert kept.read_bytes() == (served / "a.tar").read_bytes()


@pytest.mark.parametrize("label", ["2", "-2"])
def test_a_label_beyond_the_class_names_is_refused(tmp_path, label):
    members = {"a.jpg": png(0), "a.cls": label.encode()}
    write_tar(tmp_path / "train-000000.tar", members)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")

    with pytest.raises(ConfigError, match=rf"label {label}, which is not a label of 2 classes"):
        list(build_source(tar_config(tmp_path)).records())


def test_a_server_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DownloadError, match=r"http://127\.0\.0\.1:9/a\.tar cannot be downloaded"):
        download("http://127.0.0.1:9/a.tar", tmp_path)


def frames_and_batch(store, passes=()):
    count = store.index.num_rows
    batch = StoreDataset(store, np.arange(count), passes).__getitems__(list(range(count)))
    return dict(zip(batch.keys, batch.inputs, strict=True)), batch


def test_tars_are_indexed_where_they_are(tmp_path, tars):
    result = precompute.run(precompute_config(tmp_path / "store", data=tars))
    store = Store(tmp_path / "store")

    assert result.packed_records == 21
    assert not (store.path / "images").exists()
    assert [shard.records for shard in store.manifest.shards] == [5, 9, 7]
    for shard, tar in zip(
        store.manifest.shards, sorted((tmp_path / "tars").glob("*.tar")), strict=True
    ):
        assert shard.referenced
        assert (Path(shard.path), shard.bytes) == (tar, tar.stat().st_size)
        assert shard.sha256 == file_at(tar).sha256()
    assert list(verify_store(store.path)) == []
    assert precompute.run(precompute_config(store.path, data=tars)).packed_records == 0


def test_frames_in_place_and_packed_anew_are_the_same(tmp_path, tars):
    frames = {}
    for reference in ("always", "never"):
        data = replace(tars, reference=reference)
        size = {"shard_size": 8} if reference == "never" else {}
        precompute.run(precompute_config(tmp_path / reference, data=data, **size))
        frames[reference], _ = frames_and_batch(Store(tmp_path / reference))
    stores = [Store(tmp_path / reference) for reference in frames]

    assert [all(s.referenced for s in store.manifest.shards) for store in stores] == [True, False]
    assert [shard.records for shard in stores[1].manifest.shards] == [8, 8, 5]
    assert set(frames["always"]) == set(frames["never"])
    assert len(frames["always"]) == 21
    for key, frame in frames["always"].items():
        assert torch.equal(frame, frames["never"][key])
    hashes = [
        {row["key"]: row["image_sha256"] for row in index_table(store).to_pylist()}
        for store in stores
    ]
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("backend", ["zarr", "webdataset"])
def test_a_teacher_passes_over_tars_of_many_sizes(tmp_path, tars, tiny_teacher, backend):
    logits = {}
    for reference in ("always", "never"):
        config = precompute_config(
            tmp_path / reference,
            tiny_teacher,
            data=replace(tars, reference=reference),
            backend=backend,
        )
        assert precompute.run(config).teacher_records == 21
        store = Store(tmp_path / reference)
        assert list(verify_store(store.path)) == []
        _, batch = frames_and_batch(store, store.open_passes())
        logits[reference] = dict(zip(batch.keys, batch.targets[0].logits, strict=True))

    assert len(logits["always"]) == 21
    for key, values in logits["always"].items():
        # Other records in the batch may change the last bit of a float16.
        torch.testing.assert_close(values, logits["never"][key], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_a_referenced_tar_that_changes_is_named(tmp_path, tars, damage):
    precompute.run(precompute_config(tmp_path / "store", data=tars))
    tar = tmp_path / "tars/train-000001.tar"
    data = bytearray(tar.read_bytes())
    data[1000] ^= 1
    tar.write_bytes(data) if damage == "flipped" else tar.unlink()

    (problem,) = verify_store(tmp_path / "store")

    assert problem.startswith(str(tar))
    assert ("has sha256" if damage == "flipped" else "is missing") in problem


@pytest.fixture
def sorted_tars(tmp_path):
    """Three tars, each with the records of one class."""
    for label in range(3):
        members = {}
        for index in range(8):
            members |= {
                f"{label}{index}.png": png(10 * label + index),
                f"{label}{index}.cls": str(label),
            }
        write_tar(tmp_path / f"sorted/train-{label:06d}.tar", members)
    return tar_config(tmp_path / "sorted")


def test_class_sorted_tars_are_packed_anew_and_mixed(tmp_path, sorted_tars):
    precompute.run(precompute_config(tmp_path / "store", data=sorted_tars, shard_size=8))
    store = Store(tmp_path / "store")

    labels = defaultdict(set)
    for row in index_table(store).to_pylist():
        labels[row["shard"]].add(row["label"])
    assert not any(shard.referenced for shard in store.manifest.shards)
    assert len(labels) == 3
    assert all(len(found) > 1 for found in labels.values())


def test_class_sorted_tars_are_never_referenced(tmp_path, sorted_tars):
    always = replace(sorted_tars, reference="always")

    with pytest.raises(
        ConfigError, match=r"train-000000\.tar contains few of .*data\.reference=never"
    ):
        precompute.run(precompute_config(tmp_path / "store", data=always))


def test_frames_that_are_re_encoded_are_never_in_place(tmp_path, tars):
    with pytest.raises(ConfigError, match=r"reference=always .*store\.format=raw does not"):
        precompute.run(
            precompute_config(tmp_path / "a", data=replace(tars, reference="always"), format="raw")
        )

    precompute.run(precompute_config(tmp_path / "b", data=tars, format="raw"))
    assert not any(shard.referenced for shard in Store(tmp_path / "b").manifest.shards)


def test_an_undecodable_sample_of_a_referenced_tar_is_left_out(tmp_path):
    members = samples(6)
    members["0003.png"] = members["0003.png"][:60]
    write_tar(tmp_path / "tars/train-000000.tar", members)
    data = tar_config(tmp_path / "tars", on_error="skip")

    precompute.run(precompute_config(tmp_path / "store", data=data))

    store = Store(tmp_path / "store")
    frames, _ = frames_and_batch(store)
    assert [entry["key"] for entry in store.manifest.skipped] == ["train-0003"]
    assert "train-000000.tar at byte" in store.manifest.skipped[0]["reason"]
    assert store.manifest.shards[0].referenced
    assert set(frames) == {f"train-{n:04d}" for n in (0, 1, 2, 4, 5)}
    for key, frame in frames.items():
        expected = np.asarray(Image.open(io.BytesIO(png(int(key[-4:])))))
        np.testing.assert_array_equal(frame.permute(1, 2, 0).numpy(), expected)
    assert list(verify_store(store.path)) == []


def test_tars_that_move_are_the_same_data_and_changed_ones_are_not(tmp_path, tars):
    before = fingerprint(tars)
    (tmp_path / "tars").rename(tmp_path / "elsewhere")
    there = replace(tars, path=str(tmp_path / "elsewhere"))

    assert fingerprint(there) == before
    assert fingerprint(replace(there, reference="never", on_error="skip")) == before
    write_tar(tmp_path / "elsewhere/train-000002.tar", samples(7, first=201))
    assert fingerprint(there) != before


# ---- a published set -----------------------------------------------------------------------------


@pytest.mark.slow
def test_cifar_10_as_published_is_indexed_in_place(tmp_path):
    if not CIFAR.is_dir():
        pytest.skip("needs the tars of ../shared/data/cifar10")
    (tmp_path / "cifar").mkdir()
    for name in ("train-000003.tar", "classes.txt"):
        (tmp_path / "cifar" / name).symlink_to(CIFAR / name)
    data = tar_config(tmp_path / "cifar")

    precompute.run(precompute_config(tmp_path / "store", data=data))

    store = Store(tmp_path / "store")
    (shard,) = store.manifest.shards
    assert shard.referenced
    assert shard.split == "train"
    assert store.size == (32, 32)
    assert len(store.manifest.classes) == 10
    rows = index_table(store).to_pylist()
    with tarfile.open(CIFAR / "train-000003.tar") as tar:
        names = [name for name in tar.getnames() if name.endswith(".jpg")]
        assert [row["key"] for row in rows] == ["train-" + name[:-4] for name in names]
        for row, name in list(zip(rows, names, strict=True))[::500]:
            assert store.manifest.classes[row["label"]] == name.split("_")[0]
            dataset = StoreDataset(store, np.array([row["row"]]))
            expected = np.asarray(Image.open(tar.extractfile(name)))
            frame = dataset[0].inputs[0].permute(1, 2, 0).numpy()
            np.testing.assert_array_equal(frame, expected)


@pytest.fixture
def parted_tars(tmp_path):
    for split, number, count in (("train", 0, 5), ("train", 1, 9), ("test", 0, 7)):
        first = 100 * number + 1000 * (split == "test")
        write_tar(tmp_path / f"tars/{split}-{number:06d}.tar", samples(count, first=first))
    write_tar(tmp_path / "tars/train-000002.tar", {})
    return tar_config(tmp_path / "tars")


def test_each_tar_is_one_task(parted_tars):
    asked = []

    class Backwards(SerialExecutor):
        def map_shards(self, task, shards):
            asked.extend(shards)
            return super().map_shards(task, shards[::-1])  # they may finish in any order

    source = build_source(parted_tars)
    listing, _ = list_source(source, listing_paths(), 0, Backwards())

    assert [name for _, name in asked] == list(source.tars)
    assert listing.part_sizes == (7, 5, 9, 0)
    assert listing.records(np.arange(21)) == tuple(source.records())
    assert classes_of_source(source, listing) == source.classes == ("0", "1", "2")


def test_shards_in_place_are_the_tars_with_records(parted_tars):
    source = build_source(parted_tars)
    listing = list_parts(source, StoreOptions(path="store"))

    plans = source.plan_in_place("original", listing)

    names = ["test-000000", "train-000000", "train-000001"]
    assert [plan.name for plan in plans] == names
    assert [plan.reference for plan in plans] == [
        f"{parted_tars.path}/{name}.tar" for name in names
    ]
    for plan, name in zip(plans, names, strict=True):
        assert plan.records == tuple(source.part_records(f"{name}.tar"))


def test_the_driver_lists_no_tar_itself(tmp_path, parted_tars, monkeypatch):
    (tmp_path / "tars/classes.txt").write_text("0\n1\n2\n")
    expected = fingerprint(parted_tars)

    def refuse(self):
        raise AssertionError("the driver lists all tars")

    monkeypatch.setattr(WebDatasetSource, "records", refuse)
    result = precompute.run(precompute_config(tmp_path / "store", data=parted_tars))

    assert result.packed_records == 21
    manifest = Store(tmp_path / "store").manifest
    assert manifest.dataset.fingerprint == expected
    assert manifest.classes == ("0", "1", "2")


def test_a_subset_of_tars_has_the_records_of_its_classes(tmp_path, parted_tars):
    config = precompute_config(
        tmp_path / "store", data=replace(parted_tars, only_classes=("2", "0"))
    )

    assert precompute.run(config).packed_records == 3 + 6 + 4
    assert Store(tmp_path / "store").manifest.classes == ("2", "0")
