"""Image folders: keys, classes and files."""

import errno
import hashlib
import os
import random
import re
import unicodedata
from urllib.parse import unquote

import pytest

from permafrost.core.errors import ConfigError, UserError
from permafrost.core.records import MAX_KEY_BYTES, escape_key
from permafrost.sources.image_files import BROKEN_LINKS, LEFT_OUT, LEFTOVERS
from permafrost.sources.source import build_source
from tests.support.image_sets import by_key, folder_config, write_images
from tests.support.items import for_each
from tests.support.listings import plan_records
from tests.support.paths import ROOT

SHARED = ROOT.parent / "shared/data"


# ---- keys ----------------------------------------------------------------------------------------

ODD_PATHS = [
    "cat/a.jpg",
    "cat/a jpg",
    "cat/a%2Ejpg",
    "cat/a~b-c_d.jpg",
    "Katze/Müller ß.png",
    "猫/写真.jpg",
    "cat\\a.jpg",
    "cat/a..jpg",
    "-/_.jpg",
    "CAT/a.jpg",
]

MISSING = os.strerror(errno.ENOENT)
"""Words of the system for a missing file, in the language of the locale."""


def random_paths(count=2000):
    generator = random.Random(0)
    alphabet = "abcXYZ019-_./%~ +éß猫\\\U0001f600"
    return ["".join(generator.choices(alphabet, k=generator.randint(1, 40))) for _ in range(count)]


def test_a_key_has_only_safe_characters_and_gives_the_path_back():
    for path in [*ODD_PATHS, *random_paths()]:
        key = escape_key(path)
        if len(key) <= MAX_KEY_BYTES and not re.search(r"-[0-9a-f]{32}$", key):
            assert unquote(key) == path
        assert re.fullmatch(r"([A-Za-z0-9_-]|%[0-9A-F]{2})+", key)
        assert len(key.encode()) <= MAX_KEY_BYTES


def test_different_paths_have_different_keys():
    paths = {*ODD_PATHS, *random_paths(), *(f"{'long/' * 60}{i}.jpg" for i in range(50))}

    assert len({escape_key(path) for path in paths}) == len(paths)


@for_each("length", range(140, 210))
def test_a_long_key_keeps_its_head_whole_and_ends_in_the_hash_of_all(length):
    path = "a" * (length - 100) + "/é" * 40
    full = path.replace("/", "%2F").replace("é", "%C3%A9")
    key = escape_key(path)
    head, digest = key[:-33], key[-32:]

    assert full.startswith(head)
    assert 147 < len(head) <= 150
    assert not re.search(r"%.?$", head)
    assert digest == hashlib.blake2b(full.encode(), digest_size=16).hexdigest()


def test_the_longest_key_that_fits_is_kept():
    assert escape_key("a" * 200) == "a" * 200
    assert len(escape_key("a" * 201)) == 183


def test_a_file_name_that_is_no_text_is_refused():
    with pytest.raises(ConfigError, match="is not UTF-8; rename"):
        escape_key(os.fsdecode(b"cat/\xff.jpg"))


@pytest.fixture
def image_folder(tmp_path):
    """Folder of two classes with nested folders, various file names, and files that are not images."""
    root = tmp_path / "set"
    written = write_images(root, "cat/1.jpg", "cat/deep/er/2.JPEG", "dog/1.jpg", "dog/3.png")
    for path in ("cat/notes.txt", "cat/.hidden.jpg", "dog/Thumbs.db", ".git/x.jpg", "README.md"):
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_bytes(b"no image")
    return root, written


def test_a_folder_gives_its_images_with_their_classes(image_folder):
    root, written = image_folder
    source = build_source(folder_config(root))
    records = by_key(source)

    assert source.classes == ("cat", "dog")
    assert set(records) == set(written)
    assert {path: record.label for path, record in records.items()} == {
        path: int(path.startswith("dog")) for path in written
    }
    assert {record.split for record in records.values()} == {"train"}
    for path, record in records.items():
        content = source.read(record)
        assert content.image == written[path]
        assert content.suffix == ("png" if path.endswith("png") else "jpg")
        assert content.mask is None


def test_a_class_file_gives_the_order(image_folder, tmp_path):
    root, _ = image_folder
    (tmp_path / "classes.txt").write_text("dog\nbird\ncat\n")
    source = build_source(folder_config(root, classes=str(tmp_path / "classes.txt")))

    assert source.classes == ("dog", "bird", "cat")
    assert {record.label for record in source.records()} == {0, 2}


