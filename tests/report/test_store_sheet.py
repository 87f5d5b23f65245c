"""The picture of a store: its facts, its records and the histograms of a pass."""

import io

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image

from permafrost import open_store
from permafrost.config.compose import compose
from permafrost.config.verbs import build_verb_config
from permafrost.core.errors import ConfigError
from permafrost_report import store_sheet
from permafrost_report.store_sheet import _measure
from tests.support.growing import TEACHER, Pictures, growing_options
from tests.support.verbs import precompute, show


def test_a_sheet_has_the_facts_and_as_many_records_as_asked(frozen):
    store = open_store(frozen.store.path)
    (teacher,) = store.open_passes()

    sheet = store.show("train", records=10)

    shown = [axis for axis in sheet.figure.axes if axis.images]
    assert len(shown) == 20  # an image and a map each
    assert sheet.facts["pass"] == teacher.name
    assert "train 40" in sheet.sheets["data"]["records"].value
    assert sheet.sheets["teacher"]["input"].value == "whole image at 16x16, bilinear"
    titles = [axis.get_title(loc="left") for axis in sheet.figure.axes if axis.patches]
    assert ["(40 records)" in title for title in titles] == [True, True]


def test_histograms_are_of_the_stored_logits_and_maps(frozen):
    store = open_store(frozen.store.path)
    (teacher,) = store.open_passes()
    arrays = store.arrays("train", fields=["logits", "map"])
    probability = np.exp(arrays["logits"])
    probability /= probability.sum(axis=1, keepdims=True)
    maps = np.abs(arrays["map"][:, 0]).reshape(40, -1)

    sample = _measure(store, teacher, "train")

    np.testing.assert_allclose(sample.confidence, probability.max(axis=1), rtol=1e-5)
    some = maps.max(axis=1) > 0
    np.testing.assert_allclose(
        sample.coverage, maps[some].mean(axis=1) / maps[some].max(axis=1), rtol=1e-4
    )


def test_titles_end_with_an_ellipsis_where_the_next_picture_begins(frozen, monkeypatch):
    names = ["i", "WWWWWWWWWWWWWWWW", "a long name of a class of many words", "x" * 300, "$a$"]
    monkeypatch.setattr(
        store_sheet, "readable_classes", lambda classes: (names * 2)[: len(classes)]
    )

    sheet = open_store(frozen.store.path).show("train", records=10)

    renderer = FigureCanvasAgg(sheet.figure).get_renderer()
    axes = [axis for axis in sheet.figure.axes if axis.images]
    titles = [next(text for text in axis.findobj(Text) if text.get_text()) for axis in axes]
    for axis, title in zip(axes, titles, strict=True):
        place = sheet.figure.transFigure.transform_bbox(axis.get_position(original=True))
        assert title.get_window_extent(renderer).x1 <= place.x1
    shown = {title.get_text() for title in titles}
    assert {"i", "$a$"} <= shown
    assert any(text.startswith("a long na") and text.endswith("…") for text in shown)
    assert any(text.startswith("says ") and text.endswith("…") for text in shown)


def test_a_pass_that_lacks_the_last_records_is_drawn_with_those_that_it_has(tmp_path):
    pictures = Pictures(tmp_path / "pictures")
    pictures.add_all(range(5))
    precompute.run(growing_options(pictures, tmp_path / "store", teacher=TEACHER))
    pictures.add_all("a")
    result = precompute.run(growing_options(pictures, tmp_path / "store", append=True))

    assert result.next == ""  # only the command of the pass would complete it
    facts = open_store(tmp_path / "store").show().facts
    assert facts["generations"] == "1 of 2"
    assert facts["shown"] == "train, 10 of 10 records"


def test_the_stage_writes_a_picture_that_can_be_opened(frozen, tmp_path):
    words = [f"store.path={frozen.store.path}", "show.records=3"]
    output = tmp_path / "store.png"

    result = show.run(build_verb_config("show", compose("show", [*words, f"show.output={output}"])))

    assert Image.open(io.BytesIO(output.read_bytes())).size[0] == 1800
    assert result.printed()["picture"] == str(output)
    with pytest.raises(ConfigError, match=r"show\.output=store\.txt must end with"):
        build_verb_config("show", compose("show", [*words, "show.output=store.txt"]))
