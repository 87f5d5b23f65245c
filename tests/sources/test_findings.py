"""Findings of a preview: each fires on data that deserve it, and not on their nearest neighbor that does not."""

import csv
import io
import json
import re
import struct
import tarfile
import unicodedata
from dataclasses import replace
from itertools import chain

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from permafrost.config.data import FINDINGS, ImageFolderDataConfig, ImageTableDataConfig
from permafrost.core.errors import ConfigError
from permafrost.sources.findings import DataError
from permafrost.store.facts import read_data_facts
from permafrost.store.reader import Store
from permafrost_sources.options import WebDatasetDataConfig
from tests.support.image_sets import image_bytes, write_images
from tests.support.images import png_16, write_tar
from tests.support.previews import levels_of, message_of, preview_of
from tests.support.stores import precompute_config
from tests.support.tars import samples
from tests.support.verbs import precompute

NFC, NFD = (unicodedata.normalize(form, "chèvre") for form in ("NFC", "NFD"))
_BOX = (0, 0, 2, 2)
CASES = []
"""Cases (finding, level or None, function that writes data and returns their config)."""


def case(finding, level, **writers):
    """Add cases by the names of what they write, or one by the name of the function that this decorates."""

    def register(write, name=None):
        case_id = f"{finding}-{level}-{name or write.__name__}"
        CASES.append(pytest.param(finding, level, write, id=case_id))
        return write

    for name, write in writers.items():
        register(write, name)
    return register


def later(write):
    """Return a function of all but the root, which returns a function of the root."""
    return lambda *arguments, **options: lambda root: write(root, *arguments, **options)


def folder(root, *paths, **options):
    write_images(root, *paths)
    return ImageFolderDataConfig(path=str(root), **options)


def images_of(*folders, count=3, suffix="jpg"):
    return [f"{name}/{i}.{suffix}" for name in folders for i in range(count)]