def test_folders_without_images_are_no_classes_unless_a_list_names_them(tmp_path):
    write_images(tmp_path / "set", "ant/1.jpg", ".bee/1.jpg", "cat/readme.txt")
    source = build_source(folder_config(tmp_path / "set"))

    assert set(by_key(source)) == {"ant/1.jpg"}
    assert source.classes == ("ant",)
    (tmp_path / "classes.txt").write_text("cat\nant\n")
    listed = build_source(folder_config(tmp_path / "set", classes=str(tmp_path / "classes.txt")))
    assert listed.classes == ("cat", "ant")
    assert [record.label for record in listed.records()] == [1]


def test_only_some_classes_are_kept_in_the_order_given(tmp_path):
    write_images(tmp_path, "ant/1.jpg", "bee/1.jpg", "cat/1.jpg", "cat/2.jpg")
    source = build_source(folder_config(tmp_path, only_classes=("cat", "ant")))

    assert source.classes == ("cat", "ant")
    assert {path: record.label for path, record in by_key(source).items()} == {
        "cat/1.jpg": 0,
        "cat/2.jpg": 0,
        "ant/1.jpg": 1,
    }
    assert all(source.read(record).image for record in source.records())


def test_a_class_to_keep_that_the_data_lack_is_named(image_folder):
    root, _ = image_folder

    with pytest.raises(
        ConfigError, match=r"no class 'dgo' \(did you mean dog\?\) among the 2 of the data: 'cat'"
    ):
        build_source(folder_config(root, only_classes=("dgo",)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat\n", "lacks the class folder 'dog'"),
        ("cat\ndog\ncat\n", "lists the class 'cat' 2 times"),
        ('{"0": ["n1", "cat"], "1": ["n2", "dog"]}', "is JSON; write one class name per line"),
        ("0 cat\n1 dog\n", "has a number next to each name"),
        ("- cat\n- dog\n", "is YAML"),
        ("\n", "is empty"),
        (None, "cannot be read"),
    ],
)
def test_a_class_file_that_does_not_fit_is_refused(image_folder, tmp_path, text, message):
    root, _ = image_folder
    if text is not None:
        (tmp_path / "classes.txt").write_text(text)

    with pytest.raises(ConfigError, match=f"data.classes=.*{message}"):
        list(build_source(folder_config(root, classes=str(tmp_path / "classes.txt"))).records())


def test_folders_named_after_splits_are_splits(tmp_path):
    write_images(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg", "valid/dog/2.jpg")
    source = build_source(folder_config(tmp_path))

    assert source.classes == ("cat", "dog")
    assert {path: (r.split, r.label) for path, r in by_key(source).items()} == {
        "train/cat/1.jpg": ("train", 0),
        "train/dog/1.jpg": ("train", 1),
        "valid/dog/2.jpg": ("valid", 1),
    }


def test_splits_can_be_named_and_folders_left_out(tmp_path):
    write_images(tmp_path, "raw/a/cat/1.jpg", "b/cat/1.jpg", "rest/1.jpg", "loose.jpg")
    source = build_source(folder_config(tmp_path, splits={"raw/a": "train", "b": "evaluator"}))

    assert {path: record.split for path, record in by_key(source).items()} == {
        "raw/a/cat/1.jpg": "train",
        "b/cat/1.jpg": "evaluator",
    }


@pytest.mark.parametrize(
    ("paths", "options", "message"),
    [
        (["1.jpg", "cat/1.jpg"], {}, "outside of any class folder, such as 1.jpg"),
        (
            ["train/1.jpg", "test/cat/1.jpg"],
            {},
            "such as train/1.jpg; move them .*data=image_table",
        ),
        (["train/cat/1.jpg", "1.jpg"], {}, "such as 1.jpg"),
        (["readme.txt"], {}, "has no class folders in it; expected <path>/<class>"),
        (["train/readme.txt"], {}, "has no class folders in train"),
        (["cat/readme.txt"], {}, "class folders but no images in them .1 .txt.; expected"),
        (["cat/1.jpg"], {"splits": {"dog": "train"}}, "the folder 'dog', but .* contains: cat"),
        (["a/cat/1.jpg"], {"splits": {"a": "x/y"}}, r"data.splits.a='x/y' must have only"),
        (["test/cat/1.jpg"], {"test_fraction": 0.5}, "already have a split test"),
    ],
)
def test_a_folder_of_another_shape_is_refused_with_the_way_out(tmp_path, paths, options, message):
    write_images(tmp_path, *paths)

    with pytest.raises(ConfigError, match=message):
        list(build_source(folder_config(tmp_path, **options)).records())


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=rf"nowhere cannot be read: {MISSING}.*data\.path"):
        list(build_source(folder_config(tmp_path / "nowhere")).records())


