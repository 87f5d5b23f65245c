"""Tars written elsewhere: listed without changes, and never unpickled."""

import io
import re
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from permafrost.config.store import StoreOptions
from permafrost.core.errors import ConfigError
from permafrost.core.records import NO_GROUP, NO_LABEL, Box, mark_unknown
from permafrost.loading.dataset import StoreDataset
from permafrost.sources.several_files import expand_range, split_in_name
from permafrost.sources.source import build_source
from permafrost.store.image_decoding import ImageError
from permafrost.store.reader import Store
from permafrost_sources.options import WebDatasetDataConfig
from permafrost_sources.webdataset import IGNORED_JSON
from tests.support.images import png, write_tar
from tests.support.items import for_each
from tests.support.listings import plan_whole
from tests.support.previews import message_of, preview_of
from tests.support.stores import precompute_config
from tests.support.tars import samples, tar_config
from tests.support.verbs import precompute


def mask_png():
    buffer = io.BytesIO()
    values = np.random.default_rng(0).integers(0, 3, (8, 10), dtype=np.uint8)
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def list_one(path, **options):
    source = build_source(tar_config(path, **options))
    (record,) = source.records()
    return source, record


# ---- listing -------------------------------------------------------------------------------------


def test_every_sample_of_every_tar_is_a_record_with_its_bytes(tmp_path):
    for name, number in {"train-000000": 5, "train-000001": 3, "val-000000": 2}.items():
        write_tar(tmp_path / f"{name}.tar", samples(number, first=100 * len(name) + number * 10))
    source = build_source(tar_config(tmp_path))
    records = list(source.records())

    assert len(records) == len({record.key for record in records}) == 10
    assert [record.split for record in records] == ["train"] * 8 + ["val"] * 2
    assert source.classes == ("0", "1", "2")
    for record in records:
        index = int(record.key.split("-")[-1])
        content = source.read(record)
        assert record.key == f"{record.split}-{index:04d}"
        assert record.label == index % 3
        assert content.image == png(index)
        assert (content.suffix, content.mask, content.mask_offset) == ("png", None, -1)
        tar = tmp_path / source.where(record).split(" at byte ")[0]
        at = int(source.where(record).split(" at byte ")[1])
        assert tar.read_bytes()[at:][: len(content.image)] == content.image
        assert content.offset == at


@for_each(
    "name,split",
    [
        ("train-000000.tar", "train"),
        ("imagenet-val_03.tar", "val"),
        ("imagenet1k-train-0000.tar", "train"),
        ("test.tar", "test"),
        ("Training-01.tar", "train"),
        ("train_shuffled-01.tar", "train_shuffled"),
        ("test-a.tar", "test"),
        ("train-test.tar", "test"),
        ("test12.tar", "test"),
        ("cifar10-000000.tar", "cifar10"),
        ("train.tar", "train"),
        ("000017.tar", "train"),
        ("shard-a.tar", "train"),
    ],
)
def test_a_split_is_what_stands_before_the_number(name, split):
    assert split_in_name(name.removesuffix(".tar")) == split


@pytest.mark.parametrize(
    ("tar", "name", "options", "split", "key"),
    [
        ("x-01.tar", "0000", {"split": "evaluator"}, "evaluator", "evaluator-0000"),
        ("imagenet1k-train-0000.tar", "0000", {}, "train", "imagenet1k-train-0000"),
        ("train-000000.tar", "cam0/f", {}, "train", "train-cam0%2Ff"),
    ],
)
def test_a_key_is_the_tars_name_before_its_number_and_the_samples(
    tmp_path, tar, name, options, split, key
):
    members = {f"{name}.png": png(), f"{name}.cls": "0"}
    _, record = list_one(write_tar(tmp_path / tar, members), **options)

    assert (record.split, record.key) == (split, key)


@pytest.mark.parametrize(
    ("prefix", "keys"),
    [("split", ["train-0000", "val-0000"]), ("shard", ["train-000000-0000", "val-000003-0000"])],
)
def test_a_key_prefix_makes_keys_unique(tmp_path, prefix, keys):
    write_tar(tmp_path / "train-000000.tar", samples(1))
    write_tar(tmp_path / "val-000003.tar", samples(1))

    records = list(build_source(tar_config(tmp_path, key_prefix=prefix)).records())

    assert [record.key for record in records] == keys


