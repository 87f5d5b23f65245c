"""Pictures of maps in the report, and their tiles: one displayed size, small files, and any text."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from permafrost.evaluation.map_colors import contributions, overlays
from permafrost_report.pictures import (
    PictureRow,
    class_names,
    composite_on_white,
    draw_outline,
    map_rows,
    picture_grid,
    readable_classes,
)
from tests.support.html_page import pixels_of_uri


def test_contributions_are_red_for_the_class_blue_against_it_and_white_where_silent():
    maps = np.array([[[2.0, -2.0], [0.0, 1.0]]], np.float32)

    (picture,) = contributions(maps)

    assert picture[0, 0].tolist() == pytest.approx([1, 0, 0])
    assert picture[0, 1].tolist() == pytest.approx([0, 0, 1])
    assert picture[1, 0].tolist() == [1, 1, 1]
    assert picture[1, 1].tolist() == pytest.approx([1, 0.5, 0.5])


def test_one_strong_place_does_not_pale_the_others():
    maps = np.ones((1, 32, 32), np.float32)
    maps[0, 0, 0] = 1e6

    (picture,) = contributions(maps)

    assert picture[5, 5].tolist() == pytest.approx([1, 0, 0])


def test_a_zero_map_is_white_and_a_zero_overlay_the_pale_image():
    zero = np.zeros((1, 4, 4), np.float32)
    image = np.full((1, 8, 8, 3), 255, np.uint8)

    assert (contributions(zero)[0] == 1).all()
    assert (overlays(image, zero)[0] == 1).all()


def test_an_overlay_is_red_at_the_maps_highest_value_only():
    maps = np.zeros((1, 8, 8), np.float32)
    maps[0, 2, 5] = 7.0

    (picture,) = overlays(np.full((1, 8, 8, 3), 255, np.uint8), maps)

    assert picture[2, 5].tolist() == pytest.approx([0.88, 0.24, 0.28])
    assert picture[6, 1].tolist() == [1, 1, 1]


def test_a_transparent_color_is_the_page():
    colors = np.array([[[[255, 0, 0, 0], [255, 0, 0, 255]]]], np.uint8)

    (picture,) = composite_on_white(colors)

    assert picture[0, 0].tolist() == [1, 1, 1]
    assert picture[0, 1].tolist() == [1, 0, 0]


@pytest.mark.parametrize("colored", [False, True])
def test_a_b_cos_network_has_a_row_of_colors_more(colored, monkeypatch):
    shown = []
    monkeypatch.setattr(
        "permafrost_report.pictures.picture_grid", lambda rows: shown.extend(rows) or []
    )
    variant = {
        "frames": torch.zeros(3, 3, 8, 8, dtype=torch.uint8),
        "labels": torch.tensor([0, 1, -1]),  # the last is not known
        "predictions": torch.tensor([0, 0, 1]),
        "classes": torch.tensor([0, 1, 1]),
        "teacher_classes": torch.tensor([0, 0, 1]),
        "maps": torch.rand(3, 8, 8),
        "teacher_maps": torch.rand(3, 4, 4),
        "teacher_predictions": torch.tensor([7, 0, 0]),  # class 7 exists only for the teacher
    }
    if colored:
        variant["colors"] = torch.zeros(3, 8, 8, 4, dtype=torch.uint8)

    map_rows({"kd": variant}, ["cat", "dog"])

    assert [row.title for row in shown] == ["image", "teacher", "kd"] + ["colors"] * colored
    assert shown[1].captions == ["7", "0", "0"]
    assert shown[1].notes == ["", "map of cat", "map of dog"]
    assert shown[2].captions == ["cat", "cat", "dog"]
    assert shown[2].wrong == [False, True, False]
    assert shown[2].notes == ["", "", ""]


def test_records_are_called_by_their_label_or_by_all_of_them():
    classes = ["cat", "dog", "owl"]

    assert class_names(np.array([1, -1, 0]), classes) == ["dog", "", "cat"]
    # Classes of a teacher that the data lacks.
    assert class_names(np.array([1, 7]), classes) == ["1", "7"]
    many = np.array([[1, 0, 1], [0, 0, 0]], np.float32)
    assert class_names(many, classes) == ["cat\nowl", ""]


def test_a_prediction_of_many_labels_is_wrong_where_one_of_them_is(monkeypatch):
    shown = []
    monkeypatch.setattr(
        "permafrost_report.pictures.picture_grid", lambda rows: shown.extend(rows) or []
    )
    variant = {
        "frames": torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
        "labels": torch.tensor([[1.0, 1.0], [0.0, 1.0]]),
        "predictions": torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
        "classes": torch.tensor([0, 1]),
        "maps": torch.rand(2, 8, 8),
    }

    map_rows({"kd": variant}, ["cat", "dog"])

    assert shown[0].captions == ["cat\ndog", "dog"]
    assert (shown[1].captions, shown[1].wrong) == (["cat", "dog"], [True, False])
    assert shown[1].notes == ["map of cat", ""]


def test_a_region_s_edge_is_drawn_on_its_own_pixels_at_the_picture_s_size():
    region = np.zeros((8, 8), bool)
    region[2:6, 1:8] = True
    image = np.full((16, 16, 3), 51, np.uint8)

    green = (draw_outline(image, region) == [0.0, 0.65, 0.2]).all(axis=2)

    edge = np.zeros((16, 16), bool)
    edge[4:12, 2:16] = True
    edge[5:11, 3:15] = False
    assert (green == edge).all()
    assert np.allclose(draw_outline(image, region)[~edge], 0.2)
    assert np.allclose(draw_outline(image, np.zeros((8, 8), bool)), 0.2)


def test_a_wordnet_id_has_the_name_of_its_noun_and_other_classes_are_as_they_are():
    named = readable_classes(["n01443537", "n02123045", "n99999999", "dog"])

    assert named == ["goldfish (n01443537)", "tabby (n02123045)", "n99999999", "dog"]
    assert readable_classes(["0", "1"]) == ["0", "1"]


NAMES = [r"cost $5 \frac{ $", '<b>"bold"</b>', "x" * 200, "two\nlines", "\u05e9\u05dc\u05d5\u05dd"]


def noise(side: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def test_a_small_picture_keeps_every_pixel():
    picture = noise(32)

    (row,) = picture_grid([PictureRow("image", [picture])])

    (tile,) = row.tiles
    assert (pixels_of_uri(tile.source) == picture).all()
    assert (tile.width, tile.height, tile.is_enlarged) == (32, 32, True)


@pytest.mark.parametrize(("side", "stored"), [(112, 224), (224, 224), (700, 256)])
def test_a_large_picture_is_compressed_and_no_larger_than_its_enlarged_form(side, stored):
    ramp = np.linspace(0, 1, side)
    picture = np.stack(np.broadcast_arrays(ramp[:, None], ramp, 0.5), axis=2)

    (row,) = picture_grid([PictureRow("image", [picture])])

    (tile,) = row.tiles
    found = pixels_of_uri(tile.source)
    assert max(found.shape) in (stored, side if side < stored else stored)
    assert len(tile.source) < 20_000
    corner = found[-1, 0] / 255
    assert np.abs(corner - [1, 0, 0.5]).max() < 0.05


def test_a_picture_has_the_aspect_ratio_of_its_record():
    wide, tall = picture_grid([PictureRow("image", [noise(112), noise(112)], aspects=[2.0, 0.5])])[
        0
    ].tiles

    assert wide.width == 2 * wide.height
    assert tall.height == 2 * tall.width


def test_a_tile_says_what_it_shows_and_a_wrong_prediction():
    image = PictureRow("image", [noise(8)] * 2, ["cat", "dog"])
    student = PictureRow(
        "kd", [noise(8)] * 2, ["cat", "cat"], wrong=[False, True], notes=["EPG 50", ""]
    )

    first, second = picture_grid([image, student])

    assert [tile.alt for tile in first.tiles] == ["image, cat", "image, dog"]
    assert [tile.alt for tile in second.tiles] == ["kd, cat", "kd, dog, predicted cat"]
    assert [tile.is_wrong for tile in second.tiles] == [False, True]
    assert second.tiles[0].note == "EPG 50"


@pytest.mark.parametrize("name", NAMES)
def test_any_class_name_is_the_caption_as_it_is(name):
    (row,) = picture_grid([PictureRow("image", [noise(8)], [name])])

    assert row.tiles[0].caption == name
    assert row.tiles[0].alt == f"image, {' '.join(name.split())}"
