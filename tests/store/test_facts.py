"""Sheets of facts: 80 columns, marks, explanations, and their file."""

import logging

from permafrost.store.facts import Fact, FactSheet, announce, read_sheets, write_sheets

PLAIN = Fact(name="records", value="train 72, test 24", source="image_folder")
DOUBTFUL = Fact(
    name="normalization",
    value="mean 0.485 0.456 0.406, std 0.229 0.224 0.225, of a network with a long name",
    source="assumed",
    warning="nobody typed it, and a network that was trained with others gives other outputs than these",
)
FROM_FINDING = Fact(name="brightness", value="train 120", source="500 decoded", findings=("dim",))
SHEET = FactSheet(subject="data", facts=(PLAIN, DOUBTFUL, FROM_FINDING))


def test_a_sheet_fits_80_columns_and_explains_what_it_marks():
    text = str(SHEET)

    lines = text.split("\n")
    assert max(map(len, lines)) <= 80
    assert lines[:2] == ["data:", "  records        train 72, test 24 [image_folder]"]
    assert [line[2:15] for line in lines if line.startswith("! ")] == [
        "normalization",
        "brightness   ",
        "normalization",
    ]
    assert "train 120 [500 decoded; dim]" in text
    assert lines[-2].startswith("! normalization: nobody typed it")


def test_values_of_others_cannot_write_lines():
    fact = Fact(name="records", value="a\nb\x1b[2J", source="x\ny")

    (line,) = FactSheet(subject="data", facts=(fact,)).lines()

    assert line == "  records        a\\nb\\x1b[2J [x\\ny]"


def test_sheets_survive_their_file_and_damage_is_said(tmp_path, caplog):
    write_sheets(tmp_path, {"data": SHEET})

    assert read_sheets(tmp_path) == {"data": SHEET}
    assert read_sheets(tmp_path / "none") == {}
    path = tmp_path / "facts.json"
    path.write_text(path.read_text().replace("train 72", "train 73"))
    assert read_sheets(tmp_path) == {}
    assert "facts.json is damaged" in caplog.text


def test_a_sheet_is_logged_as_a_block(caplog):
    with caplog.at_level(logging.INFO):
        announce([SHEET])

    (record,) = caplog.records
    assert record.is_block
    assert record.getMessage() == str(SHEET)
