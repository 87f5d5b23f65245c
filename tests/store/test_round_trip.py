"""Round trip of values through a store: with our reader, with stock readers, and in both backends."""

import hashlib
import io
import json
import sys
import textwrap

import numpy as np
import pytest
import torch
import zarr
from PIL import Image
from zarr.core.buffer import default_buffer_prototype

from permafrost.annotation.annotator import TeacherAnnotator
from permafrost.config.store import PassOptions
from permafrost.core.records import FieldSpec
from permafrost.store.fields import WebDatasetFields
from permafrost.store.reader import Store
from permafrost.store.tars import ShardBytes
from permafrost.store.zarr_fields import ZarrFields
from permafrost_sources.demo import DemoSource
from tests.support.paths import ROOT
from tests.support.processes import run_program
from tests.support.stores import (
    TINY_DATA,
    frame_batches,
    keys_of_shard,
    precompute_config,
    stored_shard,
    table_of_shard,
)
from tests.support.trees import tree_bytes
from tests.support.verbs import precompute


def test_every_image_and_mask_comes_back_byte_for_byte(frozen):
    store, source = frozen.store, DemoSource(TINY_DATA)
    expected = {record.key: (record, source.read(record)) for record in source.records()}

    for shard in store.manifest.shards:
        data = ShardBytes(store.path, shard)
        for row in table_of_shard(store, shard).to_pylist():
            record, content = expected.pop(row["key"])
            key = row["key"]
            image = data.read(row["offset"], row["size"], row["image_crc32c"], key)
            assert image == content.image
            mask = data.read(row["mask_offset"], row["mask_size"], row["mask_crc32c"], key)
            assert mask == content.mask
            assert row["image_sha256"] == hashlib.sha256(content.image).digest()
            assert (row["label"], row["group"], row["split"]) == (
                record.label,
                record.group,
                record.split,
            )
            assert row["boxes"][0]["x0"] == pytest.approx(record.boxes[0].x0)
    assert not expected


def test_stored_targets_are_what_the_teacher_says_about_the_same_pixels(frozen):
    config = frozen.config
    annotator = TeacherAnnotator(
        config.teacher, 10, config.explainer, config.annotate, frozen.store.size
    )
    teacher = frozen.store.open_passes()[0]

    for shard in frozen.store.manifest.shards:
        batches = frame_batches(frozen.store, shard, config.annotate.batch_size)
        values, _ = annotator.annotate(batches, keys_of_shard(frozen.store, shard))
        stored_shard = teacher.read_shard(shard)
        assert set(stored_shard) == {"logits", "map", "map_scale", "target_class"}
        for name, array in stored_shard.items():
            np.testing.assert_array_equal(array, values[name])


def test_the_target_class_is_the_argmax_of_unrounded_logits(frozen):
    config = frozen.config
    annotator = TeacherAnnotator(
        config.teacher, 10, config.explainer, config.annotate, frozen.store.size
    )
    shard = frozen.store.manifest.shards[0]
    with torch.no_grad():
        (batch,) = frame_batches(frozen.store, shard)
        logits = annotator.model(batch.frames.float() / 255).logits

    stored_shard = frozen.store.open_passes()[0].read_shard(shard)

    assert stored_shard["target_class"][:, 0, 0].tolist() == logits.argmax(dim=1).tolist()


def test_both_backends_hold_the_same_values(tmp_path):
    fields = (
        FieldSpec(name="logits", shape=(3,), dtype="float16"),
        FieldSpec(name="map", shape=(1, 2, 4, 4), dtype="int8", codec="maxabs"),
        FieldSpec(name="target_class", shape=(1,), dtype="int32"),
    )
    generator = np.random.default_rng(0)
    shards = [("train-000000", list("abcde")), ("train-000001", list("fg"))]
    values = [
        {
            f.name: generator.integers(-100, 100, (len(keys), 2, *f.shape)).astype(f.dtype)
            for f in fields
        }
        for _, keys in shards
    ]

    for backend in (ZarrFields, WebDatasetFields):
        layout = backend(tmp_path / backend.__name__, fields, 2, 5, 2)
        layout.create()
        held = [
            stored_shard(
                position, name, keys, layout.write_shard(position, name, keys, values[position])
            )
            for position, (name, keys) in enumerate(shards)
        ]
        for position, shard in enumerate(held):
            read = layout.read_shard(shard)
            for f in fields:
                np.testing.assert_array_equal(read[f.name], values[position][f.name])
                assert read[f.name].dtype == f.dtype


