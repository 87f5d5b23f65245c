"""Tables of numbers: equal records from CSV and Parquet, and rejection of values that are not numbers."""

import io
import logging
import pickle
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import load_breast_cancer

from permafrost.config.store import StoreOptions
from permafrost.core.digests import sha256_json
from permafrost.core.errors import ConfigError
from permafrost.core.records import NO_LABEL
from permafrost.sources.source import build_source
from permafrost.sources.splits import split_off_test
from permafrost.store.codecs import RowError
from permafrost_papers.ked.data_options import SklearnTableDataConfig, TableDataConfig
from tests.support.listings import fingerprint_records, listed_values, plan_records, plan_whole
from tests.support.sources import documented_config, fingerprint
from tests.support.unicauca import HEADER, write_unicauca


def table_config(path, **options):
    return TableDataConfig(path=str(path), **options)


@pytest.fixture
def write(tmp_path):
    """Function that writes a table's values and returns its config."""

    def write_values(values, name="t.csv", **options):
        frame = pd.DataFrame(values)
        if name.endswith("csv"):
            frame.to_csv(tmp_path / name, index=False)
        else:
            frame.to_parquet(tmp_path / name)
        return table_config(tmp_path / name, **options)

    return write_values


def row_of(source, record):
    return np.load(io.BytesIO(source.read(record).image), allow_pickle=False)


def values_of(config):
    """Stored values by key, in the order of the columns."""
    source = build_source(config)
    return {record.key: row_of(source, record).tolist() for record in source.records()}


SMALL = {"x": [1.5, -2.0, 3.0], "y": [10, 20, 30], "label": ["b", "a", "b"]}


# ---- stored values -------------------------------------------------------------------------------


def test_rows_are_numpys_own_files_of_float32_in_the_tables_order(write):
    source = build_source(write(SMALL))

    first = next(source.records())
    content = source.read(first)

    buffer = io.BytesIO()
    np.save(buffer, np.array([1.5, 10], np.float32))
    assert (content.image, content.suffix) == (buffer.getvalue(), "npy")
    assert [r.key for r in source.records()] == [f"row-{n:09d}" for n in (1, 2, 3)]
    assert source.columns == ("x", "y")
    assert (source.classes, [r.label for r in source.records()]) == (("a", "b"), [1, 0, 1])


def test_csv_and_parquet_give_the_same_records_bit_for_bit(write):
    generator = np.random.default_rng(0)
    values = {
        "real": generator.normal(size=50) * 10.0 ** generator.integers(-30, 30, 50),
        "whole": generator.integers(-(2**62), 2**62, 50),
        "large": generator.integers(-(2**62), 2**62, 50),
        "truth": generator.integers(0, 2, 50).astype(bool),
        "protocol": generator.choice([6.0, 17.0, np.nan], 50),
        "name": generator.choice(["tcp", "udp", ""], 50),
        "site": generator.choice(["first", "second"], 50),
        "label": generator.choice([0.0, 2.0, 10.0, np.nan], 50),
    }
    values["real"][3] = np.nan
    values["real"][4] = np.inf
    options = {"categorical": ("protocol", "name"), "split": "site", "key": "whole"}
    options["split_names"] = {"first": "train", "second": "test"}
    options["on_error"] = "skip"
    csv, parquet = (write(values, name, **options) for name in ("t.csv", "t.parquet"))

    one, other = build_source(csv), build_source(parquet)

    assert one.columns == other.columns
    assert one.columns[:3] == ("real", "large", "truth")
    assert {"protocol=6", "protocol=17", "name=tcp", "name=udp"} == set(one.columns[3:])
    assert one.classes == other.classes == ("0", "2", "10")
    assert list(one.records()) == list(other.records())
    assert fingerprint(csv) == fingerprint(parquet)
    kept = [r for place, r in enumerate(one.records()) if place not in (3, 4)]
    found = [row_of(one, record)[0] for record in kept]
    assert found == np.delete(values["real"], [3, 4]).astype(np.float32).tolist()


def test_columns_without_numbers_and_columns_that_options_name_are_no_features(write, caplog):
    values = SMALL | {"host": ["a", "b", "c"], "code": [7, 8, 9], "when": ["1/2", "3/4", "5/6"]}
    values["empty"] = [None] * 3

    with caplog.at_level(logging.INFO, "permafrost.sources"):
        source = build_source(write(values, exclude=("code",)))
        columns = source.columns

    assert columns == ("x", "y")
    assert "left out columns without numbers: host, when, empty" in caplog.text
    assert build_source(write(values, features=("code", "x"))).columns == ("code", "x")