def test_keys_that_come_twice_are_refused_with_the_option_that_helps(tmp_path):
    write_tar(tmp_path / "train-000000.tar", samples(2))
    write_tar(tmp_path / "train-000001.tar", samples(1))

    with pytest.raises(
        ConfigError, match=r"1 sample keys are not unique.*'train-0000'.*key_prefix=shard"
    ):
        plan_whole(build_source(tar_config(tmp_path)), StoreOptions(path="store"))
    assert len(list(build_source(tar_config(tmp_path, key_prefix="shard")).records())) == 3


def test_ranges_globs_and_folders_name_the_same_tars(tmp_path):
    for number in range(4):
        write_tar(tmp_path / f"train-{number:03d}.tar", samples(1, first=number))
    (tmp_path / "notes.txt").write_text("no tar")

    found = [
        list(build_source(tar_config(tmp_path / path)).tars)
        for path in ("", "train-*.tar", "train-{000..003}.tar")
    ]

    assert found == [[f"train-{number:03d}.tar" for number in range(4)]] * 3
    assert expand_range("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]


@pytest.mark.parametrize("name", ["*.tar", "train-{000..001}.tar", "train-000.tar", ""])
def test_braces_of_a_folder_are_part_of_its_name(tmp_path, name):
    folder = tmp_path / "set{1,2}"
    for number in range(2):
        write_tar(folder / f"train-{number:03d}.tar", samples(1, first=number))

    found = list(build_source(tar_config(folder / name)).tars)

    assert found == ["train-000.tar", "train-001.tar"][: 1 if name == "train-000.tar" else 2]
    assert expand_range("a{1.tar") == ["a{1.tar"]


def test_members_that_webdataset_would_take_for_its_own_are_passed_over(tmp_path):
    own = {"0.__bad__": b"x", "0.__key__": b"x", "pt": b"x", "0.": b"x"}
    write_tar(tmp_path / "train-0.tar", {**own, **samples(1)})

    assert len(list(build_source(tar_config(tmp_path)).records())) == 1


@pytest.mark.parametrize("path", ["", "train-*.tar", "train-{000..003}.tar", "nowhere"])
def test_a_path_without_tars_is_refused(tmp_path, path):
    with pytest.raises(ConfigError, match=r"names no \.tar; set it to a folder, a glob or a \{"):
        list(build_source(tar_config(tmp_path / path)).records())


def test_a_missing_tar_of_a_range_is_not_passed_over(tmp_path):
    for number in (0, 2):
        write_tar(tmp_path / f"train-{number:03d}.tar", samples(1, first=number))

    with pytest.raises(ConfigError, match=r"names .*train-001\.tar, which does not exist"):
        list(build_source(tar_config(tmp_path / "train-{000..002}.tar")).records())


# ---- labels and annotations ----------------------------------------------------------------------


def test_a_json_gives_label_labels_group_and_boxes(tmp_path):
    values = {
        "label": 2,
        "labels": [2, 0],
        "group": 5,
        "boxes": [
            {"x0": 1, "y0": 2, "x1": 5.5, "y1": 8},
            {"label": 0, "x0": 0, "y0": 0, "x1": 10, "y1": 8},
        ],
    }
    path = write_tar(tmp_path / "a.tar", {"s.png": png(), "s.json": values})
    _, record = list_one(path)

    assert (record.label, record.labels, record.group) == (2, (2, 0), 5)
    assert record.boxes_in_pixels
    assert record.boxes == (
        Box(label=2, x0=1, y0=2, x1=5.5, y1=8),
        Box(label=0, x0=0, y0=0, x1=10, y1=8),
    )

    precompute.run(
        precompute_config(tmp_path / "store", data=tar_config(path, accept=("label_gaps",)))
    )
    store = Store(tmp_path / "store")
    batch = StoreDataset(store, np.arange(1), with_regions=True).__getitems__([0])
    # Width 10 and height 8: 2 x / 10 - 1, 2 y / 8 - 1.
    expected = torch.tensor([[2, -0.8, -0.5, 0.1, 1], [0, -1, -1, 1, 1]])
    torch.testing.assert_close(batch.boxes[0], expected)
    assert store.manifest.multi_label


def test_a_mapping_says_of_each_class_whether_a_sample_has_it(tmp_path):
    values = {
        "labels": {"cyst": 1, "streak": 0, "nodule": None},
        "boxes": [{"x0": 1, "y0": 2, "x1": 5, "y1": 8}],
    }
    path = write_tar(tmp_path / "a.tar", {"s.png": png(), "s.json": values})
    names = tmp_path / "names.txt"
    names.write_text("cyst\nnodule\nmass\nstreak\n")

    _, record = list_one(path, classes=str(names))

    # A class without an entry is unknown.
    assert record.labels == (0, mark_unknown(1), mark_unknown(2))
    assert record.boxes[0].label == 0
    with pytest.raises(ConfigError, match=r"need data\.classes=FILE"):
        list_one(path)
    values["labels"]["streak"] = 1
    other = write_tar(tmp_path / "b.tar", {"s.png": png(), "s.json": values})
    with pytest.raises(ConfigError, match="this record has 2 of them"):
        list_one(other, classes=str(names))


@pytest.mark.parametrize("where", ["option", "beside"])
@pytest.mark.parametrize("member", ["cls", "json"])
def test_a_label_may_be_a_name_of_the_class_file(tmp_path, where, member):
    value = "dog\n" if member == "cls" else {"species": "dog"}
    write_tar(tmp_path / "tars/a.tar", {"s.png": png(), f"s.{member}": value})
    names = tmp_path / ("tars/classes.txt" if where == "beside" else "names.txt")
    names.write_text("cat\ndog\n")
    options = {} if where == "beside" else {"classes": str(names)}

    source, record = list_one(tmp_path / "tars", label_key="species", **options)

    assert source.classes == ("cat", "dog")
    assert record.label == 1


def test_a_sample_without_annotation_has_no_label(tmp_path):
    _, record = list_one(write_tar(tmp_path / "a.tar", {"s.png": png(), "s.txt": "a caption"}))

    assert (record.label, record.group, record.labels, record.boxes) == (NO_LABEL, NO_GROUP, (), ())


@pytest.mark.parametrize("reference", ["always", "never"])
def test_a_mask_belongs_to_its_image(tmp_path, reference):
    members = {"s.png": png(), "s.mask.png": mask_png(), "s.cls": "0"}
    path = write_tar(tmp_path / "a.tar", members)
    source, record = list_one(path)
    content = source.read(record)
    assert (content.image, content.mask) == (png(), mask_png())

    precompute.run(
        precompute_config(tmp_path / "store", data=tar_config(path, reference=reference))
    )
    store = Store(tmp_path / "store")
    batch = StoreDataset(store, np.arange(1), with_regions=True).__getitems__([0])
    expected = np.asarray(Image.open(io.BytesIO(mask_png())))
    np.testing.assert_array_equal(batch.masks[0, 0].numpy(), expected)


@pytest.mark.parametrize(
    ("members", "label"),
    [
        (("input.jpg", "outputs.txt"), NO_LABEL),
        (("v2.jpg", "cls"), 1),
        (("input.jpg", "output.cls"), 1),
        (("input.jpg", "input.json", "input.mask.png"), 1),
        (("input.jpg", "a.cls", "b.cls"), NO_LABEL),
        (("jpg", "thumb.jpg", "y.cls"), 1),
        (("jpg", "meta.json"), NO_LABEL),
    ],
)
def test_members_may_have_names_with_further_dots(tmp_path, members, label):
    contents = {"json": '{"label": 1}', "png": mask_png(), "cls": "1"}
    parts = {name: contents.get(name.rpartition(".")[2], png()) for name in members}
    write_tar(tmp_path / "a.tar", {f"s.{name}": content for name, content in parts.items()})

    source, record = list_one(tmp_path)

    assert record.label == label
    assert source.read(record).image == png()
    assert (source.read(record).mask is not None) == ("input.mask.png" in members)


# ---- rejected tars -------------------------------------------------------------------------------


def labeled(label, **others):
    """Members of a sample with a label in .cls, and others by their suffix."""
    return {"s.png": png(), "s.cls": label} | {f"s.{suffix}": v for suffix, v in others.items()}


UNREADABLE_JSON = [
    *("{", "[1, 2]", "7", {"boxes": [{"x0": 1}]}, {"boxes": 3}),
    *({"labels": 3}, {"group": "a"}, {"group": None}),
]
IMAGES, LABELS = {f"{n}.png": png(n) for n in range(3)}, {f"{n}.cls": "0" for n in range(3)}
NOT_SORTED = r"not sorted.*tar --sort=name"


@pytest.mark.parametrize(
    ("members", "message"),
    [
        *(
            (labeled(name), rf"a\.tar: s has label {name!r}.*set data\.classes to the file")
            for name in ("bird", "--5", "²", "1.5", "007")
        ),
        *(
            ({"s.png": png(), "s.json": values}, r"a\.tar: s\.json cannot be read")
            for values in UNREADABLE_JSON
        ),
        (labeled("2", json={"label": 1}), r"label 2 in its \.cls and 1 as 'label' in its \.json"),
        (labeled("0", json={"boxes": [{"x0": 5, "y0": 1, "x1": 2, "y1": 3}]}), "has no area"),
        (samples(1) | {"s.cls": "1"}, "sample 's' has 0 images among its members cls"),
        (
            samples(1) | {"s.png": b"", "s.jpg": b""},
            "sample 's' has 2 images among its members png, jpg",
        ),
        (
            samples(1) | {"s.in.jpg": b"", "s.out.jpg": b""},
            "has 2 images among .* ends at its first dot",
        ),
        (IMAGES | LABELS, NOT_SORTED),
        (LABELS | IMAGES, NOT_SORTED),
        ({"0.png": png(), "1.png": png(1), "0.cls": "0", "1.cls": "1"}, NOT_SORTED),
    ],
)
def test_a_tar_that_cannot_be_understood_is_refused_with_the_reason(tmp_path, members, message):
    write_tar(tmp_path / "a.tar", members)

    with pytest.raises(ConfigError, match=message):
        list(build_source(tar_config(tmp_path)).records())


@pytest.mark.parametrize("suffix", ["pyd", "pickle", "pkl", "pth", "pt", "PKL", "logits.pth"])
def test_pickled_members_are_refused_by_name(tmp_path, suffix):
    write_tar(tmp_path / "a.tar", {"s.png": png(), f"s.{suffix}": b"cos\nsystem\n"})

    with pytest.raises(
        ConfigError, match=rf"a\.tar contains s\.{re.escape(suffix)}, which only pickle"
    ):
        list(build_source(tar_config(tmp_path)).records())


def test_a_command_is_no_path():
    with pytest.raises(ConfigError, match="would run a command"):
        tar_config("pipe:cat a.tar")


def test_a_member_that_comes_twice_is_named(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"s.png": png()})
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo("s.png")
        tar.addfile(member)

    with pytest.raises(ConfigError, match=r"contains s\.png twice"):
        list(build_source(tar_config(path)).records())


