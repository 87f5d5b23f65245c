"""Stores of table rows: round trip, stock readers, rejected rows and column moments."""

import io
import json
import sys
import textwrap
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_wine

from permafrost.core.errors import ConfigError
from permafrost.loading.dataset import StoreDataset
from permafrost.store.codecs import RowError, decode_row, encode_row
from permafrost.store.entries import ManifestError, StoreMismatchError
from permafrost.store.frames import ShardFrames
from permafrost.store.manifest import fingerprint_store
from permafrost.store.reader import Store
from permafrost.store.verification import verify_store
from permafrost_papers.ked.data_options import SklearnTableDataConfig, TableDataConfig
from permafrost_papers.ked.moments import Standardize, column_moments
from tests.support.index_table import index_table
from tests.support.processes import run_program
from tests.support.stores import precompute_config
from tests.support.trees import tree_bytes
from tests.support.unicauca import write_unicauca
from tests.support.verbs import precompute

WINE = SklearnTableDataConfig(name="wine")


def pack_table(path, data=WINE, **options):
    result = precompute.run(precompute_config(path, data=data, **options))
    return Store(path), result


def every_record(store):
    return StoreDataset(store, np.arange(store.index.num_rows), with_regions=True).__getitems__(
        list(range(store.index.num_rows))
    )


def parts_of(store, split):
    """Rows of a split, a tensor for each shard."""
    for number in store.shards.splits[split].tolist():
        shard = store.shards[number]
        yield ShardFrames(store, shard).read(0, shard.records).frames


@pytest.fixture(scope="module")
def wine(tmp_path_factory):
    """Store of 178 rows of 13 columns in shards of 16, which tests must not change."""
    return pack_table(tmp_path_factory.mktemp("wine") / "store")[0]


# ---- round trip ----------------------------------------------------------------------------------


def test_every_row_comes_back_exactly(wine):
    loaded = load_wine()
    batch = every_record(wine)

    numbers = [int(key.removeprefix("row-")) for key in batch.keys]

    assert sorted(numbers) == list(range(178))
    assert torch.equal(batch.inputs, torch.from_numpy(loaded.data[numbers].astype(np.float32)))
    assert batch.labels.tolist() == loaded.target[numbers].tolist()
    assert not batch.has_places
    assert batch.canonical_from_view is None
    assert batch.masks is None
    frames = ShardFrames(wine, wine.manifest.shards[0]).read(2, 5)
    assert torch.equal(frames.frames, batch.inputs[2:5])


def test_a_store_says_whether_it_holds_rows_or_images(wine, frozen):
    manifest = wine.manifest

    assert (manifest.kind, manifest.canonical) == ("table", None)
    assert manifest.columns == tuple(load_wine().feature_names)
    assert wine.size == (1, 13)
    assert (
        set(index_table(wine)["height"].to_pylist())
        == set(index_table(wine)["width"].to_pylist())
        == {-1}
    )
    assert set(index_table(wine)["mask_offset"].to_pylist()) == {-1}
    assert (frozen.store.manifest.kind, frozen.store.form.has_places) == ("image", True)
    assert frozen.store.manifest.columns is None


def test_columns_are_part_of_a_stores_fingerprint(wine):
    manifest = wine.manifest
    fingerprints = [
        fingerprint_store(manifest.dataset, None, columns, wine.shards.names_and_keys())
        for columns in (manifest.columns, (*manifest.columns[:-1], "other"))
    ]

    assert fingerprints[0] == manifest.fingerprint != fingerprints[1]


def test_the_same_table_gives_the_same_bytes_and_a_second_command_packs_nothing(wine, tmp_path):
    store, first = pack_table(tmp_path / "again")

    assert tree_bytes(store.path) == tree_bytes(wine.path)
    assert first.packed_records == 178
    assert pack_table(tmp_path / "again")[1].packed_records == 0


