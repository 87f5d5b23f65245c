"""Shift-equivariance curve."""

from types import SimpleNamespace

import pytest
import torch

from permafrost.core.errors import ConfigError
from permafrost.evaluation.forward import EvaluatedModel
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.geometry import warp
from permafrost.loading.subset import rows_of_split
from permafrost.models.classifier import ModelOutput
from permafrost.models.providers import build_model, freeze
from permafrost_evaluators.shift import (
    check_shift,
    overlap_cosine,
    shift_curves,
    window,
    window_view,
)
from tests.support.stores import TINY_DATA

SIDE = 48


def frames(side=SIDE + 32, count=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)


class ExplainingModel:
    """Evaluated model whose map of an image is `explain` of it, for every class."""

    device = torch.device("cpu")
    input_size = (SIDE, SIDE)

    def __init__(self, explain):
        self.network = SimpleNamespace
        self.explain = explain

    def maps(self, output, target_class):
        return self.explain(output.features)[:, None]


@pytest.fixture
def curve(monkeypatch):
    monkeypatch.setattr(
        "permafrost_evaluators.shift.forward_to_explain",
        lambda model, images: ModelOutput(torch.zeros(len(images), 3), images, None),
    )
    monkeypatch.setattr("permafrost.loading.transfer.move_batch", lambda batch, device: batch)

    class Dataset:
        def in_picture(self, picture):
            assert picture is None  # whole frames
            return self

        def __len__(self):
            return 2

        def __getitems__(self, rows):
            return SimpleNamespace(inputs=frames()[rows])

    return lambda explain: shift_curves(
        ExplainingModel(explain), Dataset(), max_shift=32, records=2
    )["map"]


def test_a_map_of_each_pixel_alone_moves_along(curve):
    assert curve(lambda images: images.mean(dim=1, keepdim=True)) == pytest.approx(
        [1.0] * 33, abs=1e-9
    )


def test_a_network_of_patches_comes_back_at_multiples_of_their_side(curve):
    def first_row_of_each_patch(images):
        weight = torch.arange(SIDE) % 16 == 0
        return images.mean(dim=1, keepdim=True) * weight[:, None]

    cosines = curve(first_row_of_each_patch)

    assert [cosines[shift] for shift in (0, 16, 32)] == pytest.approx([1.0] * 3, abs=1e-9)
    assert max(c for shift, c in enumerate(cosines) if shift % 16) < 0.1


def test_a_window_moves_its_content_by_the_shift_exactly():
    images = frames()

    unmoved, moved = (window(images, (SIDE, SIDE), shift, 32) for shift in (0, 5))

    assert torch.equal(moved[..., 5:, 5:], unmoved[..., :-5, :-5])
    assert torch.equal(unmoved, images[..., 32:, 32:].float() / 255)


def test_a_frame_without_room_comes_in_black():
    images = frames(SIDE) // 2 + 100

    unmoved, moved = (window(images, (SIDE, SIDE), shift, 4) for shift in (0, 3))

    assert torch.equal(unmoved, images.float() / 255)
    assert torch.equal(moved[..., 3:, 3:], unmoved[..., :-3, :-3])
    assert not moved[..., :3, :].any()


def test_a_map_that_is_zero_where_both_windows_see_it_is_left_out():
    maps = torch.zeros(2, 1, 8, 8)
    maps[:, 0, 2, 2] = 1
    moved = torch.zeros(2, 1, 8, 8)
    moved[0, 0, 4, 4] = 3
    moved[1, 0, 0, 0] = 3  # outside the unmoved window

    cosine, valid = overlap_cosine(maps, moved, 2)

    assert valid.tolist() == [True, False]
    assert cosine[0] == pytest.approx(1.0)


def test_a_student_is_measured_on_its_store(frozen, tiny_teacher):
    rows = rows_of_split(frozen.store.index, "test")
    dataset = StoreDataset(frozen.store, rows)
    size = (TINY_DATA.image_size,) * 2
    model = EvaluatedModel(network=freeze(build_model(tiny_teacher, 10)), input_size=size)

    curve = shift_curves(model, dataset, max_shift=3, records=8)["map"]
    again = shift_curves(model, dataset, max_shift=3, records=8)["map"]

    assert curve[0] == pytest.approx(1.0)
    assert all(0 <= value < 1 for value in curve[1:])
    assert curve == again
    with pytest.raises(ConfigError, match=r"evaluate\.shift\.pixels=16"):
        check_shift("evaluate.shift.pixels", 16, size)


@pytest.mark.parametrize("side", [SIDE + 32, SIDE + 5, SIDE])
def test_the_unmoved_window_is_a_view_like_any_other(side):
    seen = frames(side)
    view = window_view((side, side), (SIDE, SIDE), max_shift=8).expand(2, 3, 3)

    fetched = warp(seen, view, (SIDE, SIDE)) / 255

    assert torch.allclose(fetched, window(seen, (SIDE, SIDE), 0, 8), atol=1e-4)
