"""Views of a batch: images, and maps that are warped with them."""

import pytest
import torch
import torch.nn.functional as F

from permafrost.config.augment import OperationConfig
from permafrost.core.batches import StoredTargets, Targets
from permafrost.loading.geometry import (
    TargetRequest,
    canonical_from_view,
    fetch_points,
    view_images,
    view_targets,
)
from tests.support.geometry import (
    AFFINE,
    CROP,
    FLIP,
    cell_centers,
    draw,
    float_noise,
    frames_of_size,
    make_batch,
    matrix,
)


def stored_targets(maps, map_from_canonical=None, target_class=None, teacher="resnet"):
    """Targets with maps [B, E, A, h, w] of a teacher that saw the whole frame, unless map_from_canonical is given."""
    count = len(maps)
    if map_from_canonical is None:
        map_from_canonical = torch.eye(3)
    if target_class is None:
        target_class = torch.zeros(maps.shape[:2], dtype=torch.int64)
    return StoredTargets(
        teacher=teacher,
        logits=float_noise(count, 10),
        target_class=target_class,
        maps=maps,
        map_from_canonical=map_from_canonical.expand(count, 3, 3),
    )


def test_without_a_view_images_are_the_frames_over_255():
    frames = frames_of_size(4, (24, 40))

    images = view_images(make_batch(frames), (24, 40))

    assert images.dtype == torch.float32
    assert torch.equal(images, frames.float() / 255)


def test_without_a_view_a_smaller_input_is_the_whole_frame_fetched_between_its_pixels():
    frames = frames_of_size(4, (128, 128))

    images = view_images(make_batch(frames), (64, 64))

    expected = F.avg_pool2d(frames.float() / 255, 2)  # sampled midway between four pixels
    torch.testing.assert_close(images, expected, rtol=0, atol=2e-5)


def test_without_a_view_the_matrices_are_identities():
    assert torch.equal(
        canonical_from_view(make_batch(frames_of_size(3))), torch.eye(3).expand(3, 3, 3)
    )


def test_images_stay_between_zero_and_one():
    view = draw(CROP, FLIP, AFFINE, count=64, size=(32, 32))

    images = view_images(make_batch(frames_of_size(64), view), (32, 32))

    assert images.min() == 0  # outside the frame
    assert 0.9 < images.max() <= 1


@pytest.mark.parametrize(("kind", "axis"), [("horizontal_flip", -1), ("vertical_flip", -2)])
def test_a_flip_turns_the_image_and_its_maps_together(kind, axis):
    frames, maps = frames_of_size(4), float_noise(4, 2, 6, 8, 8)
    view = draw(OperationConfig(kind=kind, p=1.0), count=4, size=(32, 32))
    batch = make_batch(frames, view, (stored_targets(maps),))

    images, (targets,) = view_images(batch, (32, 32)), view_targets(batch, TargetRequest((8, 8)))

    assert torch.equal(images, frames.flip(axis).float() / 255)
    assert torch.equal(targets.maps, maps.flip(axis))