def test_categories_are_those_of_the_training_split(write):
    config = write(
        {
            "port": [80, 9, 10, 80, 443],
            "split": ["train"] * 3 + ["test"] * 2,
            "label": list("aabba"),
        },
        categorical=("port",),
        split="split",
    )

    source = build_source(config)

    assert source.columns == ("port=9", "port=10", "port=80")  # in numeric, not alphabetical order
    assert list(values_of(config).values()) == [
        [0, 0, 1],
        [1, 0, 0],
        [0, 1, 0],
        [0, 0, 1],
        [0, 0, 0],  # port 443 does not occur in the training split
    ]


def test_a_logarithm_keeps_the_sign(write):
    values = {"bytes": [0.0, np.e - 1, -(np.e**2 - 1)], "y": [1, 2, 3], "label": [0, 1, 0]}

    one = values_of(write(values, log1p=("bytes",)))
    both = values_of(write(values, log1p=("all",)))

    assert np.allclose([row[0] for row in one.values()], [0, 1, -2], atol=1e-6)
    assert [row[1] for row in one.values()] == [1, 2, 3]
    assert np.allclose([row[1] for row in both.values()], np.log([2, 3, 4]), atol=1e-6)


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        ([10, 2, -1], None, (("-1", "2", "10"), [2, 1, 0])),
        (["b", "a", None], None, (("a", "b"), [1, 0, NO_LABEL])),
        ([1.0, np.nan, 0.0], None, (("0", "1"), [1, NO_LABEL, 0])),
        (["b", "a", "b"], "b\na", (("b", "a"), [0, 1, 0])),
        ([2, 0, 1], "x\ny\nz", (("x", "y", "z"), [2, 0, 1])),
    ],
)
def test_classes_are_the_labels_sorted_or_those_of_a_file(write, tmp_path, labels, names, expected):
    if names is not None:
        (tmp_path / "classes.txt").write_text(names)
        names = str(tmp_path / "classes.txt")

    source = build_source(write(SMALL | {"label": labels}, classes=names))

    assert (source.classes, [r.label for r in source.records()]) == expected


def test_a_table_without_labels(write):
    source = build_source(write(SMALL, label=None, exclude=("label",)))

    assert source.classes == ()
    assert {record.label for record in source.records()} == {NO_LABEL}


def test_records_with_keys_of_their_own_may_be_sorted_anew(write):
    values = pd.DataFrame(SMALL | {"id": ["x/1", "x.2", "ü"]})
    config = write(values, key="id")
    before = fingerprint(config)

    again = write(values.iloc[[2, 0, 1]], key="id")

    assert {r.key for r in build_source(again).records()} == {"x%2F1", "x%2E2", "%C3%BC"}
    assert fingerprint(again) == before
    assert fingerprint(write(values, exclude=("id",))) != before  # keys are row numbers


def test_the_test_fraction_depends_on_each_key_alone(write):
    values = {"x": range(200), "label": [0, 1] * 100}
    config = write(values, test_fraction=0.25, categorical=("x",))

    source = build_source(config)

    records = list(source.records())
    plain = [replace(record, split="train") for record in records]
    assert list(split_off_test(plain, 0.25)) == records
    assert len(source.columns) == sum(record.split == "train" for record in records) < 200


# ---- identity ------------------------------------------------------------------------------------


def test_a_table_that_moves_is_the_same_and_one_that_changes_is_not(write, tmp_path):
    before = fingerprint(write(SMALL))

    assert fingerprint(write(SMALL, "elsewhere.csv")) == before
    assert fingerprint(write(SMALL, on_error="skip", max_skipped=3)) == before
    assert fingerprint(write(SMALL, features=("x", "y"))) == before
    assert fingerprint(write(SMALL, features=("y", "x"))) != before
    assert fingerprint(write(SMALL | {"x": [1.5, -2.0, 3.0000002]})) != before
    assert fingerprint(write(SMALL | {"label": ["b", "a", "a"]})) != before