def test_a_large_field_is_cut_into_inner_chunks_and_comes_back(tmp_path):
    fields = (FieldSpec(name="map", shape=(1, 6, 224, 224), dtype="float16"),)
    keys = [f"k{i}" for i in range(128)]  # 128 * 602 kB = 77 MB, more than the limit of a chunk
    layout = ZarrFields(tmp_path, tuple(fields), 1, 128, 1)
    layout.create()
    ramp = np.arange(128, dtype=np.float16)[:, None, None, None, None, None]
    values = np.broadcast_to(ramp, (128, 1, 1, 6, 224, 224))

    done = layout.write_shard(0, "train-000000", keys, {"map": values})

    shard = stored_shard(0, "train-000000", keys, done)
    np.testing.assert_array_equal(layout.read_shard(shard)["map"][::37], values[::37])
    assert "sharding_indexed" in (tmp_path / "fields.zarr" / "map" / "zarr.json").read_text()


def test_the_same_teacher_in_the_other_backend_is_a_pass_of_its_own_with_equal_values(
    tmp_path, tiny_teacher
):
    for backend in ("zarr", "webdataset"):
        precompute.run(precompute_config(tmp_path / "store", tiny_teacher, backend=backend))

    store = Store(tmp_path / "store")
    passes = [store.open_pass(folder.name) for folder in store.pass_folders()]

    assert {teacher.manifest.backend for teacher in passes} == {"zarr", "webdataset"}
    for shard in store.manifest.shards:
        one, other = (teacher.read_shard(shard) for teacher in passes)
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_stock_readers_open_everything_without_importing_ours(frozen, tmp_path, tiny_teacher):
    precompute.run(precompute_config(tmp_path / "store", tiny_teacher, backend="webdataset"))
    script = """
        import glob, json, sys
        import numpy, webdataset, zarr
        from pyarrow import parquet

        zarr_store, tar_store = sys.argv[1:]
        columns = [numpy.load(f"{zarr_store}/index/{n}.npy") for n in ("key", "key_offsets", "label")]
        key, ends, label = columns
        keys = [key[a:b].tobytes().decode() for a, b in zip(ends, ends[1:])]
        labels = dict(zip(keys, label, strict=True))
        urls = sorted(glob.glob(f"{zarr_store}/images/*.tar"))
        images = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
        assert {s["__key__"]: s["cls"] for s in images} == labels
        assert all(s["png"].shape == (16, 16, 3) for s in images)
        assert all(set(s) >= {"png", "cls", "mask.png"} for s in images)

        folder, = glob.glob(f"{zarr_store}/teachers/*/fields.zarr")
        group = zarr.open_group(folder, mode="r")
        assert set(group.array_keys()) == {"logits", "map", "map_scale", "target_class"}
        (table,) = glob.glob(f"{zarr_store}/shards-*.parquet")
        records = parquet.read_table(table)["records"].to_pylist()
        size = json.load(open(f"{zarr_store}/manifest.json"))["rows_per_shard"]
        places = [n * size + row for n, count in enumerate(records) for row in range(count)]
        array_rows = dict(zip(keys, places, strict=True))
        tars = sorted(glob.glob(f"{tar_store}/teachers/*/*.tar"))
        samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode())
        assert [s["__key__"] for s in samples] == [s["__key__"] for s in images]
        for sample in samples:
            row = array_rows[sample["__key__"]]
            for name in group.array_keys():
                numpy.testing.assert_array_equal(sample[f"{name}.npy"], group[name][row])
        assert not [m for m in sys.modules if m.split(".")[0] in ("permafrost", "stages")]
    """

    done = run_program(
        [sys.executable, "-c", textwrap.dedent(script), frozen.store.path, tmp_path / "store"]
    )

    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("records_drawn_anew")
