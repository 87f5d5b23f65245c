"""Tables of images: labels, splits, groups, boxes and masks."""

import io
import re
import unicodedata
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from permafrost.config.store import StoreOptions
from permafrost.core.errors import ConfigError
from permafrost.core.records import NO_GROUP, NO_LABEL, NONE, Box
from permafrost.sources import image_files
from permafrost.sources.image_files import to_mask_png
from permafrost.sources.source import build_source
from permafrost.store.image_decoding import ImageError
from tests.support.image_sets import (
    WATERBIRDS,
    WATERBIRDS_OPTIONS,
    by_key,
    image_bytes,
    image_table_config,
    pixels_of,
    write_images,
    write_table,
)
from tests.support.listings import plan_whole
from tests.support.previews import preview_of

NFC, NFD = (unicodedata.normalize(form, "chèvre") for form in ("NFC", "NFD"))


def test_the_metadata_of_waterbirds_is_read_unchanged(waterbirds):
    root, written = waterbirds
    source = build_source(image_table_config(root / "metadata.csv", **WATERBIRDS_OPTIONS))
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
        build_source(image_table_config(root / f"metadata.{suffix}", **WATERBIRDS_OPTIONS))
        for suffix in ("csv", "parquet")
    )

    assert list(one.records()) == list(other.records())
    assert one.classes == other.classes


@pytest.fixture(params=["csv", "parquet"])
def make_table(request, tmp_path):
    """Function that writes a table of three images, a.jpg, b.jpg and c.png, and builds its source."""
    write_images(tmp_path, "a.jpg", "b.jpg", "c.png")

    def build(columns=None, *, classes=None, **options):
        columns = {"path": ["a.jpg", "b.jpg", "c.png"], "label": ["x", "y", "x"]} | (columns or {})
        write_table(tmp_path / f"table.{request.param}", columns)
        if classes is not None:
            (tmp_path / "classes.txt").write_text("\n".join(classes))
            options["classes"] = str(tmp_path / "classes.txt")
        return build_source(image_table_config(tmp_path / f"table.{request.param}", **options))

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
        (["cat", "NA", ""], ["cat", "NA"], ("cat", "NA"), [0, 1, -1]),
        ([f" {NFC}", f"{NFD} ", "cat "], None, ("cat", NFC), [1, 1, 0]),
        (["007", "008", "007"], None, ("007", "008"), [0, 1, 0]),
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


@pytest.mark.parametrize(
    ("tags", "classes", "labels"),
    [
        ([["dog", "cat"], None, ["dog", "dog"]], ("cat", "dog"), [(0, 1), (), (1,)]),
        ([["dog"], None, []], ("dog",), [(0,), (), NONE]),
    ],
)
def test_many_labels_a_record(make_table, tags, classes, labels):
    source = make_table({"tags": tags}, label=None, labels="tags")
    records = by_key(source).values()

    assert source.classes == classes
    assert [(record.label, record.labels) for record in records] == [
        (NO_LABEL, each) for each in labels
    ]


def test_groups_number_the_combinations_the_first_column_slowest(make_table):
    columns = {"where": ["sea", "land", "sky"], "year": [3, 0, None]}
    both = make_table(columns, group=("where", "year"))
    one = make_table(columns, group=("where",))

    assert [record.group for record in both.records()] == [1 * 4 + 3, 0, NO_GROUP]
    assert [record.group for record in one.records()] == [1, 0, 2]


def test_groups_of_large_numbers_are_numbered_by_what_there_is(make_table):
    columns = {"a": [2**31, 10**17, 2**31], "b": [0, 2, 0]}

    for group in (("a",), ("a", "b")):
        groups = [record.group for record in make_table(columns, group=group).records()]
        assert groups[0] == groups[2]
        assert sorted({*groups}) == [0, 1]


