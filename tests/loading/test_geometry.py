"""Views of a batch: images and maps that one matrix per record warps, against Kornia, torchvision and closed forms."""

import copy
import math

import kornia.augmentation as K
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from kornia.geometry.transform import homography_warp

from permafrost.config.augment import AugmentOptions, OperationConfig
from permafrost.core.batches import StoredTargets, Targets
from permafrost.loading import geometry
from permafrost.loading.geometry import (
    TargetRequest,
    canonical_from_view,
    covered_share,
    downscale,
    fetch_points,
    view_images,
    view_targets,
    warp,
)
from permafrost.loading.random_views import build_operations
from tests.support.geometry import (
    AFFINE,
    CROP,
    FLIP,
    PAD_CROP,
    ROTATION,
    cell_centers,
    draw,
    draw_views,
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


def smooth_images(count, size, channels=3, max_cycles=2.0):
    """Images in [0, 1]: sums of four sines of at most `max_cycles` cycles per half frame along each axis."""
    generator = torch.Generator().manual_seed(0)
    x_cycles, y_cycles, phase = (
        torch.empty(count, channels, 1, 1, 4).uniform_(-1, 1, generator=generator) for _ in range(3)
    )
    y, x = (cell_centers(n)[:, None] for n in size)
    waves = max_cycles / 2 * (x_cycles * x + y_cycles * y[:, None]) + phase
    return 0.5 + torch.sin(2 * math.pi * waves).sum(dim=-1) / 8


def coordinate_maps(size):
    """Maps [1, 2, height, width] of the normalized coordinates x and y."""
    y, x = (cell_centers(n) for n in size)
    return torch.stack([x.expand(size), y[:, None].expand(size)])[None]


def map_cosines(a, b):
    return F.cosine_similarity(a.double().flatten(1), b.double().flatten(1))


def replay_parameters(operations, count, size, seed):
    """Random parameters of draw_views(operations, count, size, seed), by Kornia's names."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return [op.forward_parameters(torch.Size((count, 1, *size))) for op in operations]


def pixel_to_normalized(size):
    """Matrix f64 [3, 3] for pixel centers at integers: the center of pixel p of n is at (2 p + 1) / n - 1."""
    height, width = size
    rows = [[2 / width, 0, 1 / width - 1], [0, 2 / height, 1 / height - 1], [0, 0, 1]]
    return torch.tensor(rows, dtype=torch.float64)


def normalize(images):
    mean, std = (
        images.new_tensor(values).view(3, 1, 1)
        for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    return (images - mean) / std


def add_inverse(images):
    return torch.cat([images, 1 - images], dim=1)


@pytest.fixture
def restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("shape", "tolerance"), [((3, 96, 128), 2e-5), ((6, 7, 7), 1e-6), ((6, 8, 8), 1e-6)]
)
def test_the_identity_returns_what_it_is_given(shape, tolerance):
    source = float_noise(4, *shape)

    warped = warp(source, torch.eye(3).expand(4, 3, 3), shape[-2:])

    torch.testing.assert_close(warped, source, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("kind", "axis"), [("horizontal_flip", -1), ("vertical_flip", -2)])
@pytest.mark.parametrize("shape", [(3, 96, 128), (6, 7, 7), (6, 8, 8)])
def test_a_flip_mirrors_space_and_leaves_the_channels_in_order(kind, axis, shape):
    source = float_noise(4, *shape)
    view = draw(OperationConfig(kind=kind, p=1.0), count=4, size=shape[-2:])

    warped = warp(source, view, shape[-2:])

    torch.testing.assert_close(warped, source.flip(axis), rtol=0, atol=2e-5)


def test_flipping_twice_is_exactly_the_identity():
    flip = OperationConfig(kind="horizontal_flip", p=1.0)
    frames, maps = float_noise(4, 3, 32, 32), float_noise(4, 6, 8, 8)
    once, twice = draw(flip, count=4, size=(32, 32)), draw(flip, flip, count=4, size=(32, 32))

    assert torch.equal(twice, torch.eye(3).expand(4, 3, 3))
    assert torch.equal(warp(warp(frames, once, (32, 32)), once, (32, 32)), frames)
    assert torch.equal(warp(warp(maps, once, (8, 8)), once, (8, 8)), maps)


def test_a_crop_of_the_full_frame_at_its_own_size_is_exactly_the_frame():
    full = OperationConfig(kind="resized_crop", scale=(1.0, 1.0), ratio=(1.0, 1.0))
    frames = frames_of_size(4)

    view = draw(full, count=4, size=(32, 32))
    images = view_images(make_batch(frames, view), (32, 32))

    assert torch.equal(images, frames.float() / 255)


def test_a_fetch_halfway_between_two_texels_is_their_mean_and_half_a_cell_outside_counts_half():
    source = torch.tensor([[[[0.2, 0.6], [0.2, 0.6]]]])
    half_a_texel_to_the_right = matrix(shift_x=0.5)

    warped = warp(source, half_a_texel_to_the_right, (2, 2))

    expected = torch.tensor([[[[0.4, 0.3], [0.4, 0.3]]]])  # (0.2 + 0.6) / 2 and 0.6 * 1 / 2
    torch.testing.assert_close(warped, expected, rtol=0, atol=1e-6)


def test_fetch_points_are_cell_centers_in_the_source():
    x, y = fetch_points(matrix(0.5, 1.0, 0.5, 0.0), (2, 4))

    assert x[0, 0].tolist() == [0.125, 0.375, 0.625, 0.875]  # 0.5 * (-3/4, -1/4, 1/4, 3/4) + 0.5
    assert y[0, :, 0].tolist() == [-0.5, 0.5]


@pytest.mark.parametrize("image", [float_noise, smooth_images])
def test_crop_and_flip_equal_torchvision_on_the_same_boxes(image):
    count, size, view_size, rim = 24, (96, 128), (64, 64), 2
    images = float_noise(count, 3, *size) if image is float_noise else smooth_images(count, size)
    operations = build_operations(AugmentOptions(operations=(CROP, FLIP)), size)
    view = draw_views(operations, count, size, seed=7)
    crop, flip = replay_parameters(operations, count, size, seed=7)
    boxes = crop["src"].long()  # corners clockwise from the top left, including the last pixel

    warped = warp(images, view, view_size)
    expected = []
    for row in range(count):
        (left, top), (right, bottom) = boxes[row, 0].tolist(), boxes[row, 2].tolist()
        cropped = TF.resized_crop(
            images[row],
            top,
            left,
            bottom - top + 1,
            right - left + 1,
            list(view_size),
            antialias=False,
        )
        expected.append(cropped.flip(-1) if flip["batch_prob"][row] > 0.5 else cropped)

    assert 0 < (flip["batch_prob"] > 0.5).sum() < count
    difference = (warped - torch.stack(expected)).abs()
    # When upsampling, torchvision clamps half a pixel inside the box, whereas the warp reads beyond the box.
    assert difference[:, :, rim:-rim, rim:-rim].max() < 5e-5


def test_a_padded_crop_equals_kornia():
    operation = K.RandomCrop((32, 32), padding=4)
    images = float_noise(64, 3, 32, 32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        expected = operation(images)

    warped = warp(images, draw_views([operation], 64, (32, 32), seed=3), (32, 32))

    torch.testing.assert_close(warped, expected, rtol=0, atol=1e-5)


def test_a_perspective_warp_equals_kornia():
    generator = torch.Generator().manual_seed(0)
    jitter = torch.empty(16, 3, 3).uniform_(-0.1, 0.1, generator=generator)
    source_from_view = torch.diag(torch.tensor([0.5, 0.5, 1.0])) + jitter
    source_from_view[:, 2, 2] = 1  # coordinates stay within (0.5 + 3 * 0.1) / (1 - 2 * 0.1) = 1
    images = smooth_images(16, (96, 128))

    expected = homography_warp(
        images, source_from_view, (64, 80), padding_mode="border", align_corners=False
    )

    warped = warp(images, source_from_view, (64, 80))
    torch.testing.assert_close(warped, expected, rtol=0, atol=1e-4)


def test_drawn_views_invert_the_matrices_of_the_kornia_operations_in_sequence():
    size, crop_size, count = (96, 128), (64, 64), 64
    operations = [
        K.RandomResizedCrop(crop_size, scale=(0.3, 1.0), align_corners=False),
        K.RandomAffine(15.0, translate=(0.1, 0.1), scale=(0.8, 1.2), shear=10.0, p=0.8),
        K.RandomPerspective(0.2, p=0.8),
    ]
    sequence = K.AugmentationSequential(*copy.deepcopy(operations), data_keys=["input"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        sequence(torch.zeros(count, 1, *size, dtype=torch.float64))
    to_canonical, to_view = pixel_to_normalized(size), pixel_to_normalized(crop_size)
    expected = torch.linalg.inv(to_view @ sequence.transform_matrix @ to_canonical.inverse())

    drawn = draw_views(operations, count, size, seed=5)

    drawn, expected = (views / views[:, 2:, 2:] for views in (drawn, expected))
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-4)


def test_one_matrix_places_a_7x7_map_and_a_224_pixel_image_alike():
    # Zoomed in, as the last half cell of a coarse map at the rim is constant.
    zoom_in = OperationConfig(
        kind="affine", p=1.0, degrees=30.0, translate=(0.05, 0.05), scale=(2.0, 3.0)
    )
    view = draw(CROP, FLIP, zoom_in, count=32)

    coarse = warp(coordinate_maps((7, 7)).expand(32, -1, -1, -1), view, (7, 7))
    fine = warp(coordinate_maps((224, 224)).expand(32, -1, -1, -1), view, (224, 224))

    x, y = fetch_points(view, (7, 7))
    away = (torch.maximum(x.abs(), y.abs()) <= 6 / 7 - 0.1)[:, None].expand_as(coarse)
    assert away.float().mean() > 0.8
    torch.testing.assert_close(coarse[away], F.avg_pool2d(fine, 32)[away], rtol=0, atol=2e-3)
    torch.testing.assert_close(coarse[away], torch.stack([x, y], dim=1)[away], rtol=0, atol=2e-3)


def test_a_map_fetched_from_its_7x7_grid_equals_resize_then_crop():
    maps = smooth_images(64, (7, 7), channels=1, max_cycles=1.0)
    view = draw(CROP, FLIP, count=64, size=(224, 224))
    resized = F.interpolate(maps, size=(224, 224), mode="bilinear", align_corners=False)

    on_the_grid = map_cosines(warp(maps, view, (7, 7)), warp(resized, view, (7, 7)))
    on_the_image = map_cosines(warp(maps, view, (224, 224)), warp(resized, view, (224, 224)))

    assert on_the_grid.min() >= 0.99999
    assert on_the_image.min() >= 0.99999


def test_a_rough_map_equals_resize_then_crop_where_the_resize_keeps_its_texels():
    maps = float_noise(64, 1, 7, 7)
    view = draw(CROP, FLIP, count=64, size=(224, 224))
    side = 7 * 33  # an odd number of pixels per cell, so that each cell has a pixel at its center

    resized = F.interpolate(maps, size=(side, side), mode="bilinear", align_corners=False)

    torch.testing.assert_close(
        warp(maps, view, (7, 7)), warp(resized, view, (7, 7)), rtol=0, atol=2e-5
    )


def test_warping_there_and_back_returns_a_smooth_image():
    images = smooth_images(8, (128, 128), max_cycles=1.0)
    there = draw(AFFINE, count=8, size=(128, 128))

    returned = warp(warp(images, there, (128, 128)), torch.linalg.inv(there), (128, 128))

    rim = 32
    difference = (returned - images)[:, :, rim:-rim, rim:-rim].abs()
    assert (there - torch.eye(3)).abs().amax(dim=(1, 2)).min() > 0.05
    assert difference.max() < 1e-2


def test_a_warp_is_linear_in_the_map():
    a, b = float_noise(16, 6, 7, 7, seed=1), float_noise(16, 6, 7, 7, seed=2)
    view = draw(CROP, AFFINE, count=16)

    together = warp(2 * a - 3 * b, view, (7, 7))

    apart = 2 * warp(a, view, (7, 7)) - 3 * warp(b, view, (7, 7))
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-5)


def test_a_non_negative_map_stays_non_negative():
    maps = F.relu(float_noise(256, 1, 7, 7) - 0.5)
    view = draw(CROP, FLIP, AFFINE, count=256)

    warped = warp(maps, view, (7, 7))

    assert warped.min() == 0
    assert 0.1 < warped.max() <= maps.max()


@pytest.mark.parametrize("operation", [ROTATION, AFFINE, PAD_CROP])
def test_a_coarse_cell_counts_by_its_share_inside_the_frame(operation):
    view = draw(operation, count=32, size=(32, 32))
    x, y = fetch_points(view, (7 * 64, 7 * 64))
    truth = F.avg_pool2d((torch.maximum(x.abs(), y.abs()) <= 1).float()[:, None], 64)

    coverage = warp(torch.ones(32, 1, 7, 7), view, (7, 7))

    error = (coverage - truth).abs()
    assert truth.min() < 0.5
    assert error.mean() < 0.01
    assert error.max() < 0.13


def test_a_crop_lies_inside_the_frame_whatever_the_rounding():
    view = draw(CROP, FLIP, count=4096, size=(96, 128))

    coverage = warp(torch.ones(4096, 1, 7, 7), view, (7, 7))

    torch.testing.assert_close(coverage, torch.ones_like(coverage), rtol=0, atol=1e-6)


def test_a_pixel_that_touches_the_rim_is_not_dimmed():
    image = torch.ones(1, 3, 64, 64)
    eighth_of_a_frame_in_the_corner = matrix(0.125, 0.125, -0.875, -0.875)

    warped = warp(image, eighth_of_a_frame_in_the_corner, (64, 64))

    torch.testing.assert_close(warped, torch.ones(1, 3, 64, 64), rtol=0, atol=1e-6)


def test_a_point_that_rounding_puts_a_hair_outside_the_frame_counts_as_inside():
    center_crop = matrix(256 / 224, 1.0)
    pixels_3_to_19_of_256 = matrix(16 / 256, 1.0, (2 * 3 + 16) / 256 - 1)

    coverage = warp(torch.ones(1, 1, 7, 7), center_crop @ pixels_3_to_19_of_256, (7, 7))

    # With 8 points per cell, the 46th of 56 is at -7/8, where the center crop begins.
    expected = torch.tensor([0, 0, 0, 0, 0, 3 / 8, 1]).expand(1, 1, 7, 7)
    torch.testing.assert_close(coverage, expected, rtol=0, atol=1e-6)


def test_gradients_reach_the_map():
    maps = float_noise(3, 2, 4, 4).double().requires_grad_()
    view = draw(CROP, AFFINE, count=3).double()

    assert torch.autograd.gradcheck(lambda source: warp(source, view, (3, 3)), (maps,))


@pytest.mark.parametrize("encode", [normalize, add_inverse])
def test_encoding_commutes_with_crop_and_flip(encode):
    images = float_noise(32, 3, 32, 32).double()
    view = draw(CROP, FLIP, count=32, size=(32, 32))

    encoded_first = warp(encode(images), view, (32, 32))

    encoded_last = encode(warp(images, view, (32, 32)))
    torch.testing.assert_close(encoded_first, encoded_last, rtol=0, atol=1e-6)


def test_a_color_and_its_inverse_still_sum_to_one_after_crop_and_flip():
    images = float_noise(32, 3, 32, 32)
    view = draw(CROP, FLIP, count=32, size=(32, 32))

    color, inverse = warp(add_inverse(images), view, (32, 32)).chunk(2, dim=1)

    torch.testing.assert_close(color + inverse, torch.ones_like(color), rtol=0, atol=1e-6)


@pytest.mark.parametrize("encode", [normalize, add_inverse])
def test_zeros_outside_the_frame_commute_only_where_the_padding_precedes_the_encoding(encode):
    images = float_noise(32, 3, 32, 32).double()
    view = draw(PAD_CROP, count=32, size=(32, 32))
    padded_from_view = matrix(32 / 64, 32 / 64) @ view

    encoded_last = encode(warp(images, view, (32, 32)))
    padded_first = warp(encode(F.pad(images, (16, 16, 16, 16))), padded_from_view, (32, 32))
    encoded_first = warp(encode(images), view, (32, 32))

    torch.testing.assert_close(padded_first, encoded_last, rtol=0, atol=1e-6)
    assert (encoded_first - encoded_last).abs().max() > 0.9  # the inverse of black is 1, not 0


@pytest.mark.parametrize(
    ("shape", "size"), [((3, 64, 96), (56, 56)), ((6, 7, 7), (7, 7))], ids=["image", "map"]
)
def test_a_record_does_not_depend_on_the_rest_of_its_batch(shape, size, restore_threads):
    source = float_noise(16, *shape)
    view = draw(CROP, FLIP, AFFINE, count=16).contiguous()  # row by row, as read from a file
    column_by_column = view.transpose(1, 2).contiguous().transpose(1, 2)
    pick = torch.tensor([11, 0, 3, 3, 15])
    whole = warp(source, view, size)

    one_by_one = torch.cat([warp(source[[row]], view[[row]], size) for row in range(16)])
    channels_last = warp(source.contiguous(memory_format=torch.channels_last), view, size)
    other_threads = []
    for count in (1, 2):
        torch.set_num_threads(count)
        other_threads.append(warp(source, view, size))

    assert torch.equal(warp(source[pick], view[pick], size), whole[pick])
    assert torch.equal(one_by_one, whole)
    assert torch.equal(channels_last, whole)
    assert torch.equal(warp(source, column_by_column, size), whole)
    assert torch.equal(other_threads[0], other_threads[1])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float16, torch.bfloat16])
def test_integers_and_halves_are_warped_in_float32(dtype):
    source = (200 * float_noise(8, 3, 256, 256)).to(dtype)
    view = draw(CROP, AFFINE, count=8, size=(256, 256))

    warped = warp(source, view, (64, 64))

    assert warped.dtype == torch.float32
    assert torch.equal(warped, warp(source.float(), view, (64, 64)))


def test_a_float64_map_is_warped_in_float64():
    maps = float_noise(2, 1, 7, 7).double()

    warped = warp(maps, torch.eye(3).expand(2, 3, 3), (7, 7))

    assert warped.dtype == torch.float64
    torch.testing.assert_close(warped, maps, rtol=0, atol=1e-14)


@pytest.mark.slow
def test_a_compiled_warp_equals_the_eager_one():
    view = draw(CROP, FLIP, AFFINE, count=4)
    # The C++ backend takes 30 s.
    compiled = torch.compile(warp, fullgraph=True, backend="aot_eager")

    for source, size in ((float_noise(4, 3, 64, 64), (56, 56)), (float_noise(4, 6, 7, 7), (7, 7))):
        torch.testing.assert_close(
            compiled(source, view, size), warp(source, view, size), rtol=0, atol=1e-6
        )


def test_downscale_counts_source_pixels_per_view_pixel_along_the_worse_axis():
    whole, half_width, half_height = matrix(), matrix(0.5, 1.0), matrix(1.0, 0.5)
    views = torch.cat([whole, half_width, half_height, matrix(0.25, 0.25)])

    square = downscale(views, (512, 512), (224, 224))
    wide = downscale(views, (256, 512), (128, 128))

    expected = torch.tensor([512, 512, 512, 128]) / 224
    torch.testing.assert_close(square, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(wide, torch.tensor([4.0, 2.0, 4.0, 1.0]), rtol=0, atol=1e-5)


def test_downscale_does_not_change_under_rotation():
    views = draw(ROTATION, count=16)

    ratios = downscale(views, (64, 64), (32, 32))

    torch.testing.assert_close(ratios, torch.full((16,), 2.0), rtol=0, atol=1e-5)


def test_upright_views_have_the_bits_that_they_have_beside_a_rotated_one():
    """Their points are computed by row and column, and those of a batch with a rotated view by cell."""
    upright = draw(CROP, FLIP, count=16, size=(9, 11)).float()
    turned = upright[:1].clone()
    turned[0, 0, 1] = 0.3
    beside = torch.cat([upright, turned])
    images = torch.rand(len(beside), 3, 9, 11, generator=torch.Generator().manual_seed(0))

    for size in ((2, 3), (7, 7), (64, 60)):
        for alone, together in zip(
            fetch_points(upright, size), fetch_points(beside, size), strict=True
        ):
            assert alone.shape == (len(upright), *size)
            assert torch.equal(alone, together[:-1])
        assert torch.equal(covered_share(upright, size), covered_share(beside, size)[:-1])
        assert torch.equal(warp(images[:-1], upright, size), warp(images, beside, size)[:-1])


@pytest.mark.parametrize("size", [(2, 3), (7, 7), (64, 60)])
def test_all_formulas_for_the_points_of_upright_views_have_the_same_bits(monkeypatch, size):
    """A GPU, which would have to be waited for, takes the one for any view, and a CPU the fastest that is right."""
    upright = draw(CROP, FLIP, count=64, size=(9, 11)).float()
    fastest = fetch_points(upright, size)
    for kind in ("affine", "any"):
        monkeypatch.setattr(geometry, "_kind_of", lambda _, kind=kind: kind)
        for points, expected in zip(fetch_points(upright, size), fastest, strict=True):
            assert torch.equal(points, expected)


def test_float32_places_the_points_of_views_to_2e_5_of_a_pixel():
    """A device that rounds in another order differs by as much, at 224 pixels."""
    views = torch.cat([draw(CROP, FLIP, count=64), draw(ROTATION, count=64)])
    size = (224, 224)
    exact = views.float().double()
    pairs = zip(fetch_points(views.float(), size), fetch_points(exact, size), strict=True)
    for points, expected in pairs:
        assert (points - expected).abs().max() * 224 / 2 < 2e-5