def test_a_fingerprint_is_the_digest_of_the_whole_listing(write):
    config = write(SMALL, test_fraction=0.5)
    records = list(build_source(config).records())

    assert not {"path", "label", "classes", "test_fraction"} & set(config.description)
    listing = [listed_values(record) for record in sorted(records, key=lambda record: record.key)]

    assert fingerprint_records(config, 1, records) == sha256_json(
        {"data": config.description, "revision": 1, "records": listing}
    )
    assert fingerprint_records(config, 1, []) == sha256_json(
        {"data": config.description, "revision": 1, "records": []}
    )


def test_a_source_travels_without_its_table(write, tmp_path):
    source = build_source(write({"x": range(1000), "label": [0, 1] * 500}))
    records = list(source.records())
    (plan, *_) = plan_records(records, 10, 0)
    data = pickle.dumps(source)
    (tmp_path / "t.csv").unlink()

    copy = pickle.loads(data)  # noqa: S301, pickled in this test

    assert len(data) < 2000
    assert [copy.read(r) for r in plan.records] == [source.read(r) for r in plan.records]
    assert all(str(tmp_path) not in str(record.content) for record in records)


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (None, "row 2, column x: is empty or NaN"),
        ("Infinity", "row 2, column x: is infinite"),
        ("-inf", "row 2, column x: is infinite"),
        ("NaN", "row 2, column x: is empty or NaN"),
        ("1e39", r"row 2, column x: 1e\+39 is beyond the range of float32"),
        ("12 ms", "row 2, column x: '12 ms' is not a number"),
        ("1_000", "row 2, column x: '1_000' is not a number"),
    ],
)
def test_a_cell_that_is_no_finite_number_is_named_at_once_or_with_its_row(
    write, name, cell, message
):
    config = write(SMALL | {"x": ["1.5", cell, " 3"]}, name)
    with pytest.raises(RowError, match=rf"t\..*: 1 rows .*the first: {message}; .*on_error=skip"):
        list(build_source(config).records())
    source = build_source(replace(config, on_error="skip"))
    good, bad, padded = source.records()

    with pytest.raises(RowError, match=message):
        source.read(bad)
    assert row_of(source, good).tolist() == [1.5, 10]
    assert row_of(source, padded).tolist() == [3, 30]


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ({}, {"label": "klass"}, r"data.label=klass is not a column of .*; it has: x, y, label"),
        ({}, {"features": ("x", "z")}, r"data.features\[1\]=z is not a column"),
        ({}, {"exclude": ("z",)}, r"data.exclude\[0\]=z is not a column"),
        ({}, {"log1p": ("label",)}, r"data.log1p names label, .*numeric columns: x, y"),
        ({}, {"exclude": ("x", "y")}, r"has no column of numbers.*data.features"),
        (
            {"y": ["a", None, "b"]},
            {"key": "y"},
            r"row 2, column y: is empty, but every record needs a key",
        ),
        ({"y": ["a", None, "b"]}, {"split": "y"}, r"row 2, column y: is empty"),
        ({"y": ["a", "b/c", "d"]}, {"split": "y"}, r"row 2, column y: the split 'b/c'"),
        (
            {"y": ["a", "b", "a"]},
            {"split": "y", "split_names": {"a": "train"}},
            r"row 2, column y: data.split_names has no 'b'",
        ),
        (
            {"y": ["a", "b", "a"]},
            {"split": "y", "categorical": ("x",)},
            r"data.categorical names x, which has 0 values in split train.*check the split",
        ),
    ],
)
def test_options_that_do_not_fit_the_table_are_refused(write, values, options, message):
    with pytest.raises(ConfigError, match=message):
        list(build_source(write(SMALL | values, **options)).records())


def test_two_rows_with_one_key_are_named(write):
    source = build_source(write(SMALL | {"y": [1, 2, 1]}, key="y"))

    with pytest.raises(ConfigError, match=r"records 1 and 3 have the key '1'; keys must be unique"):
        plan_whole(source, StoreOptions(path="store"))


def test_a_label_that_a_class_file_has_not_is_refused(write, tmp_path):
    (tmp_path / "classes.txt").write_text("a")

    with pytest.raises(ConfigError, match=r"row 1, column label: 'b' is not one of the 1 classes"):
        list(build_source(write(SMALL, classes=str(tmp_path / "classes.txt"))).records())


