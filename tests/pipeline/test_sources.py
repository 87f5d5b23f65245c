"""Every source lists what lies on disk, under keys that last, and reads its bytes unchanged."""

import hashlib
import io
import json
import os
import pickle
import random
import re
import shlex
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.config.builder import build_verb_config
from pipeline.config.compose import compose
from pipeline.config.data import (
    SOURCES,
    DemoDataConfig,
    ImageFolderDataConfig,
    ImageTableDataConfig,
    TinyImageNetDataConfig,
    TorchvisionDataConfig,
)
from pipeline.core.errors import ConfigError, UserError
from pipeline.core.records import NO_GROUP, NO_LABEL, Box
from pipeline.sources.build import build_source
from pipeline.sources.keys import escape_key
from pipeline.sources.masks import to_mask_png
from pipeline.store.pack import fingerprint_dataset
from pipeline.store.pixels import ImageError
from pipeline.store.planning import MAX_KEY_BYTES, plan_shards

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared/data"
PAGE = (ROOT / "docs/datasets.md").read_text(encoding="utf-8")


def image_bytes(seed=0, size=(6, 4), kind="JPEG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


def write_images(root, *paths):
    """An image of its own at each path; the bytes by path."""
    written = {}
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        kind = "PNG" if path.lower().endswith("png") else "JPEG"
        written[path] = image_bytes(len(path) + sum(map(ord, path)), kind=kind)
        (root / path).write_bytes(written[path])
    return written


def by_key(source):
    return {unquote(record.key): record for record in source.records()}


def fingerprint(config):
    source = build_source(config)
    return fingerprint_dataset(config, source.revision, source.records())


def pixels_of(data):
    return np.asarray(Image.open(io.BytesIO(data)))


# ---- keys ----------------------------------------------------------------------------------------

ODD_PATHS = [
    "cat/a.jpg",
    "cat/a jpg",
    "cat/a%2Ejpg",
    "cat/a~b-c_d.jpg",
    "Katze/Müller ß.png",
    "猫/写真.jpg",
    "cat\\a.jpg",
    "cat/a..jpg",
    "-/_.jpg",
    "CAT/a.jpg",
]


def random_paths(count=2000):
    generator = random.Random(0)
    alphabet = "abcXYZ019-_./%~ +éß猫\\\U0001f600"
    return ["".join(generator.choices(alphabet, k=generator.randint(1, 40))) for _ in range(count)]


def test_a_key_has_only_safe_characters_and_gives_the_path_back():
    for path in [*ODD_PATHS, *random_paths()]:
        key = escape_key(path)
        if len(key) <= MAX_KEY_BYTES and not re.search(r"-[0-9a-f]{32}$", key):
            assert unquote(key) == path
        assert re.fullmatch(r"([A-Za-z0-9_-]|%[0-9A-F]{2})+", key)
        assert len(key.encode()) <= MAX_KEY_BYTES


def test_different_paths_have_different_keys():
    paths = {*ODD_PATHS, *random_paths(), *(f"{'long/' * 60}{i}.jpg" for i in range(50))}

    assert len({escape_key(path) for path in paths}) == len(paths)


@pytest.mark.parametrize("length", range(140, 210))
def test_a_long_key_keeps_its_head_whole_and_ends_in_the_hash_of_all(length):
    path = "a" * (length - 100) + "/é" * 40
    full = path.replace("/", "%2F").replace("é", "%C3%A9")
    key = escape_key(path)
    head, digest = key[:-33], key[-32:]

    assert full.startswith(head)
    assert 147 < len(head) <= 150
    assert not re.search(r"%.?$", head)
    assert digest == hashlib.blake2b(full.encode(), digest_size=16).hexdigest()


def test_the_longest_key_that_fits_is_kept():
    assert escape_key("a" * 200) == "a" * 200
    assert len(escape_key("a" * 201)) == 183


def test_a_file_name_that_is_no_text_is_refused():
    with pytest.raises(ConfigError, match="is not UTF-8; rename"):
        escape_key(os.fsdecode(b"cat/\xff.jpg"))


# ---- image folders -------------------------------------------------------------------------------


def folder_config(root, **options):
    return ImageFolderDataConfig(path=str(root), **options)


@pytest.fixture
def folder(tmp_path):
    """Two classes, nested folders, every kind of name; what is no image is there too."""
    root = tmp_path / "set"
    written = write_images(root, "cat/1.jpg", "cat/deep/er/2.JPEG", "dog/1.jpg", "dog/3.png")
    for path in ("cat/notes.txt", "cat/.hidden.jpg", "dog/Thumbs.db", ".git/x.jpg", "README.md"):
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_bytes(b"no image")
    return root, written


def test_a_folder_gives_its_images_with_their_classes(folder):
    root, written = folder
    source = build_source(folder_config(root))
    records = by_key(source)

    assert source.classes == ("cat", "dog")
    assert set(records) == set(written)
    assert {path: record.label for path, record in records.items()} == {
        path: int(path.startswith("dog")) for path in written
    }
    assert {record.split for record in records.values()} == {"train"}
    for path, record in records.items():
        content = source.read(record)
        assert content.image == written[path]
        assert content.suffix == ("png" if path.endswith("png") else "jpg")
        assert content.mask is None


def test_a_class_file_gives_the_order(folder, tmp_path):
    root, _ = folder
    (tmp_path / "classes.txt").write_text("dog\nbird\ncat\n")
    source = build_source(folder_config(root, classes=str(tmp_path / "classes.txt")))

    assert source.classes == ("dog", "bird", "cat")
    assert {record.label for record in source.records()} == {0, 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat\n", "lacks the class folder 'dog'"),
        ("cat\ndog\ncat\n", "names the class 'cat' 2 times"),
        ("\n", "is empty"),
        (None, "cannot be read"),
    ],
)
def test_a_class_file_that_does_not_fit_is_refused(folder, tmp_path, text, message):
    root, _ = folder
    if text is not None:
        (tmp_path / "classes.txt").write_text(text)

    with pytest.raises(ConfigError, match=f"data.classes=.*{message}"):
        build_source(folder_config(root, classes=str(tmp_path / "classes.txt"))).records()