def test_a_compressed_tar_is_refused_with_a_way_out(tmp_path):
    write_tar(tmp_path / "a.tar.gz", samples(2), mode="w:gz")

    with pytest.raises(ConfigError, match=r"unpack \.tar\.gz and \.tar\.zst first"):
        list(build_source(tar_config(tmp_path)).records())
    (tmp_path / "a.tar.gz").rename(tmp_path / "a.tar")
    with pytest.raises(ConfigError, match=r"a\.tar cannot be read as an uncompressed tar"):
        list(build_source(tar_config(tmp_path)).records())


def test_a_cut_tar_is_named_also_where_a_sample_before_the_cut_has_no_image(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"one.json": {}, "two.png": png(), "two.cls": "1"})
    path.write_bytes(path.read_bytes()[: 3 * 512 + 10])  # in the bytes of two.png

    with pytest.raises(ConfigError, match=r"a\.tar cannot be read as an uncompressed tar") as error:
        list(build_source(tar_config(path)).records())
    assert "\n" not in str(error.value)


def test_a_cut_tar_never_loses_samples_in_silence(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", samples(3)).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        tar.getmembers()
        end = tar.offset
    cut = tmp_path / "cut.tar"
    listed = []

    for length in range(0, len(whole), 256):
        cut.write_bytes(whole[:length])
        try:
            listed.append((length, len(list(build_source(tar_config(cut)).records()))))
        except ConfigError as error:
            assert "cut.tar" in str(error)  # noqa: PT017, since most lengths raise

    assert {number for _, number in listed} == {3}
    assert min(length for length, _ in listed) == end + tarfile.BLOCKSIZE


def test_a_damaged_header_never_loses_samples_in_silence(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(3))
    data = bytearray(path.read_bytes())
    at = data.find(b"0001.cls")
    data[at] ^= 1
    path.write_bytes(data)

    with pytest.raises(ConfigError, match="no end mark"):
        list(build_source(tar_config(path)).records())


def test_tars_that_were_put_together_never_lose_samples_in_silence(tmp_path):
    first, second = (write_tar(tmp_path / n, samples(2, first=f)) for n, f in (("a", 0), ("b", 5)))
    (tmp_path / "both.tar").write_bytes(first.read_bytes() + second.read_bytes())

    with pytest.raises(ConfigError, match="concatenated from several"):
        list(build_source(tar_config(tmp_path)).records())


def test_a_tar_that_shrinks_after_it_was_listed_is_an_error_and_no_garbage(tmp_path):
    source, record = list_one(write_tar(tmp_path / "a.tar", {"s.png": png()}))
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:600])

    with pytest.raises(ImageError, match=r"a\.tar: the image ends before byte"):
        source.read(record)


