"""Draws of views: ranges, seeds and schedules."""

import kornia.augmentation as K
import pytest
import torch

from permafrost.config.augment import AugmentOptions, OperationConfig
from permafrost.core.digests import derive_seed
from permafrost.core.errors import ConfigError
from permafrost.loading.random_views import VIEW_BLOCK, ViewSchedule, build_operations
from tests.support.geometry import AFFINE, CROP, FLIP, PAD_CROP, ROTATION, draw, draw_views
from tests.support.view_matrices import matrices_of


@pytest.mark.parametrize(
    "kind", ["pad_crop", "resized_crop", "horizontal_flip", "vertical_flip", "rotation", "affine"]
)
def test_every_kind_of_operation_draws_with_its_default_options(kind):
    views = draw(OperationConfig(kind=kind), count=8, size=(32, 48))

    assert views.shape == (8, 3, 3)
    assert torch.linalg.det(views).abs().min() > 0.01


@pytest.mark.parametrize(
    "operation",
    [
        CROP,
        FLIP,
        OperationConfig(kind="vertical_flip", p=0.5),
        PAD_CROP,
        ROTATION,
        AFFINE,
        OperationConfig(kind="affine", p=1.0, scale=(0.5, 2.0)),
    ],
)
def test_every_operation_draws_anew_for_each_record(operation):
    views = draw(operation, count=64, size=(32, 48))

    assert torch.isfinite(views).all()
    assert len(torch.unique(views, dim=0)) >= 2
    assert torch.equal(views[:, 2], torch.tensor([0.0, 0.0, 1.0]).expand(64, 3))


def test_a_flip_with_p_half_turns_about_half_of_the_records():
    views = draw(FLIP, count=1024)

    turned = views[:, 0, 0] < 0
    assert torch.equal(views.abs(), torch.eye(3).expand(1024, 3, 3))
    assert 448 <= turned.sum() <= 576  # 512 plus or minus four standard deviations of 16


@pytest.mark.parametrize("kind", ["horizontal_flip", "vertical_flip", "rotation", "affine"])
def test_an_operation_with_p_zero_moves_nothing(kind):
    operation = OperationConfig(kind=kind, p=0.0, degrees=30.0)

    assert torch.equal(draw(operation, count=8), torch.eye(3).expand(8, 3, 3))


def test_a_padded_crop_moves_by_whole_pixels_up_to_its_padding():
    views = draw(PAD_CROP, count=512, size=(32, 32))

    pixels = views[:, :2, 2] * 16  # the frame has 32 pixels and a width of 2
    assert torch.equal(views[:, :2, :2], torch.eye(2).expand(512, 2, 2))
    assert sorted(pixels.unique().tolist()) == [-4, -3, -2, -1, 0, 1, 2, 3, 4]


def test_crops_keep_to_their_range_of_area_and_lie_inside_the_frame():
    crop = OperationConfig(kind="resized_crop", scale=(0.25, 0.5))
    views = draw(crop, count=512, size=(96, 128))

    area = views[:, 0, 0] * views[:, 1, 1]
    extent = views[:, :2, 2].abs() + torch.stack([views[:, 0, 0], views[:, 1, 1]], dim=1)
    pixel = 1 / 40  # boxes consist of whole pixels, and their sides are at least 40 pixels long
    assert area.min() >= 0.25 * (1 - pixel) ** 2
    assert area.max() <= 0.5 * (1 + pixel) ** 2
    assert extent.max() <= 1 + 1e-6


def test_a_crop_of_an_eighth_of_the_area_twice_as_wide_as_high_is_half_as_wide_as_the_frame():
    crop = OperationConfig(kind="resized_crop", scale=(0.125, 0.125), ratio=(2.0, 2.0))

    views = draw(crop, count=16, size=(64, 64))  # 32 x 16 = 512 of 4096 pixels

    expected = torch.tensor([[0.5, 0.0], [0.0, 0.25]]).expand(16, 2, 2)
    torch.testing.assert_close(views[:, :2, :2], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "row", "column", "low", "high"),
    [
        ({"degrees": 30.0}, 0, 1, -0.5, 0.5),  # sin 30
        ({"shear": 45.0}, 0, 1, -1.0, 1.0),  # tan 45
        ({"translate": (0.1, 0.2)}, 0, 2, -0.2, 0.2),  # the frame has a width of 2
        ({"translate": (0.1, 0.2)}, 1, 2, -0.4, 0.4),
        ({"scale": (0.5, 2.0)}, 1, 1, 0.5, 2.0),
    ],
)
def test_an_affine_map_fills_the_range_of_its_options(options, row, column, low, high):
    operation = OperationConfig(kind="affine", p=1.0, **options)

    entries = draw(operation, count=1024)[:, row, column]

    assert low - 1e-6 <= entries.min() <= low + 0.05 * (high - low)
    assert high - 0.05 * (high - low) <= entries.max() <= high + 1e-6


