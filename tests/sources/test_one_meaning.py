"""The same images and labels as folders, CSV, Parquet and tars: the same classes, labels and splits, or an error."""

import csv
import io
import os
import unicodedata

import pandas as pd
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from permafrost.config.data import ImageFolderDataConfig, ImageTableDataConfig
from permafrost.core.errors import UserError
from permafrost.core.records import NO_LABEL
from permafrost.sources.image_files import LEFTOVER_FOLDERS
from permafrost.sources.source import build_source
from permafrost_sources.options import WebDatasetDataConfig
from tests.support.images import write_tar
from tests.support.previews import levels_of, preview_of

ODD_NAMES = [
    *(
        "cat",
        "Dog",
        "dog",
        "golden retriever",
        "No Finding",
        "cat|dog",
        "cat,dog",
        "cat;dog",
        "a/b"[:1],
    ),
    *("0", "1", "2", "3", "10", "007", "01", "1.0", "1e5", "-1", "-2", "+3", "²", "Infinity"),
    *("nan", "NaN", "None", "null", "NA", "none", "?", "-", "True", "no", "2026-11-25"),
    *(
        unicodedata.normalize("NFC", "chèvre"),
        unicodedata.normalize("NFD", "chèvre"),
        "猫",
        "ß",
        "ﬁsh",
    ),
    *(
        "cat ",
        " cat",
        "it's",
        '"quoted"',
        "100%",
        "a=b",
        "[cat]",
        "{x}",
        "#1",
        "~x",
        "C++",
        "train",
        "test",
    ),
]
SPLITS = ["train", "val", "test", "Training", "TEST", "valid"]


def jpeg(number):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (number % 256, number // 256, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_all(root, records):
    """Write records (split, class, number) in each of the four forms, and return their configs by form."""
    rows = []
    for split, name, number in records:
        path = root / "set" / split / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number))
        rows.append({"path": f"{split}/{name}/{number}.png", "label": name, "split": split})
    with (root / "set/t.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["path", "label", "split"])
        writer.writeheader()
        writer.writerows(rows)
    pd.DataFrame(rows).to_parquet(root / "set/t.parquet")
    for split in dict.fromkeys(split for split, _, _ in records):
        members = {}
        for each, name, number in records:
            if each == split:
                members |= {f"{number}.png": jpeg(number), f"{number}.cls": name}
        write_tar(root / "tars" / f"{split}-000000.tar", members)
    classes = build_source(ImageFolderDataConfig(path=str(root / "set"))).classes
    (root / "tars/classes.txt").write_text("\n".join(classes), encoding="utf-8")
    return {
        "folder": ImageFolderDataConfig(path=str(root / "set")),
        "csv": ImageTableDataConfig(path=str(root / "set/t.csv"), split="split"),
        "parquet": ImageTableDataConfig(path=str(root / "set/t.parquet"), split="split"),
        "tars": WebDatasetDataConfig(path=str(root / "tars")),
    }


def meaning_of(config):
    """Return (class of each image by split and number, classes), or the error that says why not."""
    try:
        result = preview_of(config)
    except UserError as error:
        return error
    if result.with_level("error"):
        return UserError("; ".join(finding.message for finding in result.with_level("error")))
    source = build_source(config)
    labels = {}
    for record in source.records():
        pixel = Image.open(io.BytesIO(source.read(record).image)).getpixel((0, 0))
        labels[pixel[0] + 256 * pixel[1]] = (record.split, record.label)
    if any(label == NO_LABEL for _, label in labels.values()):
        assert "missing_labels" in levels_of(result)
    return labels, source.classes


names = st.one_of(
    st.sampled_from(ODD_NAMES),
    st.text(
        st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp"]),
        min_size=1,
        max_size=8,
    ),
).filter(
    lambda name: (
        "/" not in name
        and name not in (".", "..")
        and not name.startswith(".")
        and name.lower() not in LEFTOVER_FOLDERS  # folders of other programs, as a preview says
    )
)
data_sets = st.lists(st.tuples(st.sampled_from(SPLITS), names), min_size=2, max_size=8)


@settings(
    max_examples=int(os.environ.get("EXAMPLES", "60")),
    derandomize=True,  # EXAMPLES=3000 looks further
    deadline=None,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.function_scoped_fixture,
        HealthCheck.filter_too_much,
    ],
)
@example(pairs=[("train", str(i)) for i in range(12)])
@example(pairs=[("train", str(i)) for i in range(1, 5)])
@example(pairs=[("Training", "cat"), ("Training", "dog"), ("TEST", "cat"), ("TEST", "dog")])
@example(
    pairs=[
        ("train", unicodedata.normalize("NFC", "chèvre")),
        ("train", "dog"),
        ("val", unicodedata.normalize("NFD", "chèvre")),
        ("val", "dog"),
    ]
)
@example(pairs=[("train", "nan"), ("train", "cat"), ("train", "dog")])
@example(pairs=[("train", "cat|dog"), ("train", "cat"), ("train", "dog")])
@example(pairs=[("train", "007"), ("train", "008")])
@example(pairs=[("train", "cat "), ("train", "dog")])
@given(pairs=data_sets)
def test_the_same_data_in_four_forms_mean_the_same_or_an_error_says_why_not(
    tmp_path_factory, pairs
):
    records = [(split, name, number) for number, (split, name) in enumerate(pairs)]
    try:
        configs = write_all(tmp_path_factory.mktemp("forms"), records)
    except (
        UserError,
        OSError,
    ):  # a name that no folder can have, or folders that are refused as a whole
        assume(False)

    meanings = {form: meaning_of(config) for form, config in configs.items()}

    understood = {form: m for form, m in meanings.items() if not isinstance(m, UserError)}
    assert all(meaning == next(iter(understood.values())) for meaning in understood.values())


@pytest.mark.parametrize("name", ["cat", "golden retriever", "chèvre", "猫"])
def test_usual_names_are_understood_in_every_form(tmp_path, name):
    records = [("train", name, 0), ("train", "eel", 1), ("val", name, 2), ("val", "eel", 3)]

    meanings = [meaning_of(config) for config in write_all(tmp_path, records).values()]

    assert not any(isinstance(meaning, UserError) for meaning in meanings)
    assert all(meaning == meanings[0] for meaning in meanings)
    assert meanings[0][1] == tuple(sorted(["eel", name]))