def test_folders_named_after_splits_are_splits(tmp_path):
    write_images(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg", "valid/dog/2.jpg")
    source = build_source(folder_config(tmp_path))

    assert source.classes == ("cat", "dog")
    assert {path: (r.split, r.label) for path, r in by_key(source).items()} == {
        "train/cat/1.jpg": ("train", 0),
        "train/dog/1.jpg": ("train", 1),
        "valid/dog/2.jpg": ("valid", 1),
    }


def test_one_folder_with_another_name_makes_all_of_them_classes(tmp_path):
    write_images(tmp_path, "train/1.jpg", "plane/1.jpg")

    assert build_source(folder_config(tmp_path)).classes == ("plane", "train")


def test_splits_can_be_named_and_folders_left_out(tmp_path):
    write_images(tmp_path, "raw/a/cat/1.jpg", "b/cat/1.jpg", "rest/1.jpg", "loose.jpg")
    source = build_source(folder_config(tmp_path, splits={"raw/a": "train", "b": "evaluator"}))

    assert {path: record.split for path, record in by_key(source).items()} == {
        "raw/a/cat/1.jpg": "train",
        "b/cat/1.jpg": "evaluator",
    }


@pytest.mark.parametrize(
    ("paths", "options", "message"),
    [
        (["1.jpg", "cat/1.jpg"], {}, "outside of any class folder, such as 1.jpg"),
        (["train/1.jpg", "test/cat/1.jpg"], {}, "such as train/1.jpg; .*data.splits"),
        (["train/cat/1.jpg", "1.jpg"], {}, "such as 1.jpg"),
        (["readme.txt"], {}, "has no class folders in it; expected <path>/<class>"),
        (["train/readme.txt"], {}, "has no class folders in train"),
        (["cat/readme.txt"], {}, "class folders but no images"),
        (["cat/1.jpg"], {"splits": {"dog": "train"}}, "the folder 'dog', but .* holds: cat"),
        (["a/cat/1.jpg"], {"splits": {"a": "x/y"}}, r"data.splits.a='x/y' must have only"),
        (["test/cat/1.jpg"], {"test_fraction": 0.5}, "have a split test already"),
    ],
)
def test_a_folder_of_another_shape_is_refused_with_the_way_out(tmp_path, paths, options, message):
    write_images(tmp_path, *paths)

    with pytest.raises(ConfigError, match=message):
        build_source(folder_config(tmp_path, **options)).records()


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere cannot be read: No such file.*data\.path"):
        build_source(folder_config(tmp_path / "nowhere")).records()


def test_the_test_fraction_depends_on_each_key_alone(tmp_path):
    write_images(tmp_path / "few", *(f"cat/{i}.jpg" for i in range(100)))
    write_images(tmp_path / "more", *(f"cat/{i}.jpg" for i in range(200)))

    def test_split(name, fraction):
        records = build_source(folder_config(tmp_path / name, test_fraction=fraction)).records()
        return {record.key for record in records if record.split == "test"}

    few, more = test_split("few", 0.3), test_split("more", 0.3)
    assert few <= more
    assert 40 < len(more) < 80
    assert few <= test_split("few", 0.5)
    assert few == {key for key in more if int(unquote(key)[4:-4]) < 100}


def test_a_file_that_changed_since_it_was_listed_is_not_read(folder):
    root, _ = folder
    source = build_source(folder_config(root))
    record = by_key(source)["cat/1.jpg"]

    (root / "cat/1.jpg").write_bytes(b"shorter")
    with pytest.raises(UserError, match="when it was listed and has 7 now"):
        source.read(record)
    (root / "cat/1.jpg").unlink()
    with pytest.raises(UserError, match="cannot be read: No such file"):
        source.read(record)


def test_a_dangling_link_is_named(folder):
    root, _ = folder
    (root / "cat/9.jpg").symlink_to(root / "gone.jpg")

    with pytest.raises(ConfigError, match=r"9\.jpg is a link to a file that is missing"):
        build_source(folder_config(root)).records()


def test_two_hundred_photographs_of_two_hundred_classes():
    if not (SHARED / "photos").is_dir():
        pytest.skip("needs the photographs in ../shared/data/photos")
    source = build_source(folder_config(SHARED / "photos"))
    records = source.records()

    assert len(source.classes) == 200
    assert sorted(record.label for record in records) == list(range(200))
    plan_shards(records, 64, 0)
    for record in records[:5]:
        assert source.read(record).image == (SHARED / "photos" / record.content[0]).read_bytes()


# ---- tables --------------------------------------------------------------------------------------


def csv_cell(value):
    """Boxes as JSON, many classes separated by spaces."""
    if not isinstance(value, list):
        return value
    return json.dumps(value) if value and isinstance(value[0], dict) else " ".join(value)


def write_table(path, columns):
    if path.suffix == ".csv":
        cells = {name: list(map(csv_cell, values)) for name, values in columns.items()}
        pd.DataFrame(cells).to_csv(path, index=False)
    else:
        pq.write_table(pa.table(columns), path)


def table_config(path, **options):
    return ImageTableDataConfig(path=str(path), **options)


WATERBIRDS = {
    "img_id": [1, 2, 3, 4],
    "img_filename": ["001.A/a_1.jpg", "001.A/a_2.jpg", "002.B/b_1.jpg", "002.B/b_2.jpg"],
    "y": [0, 1, 1, 0],
    "split": [0, 1, 2, 0],
    "place": [0, 0, 1, 1],
    "place_filename": ["/b/bamboo_forest/1.jpg"] * 4,
}
WATERBIRDS_OPTIONS = {
    "image": "img_filename",
    "label": "y",
    "split": "split",
    "split_names": {"0": "train", "1": "val", "2": "test"},
    "group": ("y", "place"),
}


@pytest.fixture
def waterbirds(tmp_path):
    root = tmp_path / "waterbirds"
    written = write_images(root, *WATERBIRDS["img_filename"])
    write_table(root / "metadata.csv", WATERBIRDS)
    return root, written


def test_the_metadata_of_waterbirds_is_read_unchanged(waterbirds):
    root, written = waterbirds
    source = build_source(table_config(root / "metadata.csv", **WATERBIRDS_OPTIONS))
    records = by_key(source)

    assert source.classes == ("0", "1")
    assert [(r.label, r.group, r.split) for r in map(records.get, WATERBIRDS["img_filename"])] == [
        (0, 0, "train"),
        (1, 2, "val"),
        (1, 3, "test"),
        (0, 1, "train"),
    ]
    for path, record in records.items():
        assert source.read(record).image == written[path]
        assert not record.boxes
        assert not record.boxes_in_pixels


def test_csv_and_parquet_give_the_same_records(waterbirds):
    root, _ = waterbirds
    write_table(root / "metadata.parquet", WATERBIRDS | {"y": [0.0, 1.0, 1.0, 0.0]})
    one, other = (
        build_source(table_config(root / f"metadata.{suffix}", **WATERBIRDS_OPTIONS))
        for suffix in ("csv", "parquet")
    )

    assert one.records() == other.records()
    assert one.classes == other.classes


@pytest.fixture(params=["csv", "parquet"])
def make_table(request, tmp_path):
    """Writes a table about three images, a.jpg, b.jpg and c.png, and builds its source."""
    write_images(tmp_path, "a.jpg", "b.jpg", "c.png")

    def build(columns=None, *, classes=None, **options):
        columns = {"path": ["a.jpg", "b.jpg", "c.png"], "label": ["x", "y", "x"]} | (columns or {})
        write_table(tmp_path / f"table.{request.param}", columns)
        if classes is not None:
            (tmp_path / "classes.txt").write_text("\n".join(classes))
            options["classes"] = str(tmp_path / "classes.txt")
        return build_source(table_config(tmp_path / f"table.{request.param}", **options))

    return build


def labels_by_path(source):
    return {path: record.label for path, record in by_key(source).items()}


@pytest.mark.parametrize(
    ("values", "classes", "names", "labels"),
    [
        (["dog", "cat", "dog"], None, ("cat", "dog"), [1, 0, 1]),
        (["dog", "cat", "dog"], ["dog", "bird", "cat"], ("dog", "bird", "cat"), [0, 2, 0]),
        ([2, 0, 2], None, ("0", "1", "2"), [2, 0, 2]),
        ([10, 9, 10], None, tuple(map(str, range(11))), [10, 9, 10]),
        ([1, 0, 1], ["cat", "dog"], ("cat", "dog"), [1, 0, 1]),
        (["7", "3", "7"], ["7", "3"], ("7", "3"), [0, 1, 0]),
        (["dog", None, "cat"], None, ("cat", "dog"), [1, -1, 0]),
        ([1, None, 0], None, ("0", "1"), [1, -1, 0]),
        ([1, -1, 0], None, ("0", "1"), [1, -1, 0]),
    ],
)
def test_labels_are_names_or_numbers(make_table, values, classes, names, labels):
    source = make_table({"label": values}, classes=classes)

    assert source.classes == names
    assert list(labels_by_path(source).values()) == labels


def test_a_table_without_labels(make_table):
    source = make_table(label=None)

    assert source.classes == ()
    assert set(labels_by_path(source).values()) == {NO_LABEL}


def test_many_labels_a_record(make_table):
    tags = [["dog", "cat"], [], ["dog", "dog"]]
    source = make_table({"tags": tags}, label=None, labels="tags")
    records = by_key(source).values()

    assert source.classes == ("cat", "dog")
    assert [record.label for record in records] == [NO_LABEL] * 3
    assert [record.labels for record in records] == [(0, 1), (), (1,)]


def test_groups_number_the_combinations_the_first_column_slowest(make_table):
    columns = {"where": ["sea", "land", "sky"], "year": [3, 0, None]}
    both = make_table(columns, group=("where", "year"))
    one = make_table(columns, group=("where",))

    assert [record.group for record in both.records()] == [1 * 4 + 3, 0, NO_GROUP]
    assert [record.group for record in one.records()] == [1, 0, 2]


def test_more_groups_than_an_index_can_number_are_refused(make_table):
    source = make_table({"a": [0, 1, 10**9], "b": [0, 1, 2]}, group=("a", "b"))

    with pytest.raises(ConfigError, match=r"data\.group=\['a', 'b'\] makes more than"):
        source.records()


def test_boxes_are_in_pixels_and_have_the_records_label_or_their_own(make_table):
    boxes = [
        [{"x0": 1, "y0": 2, "x1": 3.5, "y1": 4}],
        [],
        [{"x0": 0, "y0": 0, "x1": 1, "y1": 1, "label": "y"}],
    ]
    records = list(by_key(make_table({"boxes": boxes}, boxes="boxes")).values())

    assert records[0].boxes == (Box(label=0, x0=1, y0=2, x1=3.5, y1=4),)
    assert records[1].boxes == ()
    assert records[2].boxes == (Box(label=1, x0=0, y0=0, x1=1, y1=1),)
    assert [record.boxes_in_pixels for record in records] == [True, False, True]


def test_masks_come_as_gray_png_and_may_be_absent(make_table, tmp_path):
    indices = np.array([[0, 1], [2, 255]], dtype=np.uint8)
    mask = Image.fromarray(indices)
    mask.save(tmp_path / "gray.png")
    mask.putpalette(bytes(range(256)) * 3)
    mask.save(tmp_path / "palette.png")
    source = make_table({"mask": ["gray.png", None, "palette.png"]}, mask="mask")
    contents = [source.read(record) for record in source.records()]

    assert contents[0].mask == (tmp_path / "gray.png").read_bytes()
    assert contents[1].mask is None
    assert contents[2].mask != (tmp_path / "palette.png").read_bytes()
    assert np.array_equal(pixels_of(contents[2].mask), indices)
    assert contents[2].suffix == "png"


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({}, {"image": "file"}, r"data.image=file is no column of .*table.*; it has: path, label"),
        ({}, {"group": ("label", "place")}, r"data.group.*=place is no column"),
        ({"path": ["a.jpg", "", "c.png"]}, {}, "row 2, column path: is empty"),
        ({"path": ["a.jpg", "b.txt", "c.png"]}, {}, "row 2, column path: 'b.txt' is not an image"),
        ({"path": ["a.jpg", "./a.jpg", "c.png"]}, {}, "row 2, .*a.jpg is the image of row 1"),
        ({"path": ["a.jpg", "/b.jpg", "c.png"]}, {}, "row 2, .*/b.jpg is not in data.root"),
        ({"part": ["train", "test", None]}, {"split": "part"}, "row 3, column part: is empty"),
        ({"part": ["x", "y", "a/b"]}, {"split": "part"}, "row 3, .*'a/b' must have only letters"),
        (
            {"part": ["0", "1", "2"]},
            {"split": "part", "split_names": {"0": "train", "1": "val"}},
            "row 3, column part: data.split_names has no '2'; it has: 0, 1",
        ),
        ({}, {"classes": ["x"]}, "row 2, column label: 'y' is none of the 1 classes"),
        (
            {"label": [0, 1, 2]},
            {"classes": ["x", "z"]},
            "row 3, column label: '2' is none of the 2",
        ),
        ({"label": [0, 1, -2]}, {}, "row 3, column label: '-2' is none"),
        (
            {"b": [[{"x0": 3, "y0": 0, "x1": 3, "y1": 9}], [], []]},
            {"boxes": "b"},
            "row 1, column b: the box 3, 0, 3, 9 has no area",
        ),
        (
            {"b": [[{"x0": 3, "y0": 0, "x1": 4}], [], []]},
            {"boxes": "b"},
            "row 1, column b: expected a list of {x0, y0, x1, y1}",
        ),
        (
            {"b": [[{"x0": 0, "y0": 0, "x1": 4, "y1": 4, "label": "q"}], [], []]},
            {"boxes": "b"},
            "row 1, column b: 'q' is none",
        ),
    ],
)
def test_an_error_in_a_row_names_the_row_and_the_column(make_table, columns, options, message):
    source = make_table(columns, **options)

    with pytest.raises(ConfigError, match=message):
        source.records()