def test_the_test_fraction_depends_on_each_key_alone(tmp_path):
    write_images(tmp_path / "few", *(f"cat/{i}.jpg" for i in range(100)))
    write_images(tmp_path / "more", *(f"cat/{i}.jpg" for i in range(200)))

    def test_split(name, fraction):
        records = list(
            build_source(folder_config(tmp_path / name, test_fraction=fraction)).records()
        )
        return {record.key for record in records if record.split == "test"}

    few, more = test_split("few", 0.3), test_split("more", 0.3)
    assert few <= more
    assert 40 < len(more) < 80
    assert few <= test_split("few", 0.5)
    assert few == {key for key in more if int(unquote(key)[4:-4]) < 100}


def test_a_file_that_changed_since_it_was_listed_is_not_read(image_folder):
    root, _ = image_folder
    source = build_source(folder_config(root))
    record = by_key(source)["cat/1.jpg"]

    (root / "cat/1.jpg").write_bytes(b"shorter")
    with pytest.raises(UserError, match="when it was listed and has 7 now"):
        source.read(record)
    (root / "cat/1.jpg").unlink()
    with pytest.raises(UserError, match=f"cannot be read: {MISSING}"):
        source.read(record)


def test_a_dangling_link_is_no_record_and_counted(image_folder):
    root, written = image_folder
    (root / "cat/9.jpg").symlink_to(root / "gone.jpg")
    source = build_source(folder_config(root))

    assert set(by_key(source)) == set(written)
    assert source.tally[BROKEN_LINKS] == {"cat/9.jpg": (1, "cat/9.jpg")}


def test_two_hundred_photographs_of_two_hundred_classes():
    if not (SHARED / "photos").is_dir():
        pytest.skip("needs the photographs of ../shared/data/photos")
    source = build_source(folder_config(SHARED / "photos"))
    records = list(source.records())

    assert len(source.classes) == 200
    assert sorted(record.label for record in records) == list(range(200))
    plan_records(records, 64, 0)
    for record in records[:5]:
        assert source.read(record).image == (SHARED / "photos" / record.content[0]).read_bytes()


# ---- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (("Training", "Testing"), ("train", "test")),
        (("TRAIN", "Test"), ("train", "test")),
        (("train_set", "val-set"), ("train", "val")),
        (("seg_train", "seg_test"), ("train", "test")),
        (("trainset", "testset"), ("train", "test")),
        (("Train Images", "Validation Images"), ("train", "validation")),
        (("dev", "eval"), ("dev", "eval")),
    ],
)
def test_other_spellings_of_splits_are_splits(tmp_path, names, splits):
    write_images(tmp_path, *(f"{name}/{label}/1.jpg" for name in names for label in ("cat", "dog")))
    source = build_source(folder_config(tmp_path))

    assert source.classes == ("cat", "dog")
    assert {record.split for record in source.records()} == set(splits)


@pytest.mark.parametrize(
    "names", [("Training", "Tests of skill"), ("trainer", "tester"), ("bus", "train")]
)
def test_classes_that_look_like_splits_are_classes(tmp_path, names):
    write_images(tmp_path, *(f"{name}/1.jpg" for name in names))

    assert build_source(folder_config(tmp_path)).classes == tuple(sorted(names))


def test_numbered_folders_are_in_the_order_of_their_numbers(tmp_path):
    write_images(tmp_path, *(f"{number}/1.jpg" for number in range(12)))
    source = build_source(folder_config(tmp_path))

    assert source.classes == tuple(map(str, range(12)))
    assert {path: record.label for path, record in by_key(source).items()} == {
        f"{number}/1.jpg": number for number in range(12)
    }


