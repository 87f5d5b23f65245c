"""Cases in a report: their choice from hand-written tables, their pictures and contents, and missing inputs."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from permafrost.core.errors import ConfigError
from permafrost.evaluation.saved_records import RECORDS_NAME
from permafrost.runs.mirrors import RUNS
from permafrost.store.manifest import read_store_manifest
from permafrost_report import case_pictures
from permafrost_report.cases import choose_cases, value_of
from permafrost_report.pictures import DISPLAYED_PIXELS
from tests.report.conftest import SPLITS
from tests.support.html_page import Page
from tests.support.index_table import index_table
from tests.support.run_files import write_config
from tests.support.runs import report_config
from tests.support.sweeps import read_sweep
from tests.support.verbs import report


@pytest.fixture
def no_other_pictures(monkeypatch):
    """Omit the pictures of the page that other tests cover."""
    monkeypatch.setattr("permafrost_report.page.training_curves", lambda *_: [])
    monkeypatch.setattr("permafrost_report.page.map_rows", lambda *_: [])


@pytest.fixture
def rows(monkeypatch, no_other_pictures):
    """Rows of every grid of cases, collected instead of drawn."""
    drawn = []

    def draw(rows):
        drawn.append(rows)
        return []

    monkeypatch.setattr(case_pictures, "picture_grid", draw)
    return drawn


def case_report(frozen, **options):
    result = report.run(report_config(frozen, "grid", **{"cases": 4, **options}))
    return json.loads(Path(result.json).read_text()), Path(result.html).read_text()


def test_the_page_shows_cases_of_both_students(frozen, swept, monkeypatch):
    monkeypatch.chdir(swept)

    values, html = case_report(frozen, case_shift=3)

    page = Page(html)
    assert page.open == []
    section = html[html.index(">Case by case</h2>") : html.index(">Training</h2>")]
    regions = [r["aria-label"] for r in page.all("div") if r.get("class") == "scroll tiles"]
    assert re.findall("<h3>Split (.*)</h3>", section) == SPLITS
    for title in ("e2kd right, kd wrong", "kd right, e2kd wrong", "e2kd and kd agree"):
        assert section.count(f"<b>{title}</b>") == 2
    shown = [label for label in regions if label.startswith("Split ")]
    kinds = {(case["split"], case["kind"]) for case in values["cases"]}
    # One more per split, of moved images.
    assert len(shown) == len(kinds) + len({split for split, _ in kinds})
    assert "http:" not in re.sub('src="data:[^"]*"', "", html)  # self-contained
    index = {row["key"]: row for row in index_table(frozen.store).to_pylist()}
    for case in values["cases"]:
        assert index[case["key"]]["split"] == case["split"]
        assert str(index[case["key"]]["label"]) == case["class"]


def test_a_case_has_what_its_row_of_the_table_says(frozen, swept, monkeypatch, rows):
    monkeypatch.chdir(swept)
    values, _ = case_report(frozen)

    runs = {
        row["variant"]: RUNS / row["run"] / "evaluate" / RECORDS_NAME
        for row in read_sweep()["runs"]
    }
    tables = {variant: pd.read_parquet(path).set_index("key") for variant, path in runs.items()}
    cases = iter(values["cases"])
    for image, teacher, *students in rows:
        assert [row.title for row in (image, teacher, *students)] == [
            "image",
            "teacher",
            "kd",
            "e2kd",
        ]
        for column, case in zip(range(len(image.pictures)), cases, strict=False):
            assert image.captions[column] == case["class"]
            assert image.notes[column] == f"{case['key']}\ngroup {case['group']}"
            for student in students:
                row = tables[student.title].loc[case["key"]]
                assert student.captions[column] == str(row.predictions[0])
                assert student.wrong[column] != row.correct
                place = row.classes.tolist().index(row.labels[0])
                epg, iou = (f"{100 * row[name][place]:.0f}" for name in ("epg", "iou"))
                assert student.notes[column].splitlines()[0] == f"EPG {epg}  IoU {iou}"
                if row.target_classes[0] == row.labels[0]:
                    assert student.notes[column].endswith(f"cosine {row.map_cosine[place]:.2f}")
                    assert teacher.notes[column] == f"EPG {100 * row.teacher_epg[place]:.0f}"
                else:
                    assert "cosine" not in student.notes[column]
                    assert teacher.notes[column] == f"map of {row.target_classes[0]}"
    assert next(cases, None) is None


def test_the_box_of_the_class_is_drawn_around_its_pixels(frozen, swept, monkeypatch, rows):
    monkeypatch.chdir(swept)
    values, _ = case_report(frozen)
    boxes = {row["key"]: row["boxes"] for row in index_table(frozen.store).to_pylist()}
    cases = iter(values["cases"])

    for drawn in rows:
        for column, case in zip(range(len(drawn[0].pictures)), cases, strict=False):
            (box,) = boxes[case["key"]]
            x0, y0, x1, y1 = (round((box[c] + 1) * 8) for c in ("x0", "y0", "x1", "y1"))
            edge = np.zeros((16, 16), bool)
            edge[y0:y1, x0:x1] = True
            edge[y0 + 1 : y1 - 1, x0 + 1 : x1 - 1] = False
            for row in drawn:
                green = (row.pictures[column] == [0.0, 0.65, 0.2]).all(axis=2)
                assert (green == edge).all()


def test_the_first_cases_are_shown_moved(frozen, swept, monkeypatch, rows):
    monkeypatch.chdir(swept)

    case_report(frozen, case_shift=3)

    moved = [grid for grid in rows if len(grid) == 7]
    assert len(moved) == len(SPLITS)
    for image, shifted, teacher, *students in moved:
        assert [row.title for row in students] == ["kd", "kd, moved", "e2kd", "e2kd, moved"]
        assert (shifted.title, teacher.title) == ("moved by 3", "teacher")
        assert all(note.startswith("cosine ") for note in students[1].notes + students[3].notes)
        for before, after in zip(image.pictures, shifted.pictures, strict=True):
            assert (after[3:, 3:] == before[:-3, :-3]).all()
            assert not after[:3].any()
    with pytest.raises(ConfigError, match=r"report\.case_shift=16 moves all of .*16x16"):
        case_report(frozen, case_shift=16)


def test_a_run_without_the_table_has_a_page_without_cases(
    frozen, swept, monkeypatch, caplog, no_other_pictures
):
    monkeypatch.chdir(swept)
    table = RUNS / read_sweep()["runs"][0]["run"] / "evaluate" / RECORDS_NAME
    kept = table.read_bytes()
    table.unlink()
    caplog.set_level(logging.INFO, "permafrost.report")

    values, html = case_report(frozen)

    table.write_bytes(kept)
    (line,) = [r.getMessage() for r in caplog.records if "no cases" in r.getMessage()]
    assert (
        f"{table} does not exist; delete the folder {table.parent} and run permafrost sweep again"
        in line
    )
    assert "Case by case" not in html
    assert "cases" not in values
    assert "Case by case" not in case_report(frozen, cases=0)[1]


def test_students_that_were_evaluated_otherwise_are_not_compared(
    frozen, swept, monkeypatch, caplog, no_other_pictures
):
    monkeypatch.chdir(swept)
    config = RUNS / read_sweep()["runs"][0]["run"] / "evaluate" / "config.yaml"
    kept = config.read_text()
    text, _, _ = kept.rpartition("# sha256: ")
    write_config(config, text.replace("iou_threshold: 0.05", "iou_threshold: 0.5"))
    caplog.set_level(logging.INFO, "permafrost.report")

    _, html = case_report(frozen)

    config.write_text(kept)
    assert "were not evaluated in the same way" in caplog.text
    assert "Case by case" not in html


HOSTILE = (
    r"cost $5 \frac{ $", "<b>bold</b>", "x" * 200, "two\nlines", '"quoted" & \'so\'',
    "\u05e9\u05dc\u05d5\u05dd", "</script><script>alert(1)</script>", "{{ 7 * 7 }}", "$", "_",
)  # fmt: skip


@pytest.mark.slow
def test_any_class_name_is_shown_as_it_is(frozen, swept, monkeypatch):
    monkeypatch.chdir(swept)
    read = read_store_manifest
    monkeypatch.setattr(
        "permafrost.store.reader.read_store_manifest",
        lambda folder: replace(read(folder), classes=HOSTILE),
    )

    values, html = case_report(frozen, contact_records=8)

    page = Page(html)
    assert page.open == []
    assert len(page.all("script")) == 1
    assert page.all("b") == Page(html.replace("<b>bold</b>", "")).all("b")
    captions = {span["title"] for span in page.all("span") if span.get("dir") and span.get("title")}
    assert {case["class"] for case in values["cases"]} <= captions <= set(HOSTILE)


@pytest.mark.slow
def test_names_that_no_encoder_takes_or_of_a_megabyte_are_shown_in_part(frozen, swept, monkeypatch):
    monkeypatch.chdir(swept)
    read = read_store_manifest
    names = tuple(f"{digit}\udcff{'x' * 2**20}" for digit in range(10))
    monkeypatch.setattr(
        "permafrost.store.reader.read_store_manifest",
        lambda folder: replace(read(folder), classes=names),
    )

    values, html = case_report(frozen, contact_records=8, title="Long names")

    assert len(html.encode()) < 700_000
    assert len(json.dumps(values)) < 100_000
    assert r"\udcffxxx" in html
    assert "(1,048,578 characters)" in html


@pytest.fixture(scope="module")
def first(frozen, swept):
    """Values and page of a report with a few pictures of every kind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(swept)
        return case_report(frozen, contact_records=8, title="Twice")


