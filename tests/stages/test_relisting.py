"""The repeated command: it lists the data only if its options, the places of the files or the store have changed."""

import io
import os
import shutil
from dataclasses import replace

import pytest
from PIL import Image

from permafrost.config.data import ImageTableDataConfig
from permafrost.sources.image_folder import ImageFolderSource
from permafrost.sources.image_table import ImageTableSource
from permafrost.store.commit import ORIGIN_NAME
from permafrost.store.entries import StoreMismatchError
from permafrost.store.verification import verify_store
from permafrost_sources.demo import DemoSource, DigitsSource
from permafrost_sources.options import DigitsDataConfig
from permafrost_sources.webdataset import WebDatasetSource
from tests.support.image_sets import folder_config, write_images
from tests.support.images import write_tar
from tests.support.stores import TINY_DATA, precompute_config
from tests.support.tars import samples, tar_config
from tests.support.trees import tree_bytes
from tests.support.verbs import precompute


class ListedError(AssertionError):
    """Listing by a command that needs none."""


def refuse_to_list(*_):
    raise ListedError


@pytest.fixture
def refusing(monkeypatch):
    """Make all sources refuse to list their records."""

    for source in (DemoSource, DigitsSource, ImageFolderSource, ImageTableSource, WebDatasetSource):
        method = "part_records" if source is WebDatasetSource else "records"
        monkeypatch.setattr(source, method, refuse_to_list)


@pytest.fixture
def store(tmp_path, frozen):
    return shutil.copytree(frozen.store.path, tmp_path / "store")


def assert_listed(config):
    with pytest.raises(ListedError):
        precompute.run(config)


def test_the_same_command_does_not_list_the_data(store, frozen, refusing, caplog):
    config = precompute_config(store, frozen.config.teacher)
    before = tree_bytes(store)

    with caplog.at_level("INFO"):
        result = precompute.run(config)

    assert (result.packed_records, result.teacher_records) == (0, 0)
    assert "not listed again" in caplog.text
    assert "store.relist=true" in caplog.text
    assert "72 records, finished" in caplog.text
    assert tree_bytes(store) == before
    assert list(verify_store(store)) == []


def test_a_missing_pass_is_computed_without_listing_the_data(store, frozen, refusing):
    shutil.rmtree(store / "teachers")

    result = precompute.run(precompute_config(store, frozen.config.teacher))

    assert (result.packed_records, result.teacher_records) == (0, 72)
    assert tree_bytes(store) == tree_bytes(frozen.store.path)


@pytest.mark.parametrize(
    "options",
    [
        {"data": replace(TINY_DATA, seed=1)},
        {"data": DigitsDataConfig()},
        {"shard_size": 17},
        {"image_size": 16},
        {"format": "raw"},
        {"relist": True},
        {"seed": 1},
    ],
    ids=str,
)
def test_another_option_lists_the_data(store, refusing, options):
    own = {name: options[name] for name in ("relist", "seed") if name in options}
    config = precompute_config(store, **{n: v for n, v in options.items() if n not in own})
    assert_listed(replace(config, store=replace(config.store, **own)))


@pytest.mark.parametrize(
    "lost",
    [
        ORIGIN_NAME,
        "images/train-000000.tar",
        "commits/train-000001.parquet",
        "index/label.npy",
        "manifest.json",
    ],
)
def test_a_lost_file_lists_the_data(store, refusing, lost):
    (store / lost).unlink()

    assert_listed(precompute_config(store))


def test_a_shard_of_another_length_lists_the_data(store, refusing):
    with (store / "images/train-000000.tar").open("ab") as file:
        file.write(b"\0")

    assert_listed(precompute_config(store))


def test_without_its_origin_a_store_is_compared_and_has_it_again(store, frozen):
    path = store / ORIGIN_NAME
    origin = path.read_bytes()
    for text in (None, b"{}", b"\xff"):
        path.unlink() if text is None else path.write_bytes(text)

        result = precompute.run(precompute_config(store, frozen.config.teacher))

        assert (result.packed_records, result.teacher_records) == (0, 0)
        assert tree_bytes(store) == tree_bytes(frozen.store.path)
        assert path.read_bytes() == origin


def folder_set(root):
    write_images(root, *(f"{kind}/{n}.png" for kind in ("cat", "dog") for n in range(4)))
    return folder_config(root)


def table_set(root):
    write_images(root, *(f"{n}.png" for n in range(4)))
    (root / "t.csv").write_text("path,label\n" + "".join(f"{n}.png,{n % 2}\n" for n in range(4)))
    return ImageTableDataConfig(path=str(root / "t.csv"))


def tar_set(root):
    write_tar(root / "train-000000.tar", samples(9))
    write_tar(root / "train-000001.tar", samples(9, first=100))
    return tar_config(root, reference="never")


SETS = [folder_set, table_set, tar_set]


@pytest.mark.parametrize("make", SETS)
def test_files_at_another_place_are_listed_once_more(tmp_path, make):
    config = precompute_config(tmp_path / "store", data=make(tmp_path / "a"))
    precompute.run(config)
    before = tree_bytes(tmp_path / "store")
    origin = (tmp_path / "store" / ORIGIN_NAME).read_bytes()
    (tmp_path / "a").rename(tmp_path / "b")
    moved = replace(config, data=replace(config.data, path=config.data.path.replace("/a", "/b")))

    precompute.run(moved)

    assert tree_bytes(tmp_path / "store") == before
    assert (tmp_path / "store" / ORIGIN_NAME).read_bytes() != origin


