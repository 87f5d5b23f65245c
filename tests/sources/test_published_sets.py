"""Published sets: Tiny ImageNet and the sets of torchvision."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest

from permafrost.core.errors import ConfigError, UserError
from permafrost.core.records import NO_LABEL, Box
from permafrost.sources.source import build_source
from permafrost_papers.ked.data_options import TinyImageNetDataConfig
from tests.support.image_sets import (
    by_key,
    downloaded_config,
    folder_config,
    pixels_of,
    write_cifar,
    write_imagenet,
    write_images,
    write_mnist,
    write_sun397,
    write_voc,
)
from tests.support.listings import fingerprint_records

# ---- Tiny ImageNet -------------------------------------------------------------------------------


@pytest.fixture
def tiny_imagenet(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    for wnid in ("n02", "n01"):
        write_images(root, *(f"train/{wnid}/images/{wnid}_{i}.JPEG" for i in range(2)))
        lines = [f"{wnid}_{i}.JPEG\t0\t{i}\t62\t63\n" for i in range(2)]
        (root / f"train/{wnid}/{wnid}_boxes.txt").write_text("".join(lines))
    write_images(root, "val/images/val_0.JPEG", "test/images/test_0.JPEG")
    (root / "val/val_annotations.txt").write_text("val_0.JPEG\tn02\t5\t6\t7\t8\n")
    (root / "wnids.txt").write_text("n02\nn01\n")
    (root / "words.txt").write_text("n01\ta\nn02\tb\n")
    return root


def test_tiny_imagenet_has_labels_boxes_and_an_unlabeled_test(tiny_imagenet):
    source = build_source(TinyImageNetDataConfig(path=str(tiny_imagenet)))
    records = by_key(source)

    assert source.classes == ("n01", "n02")
    assert source.frame_size == (64, 64)
    assert len(records) == 6
    one = records["train/n02/images/n02_1.JPEG"]
    assert (one.split, one.label, one.boxes_in_pixels) == ("train", 1, True)
    assert one.boxes == (Box(label=1, x0=0, y0=1, x1=63, y1=64),)
    val = records["val/images/val_0.JPEG"]
    assert (val.split, val.label) == ("val", 1)
    assert val.boxes == (Box(label=1, x0=5, y0=6, x1=8, y1=9),)
    test = records["test/images/test_0.JPEG"]
    assert (test.split, test.label, test.boxes) == ("unlabeled_test", NO_LABEL, ())
    content = source.read(val)
    assert content.suffix == "jpg"
    assert content.image == (tiny_imagenet / "val/images/val_0.JPEG").read_bytes()


def test_some_classes_of_tiny_imagenet_need_no_boxes_of_the_others(tiny_imagenet):
    first, *others = sorted((tiny_imagenet / "wnids.txt").read_text().split())
    for wnid in others:
        (tiny_imagenet / f"train/{wnid}/{wnid}_boxes.txt").unlink()
    config = TinyImageNetDataConfig(path=str(tiny_imagenet), only_classes=(first,))

    records = list(build_source(config).records())

    assert {record.label for record in records} == {0}
    with pytest.raises(ConfigError, match=r"_boxes\.txt is missing"):
        list(build_source(replace(config, only_classes=())).records())


def test_tiny_imagenet_without_its_test(tiny_imagenet):
    shutil.rmtree(tiny_imagenet / "test")
    records = list(build_source(TinyImageNetDataConfig(path=str(tiny_imagenet))).records())

    assert {record.split for record in records} == {"train", "val"}


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("wnids.txt", None, r"must be the folder tiny-imagenet-200.*wnids\.txt"),
        ("val/val_annotations.txt", "val_0.JPEG\tn02\t5\t6\t7\n", "line 1: expected 6 columns"),
        ("val/val_annotations.txt", "val_0.JPEG\tn09\t5\t6\t7\t8\n", "no class .* for val_0.JPEG"),
        ("val/val_annotations.txt", "", "no class .* for val_0.JPEG"),
        ("train/n01/n01_boxes.txt", "n01_0.JPEG\t1\t2\t3\t4\n", "has no line for n01_1.JPEG"),
        ("train/n01/n01_boxes.txt", "n01_0.JPEG\t1\t2\t3\tx\n", "line 1: expected 5 columns"),
    ],
)
def test_a_damaged_tiny_imagenet_is_refused(tiny_imagenet, path, text, message):
    (tiny_imagenet / path).unlink()
    if text is not None:
        (tiny_imagenet / path).write_text(text)

    with pytest.raises(ConfigError, match=message):
        list(build_source(TinyImageNetDataConfig(path=str(tiny_imagenet))).records())


@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")]
)
def test_mnist_becomes_png_without_loss(tmp_path, name, folder):
    images = write_mnist(tmp_path, folder)
    source = build_source(downloaded_config(name, tmp_path))
    records = by_key(source)

    assert (source.name, source.frame_size, len(source.classes)) == (name, (28, 28), 10)
    assert len(records) == 17
    record = records["train-000011"]
    assert (record.split, record.label, record.content) == ("train", 1, ("train", 11))
    content = source.read(record)
    assert content.suffix == "png"
    assert np.array_equal(pixels_of(content.image), images["train"][11])
    assert np.array_equal(pixels_of(source.read(records["test-000004"]).image), images["t10k"][4])


@pytest.mark.parametrize(("name", "train"), [("cifar10", 15), ("cifar100", 3)])
def test_cifar_becomes_png_without_loss(tmp_path, monkeypatch, name, train):
    rows, _ = write_cifar(tmp_path, monkeypatch, name)
    source = build_source(downloaded_config(name, tmp_path))
    records = by_key(source)

    assert source.frame_size == (32, 32)
    assert source.classes[3] == "class 3"
    assert len(records) == train + 3
    record = records["test-000001"]
    assert (record.split, record.label) == ("test", 3)
    expected = rows[1].reshape(3, 32, 32).transpose(1, 2, 0)
    assert np.array_equal(pixels_of(source.read(record).image), expected)


def test_a_batch_with_another_checksum_is_never_unpickled(tmp_path, monkeypatch):
    _, folder = write_cifar(tmp_path, monkeypatch, "cifar10")
    (folder / "data_batch_1").write_bytes(b"not what it was")

    with pytest.raises(UserError, match=r"data\.name=cifar10 has no split train .*corrupted"):
        list(build_source(downloaded_config("cifar10", tmp_path)).records())


@pytest.mark.parametrize(
    ("name", "year", "splits"),
    [("voc2007", "2007", ("train", "val", "test")), ("voc2012", "2012", ("train", "val"))],
)
def test_voc_has_many_labels_and_boxes_that_count_from_zero(tmp_path, name, year, splits):
    voc = write_voc(tmp_path, year, splits)
    source = build_source(downloaded_config(name, tmp_path))
    records = by_key(source)

    assert len(source.classes) == 20
    assert source.frame_size is None
    assert {record.split for record in records.values()} == set(splits)
    assert len(records) == 2 * len(splits)
    record = records[f"{year}_00"]
    person, cat = source.classes.index("person"), source.classes.index("cat")
    assert (record.label, record.labels) == (NO_LABEL, (cat, person))
    assert record.boxes_in_pixels
    assert record.boxes == (
        Box(label=person, x0=0, y0=1.5, x1=6, y1=4),
        Box(label=cat, x0=1, y0=0, x1=5, y1=3),
    )
    content = source.read(record)
    assert content.suffix == "jpg"
    assert content.image == (voc / f"JPEGImages/{year}_00.jpg").read_bytes()


def test_a_broken_annotation_is_named(tmp_path):
    voc = write_voc(tmp_path, "2012", ("train", "val"))
    (voc / "Annotations/2012_00.xml").write_text("<annotation><object>")

    with pytest.raises(UserError, match=r"2012_00\.xml is not a VOC annotation"):
        list(build_source(downloaded_config("voc2012", tmp_path)).records())


def test_sun397_has_nested_classes_and_one_split(tmp_path):
    write_sun397(tmp_path)
    source = build_source(downloaded_config("sun397", tmp_path))
    records = by_key(source)

    assert source.classes == ("abbey", "apartment_building/outdoor")
    assert {path: (r.split, r.label) for path, r in records.items()} == {
        "a/abbey/sun_1.jpg": ("train", 0),
        "a/apartment_building/outdoor/sun_2.jpg": ("train", 1),
    }
    content = source.read(records["a/abbey/sun_1.jpg"])
    assert content.image == (tmp_path / "SUN397/a/abbey/sun_1.jpg").read_bytes()


def test_a_set_of_torchvision_without_a_test_split_gets_one(tmp_path):
    write_sun397(tmp_path)
    for number in range(3, 40):
        write_images(tmp_path, f"SUN397/a/abbey/sun_{number}.jpg")

    config = replace(downloaded_config("sun397", tmp_path), test_fraction=0.5)
    records = list(build_source(config).records())
    whole = list(build_source(downloaded_config("sun397", tmp_path)).records())

    splits = [record.split for record in records]
    assert 8 <= splits.count("test") <= 31
    assert splits.count("train") + splits.count("test") == 39
    prints = [fingerprint_records(config, 1, listed) for listed in (records, whole)]
    assert prints[0] != prints[1]
    plain = downloaded_config("sun397", tmp_path)
    assert fingerprint_records(plain, 1, whole) == prints[1]


def test_imagenet_is_read_as_unpacked_with_the_keys_of_an_image_folder(tmp_path):
    write_imagenet(tmp_path)
    source = build_source(downloaded_config("imagenet", tmp_path))
    as_folder = build_source(folder_config(tmp_path))

    assert source.classes == ("n01", "n02")
    listed = sorted(source.records(), key=lambda record: record.key)
    assert listed == sorted(as_folder.records(), key=lambda record: record.key)
    assert {(record.split, record.label) for record in listed} == {
        (split, label) for split in ("train", "val") for label in (0, 1)
    }
    assert all(source.read(record) == as_folder.read(record) for record in listed)


def test_imagenet_without_a_class_in_val_is_refused(tmp_path):
    write_imagenet(tmp_path)
    shutil.rmtree(tmp_path / "val/n01")

    with pytest.raises(UserError, match="val does not have the class folders of"):
        list(build_source(downloaded_config("imagenet", tmp_path)).records())


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("cifar10", "cifar-10-python.tar.gz"),
        ("mnist", "MNIST/raw"),
        ("voc2012", "VOCdevkit/VOC2012"),
        ("sun397", "SUN397.tar.gz"),
        ("imagenet", "ILSVRC2012_devkit_t12.tar.gz, ILSVRC2012_img_train.tar"),
    ],
)
def test_a_set_that_is_not_there_says_what_to_place_where(tmp_path, name, needs):
    with pytest.raises(UserError) as caught:
        list(build_source(downloaded_config(name, tmp_path)).records())

    message = str(caught.value)
    assert f"data.name={name}" in message
    assert re.search(rf"place .*{re.escape(needs)}.* in data\.root={tmp_path}", message)
    assert ("data.download=true" in message) == (name != "imagenet")


def test_a_failed_download_says_what_to_place_where(tmp_path, monkeypatch):
    def fail(*_args, **_options):
        raise URLError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fail)
    config = replace(downloaded_config("cifar10", tmp_path), download=True)

    with pytest.raises(UserError, match=r"no network.*; place .*cifar-10-python\.tar\.gz"):
        list(build_source(config).records())


def test_a_download_happens_only_where_the_set_is_not_there(tmp_path, monkeypatch):
    downloads = []

    def unpack(_url, root, **_options):
        downloads.append(root)
        write_voc(Path(root), "2012", ("train", "val"))

    monkeypatch.setattr("torchvision.datasets.voc.download_and_extract_archive", unpack)
    config = replace(downloaded_config("voc2012", tmp_path), download=True)

    assert len(list(build_source(config).records())) == 4
    assert len(list(build_source(config).records())) == 4
    assert downloads == [str(tmp_path)]