def test_missing_files_are_counted_and_the_first_are_named(tmp_path):
    write_images(tmp_path, "a.jpg")
    names = ["a.jpg", *(f"gone_{i}.jpg" for i in range(7))]
    write_table(tmp_path / "table.csv", {"path": names})

    with pytest.raises(
        ConfigError, match=r"7 files .*row 2: gone_0\.jpg; .*gone_4\.jpg; and 2 more"
    ):
        build_source(table_config(tmp_path / "table.csv", label=None)).records()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("table.txt", "path\n", "must end in .csv or .parquet"),
        ("table.csv", None, "cannot be read"),
        ("table.parquet", "no parquet", "cannot be read"),
        ("table.csv", "path,label\n", "has no rows"),
        ("table.csv", "path,label\na.jpg\n", "row 1: 1 cells, but the header has 2"),
    ],
)
def test_a_file_that_is_no_table_is_named(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)

    with pytest.raises(ConfigError, match=message):
        build_source(table_config(tmp_path / name)).records()


def test_paths_may_be_absolute_below_the_root_and_the_root_elsewhere(tmp_path):
    write_images(tmp_path / "images", "cat/a.jpg", "b.jpg")
    paths = [str(tmp_path / "images/cat/a.jpg"), "./b.jpg"]
    write_table(tmp_path / "table.csv", {"path": paths})
    source = build_source(
        table_config(tmp_path / "table.csv", root=str(tmp_path / "images"), label=None)
    )

    assert set(by_key(source)) == {"cat/a.jpg", "b.jpg"}


