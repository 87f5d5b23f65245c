"""Findings about equal and similar images, of packed stores and of previews."""

import hashlib
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from permafrost.config.data import ImageTableDataConfig
from permafrost.store.facts import read_data_facts
from permafrost.store.reader import Store
from permafrost_findings.equal_images import EqualImages, equal_images, find_equal_images
from tests.support.image_sets import folder_config, image_bytes
from tests.support.previews import preview_of
from tests.support.stores import precompute_config
from tests.support.verbs import precompute


def write_folder(root, seeds):
    """Write an image of a seed to each path."""
    for path, seed in seeds.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(image_bytes(seed))
    return folder_config(root)


def different(count, *folders):
    return {
        f"{folder}/{number}.jpg": 1000 * place + number
        for place, folder in enumerate(folders)
        for number in range(count)
    }


def packed_facts(tmp_path, data):
    precompute.run(precompute_config(tmp_path / "store", data=data))
    return read_data_facts(Store(tmp_path / "store").folder)


def packed(tmp_path, seeds):
    facts = packed_facts(tmp_path, write_folder(tmp_path / "set", seeds))
    return {finding.name: finding for finding in facts.findings}


def test_an_image_of_two_splits_is_named_with_both(tmp_path, caplog):
    seeds = {**different(4, "train/cat", "train/dog", "test/cat", "test/dog"), "test/cat/9.jpg": 2}

    with caplog.at_level("WARNING"):
        found = packed(tmp_path, seeds)

    assert set(found) & {"equal_in_splits", "equal_in_classes", "equal_images"} == {
        "equal_in_splits"
    }
    message = found["equal_in_splits"].message
    assert found["equal_in_splits"].level == "warning"
    assert "(1; such as" in message
    assert "test/cat/9.jpg (test)" in message
    assert "train/cat/2.jpg (train)" in message
    assert any("equal_in_splits" in text for text in caplog.messages)


def test_an_image_of_two_classes_is_named_with_both(tmp_path):
    seeds = {**different(40, "cat", "dog"), "dog/x.jpg": 2, "dog/y.jpg": 2}

    found = packed(tmp_path, seeds)

    message = found["equal_in_classes"].message
    assert "(1; such as" in message
    assert "cat/2.jpg ('cat')" in message
    assert "('dog')" in message
    assert "equal_in_splits" not in found
    assert "equal_images" not in found or found["equal_images"].level == "note"


def test_many_copies_are_counted(tmp_path):
    seeds = {**different(8, "cat", "dog"), **{f"cat/copy{i}.jpg": 3 for i in range(30)}}

    found = packed(tmp_path, seeds)

    assert found["equal_images"].level == "warning"
    assert "(30 of 46; such as" in found["equal_images"].message
    assert "equal_in_classes" not in found


def test_different_images_have_no_finding(tmp_path):
    found = packed(tmp_path, different(8, "train/cat", "train/dog", "test/cat", "test/dog"))

    assert not {"equal_in_splits", "equal_in_classes", "equal_images"} & set(found)


def test_an_unknown_label_is_no_other_class(tmp_path):
    root = tmp_path / "set"
    write_folder(root, {"a.jpg": 1, "b.jpg": 1, "c.jpg": 2, "d.jpg": 3})
    (root / "t.csv").write_text("path,label\na.jpg,cat\nb.jpg,\nc.jpg,dog\nd.jpg,cat\n")
    data = ImageTableDataConfig(path=str(root / "t.csv"))

    facts = packed_facts(tmp_path, data)

    assert "equal_in_classes" not in {finding.name for finding in facts.findings}


# ---- copies in other bytes ---------------------------------------------------------------------------


def scene(seed):
    """Smooth picture with contrast, 96x64."""
    coarse = np.random.default_rng(seed).integers(40, 200, (4, 6, 3), np.uint8)
    return Image.fromarray(coarse).resize((96, 64), Image.Resampling.BICUBIC)


def write_scenes(root, *copies):
    """Write 20 scenes to train and 20 others to test, and each of `copies`: (name in test, picture, options)."""
    scenes = [
        (f"{split}/{c}/{i}.png", scene(base + i), {})
        for split, base in (("train", 0), ("test", 100))
        for c in "ab"
        for i in range(10 * (c == "b"), 10 + 10 * (c == "b"))
    ]
    for name, picture, options in [*scenes, *copies]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(root / name, **options)
    return folder_config(root)


def brighter(picture):
    return picture.point(lambda value: value + 20)


COPIES = {
    "another format": (lambda p: p, "bmp", {}, "equal_in_splits"),
    "another compression": (lambda p: p, "png", {"compress_level": 1}, "equal_in_splits"),
    "half size": (lambda p: p.resize((48, 32)), "png", {}, "similar_in_splits"),
    "low quality": (lambda p: p, "jpg", {"quality": 50}, "similar_in_splits"),
    "other brightness": (brighter, "png", {}, "similar_in_splits"),
}