# ---- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("cat/1", "train-cat%2F1"),
        ("Katze/Müller ß", "train-Katze%2FM%C3%BCller%20%C3%9F"),
        ("猫", "train-%E7%8C%AB"),
        ("d" * 90 + "/" + "n" * 95, "train-" + "d" * 90 + "%2F" + "n" * 95),
        ("./here/1", "train-%2E%2Fhere%2F1"),
    ],
)
def test_long_and_foreign_names_are_escaped_and_read(tmp_path, kind, name, key):
    path = write_tar(tmp_path / "a.tar", {f"{name}.png": png(), f"{name}.cls": "1"}, kind)
    source, record = list_one(path)

    assert record.key == key
    assert record.label == 1
    assert source.read(record).image == png()


def test_folders_and_hidden_files_are_no_samples(tmp_path):
    path = write_tar(
        tmp_path / "a.tar",
        {".DS_Store": b"x", "d/.hidden.png": b"x", "README": b"x", "s.png": png()},
    )
    with tarfile.open(path, "a") as tar:
        folder = tarfile.TarInfo("folder.png")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)

    _, record = list_one(path)

    assert record.key == "train-s"


# ---- labels --------------------------------------------------------------------------------------


def test_a_json_beside_a_cls_adds_boxes_and_a_group(tmp_path):
    box = {"x0": 1, "y0": 1, "x1": 4, "y1": 4}
    members = {"s.png": png(), "s.cls": "2", "s.json": {"label": 2, "group": 3, "boxes": [box]}}
    _, record = list_one(write_tar(tmp_path / "a.tar", members))

    assert (record.label, record.group) == (2, 3)
    assert [(b.label, b.x0, b.x1) for b in record.boxes] == [(2, 1, 4)]