def test_a_table_can_be_split(tmp_path):
    names = [f"{i}.jpg" for i in range(50)]
    write_images(tmp_path, *names)
    write_table(tmp_path / "table.csv", {"path": names, "label": [i % 2 for i in range(50)]})
    records = build_source(table_config(tmp_path / "table.csv", test_fraction=0.5)).records()

    assert {record.split for record in records} == {"train", "test"}


@pytest.mark.parametrize("mode", ["1", "LA", "RGB", "RGBA", "I;16"])
def test_a_mask_of_any_kind_keeps_its_values(mode):
    values = np.array([[0, 255], [255, 0]], dtype=np.uint8)
    if mode == "I;16":
        mask = Image.fromarray(values.astype(np.uint16))
    else:
        mask = Image.fromarray(values).convert("RGB" if mode == "RGBA" else mode).convert(mode)
    buffer = io.BytesIO()
    mask.save(buffer, format="PNG")
    png = to_mask_png(buffer.getvalue(), "m.png")

    assert np.array_equal(pixels_of(png), values)
    assert Image.open(io.BytesIO(png)).mode == "L"


def test_a_mask_that_would_lose_something_is_refused():
    buffer = io.BytesIO()
    Image.fromarray(np.array([[0, 300]], dtype=np.uint16)).save(buffer, format="PNG")

    with pytest.raises(ImageError, match=r"m\.png cannot be used: it has colors"):
        to_mask_png(image_bytes(kind="PNG"), "m.png")
    with pytest.raises(ImageError, match="do not fit into one byte"):
        to_mask_png(buffer.getvalue(), "m.png")
    with pytest.raises(ImageError, match=r"m\.png cannot be used"):
        to_mask_png(b"no image", "m.png")


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