def test_an_identifier_is_no_category(write):
    config = write({"x": range(1001), "label": [0] * 1001}, categorical=("x",))

    with pytest.raises(ConfigError, match=r"x, which has 1001 values.*data.exclude"):
        list(build_source(config).records())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": ""}, "data.path is empty"),
        ({"features": ("label",)}, "must not name label, which is data.label"),
        ({"categorical": ("s",), "split": "s"}, "must not name s, which is data.split"),
        ({"features": ("x", "x")}, r"data.features lists a column twice"),
        ({"features": ("x",), "categorical": ("x",)}, "both name x"),
        ({"features": ("x",), "exclude": ("y",)}, "leave one of them empty"),
        ({"test_fraction": 1.0}, r"data.test_fraction must be in \[0, 1\)"),
    ],
)
def test_options_that_exclude_each_other_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        TableDataConfig(**{"path": "t.csv", **options})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.txt", "x,label\n1,a\n", "must end in .csv or .parquet"),
        ("t.csv", "", "cannot be read"),
        ("t.csv", "x,label\n", "has no rows"),
        ("t.csv", "x,x,label\n1,2,a\n", "two columns named x"),
        ("t.csv", "x,label\n1,a\n2,b,c\n", "cannot be read: .*Row #3: Expected 2 columns, got 3"),
        ("t.parquet", "no", "cannot be read"),
    ],
)
def test_a_file_that_is_no_table_is_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)

    with pytest.raises(ConfigError, match=message):
        list(build_source(table_config(tmp_path / name)).records())


# ---- real tables ---------------------------------------------------------------------------------


def test_scikit_learns_tables_are_as_it_has_them():
    source = build_source(SklearnTableDataConfig(name="breast_cancer"))
    loaded = load_breast_cancer()

    records = list(source.records())

    assert source.columns == tuple(loaded.feature_names)
    assert source.classes == ("malignant", "benign")
    assert [record.label for record in records] == loaded.target.tolist()
    rows = np.stack([row_of(source, record) for record in records])
    assert np.array_equal(rows, loaded.data.astype(np.float32))
    assert 0.1 < np.mean([record.split == "test" for record in records]) < 0.3
    assert len(build_source(SklearnTableDataConfig(name="digits")).columns) == 64


def test_the_recipe_of_unicauca_leaves_out_what_tells_the_answer(tmp_path):
    path = write_unicauca(tmp_path / "flows.csv", rows=60)
    config = replace(documented_config("data.max_skipped=100000 teacher=none"), path=str(path))

    source = build_source(config)
    records = list(source.records())

    assert len(HEADER) == 87
    assert source.classes == ("GOOGLE", "HTTP", "SKYPE")
    of_protocol = tuple(name for name in source.columns if name.startswith("Protocol="))
    assert set(of_protocol) <= {"Protocol=0", "Protocol=6", "Protocol=17"}
    answers = {"Flow.ID", "Source.IP", "Destination.IP", "Timestamp", "Label", "L7Protocol"}
    kept = [n for n in HEADER if n not in answers | {"Protocol", "ProtocolName"}]
    assert source.columns == (*kept, *of_protocol)
    bad = []
    for place, record in enumerate(records):
        try:
            row = row_of(source, record)
        except RowError as error:
            bad.append((place, str(error)))
        else:
            assert np.isfinite(row).all()
            assert np.abs(row).max() < 30  # the columns are logarithms
    assert [place for place, _ in bad] == [4, 9]
    assert "row 5, column Flow.Bytes.s: is infinite" in bad[0][1]
    assert "row 10, column Flow.Bytes.s: is empty or NaN" in bad[1][1]


@pytest.mark.parametrize(
    ("cells", "is_rounded"),
    [
        (["1600000001", "1600000002"], True),  # times in seconds
        (["16777216", "33554432"], False),
        (["0.123456789", "1600000001.5"], False),  # measurements
    ],
)
def test_whole_numbers_that_float32_cannot_hold_are_said(tmp_path, caplog, cells, is_rounded):
    (tmp_path / "t.csv").write_text("x,y\n" + "".join(f"{cell},a\n" for cell in cells))
    source = build_source(TableDataConfig(path=str(tmp_path / "t.csv"), label="y"))

    list(source.records())

    assert ("column x: 2 whole numbers are rounded to float32" in caplog.text) == is_rounded