def test_a_store_of_rows_verifies_and_a_flipped_byte_is_found(tmp_path):
    store, _ = pack_table(tmp_path / "store")
    assert list(verify_store(store.path)) == []
    shard = store.path / store.manifest.shards[0].path
    data = bytearray(shard.read_bytes())
    data[index_table(store)["offset"][0].as_py() + 130] ^= 1
    shard.write_bytes(data)

    (problem,) = verify_store(store.path)

    assert "train-000000.tar has sha256" in problem or "test-000000.tar has sha256" in problem


@pytest.mark.slow
def test_stock_readers_open_rows_without_importing_ours(wine):
    script = """
        import glob, io, json, sys
        import numpy, webdataset

        (store,) = sys.argv[1:]
        columns = json.load(open(f"{store}/manifest.json"))["index"]
        labels = numpy.load(f"{store}/{columns['label']['path']}").tolist()
        urls = sorted(glob.glob(f"{store}/images/*.tar"))
        raw = list(webdataset.WebDataset(urls, shardshuffle=False))
        decoded = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
        assert [sample["cls"] for sample in decoded] == labels
        for plain, sample in zip(raw, decoded):
            row = numpy.load(io.BytesIO(plain["npy"]), allow_pickle=False)
            assert (row.shape, row.dtype) == ((13,), numpy.float32)
            assert (row == sample["npy"]).all()
        assert not [m for m in sys.modules if m.split(".")[0] in ("permafrost", "stages")]
    """

    done = run_program([sys.executable, "-c", textwrap.dedent(script), wine.path])

    assert done.returncode == 0, done.stderr


# ---- encoding of rows ----------------------------------------------------------------------------


def npy(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def test_a_row_is_read_whatever_numpy_wrote_its_header():
    values = np.arange(5, dtype=np.float32)
    wide = io.BytesIO()
    np.lib.format.write_array(wide, values, version=(2, 0))

    assert encode_row(values) == npy(values)
    for data in (npy(values), wide.getvalue()):
        assert decode_row(data, 5).tolist() == values.tolist()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (npy(np.zeros(4, np.float32)), r"float32 \[4\] instead of float32 \[5\]"),
        (npy(np.zeros(5)), r"float64 \[5\]"),
        (npy(np.zeros((1, 5), np.float32)), r"float32 \[1, 5\]"),
        (npy(np.array([{}] * 5), allow_pickle=True), r"object \[5\] instead of float32"),
        (npy(np.zeros(5, np.float32))[:-1], r"has 147 bytes, which do not match float32 \[5\]"),
        (b"", r"cannot be read as npy"),
    ],
)
def test_anything_else_is_refused_and_never_unpickled(data, message):
    with pytest.raises(ManifestError, match=message):
        decode_row(data, 5)


# ---- rows that cannot be stored ------------------------------------------------------------------


@pytest.fixture
def flows(tmp_path):
    """Config of 60 flows, of which the fifth and the tenth have no finite rate."""
    path = write_unicauca(tmp_path / "flows.csv", rows=60)
    exclude = ("Flow.ID", "Source.IP", "Destination.IP", "Timestamp", "Label", "L7Protocol")
    return TableDataConfig(
        path=str(path), label="ProtocolName", exclude=exclude, categorical=("Protocol",)
    )


def test_a_row_that_is_not_finite_ends_the_run_with_the_way_out(flows, tmp_path):
    with pytest.raises(
        RowError,
        match=r"flows.csv: 2 rows have values that are not finite numbers, the first: row 5, "
        r"column Flow.Bytes.s: is infinite; .*leave the column out with data.exclude .*data.on_error=skip",
    ):
        pack_table(tmp_path / "store", flows)

    assert not any((tmp_path / "store").glob("*/*"))  # no shard was written
    exclude = (*flows.exclude, "Flow.Bytes.s")
    assert pack_table(tmp_path / "store", replace(flows, exclude=exclude))[1].packed_records == 60