def test_tiny_imagenet_without_its_test(tiny_imagenet):
    shutil.rmtree(tiny_imagenet / "test")
    records = build_source(TinyImageNetDataConfig(path=str(tiny_imagenet))).records()

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
        build_source(TinyImageNetDataConfig(path=str(tiny_imagenet))).records()


# ---- torchvision's sets --------------------------------------------------------------------------


def torchvision_config(name, root):
    return TorchvisionDataConfig(name=name, root=str(root), download=False)


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.tobytes())


def write_mnist(root, name="MNIST"):
    generator = np.random.default_rng(0)
    images = {"train": generator.integers(0, 256, (12, 28, 28), dtype=np.uint8)}
    images["t10k"] = generator.integers(0, 256, (5, 28, 28), dtype=np.uint8)
    for part, pixels in images.items():
        labels = (np.arange(len(pixels)) % 10).astype(np.uint8)
        write_idx(root / f"{name}/raw/{part}-images-idx3-ubyte", pixels)
        write_idx(root / f"{name}/raw/{part}-labels-idx1-ubyte", labels)
    return images


@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")]
)
def test_mnist_becomes_png_without_loss(tmp_path, name, folder):
    images = write_mnist(tmp_path, folder)
    source = build_source(torchvision_config(name, tmp_path))
    records = by_key(source)

    assert (source.name, source.frame_size, len(source.classes)) == (name, (28, 28), 10)
    assert len(records) == 17
    record = records["train-000011"]
    assert (record.split, record.label, record.content) == ("train", 1, ("train", 11))
    content = source.read(record)
    assert content.suffix == "png"
    assert np.array_equal(pixels_of(content.image), images["train"][11])
    assert np.array_equal(pixels_of(source.read(records["test-000004"]).image), images["t10k"][4])


