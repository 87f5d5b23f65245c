"""Properties of every source, and the commands of docs/howto/datasets.md."""

import json
import pickle
import shlex
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from permafrost.config.compose import compose
from permafrost.config.data import SOURCES
from permafrost.core.records import Box
from permafrost.sources.source import build_source
from permafrost_sources.options import DemoDataConfig
from tests.support.image_sets import (
    WATERBIRDS,
    WATERBIRDS_OPTIONS,
    by_key,
    downloaded_config,
    folder_config,
    image_table_config,
    pixels_of,
    write_imagenet,
    write_images,
    write_mnist,
    write_sun397,
    write_table,
    write_voc,
)
from tests.support.items import for_each
from tests.support.listings import fingerprint_records, plan_records
from tests.support.papers import needs_papers
from tests.support.sources import code_blocks, documented_config, fingerprint, page_text


def make_folder(root):
    write_images(root, "cat/1.jpg", "dog/Ünï code.jpg", "dog/3.png")
    return folder_config(root), "dog/3.png"


def make_waterbirds(root):
    write_images(root, *WATERBIRDS["img_filename"])
    write_table(root / "metadata.csv", WATERBIRDS)
    return image_table_config(root / "metadata.csv", **WATERBIRDS_OPTIONS), "002.B/b_1.jpg"


def make_masked_table(root):
    write_images(root, "images/1.jpg")
    Image.fromarray(np.zeros((4, 6), dtype=np.uint8)).save(root / "1.png")
    write_table(root / "t.csv", {"path": ["images/1.jpg"], "mask": ["1.png"]})
    return image_table_config(root / "t.csv", root=str(root), label=None, mask="mask"), "1.png"


def make_voc(root):
    write_voc(root, "2012", ("train", "val"))
    return downloaded_config("voc2012", root), "VOCdevkit/VOC2012/JPEGImages/2012_00.jpg"


def make_sun397(root):
    write_sun397(root)
    return downloaded_config("sun397", root), "SUN397/a/abbey/sun_1.jpg"


def make_imagenet(root):
    write_imagenet(root)
    return downloaded_config("imagenet", root), "train/n01/n01_1.JPEG"


FILE_SETS = [make_folder, make_waterbirds, make_masked_table, make_voc, make_sun397, make_imagenet]


def moved(config, root, target):
    """Config with every path below `target` instead of `root`."""
    options = {
        name: value.replace(str(root), str(target)) if isinstance(value, str) else value
        for name, value in vars(config).items()
    }
    return type(config)(**options)


@pytest.mark.parametrize("make", FILE_SETS)
def test_a_set_that_moves_is_the_same_set_and_one_that_changes_is_not(tmp_path, make):
    root, target = tmp_path / "first/place", tmp_path / "second"
    config, file = make(root)
    before = fingerprint(config)
    root.rename(target)
    there = moved(config, root, target)

    assert fingerprint(there) == before
    with (target / file).open("ab") as image:
        image.write(b"\0")
    assert fingerprint(there) != before


@pytest.mark.parametrize("make", FILE_SETS)
def test_every_source_can_be_planned_pickled_and_fingerprinted(tmp_path, make):
    config, _ = make(tmp_path / "set")
    source = build_source(config)
    records = list(source.records())
    assert source.classes is not None
    copy = pickle.loads(pickle.dumps(source))  # noqa: S301, pickled in this test

    plans = plan_records(records, 2, 0)
    assert sum(len(plan.records) for plan in plans) == len(records)
    assert all(str(tmp_path) not in json.dumps(record.content) for record in records)
    assert list(copy.records()) == records
    assert copy.classes == source.classes
    assert [copy.read(record) for record in records] == [source.read(record) for record in records]


def test_the_pickle_of_an_array_set_holds_no_array(tmp_path):
    write_mnist(tmp_path)
    source = build_source(downloaded_config("mnist", tmp_path))
    record = list(source.records())[-1]
    content = source.read(record)
    data = pickle.dumps(source)

    assert len(data) < 2000
    assert pickle.loads(data).read(record) == content  # noqa: S301, pickled in this test


