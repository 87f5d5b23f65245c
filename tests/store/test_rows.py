"""Reading of single rows of large fields: equal to Zarr's reader, few bytes, and no damaged rows."""

import json
import os
from functools import cache
from pathlib import Path

import google_crc32c
import numcodecs
import numpy as np
import pytest
import zarr

from permafrost.core.records import FieldSpec
from permafrost.store.entries import ManifestError
from permafrost.store.fields import WebDatasetFields
from permafrost.store.row_reader import InnerChunkRows, SelectedRows, decode_chunk
from permafrost.store.zarr_fields import ZarrFields
from tests.support.slow import slow
from tests.support.stores import stored_shard

SHAPES = {
    "a view is an inner chunk": ((1, 6, 64, 64), "float16", 1, (1, 1)),
    "as float32": ((1, 6, 64, 64), "float32", 2, (1, 1)),
    "as int8": ((1, 6, 128, 128), "int8", 2, (1, 1)),
    "several rows share one": ((1, 6, 32, 32), "int8", 2, (5, 2)),
    "not compressed": ((1, 1, 40, 40), "float16", 2, (10, 2)),
}


@cache
def small_values(shape, dtype, seed):
    """Draw values of which few are large, once for all tests."""
    values = np.random.default_rng(seed).standard_normal(shape, np.float32) ** 3
    return (values * (100 if dtype == "int8" else 1)).clip(-127, 127).astype(dtype)


def written(tmp_path, monkeypatch, shape, dtype, views, rows=17, rows_per_shard=20):
    """Two written shards, the second one short, of mostly small values, as in B-cos weights."""
    monkeypatch.setattr("permafrost.store.zarr_fields._MAX_CHUNK_BYTES", 2**10)
    spec = FieldSpec(name="map", shape=shape, dtype=dtype, codec="maxabs")
    layout = ZarrFields(tmp_path, (spec,), 2, rows_per_shard, views)
    layout.create()
    shards = []
    for position, count in enumerate((rows_per_shard, rows)):
        values = small_values((count, views, *shape), dtype, position)
        keys = [f"{position}-{row}" for row in range(count)]
        name = f"train-{position:06d}"
        done = layout.write_shard(position, name, keys, {"map": values})
        shards.append((stored_shard(position, name, keys, done), values))
    return layout, shards


@pytest.mark.parametrize("name", SHAPES)
def test_rows_and_views_are_those_that_were_written(tmp_path, monkeypatch, name):
    shape, dtype, views, inner = SHAPES[name]
    layout, shards = written(tmp_path, monkeypatch, shape, dtype, views)

    for shard, values in shards:
        opened = layout.open_shard(shard)["map"]
        rows = np.array([16, 0, 3, 16, 7])
        seen = np.array([0, 1, 0, 1, 1]) % views

        assert isinstance(opened, InnerChunkRows)
        assert opened.inner == inner
        assert opened.shape == values.shape
        np.testing.assert_array_equal(opened[rows, seen], values[rows, seen])
        np.testing.assert_array_equal(layout.read_shard(shard)["map"], values)


@pytest.mark.parametrize("views", [1, 3, slow(16)])
@pytest.mark.parametrize("name", SHAPES)
def test_a_file_has_the_bytes_that_zarrs_arrays_write(tmp_path, monkeypatch, name, views):
    shape, dtype, *_ = SHAPES[name]
    _, shards = written(tmp_path, monkeypatch, shape, dtype, views)
    described = json.loads((tmp_path / "fields.zarr/map/zarr.json").read_text())
    (sharding,) = described["codecs"]
    outer = (20, views, *shape)
    for shard, values in shards:
        memory = {}
        array = zarr.create_array(
            zarr.storage.MemoryStore(memory),
            shape=outer,
            chunks=tuple(sharding["configuration"]["chunk_shape"]),
            shards=outer,
            dtype=dtype,
            compressors=sharding["configuration"]["codecs"][1:],
            fill_value=described["fill_value"],
            config={"write_empty_chunks": True},
        )
        padded = np.full(outer, array.fill_value, dtype)
        padded[: len(values)] = values
        array[:] = padded

        (path,) = shard.files
        assert (tmp_path / path).read_bytes() == memory["c" + "/0" * len(outer)].to_bytes()