def test_a_class_in_two_forms_of_unicode_is_one(tmp_path):
    nfc, nfd = (unicodedata.normalize(form, "chèvre") for form in ("NFC", "NFD"))
    write_images(tmp_path, f"train/{nfc}/1.jpg", f"val/{nfd}/2.jpg", "train/cat/1.jpg")
    source = build_source(folder_config(tmp_path))

    assert source.classes == ("cat", nfc)
    assert sorted(record.label for record in source.records()) == [0, 1, 1]


def test_options_name_folders_in_another_form_of_unicode(tmp_path):
    nfc, nfd = (unicodedata.normalize(form, "chèvre") for form in ("NFC", "NFD"))
    write_images(tmp_path, f"{nfd}/{nfd}/1.jpg", f"b/{nfd}/2.jpg", "b/cat/3.jpg")
    config = folder_config(tmp_path, splits={nfc: "train", "b": "test"}, only_classes=(nfc,))

    records = list(build_source(config).records())

    assert [(record.split, record.label) for record in records] == [("train", 0), ("test", 0)]


def test_a_class_in_one_form_of_unicode_keeps_it(tmp_path):
    nfd = unicodedata.normalize("NFD", "chèvre")
    write_images(tmp_path, f"{nfd}/1.jpg", "cat/1.jpg")

    assert build_source(folder_config(tmp_path)).classes == ("cat", nfd)


@pytest.mark.parametrize("suffix", ["jfif", "JPE", "pjpeg", "jif"])
def test_other_suffixes_of_jpeg_are_read(tmp_path, suffix):
    write_images(tmp_path, f"cat/1.{suffix}")
    source = build_source(folder_config(tmp_path))
    (record,) = source.records()

    assert source.read(record).suffix == "jpg"


def test_leftovers_are_left_out_at_any_depth_and_counted(tmp_path):
    write_images(tmp_path, "cat/1.jpg", "__MACOSX/cat/1.jpg", "cat/@eaDir/1.jpg/THUMB.jpg")
    source = build_source(folder_config(tmp_path))

    assert set(by_key(source)) == {"cat/1.jpg"}
    assert set(source.tally[LEFTOVERS]) == {"__MACOSX", "@eaDir"}


@pytest.mark.parametrize("links", [{"cat/up": ".."}, {"cat/x": "../dog", "dog/y": "../cat"}])
def test_links_that_lead_back_are_refused(tmp_path, links):
    write_images(tmp_path, "cat/1.jpg", "dog/1.jpg")
    for link, target in links.items():
        (tmp_path / link).symlink_to(target)

    with pytest.raises(
        ConfigError, match=r"cat/(up|x/y) is a link to a folder that leads back to it"
    ):
        list(build_source(folder_config(tmp_path)).records())


def test_a_link_to_another_folder_is_followed(tmp_path):
    write_images(tmp_path / "set", "cat/1.jpg", "dog/1.jpg")
    write_images(tmp_path / "more", "2.jpg")
    (tmp_path / "set/cat/more").symlink_to(tmp_path / "more")

    assert set(by_key(build_source(folder_config(tmp_path / "set")))) == {
        *("cat/1.jpg", "cat/more/2.jpg", "dog/1.jpg")
    }


def test_a_pipe_and_links_to_missing_folders_are_counted_and_never_opened(tmp_path):
    write_images(tmp_path, "cat/1.jpg", "dog/1.jpg")
    os.mkfifo(tmp_path / "cat/pipe")
    os.mkfifo(tmp_path / "cat/pipe.jpg")
    (tmp_path / "cat/mount").symlink_to("/nowhere/at/all")
    (tmp_path / "eel").symlink_to("/nowhere/at/all")
    source = build_source(folder_config(tmp_path))

    assert set(by_key(source)) == {"cat/1.jpg", "dog/1.jpg"}
    assert source.tally[LEFT_OUT] == {"no regular file": (2, "cat/pipe")}
    assert set(source.tally[BROKEN_LINKS]) == {"cat/mount", "eel"}


def test_two_folders_that_spell_one_split_are_refused(tmp_path):
    write_images(tmp_path, "train/cat/1.jpg", "seg_train/cat/1.jpg", "test/cat/1.jpg")

    with pytest.raises(ConfigError, match=r"seg_train and train both spell split train"):
        list(build_source(folder_config(tmp_path)).records())