def test_equal_seeds_draw_equal_views_and_other_seeds_others():
    first = draw(CROP, FLIP, AFFINE, count=32, seed=1)
    again = draw(CROP, FLIP, AFFINE, count=32, seed=1)
    other = draw(CROP, FLIP, AFFINE, count=32, seed=2)

    assert torch.equal(first, again)
    assert (first - other).abs().amax(dim=(1, 2)).min() > 0


def test_drawing_leaves_the_global_generator_where_it_was():
    before = torch.get_rng_state()

    draw(CROP, FLIP, AFFINE, count=32, seed=1)

    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "operation",
    [
        K.RandomResizedCrop((32, 32), p=0.5, align_corners=False),
        K.RandomCrop((32, 32), padding=4, p=0.5),
        K.RandomHorizontalFlip(same_on_batch=True),
    ],
)
def test_an_operation_that_draws_once_per_batch_is_refused(operation):
    with pytest.raises(ConfigError, match=f"{type(operation).__name__} must draw per record"):
        draw_views([operation], 4, (32, 32), seed=0)


def test_torch_ignores_the_seed_bits_above_32_and_derived_seeds_have_none():
    operations = build_operations(AugmentOptions(operations=(CROP,)), (32, 32))

    low, high = (draw_views(operations, 4, (32, 32), seed) for seed in (1, 1 + 2**32))
    seeds = {derive_seed(0, "views", epoch, block) for epoch in range(100) for block in range(100)}

    assert torch.equal(low, high)
    assert len(seeds) == 10_000
    assert 0 <= min(seeds) < max(seeds) < 2**32


def test_derived_seeds_tell_their_parts_apart():
    seeds = {derive_seed(*parts) for parts in ((1, 23), (12, 3), (123,), ("1", 23), (23, 1))}

    assert len(seeds) == 5


def small_schedule(*operations, seed=0):
    return ViewSchedule(AugmentOptions(operations=operations), (32, 32), seed)


def test_a_schedule_gives_a_position_the_same_view_whatever_the_batch():
    whole = matrices_of(small_schedule(CROP, FLIP), 3, 0, torch.ones(2048))

    assert whole.shape == (2048, 3, 3)
    assert whole.dtype == torch.float32
    views = small_schedule(CROP, FLIP)  # a new schedule, queried out of order
    assert torch.equal(matrices_of(views, 3, 1000, torch.ones(100)), whole[1000:1100])
    assert torch.equal(matrices_of(views, 3, 0, torch.ones(1)), whole[:1])
    assert torch.equal(
        matrices_of(views, 3, VIEW_BLOCK, torch.ones(64)), whole[VIEW_BLOCK : VIEW_BLOCK + 64]
    )
    assert torch.equal(
        matrices_of(views, 3, VIEW_BLOCK - 1, torch.ones(1)), whole[VIEW_BLOCK - 1 : VIEW_BLOCK]
    )
    assert torch.equal(matrices_of(views, 3, 100, torch.ones(1948)), whole[100:])


def test_a_schedule_returns_to_a_view_after_many_other_blocks():
    views = small_schedule(CROP, FLIP)
    first = matrices_of(views, 0, 0, torch.ones(8))

    for epoch in range(1, 7):
        matrices_of(views, epoch, 0, torch.ones(8))

    assert torch.equal(matrices_of(views, 0, 0, torch.ones(8)), first)


def test_a_schedule_draws_anew_for_each_epoch_seed_and_block():
    base = matrices_of(small_schedule(CROP), 0, 0, torch.ones(VIEW_BLOCK))

    next_epoch = matrices_of(small_schedule(CROP), 1, 0, torch.ones(VIEW_BLOCK))
    other_seed = matrices_of(small_schedule(CROP, seed=1), 0, 0, torch.ones(VIEW_BLOCK))
    next_block = matrices_of(small_schedule(CROP), 0, VIEW_BLOCK, torch.ones(VIEW_BLOCK))

    for other in (next_epoch, other_seed, next_block):
        assert (other != base).any(dim=2).any(dim=1).float().mean() > 0.99


def test_a_caller_that_overwrites_its_views_does_not_change_the_schedule():
    views = small_schedule(CROP)
    first = matrices_of(views, 0, 0, torch.ones(8))
    kept = first.clone()

    first.zero_()

    assert torch.equal(matrices_of(views, 0, 0, torch.ones(8)), kept)


def test_a_schedule_without_operations_has_no_views():
    assert matrices_of(small_schedule(), 0, 0, torch.ones(64)) is None