def test_a_relative_path_names_the_same_place(tmp_path, monkeypatch):
    config = precompute_config(tmp_path / "store", data=folder_set(tmp_path / "a"))
    precompute.run(config)
    monkeypatch.setattr(ImageFolderSource, "records", refuse_to_list)
    monkeypatch.chdir(tmp_path)

    assert precompute.run(replace(config, data=folder_config("a"))).packed_records == 0


@pytest.mark.parametrize("make", SETS)
def test_a_change_that_costs_nothing_to_see_lists_the_data(tmp_path, make):
    config = precompute_config(tmp_path / "store", data=make(tmp_path / "a"))
    precompute.run(config)
    assert precompute.run(config).packed_records == 0
    if make is folder_set:
        write_images(tmp_path / "a", "dog/new.png")
    elif make is table_set:
        with (tmp_path / "a/t.csv").open("a") as file:
            file.write("4.png,1\n")
        write_images(tmp_path / "a", "4.png")
    else:
        write_tar(tmp_path / "a/train-000001.tar", samples(9, first=101))

    with pytest.raises(StoreMismatchError, match="contains data"):
        precompute.run(config)


def test_an_image_that_was_overwritten_is_seen_with_relist_alone(tmp_path):
    config = precompute_config(tmp_path / "store", data=folder_set(tmp_path / "a"))
    precompute.run(config)
    with (tmp_path / "a/cat/0.png").open("ab") as file:
        file.write(b"\0")

    assert precompute.run(config).packed_records == 0
    relisted = replace(config.store, relist=True)
    with pytest.raises(
        StoreMismatchError, match=r"1 with another number of bytes \('cat/0\.png'\)"
    ):
        precompute.run(replace(config, store=relisted))
    kept = replace(config, store=replace(relisted, changed="keep"))
    assert precompute.run(kept).packed_records == 0


def bitmap(value):
    data = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 99)).save(data, "BMP")
    return data.getvalue()


@pytest.mark.parametrize("form", ["original", "raw", "tars in place"])
def test_relisting_finds_pictures_that_were_repainted_in_their_size_and_time(
    tmp_path, caplog, form
):
    in_place = form == "tars in place"
    file = tmp_path / "set" / ("train-0.tar" if in_place else "cat/1.bmp")
    if in_place:
        pairs = ({f"{n}.bmp": bitmap(n), f"{n}.cls": "0"} for n in range(4))
        write_tar(file, {name: data for pair in pairs for name, data in pair.items()})
        data, options = tar_config(file.parent, reference="always"), {"shard_size": None}
    else:
        for n in range(4):
            (tmp_path / "set" / kind_of(n)).mkdir(parents=True, exist_ok=True)
            (tmp_path / "set" / kind_of(n) / f"{n}.bmp").write_bytes(bitmap(n))
        data, options = folder_config(tmp_path / "set"), {"image_size": 8, "format": form}
    config = precompute_config(tmp_path / "store", data=data, **options)
    relisted = replace(config, store=replace(config.store, relist=True))
    caplog.set_level("INFO")
    precompute.run(relisted)
    assert "packed records in" not in caplog.text  # there is nothing to compare with yet
    precompute.run(relisted)
    assert "store.relist=true: 0 with other bytes of 4 packed records in" in caplog.text

    before = file.stat()
    file.write_bytes(file.read_bytes().replace(bitmap(1), bitmap(200)))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))

    assert precompute.run(config).packed_records == 0  # which reads no picture
    message = r"1 with other bytes \('.*1(\.bmp)?'\).*store\.changed=keep"
    with pytest.raises(StoreMismatchError, match=message):
        precompute.run(relisted)
    precompute.run(replace(config, store=replace(relisted.store, changed="keep")))
    assert "kept as packed (store.changed=keep): 1 with other bytes" in caplog.text


def kind_of(number):
    return "cat" if number < 2 else "dog"


def test_nothing_of_a_listing_is_left_in_a_store(tmp_path, monkeypatch):
    config = precompute_config(tmp_path / "store")
    monkeypatch.setattr("permafrost.store.pack.write_image_shard", lambda *_: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        precompute.run(config)

    names = {path.name for path in (tmp_path / "store").rglob("*")}
    assert names == {".lock", "facts.json", "commits"}


def test_a_table_that_is_replaced_under_its_size_and_time_is_listed(tmp_path):
    """As an archive that keeps times restores another version."""
    write_images(tmp_path, "0.jpg", "1.jpg")
    table = tmp_path / "t.csv"
    table.write_text("path,label\n0.jpg,cat\n1.jpg,dog\n")
    data = ImageTableDataConfig(path=str(table))
    precompute.run(precompute_config(tmp_path / "store", data=data))
    times = table.stat()
    table.write_text("path,label\n0.jpg,dog\n1.jpg,cat\n")
    os.utime(table, ns=(times.st_atime_ns, times.st_mtime_ns))

    with pytest.raises(StoreMismatchError, match="but the data options describe"):
        precompute.run(precompute_config(tmp_path / "store", data=data))