def test_rows_that_are_skipped_are_listed_and_limited(flows, tmp_path):
    skipping = replace(flows, on_error="skip", max_skipped=1)
    with pytest.raises(RowError, match=r"2 rows cannot be stored, more than data.max_skipped=1"):
        pack_table(tmp_path / "store", skipping)

    store, result = pack_table(tmp_path / "store", replace(skipping, max_skipped=2))

    assert result.packed_records == 0  # all rows were packed by the first run
    assert store.index.num_rows == 58
    assert sorted(entry["key"] for entry in store.manifest.skipped) == [
        "row-000000005",
        "row-000000010",
    ]
    assert "column Flow.Bytes.s: is infinite" in json.dumps(list(store.manifest.skipped))
    assert list(verify_store(store.path)) == []
    assert every_record(store).inputs.isfinite().all()
    again = pack_table(tmp_path / "store", replace(skipping, max_skipped=2))[1]
    assert again.packed_records == 0


def test_where_no_row_can_be_stored_there_is_no_store(tmp_path):
    pd.DataFrame({"x": ["nan", "inf"], "label": [0, 1]}).to_csv(tmp_path / "t.csv", index=False)
    config = TableDataConfig(path=str(tmp_path / "t.csv"), on_error="skip")

    with pytest.raises(RowError, match=r"no row can be stored; the first: record row-00000000\d"):
        pack_table(tmp_path / "store", config)


def test_other_columns_in_the_same_store_are_refused(tmp_path):
    frame = pd.DataFrame({"x": [1.0, 2.0], "y": [3.0, 4.0], "label": [0, 1]})
    for name, table in {"a.csv": frame, "b.csv": frame.rename(columns={"y": "z"})}.items():
        table.to_csv(tmp_path / name, index=False)
    pack_table(tmp_path / "store", TableDataConfig(path=str(tmp_path / "a.csv")))

    for data, message in (
        (
            TableDataConfig(path=str(tmp_path / "b.csv")),
            r"contains the columns x, y, .*x, z: restore",
        ),
        (TableDataConfig(path=str(tmp_path / "a.csv"), exclude=("y",)), r"contains data table-"),
    ):
        with pytest.raises(StoreMismatchError, match=message):
            pack_table(tmp_path / "store", data)


@pytest.mark.parametrize("options", [{"format": "raw"}, {"image_size": 16}])
def test_a_table_has_no_frames(tmp_path, options):
    with pytest.raises(ConfigError, match=r"are for images, but data=sklearn_table has rows"):
        pack_table(tmp_path / "store", **options)


# ---- moments -------------------------------------------------------------------------------------


def test_moments_are_those_of_the_whole_split_and_of_no_other(wine):
    batch = every_record(wine)
    in_training = np.array([split == "train" for split in index_table(wine)["split"].to_pylist()])
    rows = batch.inputs.numpy().astype(np.float64)[in_training]

    mean, std = column_moments(parts_of(wine, "train"))

    np.testing.assert_allclose(mean, rows.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(std, rows.std(axis=0), rtol=1e-10)
    assert not np.allclose(column_moments(parts_of(wine, "test"))[0], mean)


def test_a_small_spread_on_a_large_mean_is_kept_and_no_spread_is_left(tmp_path):
    wave = 2.0**23 + np.arange(40) % 2
    frame = pd.DataFrame({"wave": wave, "same": [1e9] * 40, "zero": [0] * 40, "label": [0, 1] * 20})
    frame.to_csv(tmp_path / "t.csv", index=False)
    store, _ = pack_table(tmp_path / "store", TableDataConfig(path=str(tmp_path / "t.csv")))
    layer = Standardize(3)
    rows = every_record(store).inputs

    assert torch.equal(layer(rows), rows)  # the identity before moments are set
    mean, std = column_moments(parts_of(store, "train"))
    layer.set_moments(mean, std)

    assert mean.tolist() == [2**23 + 0.5, 1e9, 0]
    assert std.tolist() == [0.5, 0, 0]
    assert torch.equal(layer.std, torch.tensor([0.5, 1, 1]))
    assert layer(rows)[:, 1:].abs().max() == 0
    # The mean is midway between two float32 numbers.
    assert set(layer(rows)[:, 0].tolist()) <= {-2.0, 0.0, 2.0}