@pytest.mark.slow
def test_the_same_inputs_give_the_same_bytes(frozen, swept, first, monkeypatch):
    monkeypatch.chdir(swept)

    again = case_report(frozen, contact_records=8, title="Twice")

    assert again == first
    assert not re.search(r"Written \d{4}", first[1])


@pytest.mark.slow
def test_a_page_with_the_default_pictures_is_small(frozen, swept, monkeypatch):
    monkeypatch.chdir(swept)

    _, html = case_report(frozen, cases=8, contact_records=8)

    assert html.count('<img src="data:image/webp;base64,') > 60
    assert len(html.encode()) < 500_000


@pytest.mark.slow
def test_maps_cases_and_classes_stand_between_results_and_training(swept, first, monkeypatch):
    monkeypatch.chdir(swept)
    values, html = first

    headings = [heading["id"] for heading in Page(html).all("h2")]
    assert headings[:6] == ["summary", "results", "maps", "cases", "by_class", "training"]
    rows = pd.read_parquet(RUNS / read_sweep()["runs"][0]["run"] / "evaluate" / RECORDS_NAME)
    rows = rows[rows.split == "test"]
    right = rows.correct.groupby(rows.labels.str[0]).mean()
    accuracies = values["classes"]["accuracy"]["kd"]
    assert {label: accuracies[label] for label in right.index} == right.to_dict()