def test_a_word_for_an_unknown_value_is_no_group(make_table):
    source = make_table({"who": ["NA", "", "a"], "site": [1, 1, 1]}, group=("site", "who"))

    assert [record.group for record in source.records()] == [NO_GROUP, NO_GROUP, 1]


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
    found = preview_of(image_table_config(next(tmp_path.glob("table.*")), mask="mask"))
    assert "with a mask 2" in found.sheet()["images"].value


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        (
            {},
            {"image": "file"},
            r"data.image=file is not a column of .*table.*; it has: path, label",
        ),
        ({}, {"group": ("label", "place")}, r"data.group.*=place is not a column"),
        ({"path": ["a.jpg", "", "c.png"]}, {}, "row 2, column path: is empty"),
        ({"path": ["a.jpg", "b.txt", "c.png"]}, {}, "row 2, column path: 'b.txt' is not an image"),
        ({"path": ["a.jpg", "/b.jpg", "c.png"]}, {}, "row 2, .*/b.jpg is not in data.root"),
        ({"part": ["train", "test", None]}, {"split": "part"}, "row 3, column part: is empty"),
        ({"part": ["x", "y", "a/b"]}, {"split": "part"}, "row 3, .*'a/b' must have only letters"),
        (
            {"part": ["0", "1", "2"]},
            {"split": "part", "split_names": {"0": "train", "1": "val"}},
            "row 3, column part: data.split_names has no '2'; it has: '0', '1'",
        ),
        ({}, {"classes": ["x"]}, "row 2, column label: 'y' is not one of the 1 classes"),
        (
            {"label": [0, 1, 2]},
            {"classes": ["x", "z"]},
            "row 3, column label: '2' is not one of the 2",
        ),
        ({"label": [0, 1, -2]}, {}, "row 3, column label: '-2' is not one"),
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
            "row 1, column b: 'q' is not one",
        ),
        *(
            ({"w": ["1", cell, "1"]}, {"weight": "w"}, "row 2, column w: .* finite number >= 0")
            for cell in ("-1", "nan", "1e39", "much", None)
        ),
    ],
)
def test_an_error_in_a_row_names_the_row_and_the_column(make_table, columns, options, message):
    source = make_table(columns, **options)
    if source.config.path.endswith(".csv"):  # the header is row 1, as in a spreadsheet
        message = re.sub(r"row (\d)", lambda number: f"row {int(number[1]) + 1}", message)

    with pytest.raises(ConfigError, match=message):
        list(source.records())


def test_an_image_of_two_rows_is_named_with_both(make_table):
    source = make_table({"path": ["a.jpg", "./a.jpg", "c.png"]})

    with pytest.raises(ConfigError, match=r"/a.jpg: records 1 and 2 have the key 'a%2Ejpg'; keys"):
        plan_whole(source, StoreOptions(path="store"))


def test_missing_files_are_counted_and_the_first_are_named(tmp_path):
    write_images(tmp_path, "a.jpg")
    names = ["a.jpg", *(f"gone_{i}.jpg" for i in range(7))]
    write_table(tmp_path / "table.csv", {"path": names})

    with pytest.raises(
        ConfigError, match=r"7 files .*row 3: gone_0\.jpg; .*gone_4\.jpg; and 2 more"
    ):
        list(build_source(image_table_config(tmp_path / "table.csv", label=None)).records())


def test_rows_of_missing_files_are_left_out_where_errors_are_skipped(tmp_path, caplog):
    write_images(tmp_path, "a.jpg", "b.jpg")
    write_table(tmp_path / "table.csv", {"path": ["gone.jpg", "a.jpg", "b.jpg", "gone_2.jpg"]})
    config = image_table_config(tmp_path / "table.csv", label=None, on_error="skip")

    with caplog.at_level("WARNING"):
        assert set(by_key(build_source(config))) == {"a.jpg", "b.jpg"}

    assert "2 files in the table are not in" in caplog.text
    assert "row 2: gone.jpg; row 5: gone_2.jpg" in caplog.text
    with pytest.raises(ConfigError, match=r"more rows than data\.max_skipped=1"):
        list(build_source(replace(config, max_skipped=1)).records())


