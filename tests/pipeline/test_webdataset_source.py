"""Other people's tars: listed as they are, indexed in place or packed anew, never unpickled."""

import http.server
import io
import json
import re
import tarfile
import threading
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.config.data import WebDatasetDataConfig
from pipeline.core.errors import ConfigError
from pipeline.core.files import sha256_file
from pipeline.core.records import NO_GROUP, NO_LABEL, Box
from pipeline.loading.dataset import StoreDataset
from pipeline.sources.build import build_source
from pipeline.sources.download import DownloadError, download
from pipeline.sources.tars import expand_range, split_of_tar
from pipeline.store.pack import fingerprint_dataset
from pipeline.store.pixels import ImageError
from pipeline.store.reader import Store
from pipeline.store.verification import verify_store
from stages import precompute
from tests.conftest import precompute_config

CIFAR = Path(__file__).resolve().parents[2].parent / "shared/data/cifar10"


def png(seed=0, height=8, width=10):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def mask_png(seed=0):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 3, (8, 10), dtype=np.uint8)).save(
        buffer, "PNG"
    )
    return buffer.getvalue()


def write_tar(path, members, kind=tarfile.PAX_FORMAT, mode="w"):
    """A tar of {name: bytes, text or JSON}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, format=kind) as tar:
        for name, data in members.items():
            if not isinstance(data, (bytes, str)):
                data = json.dumps(data)
            data = data.encode() if isinstance(data, str) else data
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def samples(number, classes=3, first=0):
    """Images with labels 0, 1, 2, 0, ..."""
    members = {}
    for index in range(first, first + number):
        members |= {f"{index:04d}.png": png(index), f"{index:04d}.cls": str(index % classes)}
    return members


def config_of(path, **options):
    return WebDatasetDataConfig(path=str(path), **options)


def list_one(path, **options):
    source = build_source(config_of(path, **options))
    (record,) = source.records()
    return source, record


def fingerprint(config):
    source = build_source(config)
    return fingerprint_dataset(config, source.revision, source.records())


# ---- listing -------------------------------------------------------------------------------------


def test_every_sample_of_every_tar_is_a_record_with_its_bytes(tmp_path):
    for name, number in {"train-000000": 5, "train-000001": 3, "val-000000": 2}.items():
        write_tar(tmp_path / f"{name}.tar", samples(number, first=100 * len(name) + number * 10))
    source = build_source(config_of(tmp_path))
    records = source.records()

    assert len(records) == len({record.key for record in records}) == 10
    assert [record.split for record in records] == ["train"] * 8 + ["val"] * 2
    assert source.classes == ("0", "1", "2")
    for record in records:
        index = int(record.key.split("-")[-1])
        content = source.read(record)
        assert record.key == f"{record.split}-{index:04d}"
        assert record.label == index % 3
        assert content.image == png(index)
        assert (content.suffix, content.mask, content.mask_offset) == ("png", None, -1)
        tar = tmp_path / source.where(record).split(" at byte ")[0]
        at = int(source.where(record).split(" at byte ")[1])
        assert tar.read_bytes()[at:][: len(content.image)] == content.image
        assert content.offset == at


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-000000.tar", "train"),
        ("imagenet-val_03.tar", "imagenet-val"),
        ("test12.tar", "test"),
        ("cifar10-000000.tar", "cifar10"),
        ("train.tar", "train"),
        ("000017.tar", "train"),
        ("shard-a.tar", "train"),
    ],
)
def test_a_split_is_what_stands_before_the_number(name, split):
    assert split_of_tar(name) == split


def test_a_split_may_be_given(tmp_path):
    _, record = list_one(write_tar(tmp_path / "x-01.tar", samples(1)), split="evaluator")

    assert (record.split, record.key) == ("evaluator", "evaluator-0000")


@pytest.mark.parametrize(
    ("prefix", "keys"),
    [
        ("split", ["train-0000", "val-0000"]),
        ("shard", ["train-000000-0000", "val-000003-0000"]),
    ],
)
def test_a_key_prefix_makes_keys_unique(tmp_path, prefix, keys):
    write_tar(tmp_path / "train-000000.tar", samples(1))
    write_tar(tmp_path / "val-000003.tar", samples(1))

    records = build_source(config_of(tmp_path, key_prefix=prefix)).records()

    assert [record.key for record in records] == keys


def test_keys_that_come_twice_are_refused_with_the_option_that_helps(tmp_path):
    write_tar(tmp_path / "train-000000.tar", samples(2))
    write_tar(tmp_path / "train-000001.tar", samples(1))

    with pytest.raises(
        ConfigError, match=r"1 sample keys come twice.*'train-0000'.*key_prefix=shard"
    ):
        build_source(config_of(tmp_path)).records()
    assert len(build_source(config_of(tmp_path, key_prefix="shard")).records()) == 3


def test_ranges_globs_and_folders_name_the_same_tars(tmp_path):
    for number in range(4):
        write_tar(tmp_path / f"train-{number:03d}.tar", samples(1, first=number))
    (tmp_path / "notes.txt").write_text("no tar")

    found = [
        list(build_source(config_of(tmp_path / path)).tars)
        for path in ("", "train-*.tar", "train-{000..003}.tar")
    ]

    assert found == [[f"train-{number:03d}.tar" for number in range(4)]] * 3
    assert expand_range("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]


@pytest.mark.parametrize("name", ["*.tar", "train-{000..001}.tar", "train-000.tar", ""])
def test_braces_of_a_folder_are_part_of_its_name(tmp_path, name):
    folder = tmp_path / "set{1,2}"
    for number in range(2):
        write_tar(folder / f"train-{number:03d}.tar", samples(1, first=number))

    found = list(build_source(config_of(folder / name)).tars)

    assert found == ["train-000.tar", "train-001.tar"][: 1 if name == "train-000.tar" else 2]
    assert expand_range("a{1.tar") == ["a{1.tar"]


def test_members_that_webdataset_would_take_for_its_own_are_passed_over(tmp_path):
    own = {"0.__bad__": b"x", "0.__key__": b"x", "pt": b"x", "0.": b"x"}
    write_tar(tmp_path / "train-0.tar", {**own, **samples(1)})

    assert len(build_source(config_of(tmp_path)).records()) == 1


@pytest.mark.parametrize("path", ["", "train-*.tar", "train-{000..003}.tar", "nowhere"])
def test_a_path_without_tars_is_refused(tmp_path, path):
    with pytest.raises(ConfigError, match=r"names no \.tar; give a folder, a glob or a \{"):
        build_source(config_of(tmp_path / path)).records()


def test_a_missing_tar_of_a_range_is_not_passed_over(tmp_path):
    for number in (0, 2):
        write_tar(tmp_path / f"train-{number:03d}.tar", samples(1, first=number))

    with pytest.raises(ConfigError, match=r"names .*train-001\.tar, which does not exist"):
        build_source(config_of(tmp_path / "train-{000..002}.tar")).records()


# ---- labels and annotations ----------------------------------------------------------------------


def test_a_json_gives_label_labels_group_and_boxes(tmp_path):
    values = {
        "label": 2,
        "labels": [2, 0],
        "group": 5,
        "boxes": [
            {"x0": 1, "y0": 2, "x1": 5.5, "y1": 8},
            {"label": 0, "x0": 0, "y0": 0, "x1": 10, "y1": 8},
        ],
    }
    path = write_tar(tmp_path / "a.tar", {"s.png": png(), "s.json": values})
    _, record = list_one(path)

    assert (record.label, record.labels, record.group) == (2, (2, 0), 5)
    assert record.boxes_in_pixels
    assert record.boxes == (
        Box(label=2, x0=1, y0=2, x1=5.5, y1=8),
        Box(label=0, x0=0, y0=0, x1=10, y1=8),
    )

    precompute.run(precompute_config(tmp_path / "store", data=config_of(path)))
    store = Store(tmp_path / "store")
    batch = StoreDataset(store, np.arange(1), with_regions=True).__getitems__([0])
    # 10 wide, 8 high: 2 x / 10 - 1, 2 y / 8 - 1
    expected = torch.tensor([[2, -0.8, -0.5, 0.1, 1], [0, -1, -1, 1, 1]])
    torch.testing.assert_close(batch.boxes[0], expected)
    assert store.manifest.multi_label


@pytest.mark.parametrize("where", ["option", "beside"])
@pytest.mark.parametrize("member", ["cls", "json"])
def test_a_label_may_be_a_name_of_the_class_file(tmp_path, where, member):
    value = "dog\n" if member == "cls" else {"species": "dog"}
    write_tar(tmp_path / "tars/a.tar", {"s.png": png(), f"s.{member}": value})
    names = tmp_path / ("tars/classes.txt" if where == "beside" else "names.txt")
    names.write_text("cat\ndog\n")
    options = {} if where == "beside" else {"classes": str(names)}

    source, record = list_one(tmp_path / "tars", label_key="species", **options)

    assert source.classes == ("cat", "dog")
    assert record.label == 1


@pytest.mark.parametrize("name", ["bird", "--5", "²", "1.0", ""])
def test_a_label_that_is_no_class_is_named(tmp_path, name):
    path = write_tar(tmp_path / "a.tar", {"s.png": png(), "s.cls": name})

    with pytest.raises(ConfigError, match=rf"a\.tar: s has label {name!r}.*give the file"):
        build_source(config_of(path)).records()


@pytest.mark.parametrize(
    "values",
    [
        "{",
        "[1, 2]",
        "7",
        {"boxes": [{"x0": 1}]},
        {"boxes": 3},
        {"labels": 3},
        {"group": "a"},
        {"group": None},
    ],
)
def test_a_json_of_another_shape_is_named(tmp_path, values):
    path = write_tar(tmp_path / "a.tar", {"s.png": png(), "s.json": values})

    with pytest.raises(ConfigError, match=r"a\.tar: s\.json cannot be read"):
        build_source(config_of(path)).records()


def test_a_sample_without_annotation_has_no_label(tmp_path):
    _, record = list_one(write_tar(tmp_path / "a.tar", {"s.png": png(), "s.txt": "a caption"}))

    assert (record.label, record.group, record.labels, record.boxes) == (NO_LABEL, NO_GROUP, (), ())


@pytest.mark.parametrize("reference", ["always", "never"])
def test_a_mask_belongs_to_its_image(tmp_path, reference):
    members = {"s.png": png(), "s.mask.png": mask_png(), "s.cls": "0"}
    path = write_tar(tmp_path / "a.tar", members)
    source, record = list_one(path)
    content = source.read(record)
    assert (content.image, content.mask) == (png(), mask_png())

    precompute.run(precompute_config(tmp_path / "store", data=config_of(path, reference=reference)))
    store = Store(tmp_path / "store")
    batch = StoreDataset(store, np.arange(1), with_regions=True).__getitems__([0])
    expected = np.asarray(Image.open(io.BytesIO(mask_png())))
    np.testing.assert_array_equal(batch.masks[0, 0].numpy(), expected)


# ---- tars that are refused -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"s.cls": "1"}, r"sample 's' has 0 images among its members cls"),
        ({"s.png": b"", "s.jpg": b""}, r"sample 's' has 2 images among its members png, jpg"),
    ],
)
def test_a_sample_needs_exactly_one_image(tmp_path, members, message):
    write_tar(tmp_path / "a.tar", samples(1) | members)

    with pytest.raises(ConfigError, match=message):
        build_source(config_of(tmp_path)).records()


@pytest.mark.parametrize("suffix", ["pyd", "pickle", "pkl", "pth", "pt", "PKL", "logits.pth"])
def test_pickled_members_are_refused_by_name(tmp_path, suffix):
    path = write_tar(tmp_path / "a.tar", {"s.png": png(), f"s.{suffix}": b"cos\nsystem\n"})

    with pytest.raises(
        ConfigError, match=rf"a\.tar holds s\.{re.escape(suffix)}, which only pickle"
    ):
        build_source(config_of(path)).records()


def test_a_command_is_no_path():
    with pytest.raises(ConfigError, match="would run a command"):
        config_of("pipe:cat a.tar")


def test_a_member_that_comes_twice_is_named(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"s.png": png()})
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo("s.png")
        tar.addfile(member)

    with pytest.raises(ConfigError, match=r"holds s\.png twice"):
        build_source(config_of(path)).records()


def test_a_compressed_tar_is_refused_with_a_way_out(tmp_path):
    write_tar(tmp_path / "a.tar.gz", samples(2), mode="w:gz")

    with pytest.raises(ConfigError, match=r"unpack \.tar\.gz and \.tar\.zst first"):
        build_source(config_of(tmp_path)).records()
    (tmp_path / "a.tar.gz").rename(tmp_path / "a.tar")
    with pytest.raises(ConfigError, match=r"a\.tar cannot be read as an uncompressed tar"):
        build_source(config_of(tmp_path)).records()


def test_a_cut_tar_never_loses_samples_in_silence(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", samples(3)).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        tar.getmembers()
        end = tar.offset
    cut = tmp_path / "cut.tar"
    listed = []

    for length in range(0, len(whole), 256):
        cut.write_bytes(whole[:length])
        try:
            listed.append((length, len(build_source(config_of(cut)).records())))
        except ConfigError as error:
            assert "cut.tar" in str(error)  # noqa: PT017, most lengths raise

    assert {number for _, number in listed} == {3}
    assert min(length for length, _ in listed) == end + tarfile.BLOCKSIZE


def test_a_damaged_header_never_loses_samples_in_silence(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(3))
    data = bytearray(path.read_bytes())
    at = data.find(b"0001.cls")
    data[at] ^= 1
    path.write_bytes(data)

    with pytest.raises(ConfigError, match="no end mark"):
        build_source(config_of(path)).records()


def test_tars_that_were_put_together_never_lose_samples_in_silence(tmp_path):
    first, second = (write_tar(tmp_path / n, samples(2, first=f)) for n, f in (("a", 0), ("b", 5)))
    (tmp_path / "both.tar").write_bytes(first.read_bytes() + second.read_bytes())

    with pytest.raises(ConfigError, match="put together from several"):
        build_source(config_of(tmp_path)).records()


def test_a_tar_that_shrinks_after_it_was_listed_is_an_error_and_no_garbage(tmp_path):
    source, record = list_one(write_tar(tmp_path / "a.tar", {"s.png": png()}))
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:600])

    with pytest.raises(ImageError, match=r"a\.tar ends before byte"):
        source.read(record)


# ---- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("cat/1", "train-cat%2F1"),
        ("Katze/Müller ß", "train-Katze%2FM%C3%BCller%20%C3%9F"),
        ("猫", "train-%E7%8C%AB"),
        ("d" * 90 + "/" + "n" * 95, "train-" + "d" * 90 + "%2F" + "n" * 95),
        ("./here/1", "train-%2E%2Fhere%2F1"),
    ],
)
def test_long_and_foreign_names_are_escaped_and_read(tmp_path, kind, name, key):
    path = write_tar(tmp_path / "a.tar", {f"{name}.png": png(), f"{name}.cls": "1"}, kind)
    source, record = list_one(path)

    assert record.key == key
    assert record.label == 1
    assert source.read(record).image == png()


def test_folders_and_hidden_files_are_no_samples(tmp_path):
    path = write_tar(
        tmp_path / "a.tar",
        {".DS_Store": b"x", "d/.hidden.png": b"x", "README": b"x", "s.png": png()},
    )
    with tarfile.open(path, "a") as tar:
        folder = tarfile.TarInfo("folder.png")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)

    _, record = list_one(path)

    assert record.key == "train-s"


# ---- from the network ----------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path):
    """A local address that serves <tmp_path>/served; paths below /cut and /reset break off."""
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
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", served, asked
        running.shutdown()
        thread.join()


def test_tars_of_an_address_are_kept_and_asked_for_once(tmp_path, server):
    address, served, asked = server
    for number in range(2):
        write_tar(served / f"train-{number:02d}.tar", samples(3, first=10 * number))
    config = config_of(f"{address}/whole/train-{{00..01}}.tar?key=1", cache=str(tmp_path / "cache"))

    source = build_source(config)

    assert [record.key for record in source.records()] == [
        f"train-{n:04d}" for n in (0, 1, 2, 10, 11, 12)
    ]
    assert source.read(source.records()[4]).image == png(11)
    (kept,) = (tmp_path / "cache").iterdir()
    assert sorted(path.name for path in kept.iterdir()) == ["train-00.tar", "train-01.tar"]
    assert fingerprint(config) == fingerprint(replace(config, path=str(kept)))
    assert len(asked) == 2
    assert (
        source.plan_in_place("original") is None
    )  # a cache may be cleared; the store holds a copy


def test_files_of_one_name_from_two_addresses_are_two_files(tmp_path, server):
    address, served, asked = server
    write_tar(served / "a.tar", samples(3))

    (served / "x").mkdir()
    first = download(f"{address}/whole/a.tar", tmp_path / "cache")
    other = download(f"{address}/whole/x/../a.tar", tmp_path / "cache")

    assert first != other
    assert len(asked) == 2


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
        build_source(config_of(tmp_path)).records()


def test_a_server_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DownloadError, match=r"http://127\.0\.0\.1:9/a\.tar cannot be downloaded"):
        download("http://127.0.0.1:9/a.tar", tmp_path)


# ---- in place ------------------------------------------------------------------------------------


@pytest.fixture
def tars(tmp_path):
    """Three tars of 5, 9 and 7 samples that mix three of ten classes."""
    for number, size in enumerate((5, 9, 7)):
        write_tar(tmp_path / f"tars/train-{number:06d}.tar", samples(size, first=100 * number))
    (tmp_path / "tars/classes.txt").write_text("\n".join("abcdefghij"))
    return config_of(tmp_path / "tars")


def frames_by_key(store, passes=()):
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
        assert shard.sha256 == sha256_file(tar)
    assert list(verify_store(store.path)) == []
    assert precompute.run(precompute_config(store.path, data=tars)).packed_records == 0


def test_frames_in_place_and_packed_anew_are_the_same(tmp_path, tars):
    frames = {}
    for reference in ("always", "never"):
        data = replace(tars, reference=reference)
        precompute.run(precompute_config(tmp_path / reference, data=data, shard_size=8))
        frames[reference], _ = frames_by_key(Store(tmp_path / reference))
    stores = [Store(tmp_path / reference) for reference in frames]

    assert [all(s.referenced for s in store.manifest.shards) for store in stores] == [True, False]
    assert [shard.records for shard in stores[1].manifest.shards] == [8, 8, 5]
    assert set(frames["always"]) == set(frames["never"])
    assert len(frames["always"]) == 21
    for key, frame in frames["always"].items():
        assert torch.equal(frame, frames["never"][key])
    hashes = [
        dict(zip(*(store.index[n].to_pylist() for n in ("key", "image_sha256")), strict=True))
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
        _, batch = frames_by_key(store, store.open_passes())
        logits[reference] = dict(zip(batch.keys, batch.targets[0].logits, strict=True))

    assert len(logits["always"]) == 21
    for key, values in logits["always"].items():
        # Other neighbors in a batch may change the last bit of a half.
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
    """Three tars of one class each."""
    for label in range(3):
        members = {}
        for index in range(8):
            members |= {
                f"{label}{index}.png": png(10 * label + index),
                f"{label}{index}.cls": str(label),
            }
        write_tar(tmp_path / f"sorted/train-{label:06d}.tar", members)
    return config_of(tmp_path / "sorted")


def test_class_sorted_tars_are_packed_anew_and_mixed(tmp_path, sorted_tars):
    precompute.run(precompute_config(tmp_path / "store", data=sorted_tars, shard_size=8))
    store = Store(tmp_path / "store")

    labels = defaultdict(set)
    for row in store.index.to_pylist():
        labels[row["shard"]].add(row["label"])
    assert not any(shard.referenced for shard in store.manifest.shards)
    assert len(labels) == 3
    assert all(len(found) > 1 for found in labels.values())


def test_class_sorted_tars_are_never_referenced(tmp_path, sorted_tars):
    always = replace(sorted_tars, reference="always")

    with pytest.raises(
        ConfigError, match=r"train-000000\.tar holds few of .*data\.reference=never"
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
    data = config_of(tmp_path / "tars", on_error="skip")

    precompute.run(precompute_config(tmp_path / "store", data=data))

    store = Store(tmp_path / "store")
    frames, _ = frames_by_key(store)
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


def test_cifar_10_as_published_is_indexed_in_place(tmp_path):
    if not CIFAR.is_dir():
        pytest.skip("needs the tars in ../shared/data/cifar10")
    (tmp_path / "cifar").mkdir()
    for name in ("train-000003.tar", "classes.txt"):
        (tmp_path / "cifar" / name).symlink_to(CIFAR / name)
    data = config_of(tmp_path / "cifar")

    precompute.run(precompute_config(tmp_path / "store", data=data))

    store = Store(tmp_path / "store")
    (shard,) = store.manifest.shards
    assert shard.referenced
    assert shard.split == "train"
    assert store.size == (32, 32)
    assert len(store.manifest.classes) == 10
    rows = store.index.to_pylist()
    with tarfile.open(CIFAR / "train-000003.tar") as tar:
        names = [name for name in tar.getnames() if name.endswith(".jpg")]
        assert [row["key"] for row in rows] == ["train-" + name[:-4] for name in names]
        for row, name in list(zip(rows, names, strict=True))[::500]:
            assert store.manifest.classes[row["label"]] == name.split("_")[0]
            dataset = StoreDataset(store, np.array([row["row"]]))
            expected = np.asarray(Image.open(tar.extractfile(name)))
            frame = dataset[0].inputs[0].permute(1, 2, 0).numpy()
            np.testing.assert_array_equal(frame, expected)