@pytest.mark.parametrize("text", ["[1, 2]", '{"caption": "' + "x" * 5_000_000 + '"}'], ids=len)
def test_a_json_of_anything_beside_a_cls_is_passed_over_and_counted(tmp_path, text):
    members = {"s.png": png(), "s.cls": "2", "s.json": text}
    source, record = list_one(write_tar(tmp_path / "a.tar", members))

    assert record.label == 2
    assert source.tally.total(IGNORED_JSON) == 1


@pytest.mark.parametrize(
    ("text", "label"),
    [*((word, NO_LABEL) for word in ("", "nan", "NA", "-1")), ("3.0", 3), ("+3", 3), (" 3\n", 3)],
)
def test_a_label_may_be_written_as_in_a_table(tmp_path, text, label):
    _, record = list_one(write_tar(tmp_path / "a.tar", {"s.png": png(), "s.cls": text}))

    assert record.label == label


def test_class_names_that_are_numbers_are_names(tmp_path):
    write_tar(tmp_path / "tars/a.tar", {"s.png": png(), "s.cls": "20"})
    (tmp_path / "tars/classes.txt").write_text("\ufeff10\n20\n30\n", encoding="utf-8")

    source, record = list_one(tmp_path / "tars")

    assert (source.classes, record.label) == (("10", "20", "30"), 1)
    write_tar(tmp_path / "tars/a.tar", {"s.png": png(), "s.cls": "1"})
    with pytest.raises(ConfigError, match="class names are numbers themselves"):
        list_one(tmp_path / "tars")