def test_absolute_paths_are_below_a_root_that_is_written_with_dots(tmp_path):
    write_images(tmp_path, "a.jpg")
    (tmp_path / "elsewhere").mkdir()
    write_table(tmp_path / "table.csv", {"path": [str(tmp_path / "a.jpg")]})
    path = tmp_path / "elsewhere" / ".." / "table.csv"

    assert set(by_key(build_source(image_table_config(path, label=None)))) == {"a.jpg"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("table.txt", "path\n", "must end in .csv or .parquet"),
        ("table.csv", None, "cannot be read"),
        ("table.parquet", "no parquet", "cannot be read"),
        ("table.csv", "path,label\n", "has no rows"),
        ("table.csv", "path,label\na.jpg\n", r"Row #2: Expected 2 columns, got 1"),
        ("table.csv", "path,label,label\na.jpg,cat,dog\n", "the name of two columns"),
    ],
)
def test_a_file_that_is_no_table_is_named(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)

    with pytest.raises(ConfigError, match=message):
        list(build_source(image_table_config(tmp_path / name)).records())


def test_paths_may_be_absolute_below_the_root_and_the_root_elsewhere(tmp_path):
    write_images(tmp_path / "images", "cat/a.jpg", "b.jpg")
    paths = [str(tmp_path / "images/cat/a.jpg"), "./b.jpg"]
    write_table(tmp_path / "table.csv", {"path": paths})
    source = build_source(
        image_table_config(tmp_path / "table.csv", root=str(tmp_path / "images"), label=None)
    )

    assert set(by_key(source)) == {"cat/a.jpg", "b.jpg"}


def test_a_table_can_be_split(tmp_path):
    names = [f"{i}.jpg" for i in range(50)]
    write_images(tmp_path, *names)
    write_table(tmp_path / "table.csv", {"path": names, "label": [i % 2 for i in range(50)]})
    records = list(
        build_source(image_table_config(tmp_path / "table.csv", test_fraction=0.5)).records()
    )

    assert {record.split for record in records} == {"train", "test"}


def encoded_as(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["1", "LA", "RGB", "RGBA", "I;16"])
def test_a_mask_of_any_kind_keeps_its_values(mode):
    values = np.array([[0, 255], [255, 0]], dtype=np.uint8)
    if mode == "I;16":
        mask = Image.fromarray(values.astype(np.uint16))
    else:
        mask = Image.fromarray(values).convert("RGB" if mode == "RGBA" else mode).convert(mode)
    png = to_mask_png(encoded_as(mask), "m.png")

    assert np.array_equal(pixels_of(png), values)
    assert Image.open(io.BytesIO(png)).mode == "L"


LARGE = Image.fromarray(np.array([[0, 300]], dtype=np.uint16))
NOISY = Image.fromarray(np.random.default_rng(0).integers(0, 3, (16, 16)).astype(np.uint8) * 90)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (image_bytes(kind="PNG"), r"m\.png cannot be used: it has colors"),
        (encoded_as(LARGE), "do not fit into one byte"),
        (b"no image", r"m\.png cannot be used"),
        (encoded_as(NOISY, "JPEG"), "it is a JPEG"),
    ],
)
def test_a_mask_that_would_lose_something_is_refused(data, message):
    with pytest.raises(ImageError, match=message):
        to_mask_png(data, "m.png")


# ---- cells that mean something else than their text ----------------------------------------------


@pytest.mark.parametrize("word", ["", "nan", "NaN", "NA", "N/A", "null", "None", "<NA>", " nan "])
def test_a_word_for_nothing_is_an_unknown_label_in_csv_and_parquet(make_table, word):
    for classes in (("cat", "dog"), ("0", "1")):
        source = make_table({"label": [classes[0], word, classes[1]]})

        assert source.classes == classes
        assert list(labels_by_path(source).values()) == [0, NO_LABEL, 1]