def write_cifar(root, monkeypatch, name):
    """Tiny batches whose checksums torchvision is told; its own check runs on them."""
    from torchvision import datasets

    dataset = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    field = {"cifar10": "labels", "cifar100": "fine_labels"}[name]
    count = {"cifar10": 10, "cifar100": 100}[name]
    folder = root / dataset.base_folder
    folder.mkdir(parents=True)

    def write(file, value):
        data = pickle.dumps(value)
        (folder / file).write_bytes(data)
        return [file, hashlib.md5(data).hexdigest()]

    rows = np.random.default_rng(0).integers(0, 256, (3, 3072), dtype=np.uint8)
    batch = {"data": rows, field: [5, 3, 9]}
    monkeypatch.setattr(dataset, "train_list", [write(f, batch) for f, _ in dataset.train_list])
    monkeypatch.setattr(dataset, "test_list", [write(f, batch) for f, _ in dataset.test_list])
    names = [f"class {i}" for i in range(count)]
    file, md5 = write(dataset.meta["filename"], {dataset.meta["key"]: names})
    monkeypatch.setattr(dataset, "meta", dataset.meta | {"filename": file, "md5": md5})
    return rows, folder


@pytest.mark.parametrize(("name", "train"), [("cifar10", 15), ("cifar100", 3)])
def test_cifar_becomes_png_without_loss(tmp_path, monkeypatch, name, train):
    rows, _ = write_cifar(tmp_path, monkeypatch, name)
    source = build_source(torchvision_config(name, tmp_path))
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
        build_source(torchvision_config("cifar10", tmp_path)).records()


