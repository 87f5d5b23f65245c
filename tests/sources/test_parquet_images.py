"""Images inside of Parquet files, as Hugging Face's datasets writes them."""

import json
import os
import pickle
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import permafrost
from permafrost.config.data import ImageTableDataConfig
from permafrost.core.errors import ConfigError, UserError
from permafrost.sources.image_files import SourceFileError
from permafrost.sources.parquet_images import ParquetImages
from permafrost.sources.several_files import ABSENT_PARTS, tally_absent_parts
from permafrost.sources.source import build_source
from permafrost.sources.tally import Tally
from permafrost.store.reader import Store
from tests.support.image_sets import image_bytes, pixels_of, write_images
from tests.support.stores import precompute_config
from tests.support.trees import tree_bytes
from tests.support.verbs import precompute

NAMES = ["dog", "cat", "eel"]


def write_parquet(path, count=10, *, names=NAMES, paths=True, first=0, row_group_size=None):
    """Write a file as `datasets` does, and return the bytes of its images."""
    images = [image_bytes(first + i, kind="PNG" if i % 3 else "JPEG") for i in range(count)]
    cells = [
        {"bytes": data, "path": f"{i}.png" if paths else None} for i, data in enumerate(images)
    ]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    labels = pa.array([i % len(NAMES) for i in range(count)], pa.int64())
    table = pa.table({"image": pa.array(cells, kind), "label": labels})
    if names:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        text = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": text})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group_size)
    return images


def config_of(tmp_path, path, **options):
    return ImageTableDataConfig(
        path=str(path), image="image", cache=str(tmp_path / "cache"), **options
    )


@pytest.mark.parametrize("row_group_size", [None, 3])
@pytest.mark.parametrize("count", [1, 64, 150])
def test_every_row_is_a_record_with_its_bytes_and_its_class(tmp_path, count, row_group_size):
    images = write_parquet(tmp_path / "x.parquet", count, row_group_size=row_group_size)
    source = build_source(config_of(tmp_path, tmp_path / "x.parquet"))
    records = list(source.records())

    assert source.classes == tuple(NAMES)
    assert [record.label for record in records] == [i % 3 for i in range(count)]
    assert len({record.key for record in records}) == count
    other = pickle.loads(pickle.dumps(source))  # noqa: S301, as Ray sends it to another process
    for record, image in zip(records, images, strict=True):
        content = other.read(record)
        assert content.image == image
        assert content.suffix == ("png" if image[:4] == b"\x89PNG" else "jpg")


def test_a_column_of_plain_bytes_and_labels_without_names(tmp_path):
    images = [image_bytes(i) for i in range(4)]
    pq.write_table(pa.table({"image": images, "label": [0, 1, 1, 0]}), tmp_path / "x.parquet")
    source = build_source(config_of(tmp_path, tmp_path / "x.parquet"))

    assert source.classes == ("0", "1")
    assert [source.read(record).image for record in source.records()] == images


def test_several_files_have_the_splits_of_their_names(tmp_path):
    write_parquet(tmp_path / "data/train-00000-of-00002.parquet", 4)
    write_parquet(tmp_path / "data/train-00001-of-00002.parquet", 3, first=10)
    write_parquet(tmp_path / "data/validation-00000-of-00001.parquet", 2, first=20)
    for path in ("data", "data/*.parquet"):
        source = build_source(config_of(tmp_path, tmp_path / path))
        splits = [record.split for record in source.records()]
        assert (splits.count("train"), splits.count("validation")) == (7, 2)
    one = config_of(tmp_path, tmp_path / "data/validation-00000-of-00001.parquet")
    assert {record.split for record in build_source(one).records()} == {"validation"}


