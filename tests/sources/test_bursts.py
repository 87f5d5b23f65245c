"""Bursts of photographs, by EXIF data and names of files, which stay in one split."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from permafrost.core.records import NO_GROUP
from permafrost.evaluation.metrics import group_scores
from permafrost.sources.bursts import find_bursts
from permafrost.sources.source import build_source
from permafrost.store.facts import read_data_facts
from permafrost.store.reader import Store
from permafrost_export import export
from tests.support.image_sets import by_key, folder_config, write_images
from tests.support.stores import precompute_config
from tests.support.verbs import precompute


def photograph(path, taken="", model="X", form="JPEG"):
    """Write a photograph of a camera, taken at a time of one day, without EXIF data if there is none."""
    exif = Image.Exif()
    if taken:
        exif[ExifTags.Base.Model] = model
        exif[ExifTags.IFD.Exif] = {ExifTags.Base.DateTimeOriginal: f"2024:05:01 {taken}"}
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng([*str(path).encode()]).integers(0, 255, (16, 16, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path, form, exif=exif)


def bursts_of(root):
    """Names of the photographs of each burst of several, in the order of the names."""
    groups = {}
    for name, record in by_key(build_source(folder_config(root, group=("burst",)))).items():
        assert record.group < NO_GROUP
        groups.setdefault(record.group, []).append(name.rpartition("/")[2])
    return sorted(names for names in groups.values() if len(names) > 1)


def test_photographs_of_one_camera_and_class_a_few_seconds_apart_are_a_burst(tmp_path):
    for name, taken in {"1": "09:00:00", "2": "09:00:09", "3": "09:00:19", "4": "09:00:40"}.items():
        photograph(tmp_path / f"Käfer/IMG_000{name}.jpg", taken)
    photograph(tmp_path / "Käfer/DSC00005.jpg", "09:00:05", model="Y")
    photograph(tmp_path / "Vögel/IMG_0006.jpg", "09:00:05")
    photograph(tmp_path / "Vögel/sub/IMG_0007.jpg", "09:00:08")

    assert bursts_of(tmp_path) == [
        ["IMG_0001.jpg", "IMG_0002.jpg", "IMG_0003.jpg"],
        ["IMG_0006.jpg", "IMG_0007.jpg"],
    ]


def test_keys_without_a_suffix_are_not_copies_of_each_other():
    assert find_bursts([(key, 0, "", -np.inf) for key in ("horse_0660", "dog_0119")]) == [0, 1]


def test_the_time_of_heic_is_read(tmp_path):
    pytest.importorskip("pillow_heif").register_heif_opener()
    for number in range(2):
        photograph(tmp_path / f"a/{number}.HEIC", f"09:00:0{number}", form="HEIF")

    assert len(bursts_of(tmp_path)) == 1


BURSTS = """IMG_0001.jpg, IMG_0001 (1).jpg
IMG_1.jpg, IMG_1-edited.jpg, IMG_1-edited~2.jpg, IMG_1~2.jpg
Blüte.jpg, Blüte - Kopie (2).jpg, Blüte copy 2.jpg
IMG_0001.png, IMG_E0001.jpg
a.jpg, a.png
00001IMG_00001_BURST20190101120000123_COVER.jpg, 00002IMG_00002_BURST20190101120000123.jpg
IMG_7_BURST001_COVER.jpg, IMG_7_BURST002.jpg
PXL_20240501_090000123.jpg, PXL_20240501_090004000.MP.jpg"""
NUMBERS = """IMG_0001.jpg, IMG_0002.jpg
cat (1).jpg, cat (2).jpg
images.jpg, images (1).jpg
IMG_20240501_090000.jpg, IMG_20240501_090011.jpg
IMG-20240501-WA0001.jpg, IMG-20240501-WA0002.jpg
20240501_000001.jpg, 20240501_000002.jpg
20240501_090000/1.jpg, 20240501_090000/2.jpg
1-edited.jpg, 2-edited.jpg
sunburst1.jpg, sunburst2.jpg"""


@pytest.mark.parametrize("line", [*BURSTS.splitlines(), *NUMBERS.splitlines()])
def test_names_say_that_files_are_a_burst_or_copies_and_numbers_do_not(tmp_path, line):
    names = line.split(", ")
    write_images(tmp_path, "a/other1.jpg", *(f"a/{name}" for name in names))
    found = [sorted(burst) for burst in bursts_of(tmp_path)]
    assert found == ([sorted(names)] if line in BURSTS else [])


@pytest.mark.parametrize("taken", ["00:00:00", "  :  :  ", "09"])
def test_a_date_alone_and_damaged_exif_data_are_no_time(tmp_path, taken):
    for number in range(2):
        photograph(tmp_path / f"a/{number}.jpg", taken)
    (tmp_path / "a/2.jpg").write_bytes((tmp_path / "a/1.jpg").read_bytes()[:60])

    assert bursts_of(tmp_path) == []


def write_bursts(root):
    """Bursts of 1 to 4 photographs of three classes."""
    for name in "abc":
        for burst in range(12):
            for shot in range(1 + burst % 4):
                photograph(
                    root / f"{name}/{burst:02d}{shot}.jpg", f"1{burst % 10}:{burst:02d}:0{shot}"
                )


def test_a_drawn_split_has_whole_bursts_also_once_photographs_are_added(tmp_path):
    write_bursts(tmp_path / "set")
    data = folder_config(tmp_path / "set", test_fraction=0.2, group=("burst",), keep_groups=True)
    config = precompute_config(tmp_path / "store", data=data)
    precompute.run(config)
    kept = read_data_facts(tmp_path / "store")
    assert kept.splits == "drawn by groups of data.group=burst"
    assert all(4 <= count <= 8 for count in kept.records_of_classes["test"])  # of 30
    assert kept.sheet["groups"].value == "36"  # none of them in several splits

    for name in "abc":
        for burst in range(10):
            photograph(tmp_path / f"set/{name}/{burst:02d}8.jpg", f"1{burst}:{burst:02d}:08")
            photograph(tmp_path / f"set/{name}/{burst:02d}0-edited.jpg")
    precompute.run(replace(config, store=replace(config.store, append=True)))

    store = Store(tmp_path / "store")
    rows = np.arange(store.index.num_rows)
    groups, shards = store.index.values("group", rows), store.index.shard_numbers(rows)
    splits = store.shards.table["split"].to_numpy()[shards]
    assert (len(rows), len(set(groups))) == (150, 36)
    assert all(len(set(splits[groups == group])) == 1 for group in groups)


def test_a_card_says_that_its_split_was_drawn_by_file(tmp_path, monkeypatch):
    write_images(tmp_path / "set", *(f"{name}/{n}.jpg" for name in "ab" for n in range(8)))
    data = folder_config(tmp_path / "set", test_fraction=0.2)
    precompute.run(precompute_config(tmp_path / "store", data=data))

    kept = read_data_facts(tmp_path / "store")

    assert kept.splits == "drawn by file, bursts may be on both sides"
    assert kept.sheet["records"].source == f"image_folder; test {kept.splits}"
    results = {export.PICTURE: "", "splits": {"test": {"accuracy": 0.703, "records": 37}}}
    monkeypatch.setattr(export, "read_results", lambda _: results)
    student = SimpleNamespace(
        config=SimpleNamespace(name="x", kind="cifar"),
        **dict.fromkeys(("picture", "classes", "input_size", "teachers"), ()),
        num_classes=2,
    )
    said = export._facts(SimpleNamespace(run="one"), student, kept)["accuracy"]
    assert said == f"test 70.3% (37 records, split {kept.splits})"


def test_bursts_get_no_scores():
    scores = group_scores("hits", torch.tensor([True, False]), torch.tensor([-7, 2]), {})
    assert scores == {"group_hits": {"2": 0.0}}