def test_a_row_costs_its_own_bytes_only(tmp_path, monkeypatch):
    layout, shards = written(tmp_path, monkeypatch, (1, 6, 64, 64), "float16", 4)
    shard, values = shards[0]
    # A first read, so that the one-time reads of Zarr's encoder are not counted.
    layout.open_shard(shard)["map"][np.array([4]), np.array([2])]
    read = []

    def counting(file, length, offset, pread=os.pread):
        read.append(length)
        return pread(file, length, offset)

    monkeypatch.setattr(os, "pread", counting)
    layout.open_shard(shard)["map"][np.array([4, 4]), np.array([2, 2])]

    assert len(read) == 2  # the index of the chunks and one chunk
    assert read[1] < 1.01 * values[4, 2].nbytes


@pytest.mark.parametrize("place", ["an inner chunk", "the index"])
def test_a_flipped_bit_is_an_error_that_names_the_file(tmp_path, monkeypatch, place):
    layout, shards = written(tmp_path, monkeypatch, (1, 6, 64, 64), "float16", 1)
    path = next(p for p in (tmp_path / "fields.zarr/map/c/0").rglob("*") if p.is_file())
    data = bytearray(path.read_bytes())
    data[100 if place == "an inner chunk" else -100] ^= 1
    path.write_bytes(data)

    opened = layout.open_shard(shards[0][0])["map"]
    with pytest.raises(ManifestError, match=str(path)):
        opened[np.arange(20), np.zeros(20, np.int64)]


def test_stock_zarr_reads_compressed_fields_and_weak_signals_cost_little(tmp_path, monkeypatch):
    _, shards = written(tmp_path, monkeypatch, (1, 6, 64, 64), "int8", 1)
    array = zarr.open_array(tmp_path / "fields.zarr" / "map", mode="r")
    stored_shard = sum(
        path.stat().st_size
        for path in (tmp_path / "fields.zarr/map/c").rglob("0")
        if path.is_file()
    )

    np.testing.assert_array_equal(array[20:37], shards[1][1])
    assert stored_shard < 0.9 * sum(values.nbytes for _, values in shards)


def test_small_fields_are_arrays_and_are_not_compressed(tmp_path):
    spec = FieldSpec(name="map", shape=(1, 1, 7, 7), dtype="float16")
    for backend in (ZarrFields, WebDatasetFields):
        layout = backend(tmp_path / backend.__name__, [spec], 1, 2, 1)
        layout.create()
        done = layout.write_shard(
            0, "train-000000", ["a", "b"], {"map": np.zeros((2, 1, 1, 1, 7, 7), "f2")}
        )
        opened = layout.open_shard(stored_shard(0, "train-000000", ["a", "b"], done))
        assert isinstance(opened["map"], np.ndarray)
    assert (
        "blosc" not in (tmp_path / "ZarrFields" / "fields.zarr" / "map" / "zarr.json").read_text()
    )


def test_kept_rows_answer_for_the_rows_of_the_shard():
    array = np.arange(24).reshape(6, 2, 2)

    kept = SelectedRows(array, np.array([1, 4, 5]))

    assert kept.shape == array.shape
    np.testing.assert_array_equal(kept[np.array([5, 1]), np.array([0, 1])], array[[5, 1], [0, 1]])


@pytest.mark.parametrize("spoil", ["shorter", "memcpy", "size"])
def test_a_blosc_header_that_lies_is_not_believed(spoil):
    """c-blosc trusts the size in the header and would read beyond the end of the data, which crashes the process."""
    values = np.arange(5_000_000, dtype=np.float16)
    body = bytearray(numcodecs.Blosc(cname="zstd", clevel=0).encode(values))
    if spoil == "shorter":
        del body[50:]
    elif spoil == "memcpy":
        body = body[:16]
    else:
        body[4:8] = (10).to_bytes(4, "little")
    data = bytes(body) + google_crc32c.value(bytes(body)).to_bytes(4, "little")

    with pytest.raises(ManifestError, match="another size"):
        decode_chunk(data, values.shape, values.dtype, compressed=True, path=Path("chunk"))