@pytest.mark.parametrize("kind", COPIES)
def test_train_pictures_saved_again_in_test_are_found(tmp_path, kind):
    change, suffix, options, expected = COPIES[kind]
    copies = [(f"test/a/copy{i}.{suffix}", change(scene(i)), options) for i in range(5)]
    data = write_scenes(tmp_path / "set", *copies)

    preview = preview_of(data)
    facts = packed_facts(tmp_path, data)

    message = next(f.message for f in facts.findings if f.name == expected)
    assert "(5" in message
    assert "test/a/copy" in message
    assert "train/a/" in message
    assert facts.sheet["equal images"].findings[0] == expected
    (sampled,) = [f for f in preview.findings if f.name == "equal_in_sample"]
    assert "5 pairs among the 45 that were decoded" in sampled.message


@pytest.mark.parametrize(
    "other",
    [
        lambda i: scene(500 + i),  # other scenes
        lambda i: scene(i).rotate(180),
        lambda i: Image.new("RGB", (96, 64), (100 + i, 90, 80)),  # flat pictures
    ],
)
def test_other_pictures_are_not_similar(tmp_path, other):
    others = [(f"test/a/other{i}.png", other(i), {}) for i in range(5)]
    flat = [Image.new("RGB", (96, 64), (100 + i, 91, 80)) for i in range(5)]
    of_train = [(f"train/a/flat{i}.png", picture, {}) for i, picture in enumerate(flat)]

    facts = packed_facts(tmp_path, write_scenes(tmp_path / "set", *others, *of_train))

    assert not {"equal_in_splits", "similar_in_splits"} & {f.name for f in facts.findings}
    assert facts.sheet["equal images"].value.startswith("in several splits 0, similar 0")


@pytest.mark.parametrize("change", [lambda data: b"cut", lambda data: data[:-9] + bytes(9)])
def test_a_store_without_sound_thumbnails_compares_bytes_and_says_so(tmp_path, change):
    data = write_scenes(
        tmp_path / "set", ("test/a/copy.png", scene(3), {}), ("test/a/copy.bmp", scene(4), {})
    )
    precompute.run(precompute_config(tmp_path / "store", data=data))
    store = Store(tmp_path / "store")
    assert len(equal_images(store).rows) == 4

    file = next((tmp_path / "store/thumbnails").iterdir())
    file.write_bytes(change(file.read_bytes()))

    assert len(equal_images(store).rows) == 2
    fact, *_ = find_equal_images(store)
    assert "similar unknown" in fact.value
    assert "compared by their bytes alone" in fact.warning


# ---- the search --------------------------------------------------------------------------------------


def store_of(digests):
    """Stand-in for a store that has a column of digests and nothing else."""
    column = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(32), len(digests), [None, pa.py_buffer(np.ascontiguousarray(digests))]
    )
    return SimpleNamespace(index=SimpleNamespace(image_digests=lambda: column), shards=[])


@pytest.mark.parametrize("block", [1, 3, 65_536])
def test_the_groups_are_those_of_a_dictionary(monkeypatch, block):
    monkeypatch.setattr("permafrost_findings.equal_images._BLOCK_ROWS", block)
    values = np.random.default_rng(0).integers(0, 60, 90)
    digests = np.stack(
        [np.frombuffer(hashlib.sha256(bytes([v])).digest(), np.uint8) for v in values]
    )

    equal = equal_images(store_of(digests))

    groups = {}
    for row, value in enumerate(values):
        groups.setdefault(value, []).append(row)
    expected = sorted(rows for rows in groups.values() if len(rows) > 1)
    by_image = {}
    for row, image in zip(equal.rows, equal.images, strict=True):
        by_image.setdefault(image, []).append(int(row))
    assert sorted(by_image.values()) == expected
    assert equal.num_copies == 90 - len(groups)


def test_digests_that_only_begin_alike_are_not_equal():
    digests = np.zeros((2, 32), np.uint8)
    digests[1, 31] = 1

    assert len(equal_images(store_of(digests)).rows) == 0
    assert len(equal_images(store_of(digests[:0])).rows) == 0
    assert len(equal_images(store_of(digests[:1])).rows) == 0


def test_a_difference_between_two_of_three_copies_is_one_image():
    equal = EqualImages(
        store=None,
        rows=np.array([4, 5, 6, 8, 9]),
        images=np.array([0, 0, 0, 1, 1], np.int32),
        similar=np.empty((0, 2), np.int64),
    )

    pairs = equal.differ(np.array([0, 1, 0, 1, 1]))

    assert pairs.tolist() == [[4, 5]]
    known = np.array([1, 0, 1, 1, 1], bool)
    assert equal.differ(np.array([0, -1, 1, 1, 1]), known).tolist() == [[4, 6]]


@pytest.mark.parametrize("copies", [1, 4])
def test_memory_is_32_bytes_a_record(copies):
    count = 200_000
    digests = np.random.default_rng(0).integers(0, 256, (count // copies, 32), dtype=np.uint8)
    store = store_of(np.tile(digests, (copies, 1)))

    tracemalloc.start()
    equal = equal_images(store)
    pairs = equal.differ(equal.rows)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert len(pairs) == (count // copies if copies > 1 else 0)
    assert peak < 32 * count + 8_000_000