def test_options_that_are_not_about_where_change_the_fingerprint(tmp_path):
    config, _ = make_folder(tmp_path)

    assert fingerprint(replace(config, on_error="skip", max_skipped=3)) == fingerprint(config)
    assert fingerprint(replace(config, test_fraction=0.5)) != fingerprint(config)


def test_a_class_file_may_move_and_its_order_counts(tmp_path):
    config, _ = make_folder(tmp_path / "set")
    prints = []
    for name, text in {"a": "dog\ncat", "b": "dog\ncat", "c": "cat\ndog"}.items():
        (tmp_path / name).write_text(text)
        prints.append(fingerprint(replace(config, classes=str(tmp_path / name))))

    assert prints[0] == prints[1] != prints[2]


@pytest.mark.slow
def test_the_demo_is_known_by_all_its_options():
    config = DemoDataConfig()
    records = list(build_source(config).records())[:3]

    assert fingerprint_records(config, 1, records) != fingerprint_records(
        replace(config, image_size=40), 1, records
    )


@needs_papers
@for_each(
    "command", [c for c in "".join(code_blocks("bash")).splitlines() if not c.startswith("kaggle ")]
)
def test_every_command_of_the_catalog_has_a_store_of_its_own(command):
    program, verb, *words = shlex.split(command)

    assert program == "permafrost"
    if verb == "precompute":
        assert compose(verb, words)["store"]["path"] != "stores/demo"


def test_the_catalog_names_every_source_and_every_set_of_torchvision():
    from permafrost_sources.torchvision_sets import SETS

    assert all(f"`{kind}`" in page_text() for kind in SOURCES)
    assert all(f"data.name={name} " in page_text() for name in SETS)


def test_the_catalog_adds_cubs_boxes_to_waterbirds(waterbirds, monkeypatch):
    root, _ = waterbirds
    cub = root.parent / "CUB_200_2011"
    cub.mkdir()
    names = WATERBIRDS["img_filename"]
    (cub / "images.txt").write_text("".join(f"{i} {n}\n" for i, n in enumerate(names[::-1], 1)))
    (cub / "bounding_boxes.txt").write_text(
        "".join(f"{i} {i}.0 2.0 3.0 1.0\n" for i in range(1, len(names) + 1))
    )
    monkeypatch.chdir(root.parent)

    exec(code_blocks("python")[0], {})

    records = by_key(build_source(documented_config("metadata_boxes.csv")))
    assert [records[name].boxes for name in names] == [
        (Box(label=y, x0=4.0 - i, y0=2.0, x1=7.0 - i, y1=3.0),)
        for i, y in enumerate(WATERBIRDS["y"])
    ]
    assert [records[name].group for name in names] == [0, 2, 3, 1]


def test_the_catalog_turns_vocs_masks_into_a_table(tmp_path, monkeypatch):
    voc = tmp_path / "VOCdevkit/VOC2012"
    for folder in ("SegmentationClass", "ImageSets/Segmentation"):
        (voc / folder).mkdir(parents=True)
    indices = np.array([[0, 8, 8], [15, 255, 0]], dtype=np.uint8)
    for split, name in {"train": "2007_01", "val": "2007_02"}.items():
        write_images(voc, f"JPEGImages/{name}.jpg")
        (voc / f"ImageSets/Segmentation/{split}.txt").write_text(f"{name}\n")
        mask = Image.fromarray(indices)
        mask.putpalette(bytes(range(256)) * 3)
        mask.save(voc / f"SegmentationClass/{name}.png")
    monkeypatch.chdir(tmp_path)

    exec(code_blocks("python")[1], {})

    source = build_source(documented_config("masks.csv"))
    records = by_key(source)
    record = records["JPEGImages/2007_02.jpg"]
    assert [source.classes[label] for label in record.labels] == ["cat", "person"]
    assert record.split == "val"
    assert np.array_equal(pixels_of(source.read(record).mask), np.where(indices == 255, 0, indices))
