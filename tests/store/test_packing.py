"""Packing of image folders: all images, upright sizes in the index, and images that cannot be decoded."""

import gc
import json
import logging
import os
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from PIL import Image

from permafrost.config.data import ImageFolderDataConfig, ImageTableDataConfig
from permafrost.loading.dataset import StoreDataset
from permafrost.sources.findings import DataError
from permafrost.sources.source import build_source
from permafrost.storage.files import file_at
from permafrost.store.commit import DEFAULT_FRAME_SIZE
from permafrost.store.entries import StoreMismatchError
from permafrost.store.image_decoding import ImageError, decode_pixels
from permafrost.store.reader import Store
from permafrost.store.record_form import resize_pixels
from permafrost.store.tars import TarShard
from permafrost.store.verification import verify_store
from tests.support.index_table import index_table
from tests.support.listings import plan_whole
from tests.support.processes import run_program
from tests.support.stores import keys_of_shard, precompute_config
from tests.support.trees import tree_bytes
from tests.support.verbs import precompute


def smooth_image(height, width, channels=3, seed=0):
    """Smooth image u8 [height, width, channels] that differs between seeds."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    angles = np.arange(channels) + seed
    waves = [np.sin(3 * x * np.cos(a) + 3 * y * np.sin(a) + a) for a in angles]
    return np.rint(127.5 + 120 * np.stack(waves, axis=-1)).astype(np.uint8)


def write_image(path, pixels, orientation=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    if orientation is not None:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = orientation
    Image.fromarray(pixels.squeeze()).save(path, **options)


UPRIGHT_SIZES = {
    "cat/wide.jpg": (30, 40),
    "cat/gray.jpg": (20, 20),
    "cat/turned.jpg": (50, 24),  # stored rotated, as 24 x 50
    "dog/clear.png": (16, 48),
    "dog/tall.png": (64, 18),
    "dog/deep/small.webp": (9, 11),
}


@pytest.fixture
def mixed(tmp_path):
    """Folder of six images of different sizes and kinds."""
    root = tmp_path / "mixed"
    write_image(root / "cat/wide.jpg", smooth_image(30, 40))
    write_image(root / "cat/gray.jpg", smooth_image(20, 20, 1))
    write_image(root / "cat/turned.jpg", smooth_image(24, 50), orientation=6)
    write_image(root / "dog/clear.png", smooth_image(16, 48, 4))
    write_image(root / "dog/tall.png", smooth_image(64, 18))
    write_image(root / "dog/deep/small.webp", smooth_image(9, 11))
    return ImageFolderDataConfig(path=str(root))


def write_equal_images(root, number=12):
    """Write PNGs of one size in two classes."""
    for index in range(number):
        write_image(root / f"{'ab'[index % 2]}/{index}.png", smooth_image(12, 10, seed=index))


@pytest.fixture
def equal_images(tmp_path):
    write_equal_images(tmp_path / "equal")
    # As many classes as the teacher has.
    (tmp_path / "classes.txt").write_text("\n".join("abcdefghij"))
    return ImageFolderDataConfig(
        path=str(tmp_path / "equal"), classes=str(tmp_path / "classes.txt")
    )


def pack_small(data, path, teacher=None, **options):
    config = precompute_config(path, teacher, data=data, **{"shard_size": 4, **options})
    return precompute.run(config)


def plans_of(data, path, shard_size=4):
    return plan_whole(build_source(data), precompute_config(path, shard_size=shard_size).store)


def whole_dataset(store, passes=(), **options):
    return StoreDataset(store, np.arange(store.index.num_rows), passes, **options)


def frames_by_key(store):
    batch = whole_dataset(store).__getitems__(list(range(store.index.num_rows)))
    return dict(zip(batch.keys, batch.inputs, strict=True))


def original_frame(data, key, size):
    source = build_source(data)
    (record,) = [record for record in source.records() if record.key == key]
    pixels = resize_pixels(decode_pixels(source.read(record).image), size)
    return torch.from_numpy(pixels).permute(2, 0, 1)


# ---- formats and sizes ---------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["original", "jpeg95", "raw"])
def test_the_index_has_the_originals_upright_sizes_in_every_format(mixed, tmp_path, form):
    pack_small(mixed, tmp_path / "store", format=form)
    store = Store(tmp_path / "store")

    sizes = {unquote(r["key"]): (r["height"], r["width"]) for r in index_table(store).to_pylist()}

    assert sizes == UPRIGHT_SIZES
    assert store.size == DEFAULT_FRAME_SIZE == (256, 256)
    assert store.manifest.canonical.format == form
    assert store.manifest.classes == ("cat", "dog")
    assert list(verify_store(store.path)) == []
    assert pack_small(mixed, store.path, format=form).packed_records == 0


@pytest.mark.parametrize(("other", "size"), [(False, (12, 10)), (True, (256, 256))])
def test_images_of_one_size_keep_it_and_one_that_differs_makes_all_frames_square(
    equal_images, tmp_path, other, size
):
    if other:
        write_image(tmp_path / "equal/a/other.png", smooth_image(12, 11))
    pack_small(equal_images, tmp_path / "store")

    assert Store(tmp_path / "store").size == size


@pytest.mark.parametrize("form", ["original", "jpeg95", "raw"])
def test_the_image_size_that_is_asked_for_is_the_frames(mixed, tmp_path, form):
    pack_small(mixed, tmp_path / "store", format=form, image_size=32)
    store = Store(tmp_path / "store")

    assert store.size == (32, 32)
    assert {tuple(frame.shape) for frame in frames_by_key(store).values()} == {(3, 32, 32)}
    assert pack_small(mixed, store.path, format=form, image_size=32).packed_records == 0


def test_frames_are_the_same_pixels_from_original_and_raw_and_close_to_them_from_jpeg(
    mixed, tmp_path
):
    frames = {}
    for form in ("original", "raw", "jpeg95"):
        pack_small(mixed, tmp_path / form, format=form, image_size=64)
        frames[form] = frames_by_key(Store(tmp_path / form))

    for key, frame in frames["original"].items():
        assert torch.equal(frame, original_frame(mixed, key, (64, 64)))
        assert torch.equal(frames["raw"][key], frame)
        difference = frames["jpeg95"][key].float() - frame.float()
        assert 0 < difference.square().mean() < 255**2 / 10**3.5  # more than 35 dB on smooth images
    assert len(frames["original"]) == len(UPRIGHT_SIZES)


def test_original_members_are_the_files_bytes(mixed, tmp_path):
    pack_small(mixed, tmp_path / "store")
    store = Store(tmp_path / "store")

    dataset = whole_dataset(store)
    for row in index_table(store).to_pylist():
        shard = [s.name for s in store.manifest.shards].index(row["shard"])
        data = dataset._open_shard(shard).read(
            row["offset"], row["size"], row["image_crc32c"], row["key"]
        )
        assert data == (tmp_path / "mixed" / unquote(row["key"])).read_bytes()


@pytest.mark.slow
def test_stock_readers_open_every_format_without_importing_ours(mixed, tmp_path):
    for form in ("original", "jpeg95", "raw"):
        pack_small(mixed, tmp_path / form, format=form, image_size=32)
    script = """
        import glob, io, sys
        import numpy, webdataset
        from PIL import Image

        for form in ("original", "jpeg95", "raw"):
            names = ("key", "key_offsets", "label")
            key, ends, label = (numpy.load(f"{sys.argv[1]}/{form}/index/{name}.npy") for name in names)
            keys = [key[a:b].tobytes().decode() for a, b in zip(ends, ends[1:])]
            labels = dict(zip(keys, label, strict=True))
            urls = sorted(glob.glob(f"{sys.argv[1]}/{form}/images/*.tar"))
            samples = list(webdataset.WebDataset(urls, shardshuffle=False))
            assert {s["__key__"]: int(s["cls"]) for s in samples} == labels
            for sample in samples:
                (suffix,) = set(sample) & {"jpg", "png", "webp", "npy"}
                if form == "raw":
                    pixels = numpy.load(io.BytesIO(sample["npy"]))
                    assert pixels.shape == (32, 32, 3) and pixels.dtype == numpy.uint8
                elif form == "jpeg95":
                    assert suffix == "jpg"
                    assert Image.open(io.BytesIO(sample["jpg"])).size == (32, 32)
                else:
                    Image.open(io.BytesIO(sample[suffix])).load()
        decoded = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
        assert all(s["npy"].shape == (32, 32, 3) for s in decoded)
        assert not [m for m in sys.modules if m.split(".")[0] in ("permafrost", "stages")]
    """

    done = run_program([sys.executable, "-c", textwrap.dedent(script), tmp_path])

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"format": "raw"}, "store.format=raw"),
        ({"format": "jpeg95"}, "store.format=jpeg95"),
        ({"image_size": 48}, "store.image_size=48"),
    ],
)
def test_a_store_of_another_format_or_size_is_never_mixed(mixed, tmp_path, options, named):
    pack_small(mixed, tmp_path / "store", image_size=32)
    before = tree_bytes(tmp_path / "store")

    with pytest.raises(StoreMismatchError, match=rf"32x32 pixels as original.*{named}"):
        pack_small(mixed, tmp_path / "store", **{"image_size": 32, **options})

    assert tree_bytes(tmp_path / "store") == before


def test_the_unfinished_shards_of_another_format_are_never_mixed(mixed, tmp_path):
    pack_small(mixed, tmp_path / "store", format="raw", image_size=32)
    (tmp_path / "store/manifest.json").unlink()

    for options in ({"format": "jpeg95", "image_size": 32}, {"format": "raw", "image_size": 64}):
        with pytest.raises(StoreMismatchError, match=r"choose another store\.path, or delete"):
            pack_small(mixed, tmp_path / "store", **options)

    assert pack_small(mixed, tmp_path / "store", format="raw", image_size=32).packed_records == 0


# ---- boxes and masks -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["original", "raw"])
def test_boxes_in_pixels_are_normalized_by_the_upright_size(tmp_path, form):
    write_image(tmp_path / "wide.png", smooth_image(20, 40))
    # Upright, the rotated image has height 40 and width 20.
    write_image(tmp_path / "turned.jpg", smooth_image(20, 40), orientation=6)
    box = {"x0": 5, "y0": 10, "x1": 20, "y1": 15}
    rows = [("wide.png", 0, [box]), ("turned.jpg", 1, [box, box | {"x0": 0}])]
    lines = [f'{p},{label},"{json.dumps(b).replace(chr(34), chr(34) * 2)}"' for p, label, b in rows]
    (tmp_path / "table.csv").write_text("\n".join(["path,label,boxes", *lines]) + "\n")
    table = ImageTableDataConfig(path=str(tmp_path / "table.csv"), boxes="boxes")

    pack_small(table, tmp_path / "store", format=form)

    store = Store(tmp_path / "store")
    batch = whole_dataset(store, with_regions=True).__getitems__([0, 1])
    boxes = dict(zip(map(unquote, batch.keys), batch.boxes, strict=True))
    # x0 = 2 * 5 / 40 - 1, y0 = 2 * 10 / 20 - 1, ...
    assert boxes["wide.png"].tolist() == [[0, -0.75, 0, 0, 0.5]]
    assert boxes["turned.jpg"].tolist() == [[1, -0.5, -0.5, 1, -0.25], [1, -1, -0.5, 1, -0.25]]


def test_a_mask_that_cannot_be_decoded_names_its_record(tmp_path):
    write_image(tmp_path / "a.png", smooth_image(8, 8))
    write_image(tmp_path / "mask.png", np.zeros((8, 8), np.uint8))
    os.truncate(tmp_path / "mask.png", 45)
    (tmp_path / "table.csv").write_text("path,label,mask\na.png,0,mask.png\n")
    table = ImageTableDataConfig(path=str(tmp_path / "table.csv"), mask="mask")

    with pytest.raises(DataError, match=r"a\.png mask mask\.png cannot be used"):
        pack_small(table, tmp_path / "store")


# ---- undecodable images --------------------------------------------------------------------------


def break_record(data, record):
    """Overwrite a part of a record's file with zeros, as after a lost write, and return its former bytes.

    Its beginning and its end stay, so that only the packing notices.
    """
    path = Path(data.path) / record.content[0]
    sound = path.read_bytes()
    half, end = len(sound) // 2, 40
    path.write_bytes(sound[:half] + bytes(len(sound) - half - end) + sound[-end:])
    return sound


@pytest.fixture
def broken(equal_images, tmp_path):
    """Record that cannot be decoded, the second of the second of three shards, and its original bytes."""
    record = plans_of(equal_images, tmp_path / "plan")[1].records[1]
    return record, break_record(equal_images, record)


def test_an_undecodable_image_stops_the_run_by_name_and_finished_shards_stay(
    equal_images, broken, tmp_path
):
    record, sound = broken
    path = tmp_path / "equal" / unquote(record.key)

    with pytest.raises(ImageError) as caught:
        pack_small(equal_images, tmp_path / "store")

    assert f"record {record.key} ({path})" in str(caught.value)
    assert f"repair them and delete {tmp_path / 'store'}" in str(caught.value)
    assert "data.on_error=skip" in str(caught.value)
    finished = sorted(p.name for p in (tmp_path / "store/images").iterdir())
    assert finished == ["train-000000.tar", "train-000002.tar"]

    path.write_bytes(sound)
    assert pack_small(equal_images, tmp_path / "store").packed_records == 4
    pack_small(equal_images, tmp_path / "other")
    assert tree_bytes(tmp_path / "store") == tree_bytes(tmp_path / "other")


def test_an_image_mended_at_another_length_is_other_data_and_the_way_out_is_named(
    equal_images, broken, tmp_path
):
    record, sound = broken
    with pytest.raises(ImageError):
        pack_small(equal_images, tmp_path / "store")
    (tmp_path / "equal" / unquote(record.key)).write_bytes(sound + b"\0")

    with pytest.raises(
        StoreMismatchError, match=r"choose another store\.path, or delete the folder"
    ):
        pack_small(equal_images, tmp_path / "store")

    assert pack_small(equal_images, tmp_path / "other").packed_records == 12


def test_a_skipped_image_is_listed_and_left_out_everywhere(
    equal_images, broken, tmp_path, tiny_teacher
):
    record, _ = broken
    skipping = replace(equal_images, on_error="skip")

    result = pack_small(skipping, tmp_path / "store", tiny_teacher)

    store = Store(tmp_path / "store")
    assert (result.packed_records, result.teacher_records) == (11, 11)
    (skipped,) = store.manifest.skipped
    assert skipped["key"] == record.key
    assert f"record {record.key} " in skipped["reason"]
    assert "cannot be decoded" in skipped["reason"]
    assert [shard.records for shard in store.manifest.shards] == [4, 3, 4]
    expected = [r.key for plan in plans_of(equal_images, store.path) for r in plan.records]
    expected.remove(record.key)
    assert index_table(store)["key"].to_pylist() == expected
    assert list(verify_store(store.path)) == []

    again = pack_small(skipping, store.path, tiny_teacher)
    assert (again.packed_records, again.teacher_records) == (0, 0)

    passes = store.open_passes()
    batch = whole_dataset(store, passes).__getitems__(list(range(11)))
    stored = {
        key: logits
        for shard in store.manifest.shards
        for key, logits in zip(
            keys_of_shard(store, shard), passes[0].read_shard(shard)["logits"][:, 0], strict=True
        )
    }
    assert batch.keys == tuple(expected)
    for key, frame, logits in zip(batch.keys, batch.inputs, batch.targets[0].logits, strict=True):
        assert torch.equal(frame, original_frame(equal_images, key, store.size))
        np.testing.assert_array_equal(logits.numpy(), stored[key].astype(np.float32))


def test_the_policy_is_no_part_of_the_data_so_that_finished_shards_are_reused(
    equal_images, broken, tmp_path
):
    with pytest.raises(ImageError):
        pack_small(equal_images, tmp_path / "store")

    result = pack_small(replace(equal_images, on_error="skip"), tmp_path / "store")

    assert result.packed_records == 3  # of the shard with the image; the others were packed
    pack_small(replace(equal_images, on_error="skip"), tmp_path / "other")
    assert tree_bytes(tmp_path / "store") == tree_bytes(tmp_path / "other")
    assert pack_small(equal_images, tmp_path / "store").packed_records == 0


def test_the_others_are_packed_as_if_the_skipped_image_had_never_been(tmp_path):
    data = ImageFolderDataConfig(path=str(tmp_path / "set"), on_error="skip")
    write_equal_images(tmp_path / "set", 8)
    (plan,) = plans_of(data, tmp_path / "plan", shard_size=16)
    broken = plan.records[3]
    break_record(data, broken)
    pack_small(data, tmp_path / "skipping", shard_size=16)
    (tmp_path / "set" / unquote(broken.key)).unlink()
    pack_small(data, tmp_path / "without", shard_size=16)

    for name in ("images", "index"):
        assert tree_bytes(tmp_path / "skipping" / name) == tree_bytes(tmp_path / "without" / name)


def test_too_many_skipped_images_fail_and_a_higher_limit_repeats_no_work(
    equal_images, broken, tmp_path
):
    strict = replace(equal_images, on_error="skip", max_skipped=0)
    with pytest.raises(
        ImageError, match=r"1 images cannot be decoded, more than data.max_skipped=0"
    ):
        pack_small(strict, tmp_path / "store")
    assert not (tmp_path / "store/manifest.json").exists()

    result = pack_small(replace(strict, max_skipped=1), tmp_path / "store")

    assert result.packed_records == 0
    assert len(Store(tmp_path / "store").manifest.skipped) == 1


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("backend", ["zarr", "webdataset"])
def test_a_shard_may_lose_all_its_images(equal_images, tmp_path, tiny_teacher, position, backend):
    plans = plans_of(equal_images, tmp_path / "plan")
    for record in plans[position].records:
        break_record(equal_images, record)

    skipping = replace(equal_images, on_error="skip")
    result = pack_small(skipping, tmp_path / "store", tiny_teacher, backend=backend)

    store = Store(tmp_path / "store")
    assert (result.packed_records, result.teacher_records) == (8, 8)
    assert store.manifest.shards[position].records == 0
    assert list(verify_store(store.path)) == []
    batch = whole_dataset(store, store.open_passes()).__getitems__(list(range(8)))
    for key, frame in zip(batch.keys, batch.inputs, strict=True):
        assert torch.equal(frame, original_frame(equal_images, key, store.size))
    (stored,) = batch.targets
    assert stored.logits.isfinite().all()
    assert len(stored.logits.unique(dim=0)) == 8


def test_where_no_image_can_be_decoded_there_is_no_store(equal_images, tmp_path):
    for plan in plans_of(equal_images, tmp_path / "plan"):
        for record in plan.records:
            break_record(equal_images, record)

    with pytest.raises(ImageError, match="no image can be decoded; the first: record "):
        pack_small(replace(equal_images, on_error="skip"), tmp_path / "store")

    assert not (tmp_path / "store/manifest.json").exists()


def test_a_shard_that_fails_writes_nothing_into_the_next_file(tmp_path):
    def fail():
        with file_at(tmp_path / "a.tar").open_atomically() as file, TarShard(file) as tar:
            tar.add("a", "bin", bytes(2**20 - 880))  # the stream buffers the last kilobytes
            raise RuntimeError("a bad image")

    with pytest.raises(RuntimeError, match="a bad image") as caught:
        fail()
    with (tmp_path / "next").open("wb"):  # may get the number of the closed descriptor
        del caught  # releases the shard as well
        gc.collect()

    assert (tmp_path / "next").stat().st_size == 0
    assert [path.name for path in tmp_path.iterdir()] == ["next"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"image_size": 8}, "images have 12.5 times the pixels of their frames of 8x8"),
        ({"image_size": 8, "format": "jpeg95"}, ""),
        ({}, ""),  # smaller than their frames
    ],
)
def test_frames_are_suggested_where_the_originals_are_much_larger(
    mixed, tmp_path, caplog, options, said
):
    caplog.set_level(logging.INFO, "permafrost.precompute")

    pack_small(mixed, tmp_path / "store", **options)

    assert ("store.format=jpeg95" in caplog.text) == bool(said)
    assert said in caplog.text
    caplog.clear()
    pack_small(mixed, tmp_path / "store", **options)
    assert "store.format=jpeg95" not in caplog.text