@pytest.mark.parametrize(
    ("names", "absent"),
    [
        (["train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001", "more"], {}),
        (["a-01-of-02", "a-02-of-02"], {}),
        (["a-02-of-02"], {"a-01-of-02": 1}),
        (["train-00001-of-00004-0af3", "test-00000-of-00001-17bc"], {"train-00000-of-00004": 3}),
        (["data.00000-of-00002"], {"data.00001-of-00002": 1}),
        (["00003-of-00004", "00001-of-00004", "00000-of-00004"], {"00002-of-00004": 1}),
        (["train_01_of_03", "train_03_of_03"], {"train_02_of_03": 1}),
        ([f"part-{n:05d}" for n in (0, 1, 2, 4, 5)], {"part-00003": 1}),
        ([f"part-{n:05d}-tid-{7 * n}-c000.snappy" for n in (0, 1, 4)], {"part-00002": 2}),
        ([f"part_{n}_of_x" for n in (9, 11)], {"part_10": 1}),
        (["a8", "a9", "a11", "b1", "b2", "12"], {"a10": 1}),
        (["train-00000", "train-00005"], {"train-00001": 4}),
        (["scan-0012", "scan-8745"], {}),
        (["day-2019", "day-2023", "2020-a-1", "2022-b-9"], {}),
    ],
)
def test_files_that_the_names_of_others_count_are_said_to_be_absent(names, absent):
    tally = Tally()

    tally_absent_parts([f"{name}.parquet" for name in names], tally)

    assert {item: count for item, (count, _) in tally[ABSENT_PARTS].items()} == absent


def test_a_preview_of_one_part_says_so(tmp_path, caplog):
    write_parquet(tmp_path / "train-00001-of-00002.parquet", 4)
    caplog.set_level("INFO")

    words = "data=image_table", f"data.path={tmp_path}", f"data.cache={tmp_path / 'cache'}"
    findings = [finding.message for finding in permafrost.preview(*words).findings]

    text = "only a part of the data, as their names say: train-00000-of-00002 is absent"
    assert any(text in finding for finding in findings)
    assert f"column image is copied to {tmp_path / 'cache'}" in caplog.text


def test_the_copy_is_made_once_and_again_after_a_change(tmp_path):
    path = tmp_path / "x.parquet"
    write_parquet(path)
    config = config_of(tmp_path, path)
    list(build_source(config).records())
    (copy,) = (tmp_path / "cache").iterdir()
    before = copy.stat().st_mtime_ns
    source = build_source(config)
    record = next(iter(source.records()))
    assert copy.stat().st_mtime_ns == before

    write_parquet(path, 12, first=50)

    with pytest.raises(UserError, match="when it was listed"):
        build_source(config).read(record)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_two_files_of_one_name_size_and_time_have_two_copies(tmp_path):
    images = {}
    for number, folder in enumerate(("train", "val")):
        path = tmp_path / folder / "part-0.parquet"
        images[folder] = [bytes([number]) * 40 for _ in range(3)]
        path.parent.mkdir()
        table = pa.table({"image": images[folder], "label": [0, 1, 0]})
        pq.write_table(table, path, compression="none", use_dictionary=False)
        os.utime(path, ns=(10**18, 10**18))
    sizes = {path.stat().st_size for path in tmp_path.rglob("*.parquet")}
    copies = [
        ParquetImages.of(tmp_path / folder / "part-0.parquet", "image", tmp_path / "cache")
        for folder in images
    ]

    assert len(sizes) == 1
    for folder, copy in zip(images, copies, strict=True):
        assert [copy.read(row, 40) for row in range(3)] == images[folder]


def test_a_damaged_copy_is_named_and_no_record_is_skipped(tmp_path):
    images = write_parquet(tmp_path / "x.parquet")
    config = config_of(tmp_path, tmp_path / "x.parquet", on_error="skip")
    source = build_source(config)
    records = list(source.records())
    (copy,) = (tmp_path / "cache").iterdir()
    data = bytearray(copy.read_bytes())
    data[data.index(images[3]) + 20] ^= 1
    copy.write_bytes(bytes(data))

    source = build_source(config)
    with pytest.raises(UserError, match=rf"{copy.name} is damaged: .* row 4") as caught:
        source.read(records[3])
    assert not isinstance(caught.value, SourceFileError)
    assert source.read(records[2]).image == images[2]


