"""Copies of columns of Parquet files: of the file that was listed, whole, and never other values."""

import random
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from permafrost.core.errors import UserError
from permafrost.sources.column_copies import ColumnCopy, binary_cells
from permafrost.sources.parquet_images import ParquetImages
from permafrost_exchange.format_options import ListColumnsConfig
from permafrost_exchange.formats.list_columns import ListColumnReader
from permafrost_exchange.target_reader import ReadRequest

ROWS = 150
CELLS = [None if row % 7 == 3 else bytes([row]) * (row % 11) for row in range(ROWS)]


def write_cells(path, cells=CELLS):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": pa.array(cells, pa.binary())}), path, row_group_size=40)
    return path


def copy_of(path, cells=binary_cells):
    return ColumnCopy(path, "image", path.parent / "cache", cells)


def rows_of(copy):
    return [
        None if (data := copy.read(row)) is None else bytes(data) for row in range(copy.num_rows)
    ]


def test_every_cell_comes_back(tmp_path):
    copy = copy_of(write_cells(tmp_path / "t.parquet"))

    assert rows_of(copy) == CELLS
    assert rows_of(copy_of(tmp_path / "t.parquet")) == CELLS
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_file_without_rows_has_a_copy_without_rows(tmp_path):
    assert copy_of(write_cells(tmp_path / "t.parquet", [])).num_rows == 0


def test_a_file_that_is_replaced_while_it_is_copied_is_refused_and_leaves_no_copy(tmp_path):
    path, other = write_cells(tmp_path / "t.parquet"), tmp_path / "other.parquet"
    write_cells(other, CELLS[::-1])
    shutil.copy(path, tmp_path / "original.parquet")

    def replaced(path, column):
        shutil.copy(other, path)
        yield from binary_cells(path, column)

    with pytest.raises(UserError, match="was changed since it was listed"):
        copy_of(path, replaced).read(0)
    shutil.copy(tmp_path / "original.parquet", path)

    assert rows_of(copy_of(path)) == CELLS


def test_images_of_a_file_that_is_replaced_after_its_digest_are_refused(tmp_path):
    images = ParquetImages.of(write_cells(tmp_path / "t.parquet"), "image", tmp_path / "cache")
    assert images.copy.sha256
    write_cells(tmp_path / "t.parquet", CELLS[::-1])

    with pytest.raises(UserError, match="was changed since it was listed"):
        images.locate(0)


def test_a_damaged_copy_has_no_other_values(tmp_path, count_trials):
    """Any bit of a copy is flipped, or its end is cut off."""
    path = write_cells(tmp_path / "t.parquet")
    copy_of(path).read(0)
    (file,) = (tmp_path / "cache").iterdir()
    whole, draw = file.read_bytes(), random.Random(7)
    for trial in range(400):
        data = bytearray(whole)
        if trial % 4:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        else:
            del data[draw.randrange(len(data)) :]
        file.write_bytes(data)
        with pytest.raises(UserError, match="is damaged"):
            rows_of(copy_of(path))

    count_trials("damage of a copy of a column", {"named": 400})


def write_lists(path, lists, keys=None, name="logits", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = [f"k{row}" for row in range(len(lists))] if keys is None else keys
    pq.write_table(pa.table({"key": keys, name: lists}), path, **options)


def read_lists(path, numbers, **options):
    reader = ListColumnReader(
        ListColumnsConfig(frame="full", cache=str(path.parent / "cache"), **options), path
    )
    names = [name for part in reader.listing() for name in part.names]
    return names, reader.read(ReadRequest(np.asarray(numbers), ["a"], ["a"], None, None, None))


def test_a_file_without_rows_among_others_is_passed_over(tmp_path):
    kind = pa.list_(pa.float32())
    write_lists(tmp_path / "q/a.parquet", pa.array([], kind), pa.array([], pa.string()))
    write_lists(tmp_path / "q/b.parquet", pa.array([[1.0, 2.0], [3.0, 4.0]], kind))
    write_lists(tmp_path / "q/c.parquet", pa.array([], kind), pa.array([], pa.string()))

    names, values = read_lists(tmp_path / "q", [1])

    assert names == ["k0", "k1"]
    assert values["logits"].tolist() == [[[3.0, 4.0]]]


def test_names_of_a_file_that_is_replaced_are_refused_although_its_copy_exists(tmp_path):
    path = tmp_path / "t.parquet"
    lists = pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float32()))
    write_lists(path, lists)
    read_lists(path, [0])
    reader = ListColumnReader(ListColumnsConfig(frame="full", cache=str(tmp_path / "cache")), path)
    assert reader.sha256_of(path)
    write_lists(path, lists, ["k1", "k0"])

    with pytest.raises(UserError, match="was changed since it was listed"):
        list(reader.listing())


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (pa.array([[], []], pa.list_(pa.float32())), "has lists without a number"),
        (pa.array([1.0, 2.0]), "is double in place of a list of numbers"),
        (pa.array(["a", "b"]), "in place of a list of numbers"),
        (pa.array([{"x": 1.0}, {"x": 2.0}]), "in place of a list of numbers"),
    ],
)
def test_another_kind_of_column_is_named(tmp_path, lists, message):
    write_lists(tmp_path / "t.parquet", lists)

    with pytest.raises(UserError, match=message):
        read_lists(tmp_path / "t.parquet", [0])


def test_a_file_that_lacks_a_column_is_named(tmp_path):
    lists = pa.array([[1.0, 2.0]], pa.list_(pa.float32()))
    write_lists(tmp_path / "q/a.parquet", lists)
    write_lists(tmp_path / "q/b.parquet", lists, name="other")

    with pytest.raises(UserError, match=r"b\.parquet has 0 columns logits"):
        read_lists(tmp_path / "q", [0])


@pytest.mark.parametrize("name", ["logits", "a.logits"])
def test_few_numbers_other_than_zero_are_read_in_half_precision(tmp_path, name):
    """As many classes of which a teacher names five: small files of much data."""
    values = np.zeros((10_000, 1000), np.float16)
    values[:, :5] = np.random.default_rng(0).normal(size=(10_000, 5))
    lists = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), 1000)
    write_lists(tmp_path / "t.parquet", lists, name=name, compression="zstd")

    _, read = read_lists(tmp_path / "t.parquet", [9999], fields={"logits": name})

    assert np.array_equal(read["logits"][0, 0], values[9999])