@pytest.mark.parametrize(("of_table", "of_files"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_table_names_files_in_another_form_of_unicode(tmp_path, monkeypatch, of_table, of_files):
    folder, name = "œuvre é", "größe 한국"
    stored = [unicodedata.normalize(of_files, f"{folder}/{name}{n}.png") for n in range(3)]
    write_images(tmp_path, *stored, "plain.png")
    named = [unicodedata.normalize(of_table, path) for path in stored]
    rows = {"path": [*named, "plain.png"], "label": list("abab"), "mask": [named[0], "", "", ""]}
    write_table(tmp_path / "t.csv", rows)
    scanned, scan = [], image_files._iter_entries
    monkeypatch.setattr(image_files, "_iter_entries", lambda at: scanned.append(at) or scan(at))

    records = list(build_source(image_table_config(tmp_path / "t.csv", mask="mask")).records())

    assert [record.content[0] for record in records] == [*stored, "plain.png"]
    assert records[0].content[2] == stored[0]
    assert len(scanned) == 2  # the root and the folder, once


@pytest.mark.parametrize(
    ("cells", "options", "classes"),
    [
        (["cat|dog", "dog", "No Finding|cat"], {}, ("No Finding", "cat", "dog")),
        (["cat;dog", "eel", "eel"], {"label_separator": ";"}, ("cat", "dog", "eel")),
        (["cat;dog", "eel", "eel"], {"label_separator": ""}, ("cat;dog", "eel")),
        (['["cat", "a dog"]', "[]", "['cat']"], {}, ("a dog", "cat")),
        (["cat|NA", "dog", "cat|dog"], {}, ("cat", "dog")),
    ],
)
def test_cells_of_several_labels(make_table, cells, options, classes):
    source = make_table({"tags": cells}, label=None, labels="tags", **options)

    assert source.classes == classes


def test_a_separator_without_several_labels_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.label=null data\.labels=label"):
        image_table_config(tmp_path / "t.csv", label_separator="|")


@pytest.mark.parametrize(
    ("columns", "options"),
    [
        ({"label": ["x" * 5000, "y", "z"]}, {}),
        ({"path": ["x" * 5000, "b.jpg", "c.png"]}, {}),
        ({"label": ["x", "y" * 5000, "z"]}, {"classes": ["x", "z"]}),
        ({"part": ["/" * 5000, "a", "b"]}, {"split": "part"}),
        ({"tags": ["[" + "x" * 5000 + "]", "a", "b"]}, {"label": None, "labels": "tags"}),
    ],
)
def test_no_error_has_a_long_cell(make_table, columns, options):
    with pytest.raises(ConfigError) as caught:
        list(make_table(columns, **options).records())
    assert len(str(caught.value)) < 700


def test_usual_spellings_of_splits_are_splits(make_table):
    source = make_table({"part": ["Training", "TEST", "val"]}, split="part")

    assert [record.split for record in source.records()] == ["train", "test", "val"]


def test_a_list_in_a_column_of_single_labels_is_refused(tmp_path):
    write_images(tmp_path, "a.jpg")
    write_table(tmp_path / "t.parquet", {"path": ["a.jpg"], "label": [["cat", "dog"]]})

    with pytest.raises(ConfigError, match=r"not a single label.*data\.labels=label"):
        list(build_source(image_table_config(tmp_path / "t.parquet")).records())


def test_a_split_that_is_unknown_is_refused_or_drawn(make_table):
    table = {"part": ["train", "NA", "test"]}
    with pytest.raises(
        ConfigError, match=r"column part: is empty \(1 of all rows\); data\.test_fr"
    ):
        list(make_table(table, split="part").records())

    splits = [
        record.split for record in make_table(table, split="part", test_fraction=0.5).records()
    ]

    assert (splits[0], splits[2]) == ("train", "test")
    assert splits[1] in ("train", "test")