def test_an_image_and_its_map_of_the_same_coordinates_stay_equal_under_1000_crops_and_flips():
    x, y = (16 * torch.arange(16).expand(16, 16) for _ in range(2))
    frame = torch.stack([x, y.T, (x + y.T) // 2]).to(torch.uint8)
    frames = frame.expand(1000, 3, 16, 16)
    view = draw(CROP, FLIP, count=1000, size=(16, 16))
    batch = make_batch(frames, view, (stored_targets(frames[:, None] / 255),))

    images, (targets,) = view_images(batch, (16, 16)), view_targets(batch, TargetRequest((16, 16)))

    assert targets.maps.shape == (1000, 1, 3, 16, 16)
    torch.testing.assert_close(targets.maps[:, 0], images, rtol=0, atol=1e-6)
    # The sampled coordinate is the one of the matrix, clamped to the outermost pixel center.
    fetched = view[:, 0, :1] * cell_centers(16) + view[:, 0, 2:]
    expected = (8 * fetched + 7.5).clamp(0, 15) * 16 / 255
    torch.testing.assert_close(images[:, 0, 5], expected, rtol=0, atol=2e-5)


def test_a_map_does_not_depend_on_the_pixels():
    maps = float_noise(8, 1, 1, 7, 7)
    view = draw(CROP, FLIP, AFFINE, count=8, size=(32, 32))
    frames = frames_of_size(8)
    darker = (frames.float() * 0.5).to(torch.uint8)

    (original,) = view_targets(
        make_batch(frames, view, (stored_targets(maps),)), TargetRequest((7, 7))
    )
    (jittered,) = view_targets(
        make_batch(darker, view, (stored_targets(maps),)), TargetRequest((7, 7))
    )

    assert torch.equal(original.maps, jittered.maps)
    assert torch.equal(original.map_valid, jittered.map_valid)


def test_the_map_of_a_center_crop_is_zero_outside_what_its_teacher_saw():
    maps = torch.ones(2, 1, 1, 7, 7)
    stored = stored_targets(maps, map_from_canonical=matrix(256 / 224, 256 / 224)[0])

    (targets,) = view_targets(
        make_batch(frames_of_size(2), targets=(stored,)), TargetRequest((16, 16))
    )

    expected = torch.zeros(2, 1, 1, 16, 16)
    # 16 cells over 256 pixels: the crop cuts off 16 pixels, or one cell, on each side.
    expected[..., 1:-1, 1:-1] = 1
    torch.testing.assert_close(targets.maps, expected, rtol=0, atol=1e-6)


def test_a_view_is_applied_in_the_frame_and_not_in_the_center_crop_of_the_teacher():
    maps = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(1, 1, 1, 4, 4)
    stored = stored_targets(maps, map_from_canonical=matrix(2.0, 2.0)[0])
    left_half = matrix(0.5, 0.5, -0.5, 0.0)

    batch = make_batch(frames_of_size(1), left_half, (stored,))
    (targets,) = view_targets(batch, TargetRequest((4, 4)))

    expected = torch.tensor([0.0, 0.0, 1.0, 2.0]).expand(1, 1, 1, 4, 4)  # map x = view x - 1
    torch.testing.assert_close(targets.maps, expected, rtol=0, atol=1e-6)


def test_a_center_crop_map_follows_its_image_under_crop_and_flip():
    frames = frames_of_size(64)
    center = frames[:, None, :, 8:24, 8:24] / 255
    stored = stored_targets(center, map_from_canonical=matrix(2.0, 2.0)[0])
    view = draw(CROP, FLIP, count=64, size=(32, 32))
    batch = make_batch(frames, view, (stored,))

    images, (targets,) = view_images(batch, (64, 64)), view_targets(batch, TargetRequest((64, 64)))

    map_from_view = matrix(2.0, 2.0) @ view
    x, y = fetch_points(map_from_view, (64, 64))
    # Beyond the outermost pixel center the warp clamps.
    inside = torch.maximum(x.abs(), y.abs()) < 15 / 16
    outside = torch.maximum(x.abs(), y.abs()) > 1 + 1e-4
    moved = targets.maps[:, 0].movedim(1, -1)
    assert inside.any(dim=2).any(dim=1).sum() > 32
    assert moved[inside].min() >= 0
    assert moved[inside].mean() > 0.4
    torch.testing.assert_close(moved[inside], images.movedim(1, -1)[inside], rtol=0, atol=2e-5)
    assert moved[outside].abs().max() == 0


def test_a_map_is_invalid_where_it_is_zero_or_explains_no_class():
    left = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(4, 4)
    maps = torch.stack([left, torch.zeros(4, 4), left, left])[:, None, None]
    classes = torch.tensor([[3], [3], [-1], [0]])
    right_half = matrix(0.5, 1.0, 0.5, 0.0)
    view = torch.cat([matrix(), matrix(), matrix(), right_half])
    batch = make_batch(frames_of_size(4), view, (stored_targets(maps, target_class=classes),))

    (targets,) = view_targets(batch, TargetRequest((4, 4)))

    assert targets.map_valid.tolist() == [[True], [False], [False], [False]]


def test_validity_is_told_apart_for_each_target_class():
    maps = torch.zeros(1, 3, 2, 4, 4)
    maps[0, 0, 1] = -1  # one nonzero channel makes a map valid, even if it is negative
    maps[0, 2] = 1
    classes = torch.tensor([[4, 2, -1]])
    batch = make_batch(frames_of_size(1), targets=(stored_targets(maps, target_class=classes),))

    (targets,) = view_targets(batch, TargetRequest((4, 4)))

    assert targets.map_valid.tolist() == [[True, False, False]]


def test_logits_and_classes_pass_through_and_a_teacher_without_maps_has_none():
    with_maps = stored_targets(float_noise(2, 1, 1, 7, 7), teacher="first")
    without = StoredTargets(teacher="second", logits=float_noise(2, 5))
    view = draw(CROP, count=2, size=(32, 32))

    first, second = view_targets(
        make_batch(frames_of_size(2), view, (with_maps, without)), TargetRequest((7, 7))
    )

    assert (first.teacher, second.teacher) == ("first", "second")
    assert torch.equal(first.logits, with_maps.logits)
    assert torch.equal(first.target_class, with_maps.target_class)
    assert torch.equal(second.logits, without.logits)
    assert type(second) is Targets


def test_targets_without_maps_keep_their_logits():
    stored = stored_targets(float_noise(2, 1, 1, 7, 7))

    (targets,) = view_targets(
        make_batch(frames_of_size(2), targets=(stored,)), TargetRequest((7, 7), with_maps=False)
    )

    assert type(targets) is Targets
    assert torch.equal(targets.logits, stored.logits)


def test_the_targets_of_a_record_do_not_depend_on_the_rest_of_its_batch():
    frames, maps = frames_of_size(16), float_noise(16, 1, 6, 7, 7)
    center_crop = matrix(256 / 224, 256 / 224)[0]
    view = draw(CROP, FLIP, AFFINE, count=16, size=(32, 32))
    whole = make_batch(frames, view, (stored_targets(maps, center_crop),))

    (together,) = view_targets(whole, TargetRequest((7, 7)))
    one_by_one = []
    for row in range(16):
        stored = stored_targets(maps[[row]], center_crop)
        one_by_one += view_targets(
            make_batch(frames[[row]], view[[row]], (stored,)), TargetRequest((7, 7))
        )

    assert torch.equal(torch.cat([targets.maps for targets in one_by_one]), together.maps)


def test_the_shuffled_control_gives_each_record_the_map_of_its_neighbor():
    maps = float_noise(4, 1, 2, 7, 7)
    maps[1] = 0
    view = draw(CROP, FLIP, count=4, size=(32, 32))
    batch = make_batch(frames_of_size(4), view, (stored_targets(maps),))

    (own,) = view_targets(batch, TargetRequest((7, 7)))
    (shuffled,) = view_targets(batch, TargetRequest((7, 7), map_control="shuffled"))

    assert torch.equal(shuffled.maps, own.maps[[3, 0, 1, 2]])
    assert own.map_valid.tolist() == [[True], [False], [True], [True]]
    assert shuffled.map_valid.tolist() == [[True], [True], [False], [True]]
    assert torch.equal(shuffled.logits, own.logits)
    assert torch.equal(shuffled.target_class, own.target_class)


def test_the_unaugmented_control_leaves_the_map_where_it_was_while_the_image_moves():
    maps = float_noise(4, 1, 2, 7, 7)
    stored = stored_targets(maps, map_from_canonical=matrix(256 / 224, 256 / 224)[0])
    flip = draw(OperationConfig(kind="horizontal_flip", p=1.0), count=4, size=(32, 32))
    frames = frames_of_size(4)
    still, moving = make_batch(frames, targets=(stored,)), make_batch(frames, flip, (stored,))

    (unaugmented,) = view_targets(moving, TargetRequest((7, 7), map_control="unaugmented"))

    (expected,) = view_targets(still, TargetRequest((7, 7)))
    (augmented,) = view_targets(moving, TargetRequest((7, 7)))
    assert torch.equal(unaugmented.maps, expected.maps)
    assert not torch.equal(unaugmented.maps, augmented.maps)