VOC_XML = """<annotation><filename>{name}.jpg</filename>
<object><name>person</name><difficult>1</difficult>
<bndbox><xmin>1</xmin><ymin>2.5</ymin><xmax>6</xmax><ymax>4</ymax></bndbox>
<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>
</object>
<object><name>cat</name><bndbox><ymin>1</ymin><xmin>2</xmin><ymax>3</ymax><xmax>5</xmax></bndbox></object>
</annotation>"""


def write_voc(root, year, splits):
    voc = root / f"VOCdevkit/VOC{year}"
    for folder in ("ImageSets/Main", "Annotations"):
        (voc / folder).mkdir(parents=True)
    for number, split in enumerate(splits):
        names = [f"{year}_{number}{i}" for i in range(2)]
        write_images(voc, *(f"JPEGImages/{name}.jpg" for name in names))
        (voc / f"ImageSets/Main/{split}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            (voc / f"Annotations/{name}.xml").write_text(VOC_XML.format(name=name))
    return voc


@pytest.mark.parametrize(
    ("name", "year", "splits"),
    [("voc2007", "2007", ("train", "val", "test")), ("voc2012", "2012", ("train", "val"))],
)
def test_voc_has_many_labels_and_boxes_that_count_from_zero(tmp_path, name, year, splits):
    voc = write_voc(tmp_path, year, splits)
    source = build_source(torchvision_config(name, tmp_path))
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
        build_source(torchvision_config("voc2012", tmp_path)).records()


def write_sun397(root):
    names = ("/a/abbey", "/a/apartment_building/outdoor")
    write_images(root, "SUN397/a/abbey/sun_1.jpg")
    write_images(root, "SUN397/a/apartment_building/outdoor/sun_2.jpg")
    (root / "SUN397/ClassName.txt").write_text("\n".join(names) + "\n")


def test_sun397_has_nested_classes_and_one_split(tmp_path):
    write_sun397(tmp_path)
    source = build_source(torchvision_config("sun397", tmp_path))
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

    config = replace(torchvision_config("sun397", tmp_path), test_fraction=0.5)
    records = build_source(config).records()
    whole = build_source(torchvision_config("sun397", tmp_path)).records()

    splits = [record.split for record in records]
    assert 8 <= splits.count("test") <= 31
    assert splits.count("train") + splits.count("test") == 39
    prints = [fingerprint_dataset(config, 1, listed) for listed in (records, whole)]
    assert prints[0] != prints[1]
    plain = torchvision_config("sun397", tmp_path)
    assert fingerprint_dataset(plain, 1, whole) == prints[1]


def write_imagenet(root):
    import torch

    root.mkdir(parents=True, exist_ok=True)
    words = {"n01": ("crane", "bird"), "n02": ("crane",)}
    torch.save((words, ["n02"]), root / "meta.bin")
    write_images(root, "train/n01/n01_1.JPEG", "train/n02/n02_1.JPEG")
    write_images(root, "val/n01/ILSVRC2012_val_1.JPEG", "val/n02/ILSVRC2012_val_2.JPEG")


def test_imagenet_is_read_as_unpacked_with_the_keys_of_an_image_folder(tmp_path):
    write_imagenet(tmp_path)
    source = build_source(torchvision_config("imagenet", tmp_path))
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
        build_source(torchvision_config("imagenet", tmp_path)).records()


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
        build_source(torchvision_config(name, tmp_path)).records()

    message = str(caught.value)
    assert f"data.name={name}" in message
    assert re.search(rf"place .*{re.escape(needs)}.* in data\.root={tmp_path}", message)
    assert ("data.download=true" in message) == (name != "imagenet")


def test_a_failed_download_says_what_to_place_where(tmp_path, monkeypatch):
    def fail(*_args, **_options):
        raise URLError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fail)
    config = replace(torchvision_config("cifar10", tmp_path), download=True)

    with pytest.raises(UserError, match=r"no network.*; place .*cifar-10-python\.tar\.gz"):
        build_source(config).records()


