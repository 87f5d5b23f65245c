"""Tiles of the page: one displayed size, small files, and any text."""

from __future__ import annotations

import numpy as np
import pytest

from permafrost_report.pictures import PictureRow, picture_grid
from tests.support.html_page import pixels_of_uri

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