@pytest.mark.slow
def test_all_tiles_have_one_displayed_size(first):
    _, html = first

    images = [i for i in Page(html).all("img") if i["src"].startswith("data:image/webp")]
    assert len({int(i["width"]) for i in images}) > 1  # maps of 16 pixels, views of 112
    (style,) = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    assert re.findall(r"--tile: clamp\(\d+px, [^,]+, (\d+)px\)", style) == [str(DISPLAYED_PIXELS)]
    assert re.search(r"\.zoom img \{ [^}]*width: var\(--tile\)", style)
    assert html.count('<button type="button" class="zoom"><img') == len(images)


NAMES = ("kd", "e2kd")


def row(key, correct, prediction=None, cosine=None, **columns):
    """Row of the table of a record with the single label 3, which the teacher explains."""
    values = {"key": key, "labels": [3], "correct": correct, "predictions": [prediction]}
    return values | {"epg": [None], "classes": [3], "map_cosine": [cosine]} | columns


def chosen_cases(baseline, candidate, num_cases=8, **options):
    choice = choose_cases(baseline, candidate, NAMES, num_cases, **{"many": False} | options)
    return {
        kind.title: (kind.found, [(case.key, case.label) for case in kind.cases])
        for kind in choice.kinds
    }


def test_cases_are_shown_from_both_sides_and_begin_where_the_maps_differ_most():
    # key: (baseline correct, its prediction, its cosine), (candidate correct, ...)
    records = {
        "a": ((False, 1, 0.50), (True, 3, 0.60)),
        "b": ((False, 1, 0.25), (True, 3, 0.75)),
        "c": ((False, 1, None), (True, 3, 0.99)),  # without a map, so it comes last
        "d": ((True, 3, 0.50), (False, 2, 0.75)),
        "e": ((True, 3, 0.75), (False, 2, 0.50)),
        "f": ((True, 3, 0.75), (True, 3, 0.25)),
        "g": ((False, 1, 0.50), (False, 1, 0.75)),
        "h": ((False, 1, 0.50), (False, 2, 0.75)),  # both wrong, with different predictions
    }
    baseline, candidate = ([row(k, *v[n]) for k, v in records.items()] for n in (0, 1))

    shown = chosen_cases(baseline, candidate)

    assert shown == {
        "e2kd right, kd wrong": (3, [("b", 3), ("a", 3), ("c", 3)]),
        "kd right, e2kd wrong": (2, [("e", 3), ("d", 3)]),
        "e2kd and kd agree": (2, [("f", 3), ("g", 3)]),
    }
    assert chosen_cases(baseline[::-1], candidate[::-1]) == shown