def test_a_store_is_the_same_bytes_wherever_it_is_made(frozen, tmp_path):
    config = precompute_config(tmp_path / "again", frozen.config.teacher)

    precompute.run(config)

    assert tree_bytes(tmp_path / "again") == tree_bytes(frozen.store.path)


def test_a_narrow_type_that_loses_the_map_is_refused(tmp_path, tiny_teacher):
    config = precompute_config(
        tmp_path / "store", tiny_teacher, annotate=PassOptions(map_dtype="int8", min_fidelity=1.0)
    )

    with pytest.raises(ValueError, match=r"annotate\.min_fidelity"):
        precompute.run(config)


def test_masks_are_the_pasted_ink_and_lie_inside_their_box(frozen):
    source = DemoSource(TINY_DATA)
    for record in list(source.records())[:20]:
        mask = np.asarray(Image.open(io.BytesIO(source.read(record).mask))) > 0
        rows, columns = np.nonzero(mask)
        box = record.boxes[0]
        assert (box.x0 + 1) * 8 == pytest.approx(columns.min())
        assert (box.x1 + 1) * 8 == pytest.approx(columns.max() + 1)
        assert (box.y0 + 1) * 8 == pytest.approx(rows.min())
        assert (box.y1 + 1) * 8 == pytest.approx(rows.max() + 1)


def test_reading_an_index_starts_no_thread_that_could_outlive_the_process(frozen):
    """A process that exits while Arrow starts its threads is aborted with SIGABRT."""
    script = """
        import os, sys
        from pathlib import Path
        import pyarrow.parquet
        from permafrost.store.commit_markers import MARKER_SCHEMA, read_marker
        from permafrost.store.reader import Store

        store = Path(sys.argv[1])
        before = set(os.listdir("/proc/self/task"))
        index = Store(store).index
        index.take(("label", "offset"), range(index.num_rows))
        index.keys(range(index.num_rows))
        for path in store.glob("commits/*.parquet"):
            read_marker(path, MARKER_SCHEMA)
        assert set(os.listdir("/proc/self/task")) == before
        marker = next(store.glob("commits/*.parquet"))
        pyarrow.parquet.read_table(marker)  # the control: stock reading starts some
        assert set(os.listdir("/proc/self/task")) > before
    """

    done = run_program([sys.executable, "-c", textwrap.dedent(script), frozen.store.path], cwd=ROOT)

    assert done.returncode == 0, done.stderr


def test_zarr_reads_the_metadata_and_would_write_the_same(tmp_path):
    specs = (
        FieldSpec(name="logits", shape=(10,), dtype="float16", axes=("class",)),
        FieldSpec(name="target_class", shape=(1,), dtype="int32"),
        FieldSpec(name="map", shape=(1, 6, 64, 64), dtype="float16", codec="maxabs"),
        FieldSpec(name="narrow", shape=(1, 6, 64, 64), dtype="int8", codec="maxabs"),
    )
    for rows_per_shard in (4, 4096):  # with 4096 rows, large fields are split into inner chunks
        layout = ZarrFields(tmp_path / str(rows_per_shard), tuple(specs), 2, rows_per_shard, 2)
        layout.create()
        layout.check_shared_files()
        for spec in specs:
            path = tmp_path / str(rows_per_shard) / "fields.zarr" / spec.name
            ours = json.loads((path / "zarr.json").read_text())
            metadata = zarr.open_array(path, mode="r").metadata
            files = metadata.to_buffer_dict(default_buffer_prototype())
            theirs = json.loads(files["zarr.json"].to_bytes())
            # Another version of Zarr may have entries that are empty.
            assert {n: value for n, value in theirs.items() if value or n in ours} == ours