SORTED_NUMBERS = sorted(map(str, range(12)))
"""0, 1, 10, 11, 2, ..., as torchvision's ImageFolder sorts them."""


@pytest.mark.parametrize(
    ("names", "text", "label"),
    [
        (SORTED_NUMBERS, "0", 0),
        (SORTED_NUMBERS, "1", 1),
        (SORTED_NUMBERS, "2", None),
        (SORTED_NUMBERS, "10", None),
        (["cat", "911"], "0", 0),
        (["01", "02", "03"], "\ufeff01", 0),  # with leading zeros it is no position
    ],
)
def test_a_number_is_a_position_unless_another_class_has_that_name(tmp_path, names, text, label):
    write_tar(tmp_path / "tars/a.tar", {"s.png": png(), "s.cls": text})
    (tmp_path / "tars/classes.txt").write_text("\n".join(names))

    if label is None:
        with pytest.raises(ConfigError, match=rf"label {text}, which is the name of class"):
            list_one(tmp_path / "tars")
    else:
        assert list_one(tmp_path / "tars")[1].label == label


def test_a_sample_without_an_image_in_a_sorted_tar_has_another_cause(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"a.png": png(), "b.cls": "0", "c.png": png(1)})

    with pytest.raises(ConfigError, match="has 0 images") as caught:
        list(build_source(tar_config(path)).records())
    assert "sorted" not in str(caught.value)


def test_a_tar_that_would_be_passed_over_is_named(tmp_path):
    write_tar(tmp_path / "tars/train-000.tar", samples(1))
    (tmp_path / "tars/train-001.tar.gz").write_bytes(b"x")

    with pytest.raises(ConfigError, match=r"also contains train-001\.tar\.gz"):
        list(build_source(tar_config(tmp_path / "tars")).records())
    assert list(build_source(tar_config(tmp_path / "tars/*.tar")).records())


def test_tars_beside_and_in_a_folder_are_named_and_read(tmp_path):
    for number, folder in enumerate((".", "more")):
        members = samples(2, first=2 * number)
        write_tar(tmp_path / folder / f"train-00000{number}.tar", members)
    message = message_of(preview_of(WebDatasetDataConfig(path=str(tmp_path))), "files_left_out")

    named = re.search(r"'data\.path=(.*?)'", message)[1].replace("<folder>", str(tmp_path))

    assert len(list(build_source(WebDatasetDataConfig(path=named)).records())) == 4


def test_tars_in_folders_of_splits_are_named_and_read(tmp_path):
    for number, split in enumerate(("train", "val")):
        write_tar(tmp_path / split / f"00000{number}.tar", samples(2))

    with pytest.raises(ConfigError, match=r"in its folders: data\.path='(.*)'") as caught:
        list(build_source(WebDatasetDataConfig(path=str(tmp_path))).records())

    named = re.search(r"data\.path='(.*?)'", str(caught.value))[1]
    records = list(build_source(WebDatasetDataConfig(path=named)).records())
    assert sorted({record.split for record in records}) == ["train", "val"]
    assert all(record.split in record.key for record in records)
    assert len(records) == 4


def test_keys_of_json_that_no_option_reads_are_noted(tmp_path):
    members = {"a.png": png(1), "a.json": '{"label": 0, "caption": "x", "quality": 3}'}
    write_tar(tmp_path / "train-000000.tar", members)

    preview = preview_of(tar_config(tmp_path))

    (note,) = (finding for finding in preview.findings if "keys of .json" in finding.message)
    assert note.message.index("caption") < note.message.index("quality")  # as in the file
    assert "label" not in note.message