def table(root, columns, **options):
    """CSV of as many images as the columns have cells."""
    count = len(next(iter(columns.values())))
    names = [f"{i}.jpg" for i in range(count)]
    write_images(root, *names)
    rows = [["path", *columns], *zip(names, *columns.values(), strict=True)]
    with (root / "t.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(rows)
    return ImageTableDataConfig(path=str(root / "t.csv"), **options)


def tars(root, members, name="train-000000.tar", classes=None, **options):
    write_tar(root / "tars" / name, members)
    if classes is not None:
        (root / "tars/classes.txt").write_text("\n".join(classes))
    return WebDatasetDataConfig(path=str(root / "tars"), **options)


files_of, table_of, tars_of = later(folder), later(table), later(tars)


@later
def folders_of(root, *names, count=3, **options):
    return folder(root, *images_of(*names, count=count), **options)


@later
def labels_of(root, cells):
    return table(root, {"label": cells})


@later
def tags_of(root, cells, **options):
    return table(root, {"tags": cells}, label=None, labels="tags", **options)


@later
def listed_classes(root, labels, *lines):
    (root / "names.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return table(root, {"label": labels}, classes=str(root / "names.txt"))


@later
def boxes_of(root, *boxes, **options):
    """Table of an image for each box, which is given by its corners."""
    cells = [json.dumps([dict(zip(("x0", "y0", "x1", "y1"), box, strict=True))]) for box in boxes]
    return table(root, {"label": ["cat", "dog"], "boxes": cells}, boxes="boxes", **options)


@later
def csv_of(root, text, *files):
    write_images(root, *files)
    (root / "t.csv").write_text(text)
    return ImageTableDataConfig(path=str(root / "t.csv"))


@later
def with_files(root, write, files):
    config = write(root)
    for name, content in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(content)
    return config


def members_with(*labels):
    """Members of a tar of samples with these labels."""
    pairs = (((f"{n}.jpg", image_bytes(n)), (f"{n}.cls", label)) for n, label in enumerate(labels))
    return dict(chain.from_iterable(pairs))


# ---- folders -------------------------------------------------------------------------------------


case(
    "class_folders_repeat",
    "error",
    folds_of_classes=folders_of("fold1/cat", "fold1/dog", "fold2/cat", "fold2/dog"),
    pictures_beside_masks_in_every_class=folders_of("cat/rgb", "cat/nir", "dog/rgb", "dog/nir"),
)

case(
    "splits_in_classes",
    "error",
    splits_inside_of_classes=folders_of("cat/train", "cat/test", "dog/train", "dog/test"),
    a_split_beside_the_images_of_classes=folders_of("cat", "cat/test", "dog"),
)
case(
    "splits_in_classes", None, other_folders_inside_of_classes=folders_of("cat", "cat/2020", "dog")
)

case(
    "class_folders_repeat",
    None,
    sessions_with_names_of_their_own=folders_of("cat/a1", "cat/a2", "dog/b1", "dog/b2"),
    a_few_nested_images=folders_of("cat", "dog", "cat/more", "dog/more"),
)

case(
    "folders_too_deep",
    "error",
    one_wrapping_folder=folders_of("photos/cat", "photos/dog"),
    one_wrapping_folder_in_a_split=folders_of(
        "train/all/cat", "train/all/dog", "val/cat", "val/dog"
    ),
)
case("folders_too_deep", None, one_class_of_images=folders_of("photos"))

case(
    "nested_class_folders",
    "error",
    classes_below_their_kinds=folders_of("animal/cat", "animal/dog", "vehicle/car", "vehicle/bus"),
)
case("nested_class_folders", None, classes_with_images=folders_of("animal", "vehicle"))

case(
    "single_folder",
    "error",
    images_of_coco=folders_of("train2017"),
    images_in_a_folder_of_all=folders_of("train/all", "val/all"),
)
case("single_folder", None, a_single_class=folders_of("train/cat", "val/cat"))


masks_beside_classes = folders_of("cat", "dog", "masks")
case(
    "other_things",
    "error",
    masks_beside_classes=masks_beside_classes,
    masks_named_after_their_images=files_of(
        *images_of("cat", "dog"), "cat/0_mask.png", "dog/1_mask.png"
    ),
    thumbnails_named_after_their_images=files_of(*images_of("cat", "dog"), "cat/thumb_0.jpg"),
    masks_inside_a_class=folders_of("cat", "cat/masks", "dog"),
    images_beside_their_masks=folders_of("train/images", "train/mask", "test/images", "test/mask"),
)
case(
    "other_things",
    None,
    people_with_masks=files_of(*images_of("with_mask", "without_mask"), "with_mask/a_mask.jpg"),
)

case(
    "same_names",
    "warning",
    a_png_beside_each_jpg=files_of(*images_of("cat", "dog"), *images_of("cat", suffix="png")),
)
case("same_names", None, the_same_numbers_in_every_class=folders_of("cat", "dog"))


@later
def members(root, *extra, count=4):
    """A tar of samples and further members, each a name or a changed header."""
    config = tars(root, samples(count), name="train-000000.tar")
    with tarfile.open(root / "tars/train-000000.tar", "a") as tar:
        for name, kind in extra:
            entry = tarfile.TarInfo(name)
            entry.type = kind
            entry.linkname = tar.getnames()[0]
            tar.addfile(entry, io.BytesIO(b""))
    return config


case(
    "members_left_out",
    "error",
    a_sample_of_hard_links=members(("z.jpg", tarfile.LNKTYPE), ("z.cls", tarfile.LNKTYPE)),
    a_symbolic_link=members(("z.jpg", tarfile.SYMTYPE)),
)
case("members_left_out", "warning", a_member_without_a_suffix=members(("README", tarfile.REGTYPE)))
case(
    "members_left_out",
    "note",
    hidden_members_pipes_and_reserved_names=members(
        ("._z.jpg", tarfile.REGTYPE), ("z.fifo", tarfile.FIFOTYPE), ("z.__note__", tarfile.REGTYPE)
    ),
)
case("members_left_out", None, folders_in_a_tar=members(("folder", tarfile.DIRTYPE)))


@case("files_left_out", "warning")
def tars_in_a_folder_beside_tars(root):
    write_tar(root / "tars/more/train-000001.tar", samples(2))
    return tars(root, samples(4))


@case("files_left_out", "note")
def notes_and_hidden_files(root):
    config = folder(root, *images_of("cat", "dog"))
    (root / "cat/notes.txt").write_text("x")
    (root / "cat/._0.jpg").write_bytes(b"x")
    (root / "dog/@eaDir").mkdir()
    (root / "dog/@eaDir/0.jpg").write_bytes(image_bytes())
    (root / "__MACOSX").mkdir()
    return config


case(
    "files_left_out",
    "note",
    other_files_beside_tars=with_files(tars_of(samples(4)), {"tars/index.json": b"{}"}),
)
case(
    "files_left_out",
    None,
    class_names_beside_tars=tars_of(samples(4), classes=[str(number) for number in range(4)]),
    images_alone=folders_of("cat", "dog"),
)

case(
    "pictures_left_out",
    "warning",
    few_raw_files=with_files(folders_of("cat", "dog", count=20), {"cat/1.CR2": b"x"}),
)
case(
    "pictures_left_out",
    "error",
    many_pictures_without_a_suffix=with_files(
        folders_of("cat", "dog"), {f"cat/IMG_{n}": image_bytes(n) for n in range(3)}
    ),
    pictures_without_a_suffix_after_texts_without_one=with_files(
        folders_of("a", "b"),
        {f"a/{name}": b"x" for name in ("LICENSE", "README", "SOURCE", "TODO")}
        | {f"b/IMG_{n}": image_bytes(n) for n in range(5)},
    ),
)
case(
    "pictures_left_out",
    None,
    suffixes_of_jpeg=files_of("cat/1.jfif", "cat/2.JPE", "dog/3.pjpeg", "dog/4.JPG"),
)


@case("damaged_files", "error")
def an_empty_file_and_a_broken_link(root):
    config = folder(root, *images_of("cat", "dog"))
    (root / "cat/empty.jpg").write_bytes(b"")
    (root / "dog/gone.png").symlink_to(root / "nowhere.png")
    return config


@case("damaged_files", "error")
def files_that_were_cut(root):
    config = folder(root, *images_of("cat", "dog"), "dog/last.png")
    for name in ("cat/0.jpg", "dog/last.png"):
        data = (root / name).read_bytes()
        (root / name).write_bytes(data[: len(data) * 3 // 4])
    return config


case(
    "damaged_files",
    "error",
    a_file_of_another_kind=with_files(
        folders_of("cat", "dog"), {"cat/page.jpg": b"<html>not found</html>"}
    ),
)
case(
    "damaged_files",
    "warning",
    damage_that_may_be_skipped=with_files(
        folders_of("cat", "dog", on_error="skip"), {"cat/empty.jpg": b""}
    ),
)
case("damaged_files", None, sound_files=folders_of("cat", "dog"))

case(
    "split_spellings",
    "note",
    splits_with_capitals=folders_of("Training/cat", "Training/dog", "TEST_set/cat", "TEST_set/dog"),
    tars_named_after_their_set=tars_of(samples(6), name="imagenet1k-train-0000.tar"),
)

case(
    "classes_like_splits",
    "error",
    domains_and_splits_in_one_name=folders_of("trainA", "trainB", "testA", "testB"),
    splits_after_the_class=folders_of("cat_train", "cat_test", "dog_train", "dog_test"),
)
case(
    "classes_like_splits",
    "warning",
    flat_test_images_beside_classes=folders_of("cat", "dog", "test"),
)
case(
    "classes_like_splits",
    None,
    words_with_the_letters_of_a_split=folders_of("contest", "trainer", "valley"),
)

case(
    "unusual_splits",
    "error",
    splits_that_are_numbers=table_of({"label": ["cat", "dog"], "part": [0, 1]}, split="part"),
    splits_that_are_flags=table_of(
        {"label": ["cat", "dog"], "is_training": ["True", "False"]}, split="is_training"
    ),
)
case(
    "unusual_splits",
    "warning",
    two_words_for_validation=folders_of("train/cat", "train/dog", "val/cat", "validation/dog"),
)
usual_splits = folders_of("train/cat", "train/dog", "test/cat", "test/dog")
case("split_spellings", None, splits_in_usual_spelling=usual_splits)
case("unusual_splits", None, splits_train_and_test=usual_splits)


# ---- classes -------------------------------------------------------------------------------------


case(
    "empty_classes",
    "warning",
    a_folder_of_text=with_files(folders_of("cat", "dog"), {"bird/readme.txt": b"x"}),
    a_class_that_only_the_list_names=listed_classes(["cat", "dog"], "\ufeffcat", "dog", "bird"),
)
case("empty_classes", None, classes_with_records=folders_of("cat", "dog"))

case(
    "unequal_classes",
    "warning",
    ten_times_as_many=labels_of(["cat"] * 20 + ["dog"] * 2),
)
case("unequal_classes", None, nine_times_as_many=labels_of(["cat"] * 18 + ["dog"] * 2))

case(
    "background_classes",
    "warning",
    caltech_101=folders_of("BACKGROUND_Google", "Faces", "airplanes"),
    caltech_256=folders_of("001.ak47", "002.flag", "257.clutter"),
    spoken_commands=labels_of(["_background_noise_", "yes", "no"]),
)
case(
    "background_classes",
    None,
    defects_and_their_background=folders_of("background", "scratch"),
    leaves_before_a_background=folders_of("leaf", "Background_without_leaves", "stem"),
)

case(
    "class_per_record",
    "warning",
    identifiers=labels_of([f"patient{number:03}" for number in range(30)]),
    dates=labels_of([f"2021-03-{number:02}" for number in range(1, 29)]),
    ages=labels_of([str(number) for number in range(25)]),
)
case(
    "class_per_record",
    None,
    two_images_of_each_person=labels_of([f"person{number // 2:03}" for number in range(60)]),
    a_folder_for_each_image=folders_of(*(f"n{number:08}" for number in range(30)), count=1),
    few_images=labels_of(["cat", "dog", "eel"]),
)


@later
def categories(root, ordered):
    write_images(root, "0.jpg", "1.jpg", "2.jpg")
    names = pd.Categorical(
        ["low", "high", "medium"], categories=["low", "medium", "high"], ordered=ordered
    )
    pd.DataFrame({"path": ["0.jpg", "1.jpg", "2.jpg"], "label": names}).to_parquet(
        root / "t.parquet", index=False
    )
    return ImageTableDataConfig(path=str(root / "t.parquet"))


case("category_order", "warning", grades=categories(ordered=True))
case("category_order", None, categories_without_an_order=categories(ordered=False))


@case("category_order", None)
def grades_that_a_file_lists(root):
    config = categories(ordered=True)(root)
    (root / "names.txt").write_text("low\nmedium\nhigh\n")
    return replace(config, classes=str(root / "names.txt"))


case(
    "signed_labels",
    "error",
    attributes_of_faces=labels_of(["-1", "1", "1", "-1"]),
    attributes_of_faces_with_names=listed_classes(["-1", "1", "1", "-1"], "old", "young"),
    attributes_of_faces_in_tars=tars_of(
        members_with("1", "-1", "1", "-1"), classes=["old", "young"]
    ),
)
case("signed_labels", None, a_few_unknown_labels=labels_of(["0", "1", "1", "-1"]))

case(
    "one_hot_columns",
    "error",
    diagnoses_in_columns=table_of(
        {"MEL": [1, 0, 0], "NV": [0, 1, 0], "BCC": [0, 0, 1]}, label="MEL"
    ),
    diagnoses_in_columns_with_fractions=table_of(
        {"MEL": ["1.0", "0.0", "0.0"], "NV": ["0.0", "1.0", "1.0"], "BCC": ["0.0"] * 3}, label="NV"
    ),
)
case(
    "one_hot_columns",
    None,
    attributes_that_do_not_exclude_each_other=table_of(
        {"young": [1, 0, 1], "smiling": [0, 1, 1], "hat": [0, 0, 1]}, label="young"
    ),
)


@later
def cars_and_water(root, water):
    columns = {"car": ["1", "0", "", "1"], "water": water}
    return table(root, columns, label=None, labels=("car", "water"))


case("constant_labels", "warning", water_in_every_picture=cars_and_water(["1", "", "1", "1"]))
case("constant_labels", None, water_in_some_pictures=cars_and_water(["1", "", "1", "0"]))

case(
    "flag_column",
    "error",
    a_column_of_one_class_as_names=table_of({"car": ["1", "0", "", "1"]}, label=None, labels="car"),
)
case("flag_column", None, lists_of_two_numbers=tags_of(["[0]", "[1]", "[0, 1]", "[]"]))


@later
def labeled_boxes(root, first):
    box = json.dumps([{"label": "car", "x0": 1, "y0": 1, "x1": 5, "y1": 5}])
    columns = {"car": [first, "1", "0"], "sign": ["1", "0", "1"], "boxes": [box, "", ""]}
    return table(root, columns, label=None, labels=("car", "sign"), boxes="boxes")


case(
    "boxes_of_other_labels",
    "warning",
    a_box_of_a_class_that_the_record_lacks=labeled_boxes("0"),
    a_box_of_a_class_that_is_unknown=labeled_boxes(""),
)
case("boxes_of_other_labels", None, a_box_of_a_class_of_the_record=labeled_boxes("1"))

case(
    "unread_columns",
    "note",
    a_column_that_no_option_names=table_of({"label": ["cat", "dog"] * 4, "quality": ["good"] * 8}),
)
case(
    "unread_columns",
    None,
    columns_that_are_all_read=table_of(
        {"label": ["cat", "dog"] * 4, "patient": ["a", "b"] * 4}, group=("patient",)
    ),
)

case(
    "unread_split",
    "warning",
    a_column_of_splits_that_no_option_names=table_of(
        {"label": ["cat", "dog"] * 4, "Split": ["train", "test"] * 4}
    ),
)
case(
    "unread_split",
    None,
    a_column_of_splits_that_is_read=table_of(
        {"label": ["cat", "dog"] * 4, "Split": ["train"] * 8}, split="Split"
    ),
)


@later
def patients(root, count=60, **options):
    columns = {
        "label": ["ill" if number % 3 else "well" for number in range(count)],
        "patient": [f"p{number // 5}" for number in range(count)],
        "part": ["test" if number % 5 == 0 else "train" for number in range(count)],
    }
    return table(root, columns, group=("patient",), **options)


case(
    "groups_across_splits",
    "warning",
    patients_of_a_drawn_split=patients(test_fraction=0.3),
    patients_of_a_column_of_splits=patients(split="part"),
)
case(
    "groups_across_splits",
    None,
    patients_that_are_kept_whole=patients(test_fraction=0.3, keep_groups=True),
    a_few_groups_of_people=patients(count=35, split="part"),
)


@case("groups_across_splits", None)
def classes_and_places(root):
    columns = {"y": [n % 4 for n in range(60)], "place": [n % 3 for n in range(60)]}
    return table(root, columns, label="y", group=("y", "place"), test_fraction=0.3)


@later
def findings_of_lungs(root, none, more=()):
    cells = ["Edema|Mass", "Mass|Nodule", "Edema", "Nodule", *more, none, none]
    return table(root, {"tags": cells * 2}, label=None, labels="tags")


case(
    "labels_of_nothing",
    "warning",
    a_label_of_no_finding=findings_of_lungs("No Finding"),
    a_label_of_no_finding_beside_devices=findings_of_lungs("No Finding", ["No Finding|devices"]),
    a_label_of_health_in_another_language=findings_of_lungs("ohne_Befund"),
    a_label_of_any_name_that_always_stands_alone=tags_of(
        ["a|b", "b|c", "c|a", "b"] * 10 + ["HC"] * 20
    ),
)


@case("labels_of_nothing", "warning")
def a_label_of_none_in_columns(root):
    columns = {"edema": [1, 1, 0, 0], "mass": [1, 0, 0, 0], "background": [0, 0, 1, 1]}
    return table(root, columns, label=None, labels=tuple(columns))


case(
    "labels_of_nothing",
    None,
    an_empty_list_for_no_finding=findings_of_lungs("[]"),
    a_few_records_of_a_rare_label=findings_of_lungs("Hernia"),
    a_normal_picture_from_the_front=findings_of_lungs("Normal|frontal", ["Edema|frontal"]),
    a_healthy_class_of_records_with_one_label=labels_of(["healthy", "ill"] * 5),
)


@case("blank_groups", "warning")
def patients_without_a_name(root):
    columns = {"label": ["a", "b"] * 4, "patient": ["p", "p", "NA", "", "q", "q", "r", "r"]}
    return table(root, columns, group=("patient",))


@case("blank_groups", "warning")
def patients_of_some_samples_of_a_tar(root):
    names = {f"{n}.jpg": image_bytes(n) for n in range(4)}
    groups = {f"{n}.json": json.dumps({"label": 0, "group": n}) for n in range(3)}
    return tars(root, dict(sorted((names | groups).items())))


case(
    "blank_groups",
    None,
    patients_of_all_rows=table_of({"label": ["a", "b"], "patient": ["p", "q"]}, group=("patient",)),
)


@later
def shots(root, **options):
    names = [f"{name}/I{n}_BURST00{shot}.jpg" for name in "ab" for n in range(8) for shot in "123"]
    return folder(root, *names, test_fraction=0.4, **options)


case("bursts", "warning", shots_of_a_drawn_split=shots())
case("bursts", None, shots_that_are_kept_whole=shots(group=("burst",), keep_groups=True))

case("numbered_folders", "warning", folders_0_to_11=folders_of(*map(str, range(12)), count=1))
case(
    "numbered_folders",
    "note",
    folder_4_is_absent=folders_of(*(f"c{number}" for number in range(10) if number != 4)),
)
case(
    "numbered_folders",
    None,
    folders_00_to_11=folders_of(*(f"{i:02d}" for i in range(12)), count=1),
    folders_0_to_9=folders_of(*map(str, range(10)), count=1),
)

case(
    "class_spellings",
    "error",
    one_class_in_two_spellings_by_split=folders_of("train/Cat", "train/dog", "val/cat", "val/dog"),
)
case("class_spellings", "warning", a_copy_of_a_class=folders_of("cat", "cat - Copy", "dog"))
case(
    "class_spellings",
    None,
    one_class_in_two_forms_of_unicode=folders_of(
        f"train/{NFC}", "train/dog", f"val/{NFD}", "val/dog"
    ),
)

case("classes_without_names", "warning", a_table_of_numbers=labels_of([0, 1, 2, 0]))
case("classes_without_names", None, folders_that_are_called_numbers=folders_of("0", "1", "2"))

case(
    "classes_of_one_split",
    "error",
    splits_with_other_names_for_classes=folders_of("train/n01", "train/n02", "val/images"),
)
case(
    "classes_of_one_split",
    "warning",
    a_class_that_is_never_trained=folders_of(
        "train/cat", "train/dog", "val/cat", "val/dog", "val/eel"
    ),
)
case(
    "classes_of_one_split",
    None,
    the_same_classes_in_both_splits=folders_of("train/cat", "train/dog", "val/cat", "val/dog"),
)

case("unknown_classes", "error", a_folder_that_a_program_named_nan=folders_of("cat", "dog", "nan"))
case("unknown_classes", "warning", a_class_named_unknown=labels_of(["cat", "dog", "unknown"]))
case(
    "unknown_classes",
    None,
    a_listed_class_of_that_name=listed_classes(["cat", "dog", "NA"], "cat", "dog", "NA"),
)


# ---- labels --------------------------------------------------------------------------------------


case(
    "quoted_classes",
    "error",
    blanks_before_quotes=csv_of('path,label\n0.jpg, "cat"\n1.jpg, "dog"\n', "0.jpg", "1.jpg"),
)
case("quoted_classes", None, quotes_without_blanks=labels_of(["cat", "dog"]))

case("mixed_numbers", "warning", a_typing_error_among_numbers=labels_of([*range(10), "l0"]))
case("mixed_numbers", None, names_with_a_number=labels_of(["cat", "dog", "911"]))

case(
    "one_hot_labels",
    "error",
    a_0_or_1_for_each_class=tags_of(["[1, 0, 0]", "[0, 1, 0]", "[0, 0, 1]"]),
    a_0_or_1_for_each_class_in_tars=tars_of(
        {"a.jpg": image_bytes(1), "a.json": '{"labels": [1.0, 0.0, 0.0]}'}, accept=("label_gaps",)
    ),
)
case("one_hot_labels", None, numbers_of_classes=tags_of(["[0, 2]", "[1]", "[0, 1]"]))

case("normalized_boxes", "error", boxes_from_0_to_1=boxes_of(*[(0.1, 0.2, 0.5, 1)] * 2))
case("normalized_boxes", None, boxes_in_pixels=boxes_of(_BOX, _BOX))

case(
    "label_gaps",
    "error",
    labels_from_1=labels_of([1, 2, 3, 4]),
    labels_of_tars_with_a_gap=tars_of(members_with("0", "2")),
)
case("label_gaps", None, labels_from_0=labels_of([0, 1, 2, 2]))

case(
    "missing_labels",
    "error",
    tars_with_class_names_and_labels_elsewhere=tars_of(
        {"a.jpg": image_bytes(1), "a.cls.txt": "0"}, classes=["cat", "dog"]
    ),
)
case(
    "missing_labels",
    "warning",
    tars_whose_json_has_another_key=tars_of(
        {"a.jpg": image_bytes(1), "a.json": json.dumps({"class_id": 1})}
    ),
    some_unlabeled_samples=tars_of({**samples(6), "z.jpg": image_bytes(9)}),
)
case("missing_labels", None, labeled_samples=tars_of(samples(6)))

case(
    "joined_labels",
    "error",
    several_labels_in_a_cell_of_one=labels_of(["cat|dog", "cat", "dog", "bird"]),
    a_list_in_a_cell_of_one=labels_of(['["cat", "dog"]', "cat", "dog"]),
    pieces_that_occur_once=tags_of(["cat;dog", "eel;fox"]),
)
case(
    "joined_labels",
    "warning",
    names_with_blanks_in_a_cell_of_several=tags_of(["No Finding", "Effusion"]),
)
case("joined_labels", None, names_with_commas=labels_of(["tern, arctic", "tern, common", "eel"]))

case("label_separator", "note", cells_with_bars=tags_of(["cat|dog", "cat", "No Finding"]))
case(
    "label_separator",
    None,
    cells_with_a_separator_that_is_set=tags_of(
        ["cat|dog", "cat", "No Finding"], label_separator="|"
    ),
)

case("unknown_cells", "warning", arguments_for_nothing=labels_of(["cat", "NA", "null", "dog"]))
case("unknown_cells", None, empty_cells=labels_of(["cat", "", "NaN", "dog"]))

case("fractions", "error", measurements=labels_of(["0.5", "1.0", "0.25"]))
case("fractions", None, numbers_that_pandas_made_floats=labels_of(["0.0", "1.0", ""]))


@case("json_next_to_cls", "warning")
def a_json_of_another_form(root):
    json_text = json.dumps({"boxes": [[1, 2, 3, 4]]})
    return tars(root, {"a.jpg": image_bytes(1), "a.cls": "0", "a.json": json_text})


@case("json_next_to_cls", None)
def a_json_with_boxes(root):
    box = {"x0": 0, "y0": 0, "x1": 2, "y1": 2}
    json_text = json.dumps({"boxes": [box], "label": 0})
    return tars(root, {"a.jpg": image_bytes(1), "a.cls": "0", "a.json": json_text})


# ---- pixels --------------------------------------------------------------------------------------


@later
def deep_folder(root, largest, channels=1, **options):
    config = folder(root, *images_of("cat", "dog"), **options)
    values = np.random.default_rng(0).integers(0, largest + 1, (8, 8, channels))
    values[0, 0, 0] = largest
    (root / "cat/deep.png").write_bytes(png_16(values))
    return config


case(
    "dark_images",
    "error",
    values_of_12_bits=deep_folder(4095),
    colors_and_alpha_of_10_bits=deep_folder(1023, channels=4),
)


@case("dark_images", "error")
def one_bright_pixel_in_one_of_many_dark_images(root):
    config = deep_folder(4095)(root)
    for number in range(12):
        (root / f"cat/deep{number}.png").write_bytes((root / "cat/deep.png").read_bytes())
    (root / "cat/hot.png").write_bytes(png_16(np.full((8, 8, 1), 65_535)))
    return config


case("dark_images", "warning", values_of_half_the_range=deep_folder(30_000))
case("dark_images", "note", values_of_16_bits=deep_folder(65_535))
case("dark_images", None, a_range_that_is_set=deep_folder(4095, bit_range=(0, 4095)))


def turned_jpeg(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


@later
def boxed(root, orientation, **options):
    config = boxes_of(_BOX, _BOX, **options)(root)
    (root / "0.jpg").write_bytes(turned_jpeg(orientation))
    return config


case("turned_regions", "warning", boxes_of_a_turned_image=boxed(6))
case(
    "turned_regions",
    None,
    boxes_of_an_upright_image=boxed(1),
    boxes_of_a_turned_image_with_the_option=boxed(6, boxes_of="stored"),
)


# ---- pictures ------------------------------------------------------------------------------------


def write_array(path, values, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values, mode).save(path)


@later
def arrays(root, make, *, folders=("cat", "dog"), count=6, **options):
    """Folder of PNG whose pixels a function of their number makes."""
    for place, name in enumerate(folders):
        for number in range(count):
            write_array(root / name / f"{number}.png", make(place * count + number))
    return ImageFolderDataConfig(path=str(root), **options)


def noise(number, channels=3, most=256, side=8):
    draw = np.random.default_rng(number)
    return draw.integers(0, most, (side, side, channels), np.uint8)


case(
    "blank_images",
    "error",
    drawings_that_are_transparent_everywhere=arrays(
        lambda n: np.dstack([noise(n), np.zeros((8, 8), np.uint8)])
    ),
)
case(
    "blank_images",
    "warning",
    some_frames_of_one_color=arrays(
        lambda n: noise(n) if n % 3 else np.full((8, 8, 3), 7, np.uint8)
    ),
)
case(
    "blank_images",
    None,
    one_blank_page_among_many=arrays(
        lambda n: noise(n) if n else np.full((8, 8, 3), 255, np.uint8), count=15
    ),
)

case(
    "dim_images",
    "warning",
    maps_of_class_numbers_as_images=arrays(lambda n: noise(n, 1, most=3)[..., 0]),
)
case(
    "dim_images",
    None,
    masks_of_0_and_255=arrays(lambda n: 255 * (noise(n, 1, most=2)[..., 0])),
    some_pictures_of_the_night=arrays(lambda n: noise(n, most=20 if n % 2 else 256)),
)


def five_bands():
    """TIFF of 2x2 pixels of five channels of 8 bits, without compression."""
    pixels = bytes(range(0, 200, 10)) + struct.pack("<6H", 8, 8, 8, 8, 8, 0)
    entries = [
        (256, 4, 1, 2),
        (257, 4, 1, 2),
        (258, 3, 5, 28),  # the depths are behind the pixels
        (259, 3, 1, 1),
        (262, 3, 1, 2),
        (273, 4, 1, 8),
        (277, 3, 1, 5),
        (278, 4, 1, 2),
        (279, 4, 1, 20),
        (284, 3, 1, 1),
        (338, 3, 2, 0),
    ]
    head = struct.pack("<2sHI", b"II", 42, 8 + len(pixels))
    directory = struct.pack("<H", len(entries))
    directory += b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return head + pixels + directory + struct.pack("<I", 0)


case(
    "dropped_channels",
    "warning",
    tiffs_of_five_bands=with_files(arrays(noise), {"cat/5.tif": five_bands()}),
)


@case("dropped_channels", "warning")
def animations(root):
    config = arrays(noise)(root)
    frames = [Image.fromarray(noise(n)) for n in range(3)]
    frames[0].save(root / "cat" / "a.gif", save_all=True, append_images=frames[1:])
    return config


def with_alpha(number, make):
    pixels = noise(number, channels=4, side=16)
    pixels[..., 3] = make(pixels[..., 3])
    return pixels


case(
    "dropped_channels",
    "warning",
    near_infrared_that_is_marked_as_alpha=arrays(lambda number: noise(number, channels=4)),
    gray_and_depth=arrays(lambda number: noise(number, channels=2)),
)


@case("dropped_channels", "warning")
def a_fourth_channel_without_a_meaning(root):
    config = arrays(noise)(root)
    Image.fromarray(noise(1, channels=4), "RGBX").save(root / "cat" / "a.tif")
    return config


@case("dropped_channels", None)
def cut_out_things_with_soft_edges(root):
    def cut(alpha):
        alpha[:8], alpha[9:] = 0, 255
        return alpha

    return arrays(lambda number: with_alpha(number, cut))(root)


@later
def deep_folders(root, **largest):
    """A folder with 16-bit files for each class, or class of a split, with these largest values."""
    for name, most in largest.items():
        for number in range(5):
            values = np.random.default_rng(number).integers(0, most + 1, (8, 8, 1))
            values[0, 0] = most - number * (most // 16)
            path = root / name.replace("__", "/") / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png_16(values))
    return ImageFolderDataConfig(path=str(root))


case(
    "darker_items",
    "warning",
    a_class_of_12_bits_among_16=deep_folders(cat=4095, cow=60_000, dog=65_535),
)


@case("darker_items", "warning")
def a_split_of_14_bits(root):
    most = {"train": 65_535, "test": 16_383}
    return deep_folders(**{f"{s}__{name}": most[s] for s in most for name in ("cat", "dog")})(root)


case(
    "darker_items",
    None,
    classes_that_differ_by_less_than_two_bits=deep_folders(cat=24_000, dog=65_535),
)


@case("dropped_channels", None)
def gifs_of_one_picture(root):
    config = arrays(noise)(root)
    Image.fromarray(noise(1)).save(root / "cat" / "a.gif")
    return config


case("dark_images", "note", a_range_that_fits=deep_folder(60_000))
case(
    "dark_images",
    "warning",
    a_range_that_cuts_brighter_files=deep_folder(60_000, bit_range=(0, 4095)),
)


@later
def of_two_kinds(root, first, second, folders=("cat", "dog"), **options):
    """Two folders of ten files each, whose suffixes and sizes may differ."""
    for name, (suffix, side) in zip(folders, (first, second), strict=True):
        for number in range(10):
            write_array(root / name / f"{number}.{suffix}", noise(number, side=side))
    return ImageFolderDataConfig(path=str(root), **options)


case(
    "traits_of_classes",
    "warning",
    one_class_of_png_and_one_of_jpeg=of_two_kinds(("png", 8), ("jpg", 8)),
    classes_of_different_sizes=of_two_kinds(("png", 8), ("png", 9)),
)
case("traits_of_classes", None, classes_of_one_kind_of_file=of_two_kinds(("png", 8), ("png", 8)))


@case("traits_of_classes", None)
def classes_of_both_kinds_of_file(root):
    config = of_two_kinds(("png", 8), ("jpg", 8))(root)
    for name in ("cat", "dog"):
        for number in range(10, 14):
            write_array(root / name / f"{number}.png", noise(number))
    return config


case(
    "traits_of_splits",
    "warning",
    a_test_split_of_another_size=of_two_kinds(
        ("png", 8), ("png", 12), ("train/cat", "test/cat"), accept=("classes_like_splits",)
    ),
)
case(
    "traits_of_splits",
    None,
    splits_of_one_size=of_two_kinds(("png", 8), ("png", 8), ("train/cat", "test/cat")),
)


@later
def masked(root, mask, **columns):
    config = table(root, {"label": ["cat", "dog"], **columns, "mask": ["m.png", ""]}, mask="mask")
    write_array(root / "m.png", mask)
    return config


case(
    "regions_outside",
    "error",
    boxes_of_larger_images=boxes_of((0, 0, 200, 200), _BOX),
    a_mask_of_other_proportions=masked(np.zeros((4, 16), np.uint8)),
)
case(
    "regions_outside",
    "warning",
    boxes_of_larger_images_that_are_left_out=boxes_of((0, 0, 200, 200), _BOX, on_error="skip"),
)
case("regions_outside", None, boxes_and_masks_of_their_images=masked(np.ones((4, 6), np.uint8)))


@later
def many_labels_and_a_mask(root, value):
    names = ["cat|dog", "dog|cat"]
    config = table(
        root, {"tags": names, "mask": ["m.png", ""]}, mask="mask", labels="tags", label=None
    )
    write_array(root / "m.png", np.full((4, 6), value, np.uint8))
    return config


case("mask_values", "error", masks_of_0_and_255_beside_several_labels=many_labels_and_a_mask(255))
case("mask_values", None, masks_of_classes_beside_several_labels=many_labels_and_a_mask(2))


@later
def appended(root, *, highest=255, folder="cat", copies=""):
    """A folder of 40 images, its store, and 20 more, with values below a bound."""
    generator = np.random.default_rng(0)
    for number in range(60):
        name, most = ("dog", 255) if number < 40 else (folder, highest)
        pixels = generator.integers(0, most, (12, 16, 3)).astype(np.uint8)
        if number == 40:
            data = ImageFolderDataConfig(path=str(root / "set"))
            precompute.run(precompute_config(root / "store", data=data))
        for cls in ("cat", name) if number < 20 else (name,):
            (root / "set" / cls).mkdir(parents=True, exist_ok=True)
            write_array(root / "set" / cls / f"{number}.png", pixels)
    if copies:
        Image.open(root / "set/dog/30.png").save(root / "set/dog" / copies)
    return data, str(root / "store")


@later
def pictures(root, **folders):
    """Write 20 pictures of noise to each folder, of (width, height) and around a brightness."""
    random = np.random.default_rng(0)
    for name, (size, brightness) in folders.items():
        (root / name.replace("_", "/")).mkdir(parents=True)
        for i in range(20):
            level = brightness + random.integers(-30, 30)
            noise = np.clip(random.normal(level, 20, (*size[::-1], 3)), 0, 255)
            Image.fromarray(noise.astype(np.uint8)).save(root / name.replace("_", "/") / f"{i}.png")
    return ImageFolderDataConfig(path=str(root))


case(
    "strips",
    "warning",
    long_and_narrow=pictures(train_cat=((100, 10), 120), train_dog=((10, 100), 120)),
)
case("strips", None, photographs=pictures(train_cat=((40, 30), 120), train_dog=((30, 40), 120)))

case(
    "brightness_of_splits",
    "warning",
    a_dark_test_split=pictures(train_cat=((24, 24), 150), test_cat=((24, 24), 60)),
)


@case("equal_in_sample", "note")
def one_test_picture_of_train(root):
    data = pictures(train_cat=((24, 24), 120), test_cat=((24, 24), 120))(root)
    Image.open(root / "train/cat/0.png").save(root / "test/cat/again.bmp")
    return data


@case("equal_in_sample", None)
@case("brightness_of_splits", None)
def a_dark_class(root):
    sides = {"cat": 150, "dog": 60}
    names = [(split, name) for split in ("train", "test") for name in sides]
    return pictures(**{f"{split}_{name}": ((24, 24), sides[name]) for split, name in names})(root)


case("new_classes", "note", a_class_that_the_store_has_not=appended(folder="cow"))

case("other_brightness", "warning", images_darker_than_those_of_the_store=appended(highest=120))

case(
    "packed_copies",
    "warning",
    an_image_that_the_store_has_under_another_name=appended(copies="copy.png"),
    an_image_that_the_store_has_in_another_format=appended(copies="copy.bmp"),
)


@case("new_classes", None)
@case("other_brightness", None)
@case("packed_copies", None)
def images_like_those_of_the_store(root):
    return appended()(root)


# ---- tests ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("finding", "level", "write"), CASES)
def test_a_finding_fires_where_it_should_and_only_there(tmp_path, finding, level, write):
    config = write(tmp_path)

    assert levels_of(preview_of(config)).get(finding) == level


def test_every_finding_has_a_case_that_fires_and_one_that_does_not():
    fired = {(each.values[0], each.values[1] is not None) for each in CASES}

    assert fired == {(name, fires) for name in FINDINGS for fires in (True, False)}


def test_an_error_stops_before_anything_is_packed_and_names_the_option(tmp_path):
    data = masks_beside_classes(tmp_path / "set")
    config = precompute_config(tmp_path / "store", data=data)

    with pytest.raises(DataError, match=r"'masks'.*data\.accept=\[other_things\]") as caught:
        precompute.run(config)

    assert len(caught.value.lines) == 1
    assert not (tmp_path / "store/images").exists()


def test_what_is_accepted_is_a_warning_and_is_kept_beside_the_store(tmp_path, caplog):
    data = masks_beside_classes(tmp_path / "set")
    accepting = ImageFolderDataConfig(path=data.path, accept=("other_things",))

    with caplog.at_level("WARNING"):
        precompute.run(precompute_config(tmp_path / "store", data=accepting))

    kept = read_data_facts(Store(tmp_path / "store").folder)
    assert [f.level for f in kept.findings if f.name == "other_things"] == ["warning"]
    assert any("other_things" in message for message in caplog.messages)
    assert str(tmp_path) not in (tmp_path / "store/facts.json").read_text()


def test_a_name_of_no_finding_is_refused(tmp_path):
    data = folder(tmp_path, *images_of("cat", "dog"), accept=("other_thing",))

    with pytest.raises(ConfigError, match=r"no finding 'other_thing' .did you mean other_things"):
        preview_of(data)


def test_a_stranger_may_add_a_finding(tmp_path):
    def find_cats(result):
        if "cat" in result.classes:
            yield "error", "there are cats"

    FINDINGS["cats"] = find_cats
    try:
        with_cats = preview_of(folder(tmp_path / "a", *images_of("cat", "dog")))
        without = preview_of(folder(tmp_path / "b", *images_of("eel", "dog")))
    finally:
        del FINDINGS["cats"]

    assert message_of(with_cats, "cats") == "there are cats"
    assert "cats" not in levels_of(without)


# ---- what is refused, with the way out -----------------------------------------------------------


def named(cell, *files):
    return csv_of(f"path,label\n{cell},cat\n", *files)


def folders_and_meanings(root):
    config = folder(root / "set", *images_of("n01440764", "n01443537"))
    (root / "names.txt").write_text("n01440764 tench\nn01443537 goldfish\n")
    return replace(config, classes=str(root / "names.txt"))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (listed_classes(["cat", "dog"], "1 cat", "2 dog"), "number next to each"),
        (listed_classes(["cat", "dog"], "cat,0", "dog,1"), "number next to each"),
        (listed_classes(["1", "2"], "cat", "dog"), "count from 1"),
        (
            listed_classes(["n014", "n015"], "n014 tench", "n015 eel"),
            "'n014 tench': write the names of cells alone",
        ),
        (folders_and_meanings, "'n01440764 tench'; write the names of folders alone"),
        (
            csv_of("0.jpg,cat\n1.jpg,dog\n", "0.jpg", "1.jpg"),
            "its first line is a record and no header",
        ),
        (
            csv_of("path,label\n0.jpg,cat\n0.jpg,dog\n1.jpg,dog\n", "0.jpg", "1.jpg"),
            r"list all of them in one row .data\.labels",
        ),
        (named("7", "7.jpg"), r"there is '7\.jpg': write the whole path"),
        (named("7", "train/7.JPG"), r"there is 'train/7\.JPG'"),
        (named("7.jpg", "train/7.jpg"), r"in its folder train .data\.root="),
        (named("https://x.org/7.jpg"), "is an address or begins with ~"),
        (named("s3://x/7.jpg"), "is an address or begins with ~"),
        (named("~/7.jpg"), "is an address or begins with ~"),
        (named("7.png", "7.jpg"), r"there is '7\.jpg', so the table has another"),
        (named("7.jpg.jpg", "7.jpg"), r"there is '7\.jpg', so the table has anoth"),
        (named("train/7.jpg", "7.jpg"), r"there is '7\.jpg', so the table names"),
        (listed_classes(["cat", "dog"], "nc: 2", "names:", "  0: cat", "  1: dog"), "is YAML"),
        (
            table_of({"MEL": [1, 0, 0], "NV": [0, 1, 0], "BCC": [0, 0, 1]}),
            r"one for each class, are data\.labels=\[a,b",
        ),
    ],
)
def test_a_refusal_names_the_way_out(tmp_path, write, message):
    config = write(tmp_path)
    try:
        refusal = message_of(preview_of(config), "repeated_keys")
    except ConfigError as error:
        refusal = str(error)

    assert re.search(message, refusal)


def test_an_unknown_label_is_named_by_its_value(tmp_path):
    in_table = table(tmp_path / "a", {"label": ["cat", "-1", "", "NA", "dog"]})
    in_tars = tars(tmp_path / "b", members_with("cat", "-1", "", "dog"), classes=["cat", "dog"])

    for config in (in_table, in_tars):
        message = message_of(preview_of(config), "missing_labels")
        assert "1 -1 (" in message
        assert "1 empty (" in message


def test_all_damaged_files_are_named_at_once(tmp_path):
    data = folder(tmp_path, *images_of("cat", "dog"))
    for number in range(4):
        (tmp_path / f"cat/{number}b.jpg").write_bytes(b"" if number % 2 else b"no image at all")

    message = message_of(preview_of(data), "damaged_files")

    assert message.startswith("files that cannot be read (4): cat/0b.jpg cannot be decoded")
    assert all(f"cat/{number}b.jpg" in message for number in range(4))
    assert "data.on_error=skip" in message


def test_a_sample_is_stated_and_all_files_may_be_read(tmp_path):
    data = folder(tmp_path, *images_of("cat", "dog", count=20))
    some, every = preview_of(data, files=10), preview_of(data, all=True)

    assert some.sample.files == 10
    assert some.sheet()["images"].source == "10 of 40 headers"
    assert every.sample.files == 40
    assert every.sheet()["images"].text() == "JPEG 40 [all headers]"
    assert preview_of(data, files=10).stored() == some.stored()


def test_a_preview_counts_classes_by_split(tmp_path):
    data = folder(tmp_path, *images_of("train/cat", "train/dog", "val/dog"))
    result = preview_of(data)

    assert result.counts.records == {"train": 6, "val": 3}
    assert [[result.count(s, label) for label in range(2)] for s in ("train", "val")] == [
        [3, 3],
        [0, 3],
    ]
    assert result.stored().records_of_classes == {"train": (3, 3), "val": (0, 3)}


def test_a_parquet_column_of_bytes_is_not_text_in_an_error(tmp_path):
    images = [image_bytes(i) for i in range(3)]
    pq.write_table(pa.table({"image": images, "label": [0, 1, 0]}), tmp_path / "t.parquet")
    data = ImageTableDataConfig(
        path=str(tmp_path / "t.parquet"), image="label", label=None, cache=str(tmp_path / "cache")
    )

    with pytest.raises(ConfigError) as caught:
        preview_of(data)
    assert len(str(caught.value)) < 600