@pytest.mark.parametrize(
    ("num_cases", "of_each"), [(1, [1, 0, 0]), (2, [1, 1, 0]), (4, [2, 1, 1]), (8, [4, 2, 2])]
)
def test_half_of_the_cases_speak_for_the_candidate(num_cases, of_each):
    truths = [(False, True), (True, False), (True, True)] * 6
    baseline, candidate = (
        [row(f"{n:02}", t[who], 3 if t[who] else 0, 0.5) for n, t in enumerate(truths)]
        for who in (0, 1)
    )

    shown = chosen_cases(baseline, candidate, num_cases)

    assert [len(cases) for _, cases in shown.values()] == of_each
    # The cases of a kind differ only in their keys.
    firsts = [
        [(f"{kind + 3 * n:02}", 3) for n in range(count)] for kind, count in enumerate(of_each)
    ]
    assert [cases for _, cases in shown.values()] == firsts


def test_without_a_teacher_s_maps_epg_orders_and_without_regions_the_keys():
    nothing = {"map_cosine": [None]}
    baseline = [row(key, False, 0, epg=[0.5], **nothing) for key in "ab"]
    better = [row(k, True, 3, epg=[e], **nothing) for k, e in zip("ab", (0.6, 0.7), strict=True)]
    blind = [row(key, True, 3, **nothing) for key in "ab"]

    assert chosen_cases(baseline, better)["e2kd right, kd wrong"][1] == [("b", 3), ("a", 3)]
    assert chosen_cases(baseline, blind)["e2kd right, kd wrong"][1] == [("a", 3), ("b", 3)]
    assert chosen_cases(baseline, blind)["e2kd and kd agree"] == (0, [])


def test_a_record_whose_label_is_not_known_is_no_case():
    assert chosen_cases([row("a", None, 1, 0.1)], [row("a", None, 1, 0.9)]) == {
        "e2kd right, kd wrong": (0, []),
        "kd right, e2kd wrong": (0, []),
        "e2kd and kd agree": (0, []),
    }


def test_of_many_labels_every_class_with_a_region_is_a_case():
    def many(key, labels, epg):
        classes = {"labels": labels, "classes": labels}
        return {"key": key, "epg": epg, "correct": False, "predictions": [], **classes}

    baseline = [
        many("a", [0, 2], [0.2, 0.5]),
        many("b", [1, 2], [0.5, None]),
        many("c", [0], [0.5]),
    ]
    candidate = [
        many("a", [0, 2], [0.4, 0.1]),
        many("b", [1, 2], [0.9, 0.9]),
        many("c", [0], [0.5]),
    ]

    shown = chosen_cases(baseline, candidate, 4, many=True)

    assert shown == {
        "EPG: e2kd above kd": (2, [("b", 1), ("a", 0)]),
        "EPG: kd above e2kd": (1, [("a", 2)]),
    }


def test_a_value_is_that_of_the_asked_class():
    values = row(
        "a", True, 3, labels=[3, 5], classes=[3, 5], epg=[0.1, None], map_cosine=[0.9, 0.7]
    )

    assert value_of(values, "epg", 3) == 0.1
    assert value_of(values, "epg", 5) is None
    assert value_of(values, "map_cosine", 3) == 0.9
    assert value_of(values, "map_cosine", 4) is None
