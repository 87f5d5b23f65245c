"""The page on own photographs: its table and commands, and every finding with its levels."""

import csv
import re
import shlex
from itertools import product

from permafrost.config.data import FINDINGS
from permafrost.functions import run_verb
from permafrost.store.reader import Store
from permafrost_findings.equal_images import EQUAL_IMAGES
from tests.sources.test_findings import CASES
from tests.support.commands import lines_of
from tests.support.image_sets import folder_config, image_bytes, write_images
from tests.support.pages import blocks_of
from tests.support.paths import ROOT
from tests.support.previews import message_of, preview_of

PAGE = ROOT / "docs/howto/own-data.md"
ROWS = dict(
    re.findall(r"^\| `(\w+)` \| ([^|]*) \|", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
)


def write_table_of_page(folder):
    """Write the table of the page, each row once in each of its splits, and a picture for each row."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:1] == "|"][:5]
    header, _, *rows = ([cell.strip(" `") for cell in line.split("|")[1:-1]] for line in lines)
    path, split = header.index("path"), header.index("split")
    (folder / "img").mkdir(parents=True)
    with (folder / "photos.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for number, (row, of) in enumerate(product(rows, [row[split] for row in rows])):
            name = row[path].replace(".jpg", f"-{of}.jpg")
            (folder / name).write_bytes(image_bytes(number, size=(100, 90)))
            writer.writerow([name, *row[1:split], of, *row[split + 1 :]])


def test_the_table_of_the_page_is_read_by_its_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_table_of_page(tmp_path / "data/photos")
    preview, packing, *_ = (
        shlex.split(line) for block in blocks_of(PAGE, "bash") for line in lines_of(block.code)
    )

    shown = run_verb(*preview[1:]).preview
    labeled = run_verb(*preview[1:], "data.labels=labels").preview
    run_verb(*packing[1:], "executor=serial", "store.image_size=64")

    assert message_of(shown, "unread_columns") == "columns that are not read: labels"
    assert not {finding.level for finding in labeled.findings} & {"error", "warning"}
    store, rows = Store(tmp_path / "stores/photos"), range(9)
    assert store.manifest.classes == ("boat", "house")
    assert [store.num_records(split) for split in ("train", "val", "test")] == [3, 3, 3]
    assert sorted(store.index.values("group", rows)) == [0] * 6 + [1] * 3  # land, water
    assert store.index.list_lengths("boxes", rows).sum() == 6


def test_every_finding_has_a_row():
    assert list(ROWS) == [*FINDINGS, *EQUAL_IMAGES]


def test_a_row_has_the_levels_that_the_tests_show():
    shown = {name: set() for name in FINDINGS}
    for case in CASES:
        name, level, _ = case.values
        shown[name] |= {level} - {None}

    for name, levels in shown.items():
        assert levels <= set(re.findall(r"error|warning|note", ROWS[name])), name


def test_the_rule_of_the_page_names_rare_classes(tmp_path):
    (block,) = blocks_of(PAGE, "python")
    counts = {"cat": 12, "dog": 3}
    write_images(tmp_path, *(f"{c}/{i}.jpg" for c, count in counts.items() for i in range(count)))
    try:
        exec(block.code, {})
        result = preview_of(folder_config(tmp_path))
    finally:
        FINDINGS.pop("rare_classes", None)

    assert message_of(result, "rare_classes") == "class dog has 3 records to train on"