def test_a_file_that_changes_between_listing_and_reading_is_named(tmp_path):
    write_parquet(tmp_path / "x.parquet")
    images = ParquetImages.of(tmp_path / "x.parquet", "image", tmp_path / "cache")
    images.locate(0)
    elsewhere = pickle.loads(pickle.dumps(images))  # noqa: S301, as Ray sends it to another host
    shutil.rmtree(tmp_path / "cache")
    write_parquet(tmp_path / "x.parquet", first=50)

    with pytest.raises(UserError, match="was changed since it was listed"):
        elsewhere.read(0, 1)


def test_a_row_without_bytes_is_named(tmp_path):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = pa.array([{"bytes": image_bytes(), "path": "a"}, {"bytes": None, "path": "b"}], kind)
    pq.write_table(pa.table({"image": cells, "label": [0, 1]}), tmp_path / "x.parquet")

    with pytest.raises(ConfigError, match=r"x\.parquet, row 2, column image: has no bytes"):
        list(build_source(config_of(tmp_path, tmp_path / "x.parquet")).records())


def test_a_store_of_parquet_is_that_of_the_files(tmp_path):
    """Packed from Parquet and from files of the same bytes, shards hold the same images and labels."""
    images = write_parquet(tmp_path / "x.parquet", 12)
    precompute.run(
        precompute_config(tmp_path / "store", data=config_of(tmp_path, tmp_path / "x.parquet"))
    )
    store = Store(tmp_path / "store")

    assert store.manifest.classes == tuple(NAMES)
    rows = np.arange(store.index.num_rows)
    digests = {store.index.values("label", rows)[i]: None for i in range(len(rows))}
    assert set(digests) == {0, 1, 2}
    heights = store.index.take(("height", "width"), rows)
    shapes = {pixels_of(image).shape[:2] for image in images}
    assert set(zip(heights["height"].tolist(), heights["width"].tolist(), strict=True)) == shapes
    again = precompute_config(
        tmp_path / "again", data=config_of(tmp_path / "b", tmp_path / "x.parquet")
    )
    precompute.run(again)
    assert tree_bytes(tmp_path / "store") == tree_bytes(tmp_path / "again")


def test_paths_beside_a_column_of_bytes_stay_paths(tmp_path):
    write_images(tmp_path, "a.jpg", "b.jpg")
    table = pa.table({"image": ["a.jpg", "b.jpg"], "label": ["x", "y"]})
    pq.write_table(table, tmp_path / "x.parquet")
    source = build_source(config_of(tmp_path, tmp_path / "x.parquet"))

    assert [record.content[0] for record in source.records()] == ["a.jpg", "b.jpg"]


def test_the_folder_of_a_set_is_enough(tmp_path):
    write_parquet(tmp_path / "set/data/train-00000-of-00001.parquet")
    write_parquet(tmp_path / "set/data/test-00000-of-00001.parquet", 4, first=20)
    source = build_source(
        ImageTableDataConfig(path=str(tmp_path / "set"), cache=str(tmp_path / "cache"))
    )

    records = list(source.records())

    assert [record.split for record in records] == ["test"] * 4 + ["train"] * 10
    assert source.classes == tuple(NAMES)


def test_one_of_several_columns_of_images_must_be_named(tmp_path):
    images = [{"bytes": image_bytes(), "path": None}]
    pq.write_table(
        pa.table({"left": images, "right": images, "label": [0]}), tmp_path / "x.parquet"
    )
    source = build_source(
        ImageTableDataConfig(path=str(tmp_path / "x.parquet"), cache=str(tmp_path))
    )

    with pytest.raises(ConfigError, match=r"data\.image=path is not a column"):
        list(source.records())