def test_a_download_happens_only_where_the_set_is_not_there(tmp_path, monkeypatch):
    downloads = []

    def unpack(_url, root, **_options):
        downloads.append(root)
        write_voc(Path(root), "2012", ("train", "val"))

    monkeypatch.setattr("torchvision.datasets.voc.download_and_extract_archive", unpack)
    config = replace(torchvision_config("voc2012", tmp_path), download=True)

    assert len(build_source(config).records()) == 4
    assert len(build_source(config).records()) == 4
    assert downloads == [str(tmp_path)]


# ---- what holds for every source -----------------------------------------------------------------


def make_folder(root):
    write_images(root, "cat/1.jpg", "dog/Ünï code.jpg", "dog/3.png")
    return folder_config(root), "dog/3.png"


def make_waterbirds(root):
    write_images(root, *WATERBIRDS["img_filename"])
    write_table(root / "metadata.csv", WATERBIRDS)
    return table_config(root / "metadata.csv", **WATERBIRDS_OPTIONS), "002.B/b_1.jpg"


def make_masked_table(root):
    write_images(root, "images/1.jpg")
    Image.fromarray(np.zeros((4, 6), dtype=np.uint8)).save(root / "1.png")
    write_table(root / "t.csv", {"path": ["images/1.jpg"], "mask": ["1.png"]})
    return table_config(root / "t.csv", root=str(root), label=None, mask="mask"), "1.png"


def make_voc(root):
    write_voc(root, "2012", ("train", "val"))
    return torchvision_config("voc2012", root), "VOCdevkit/VOC2012/JPEGImages/2012_00.jpg"


def make_sun397(root):
    write_sun397(root)
    return torchvision_config("sun397", root), "SUN397/a/abbey/sun_1.jpg"


def make_imagenet(root):
    write_imagenet(root)
    return torchvision_config("imagenet", root), "train/n01/n01_1.JPEG"


FILE_SETS = [make_folder, make_waterbirds, make_masked_table, make_voc, make_sun397, make_imagenet]


def moved(config, root, target):
    """The config with every path below `target` instead of `root`."""
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
    records = source.records()
    assert source.classes is not None
    copy = pickle.loads(pickle.dumps(source))  # noqa: S301, made here

    plans = plan_shards(records, 2, 0)
    assert sum(len(plan.records) for plan in plans) == len(records)
    assert all(str(tmp_path) not in json.dumps(record.content) for record in records)
    assert copy.records() == records
    assert copy.classes == source.classes
    assert [copy.read(record) for record in records] == [source.read(record) for record in records]


def test_the_pickle_of_an_array_set_holds_no_array(tmp_path):
    write_mnist(tmp_path)
    source = build_source(torchvision_config("mnist", tmp_path))
    record = source.records()[-1]
    content = source.read(record)
    data = pickle.dumps(source)

    assert len(data) < 2000
    assert pickle.loads(data).read(record) == content  # noqa: S301, made here


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


def test_the_demo_is_known_by_all_its_options():
    config = DemoDataConfig()
    records = build_source(config).records()[:3]

    assert fingerprint_dataset(config, 1, records) != fingerprint_dataset(
        replace(config, image_size=40), 1, records
    )


# ---- the catalog -------------------------------------------------------------------------------


def code_blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.mark.parametrize("command", "".join(code_blocks("bash")).splitlines())
def test_every_command_of_the_catalog_can_be_given(command):
    words = shlex.split(command)
    verb = words[2].removeprefix("stages.")
    composed = compose(verb, words[3:])
    config = build_verb_config(verb, composed)

    assert words[:2] == ["python", "-m"]
    assert verb != "precompute" or config.data.kind in SOURCES
    assert composed["store"]["path"] != "stores/demo"


def test_the_catalog_names_every_source_and_every_set_of_torchvision():
    from pipeline.sources.torchvision_sets import SETS

    assert all(f"`{kind}`" in PAGE for kind in SOURCES)
    assert all(f"data.name={name} " in PAGE for name in SETS)


def config_of(command_part):
    (command,) = [c for c in "".join(code_blocks("bash")).splitlines() if command_part in c]
    return build_verb_config("precompute", compose("precompute", shlex.split(command)[3:])).data


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

    records = by_key(build_source(config_of("metadata_boxes.csv")))
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

    source = build_source(config_of("masks.csv"))
    records = by_key(source)
    record = records["JPEGImages/2007_02.jpg"]
    assert [source.classes[label] for label in record.labels] == ["cat", "person"]
    assert record.split == "val"
    assert np.array_equal(pixels_of(source.read(record).mask), np.where(indices == 255, 0, indices))
