"""Views of originals with many aspect ratios: crops and rotations are exact in the pixels of the original."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomAffine, RandomResizedCrop
from torchvision.transforms.v2 import functional as tv

from permafrost.config.augment import AugmentOptions, OperationConfig
from permafrost.config.data import ImageFolderDataConfig
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.geometry import center_crop, decode_maps, view_maps, warp
from permafrost.loading.random_views import VIEW_BLOCK, ViewSchedule
from permafrost.store.reader import Store
from permafrost.store.record_form import resize_pixels
from tests.support.stores import precompute_config
from tests.support.verbs import precompute
from tests.support.view_matrices import matrices_of

CROP = OperationConfig(kind="resized_crop", scale=(0.25, 1.0))
FIELDS_CROP = OperationConfig(kind="resized_crop")
ROTATION = OperationConfig(kind="rotation", degrees=40.0, p=1.0)
FLIP = OperationConfig(kind="horizontal_flip", p=0.5)
ASPECTS = (0.4, 0.56, 1.0, 1.5, 1.9, 3.0)


def large_schedule(*operations, seed=0, one_aspect=False):
    config = AugmentOptions(operations=operations)
    return ViewSchedule(config, (256, 256), seed, one_aspect=one_aspect)


def mixed_aspects(count):
    return torch.tensor(ASPECTS).repeat(-(-count // len(ASPECTS)))[:count]


def diagonal(aspects):
    """Matrices from the normalized frame to the proportions of the original: diag(a, 1, 1)."""
    ones = torch.ones(len(aspects), dtype=torch.float64)
    return torch.diag_embed(torch.stack([aspects.double(), ones, ones], dim=1))


def assert_turns(matrices, tolerance=1e-5):
    """Check that the matrices are rotations about the center by various angles."""
    linear = matrices[:, :2, :2].double()
    eye = torch.eye(2, dtype=torch.float64).expand_as(linear)
    torch.testing.assert_close(linear @ linear.mT, eye, rtol=0, atol=tolerance)
    torch.testing.assert_close(torch.linalg.det(linear), eye[:, 0, 0], rtol=0, atol=tolerance)
    assert matrices[:, :2, 2].abs().max() < tolerance
    assert linear[:, 0, 1].std() > 0.1


# ---- crops ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [None, (0.25, 1.0), (0.5, 0.5)])
@pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (1.0, 1.0), (0.5, 0.6)])
def test_a_crop_has_its_share_and_ratio_in_the_originals_pixels_and_lies_inside(scale, ratio):
    operation = OperationConfig(kind="resized_crop", scale=scale, ratio=ratio)
    aspects = mixed_aspects(3000)

    views = matrices_of(large_schedule(operation), 0, 0, aspects)

    half_width, half_height = views[:, 0, 0], views[:, 1, 1]
    shares, ratios = half_width * half_height, aspects * half_width / half_height
    low, high = scale or (0.08, 1.0)
    fallback = (half_width == 1) | (half_height == 1)  # limited by the frame, not by the scale
    assert shares[~fallback].min() >= low - 1e-6
    assert shares[~fallback].max() <= high + 1e-6
    assert ratios.min() >= ratio[0] - 1e-5
    assert ratios.max() <= ratio[1] + 1e-5
    assert (views[:, :2, 2].abs() + torch.stack([half_width, half_height], 1)).max() <= 1 + 1e-6
    rest = views.clone()
    rest[:, [0, 1, 2, 0, 1], [0, 1, 2, 2, 2]] = 0
    assert rest.abs().max() == 0
    assert (~fallback).float().mean() > 0.4


@pytest.mark.parametrize("aspect", [0.56, 1.0, 1.9])
def test_crops_are_distributed_as_torchvisions(aspect):
    count, height = 4096, 2000
    width = round(height * aspect)
    canvas = torch.empty(1).expand(3, height, width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        boxes = torch.tensor(
            [
                RandomResizedCrop.get_params(canvas, [0.08, 1.0], [3 / 4, 4 / 3])
                for _ in range(count)
            ],
            dtype=torch.float64,
        )
    top, left, high, wide = boxes.unbind(1)
    theirs = {
        "share": high * wide / (height * width),
        "x": (2 * left + wide) / width - 1,
        "y": (2 * top + high) / height - 1,
        "width": wide / width,
    }

    views = matrices_of(large_schedule(FIELDS_CROP), 0, 0, torch.full((count,), aspect)).double()

    ours = {
        "share": views[:, 0, 0] * views[:, 1, 1],
        "x": views[:, 0, 2],
        "y": views[:, 1, 2],
        "width": views[:, 0, 0],
    }
    points = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    for name, values in ours.items():
        torch.testing.assert_close(
            values.quantile(points), theirs[name].quantile(points), rtol=0, atol=0.03
        )


@pytest.mark.parametrize(("width", "height"), [(3000, 1000), (1000, 3000)])
def test_where_no_crop_fits_it_is_torchvisions_centered_one(width, height):
    canvas = torch.empty(1).expand(3, height, width)
    top, left, high, wide = RandomResizedCrop.get_params(canvas, [0.9, 1.0], [0.8, 1.25])
    operation = OperationConfig(kind="resized_crop", scale=(0.9, 1.0), ratio=(0.8, 1.25))

    views = matrices_of(large_schedule(operation), 0, 0, torch.full((64,), width / height))

    x0, x1 = 2 * left / width - 1, 2 * (left + wide) / width - 1
    y0, y1 = 2 * top / height - 1, 2 * (top + high) / height - 1
    expected = torch.tensor(
        [[(x1 - x0) / 2, 0, (x0 + x1) / 2], [0, (y1 - y0) / 2, (y0 + y1) / 2], [0, 0, 1]]
    )
    assert expected[:2, 2].abs().max() < 1e-12
    torch.testing.assert_close(views, expected.expand(64, 3, 3), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(300, 400), (400, 300), (200, 640), (256, 256)])
def test_a_crop_of_the_frame_is_torchvisions_crop_of_the_original(size):
    height, width = size
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    original = torch.stack([x / width, y / height, (x / width + y / height) / 2]) * 255
    pixels = original.round().to(torch.uint8).permute(1, 2, 0).numpy()
    frame = torch.from_numpy(resize_pixels(pixels, (256, 256))).permute(2, 0, 1)
    views = matrices_of(large_schedule(CROP), 0, 0, torch.full((24,), width / height))

    ours = warp(frame.expand(24, 3, 256, 256), views, (64, 64))

    for view, seen in zip(views.double(), ours, strict=True):
        left, right = ((view[0, 2] + sign * view[0, 0] + 1) / 2 * width for sign in (-1, 1))
        top, bottom = ((view[1, 2] + sign * view[1, 1] + 1) / 2 * height for sign in (-1, 1))
        box = [round(float(v)) for v in (top, left, bottom - top, right - left)]
        theirs = tv.resized_crop(original, *box, [64, 64], antialias=True)
        # The rounding of torchvision's box moves its sides by up to 0.75 of at least 200 pixels, which is one
        # level. The 8 bits of the frame cost up to half a level.
        assert (seen.mean((1, 2)) - theirs.mean((1, 2))).abs().max() < 1.5
        assert (seen[:, 4:-4, 4:-4] - theirs[:, 4:-4, 4:-4]).abs().max() < 3
    assert ours[:, 0].mean((1, 2)).std() > 10  # the crops differ from each other


# ---- rotations -----------------------------------------------------------------------------------


def test_a_rotation_turns_the_originals_pixels_whatever_their_proportions():
    aspects = mixed_aspects(600)

    views = matrices_of(large_schedule(ROTATION), 0, 0, aspects).double()

    true = diagonal(aspects)
    assert_turns(true @ views @ torch.linalg.inv(true))
    with pytest.raises(AssertionError):
        assert_turns(views)
    assert_turns(views[aspects == 1])


def test_a_rotation_before_a_crop_turns_the_original_and_one_after_it_the_square_view():
    aspects = mixed_aspects(600)
    crops = matrices_of(large_schedule(CROP), 0, 0, aspects).double()
    true = diagonal(aspects)

    before = matrices_of(large_schedule(ROTATION, CROP), 0, 0, aspects).double() @ torch.linalg.inv(
        crops
    )
    after = (
        torch.linalg.inv(crops)
        @ matrices_of(large_schedule(CROP, ROTATION), 0, 0, aspects).double()
    )

    assert_turns(true @ before @ torch.linalg.inv(true))
    assert_turns(after)
    with pytest.raises(AssertionError):
        assert_turns(before)


def test_a_crop_after_a_crop_cuts_a_square():
    aspects = mixed_aspects(600)
    square = OperationConfig(kind="resized_crop", scale=(0.25, 0.25), ratio=(1.0, 1.0))

    views = matrices_of(large_schedule(CROP, square), 0, 0, aspects)

    first = matrices_of(large_schedule(CROP), 0, 0, aspects)
    second = torch.linalg.inv(first.double()) @ views.double()
    halves = torch.full((600,), 0.5, dtype=torch.float64)
    for axis in (0, 1):
        torch.testing.assert_close(second[:, axis, axis], halves, rtol=0, atol=1e-5)


def test_flips_do_not_ask_for_proportions():
    views = matrices_of(large_schedule(FLIP), 0, 0, mixed_aspects(600))

    assert torch.equal(views, matrices_of(large_schedule(FLIP), 0, 0, torch.ones(600)))
    expected = torch.eye(3).repeat(600, 1, 1)
    expected[:, 0, 0] = views[:, 0, 0]
    assert torch.equal(views, expected)
    assert 0.4 < (views[:, 0, 0] == -1).float().mean() < 0.6
    assert set(views[:, 0, 0].tolist()) == {-1.0, 1.0}


# ---- shifts --------------------------------------------------------------------------------------


PAD = OperationConfig(kind="pad_crop", padding=32)
SLANT = OperationConfig(kind="affine", p=1.0, degrees=30.0, scale=(0.7, 1.3), shear=10.0)
MOVE = OperationConfig(kind="affine", p=1.0, translate=(0.1, 0.2))
NARROW = (1 / 8, 1 / 4, 0.4, 1.0, 2.5, 4.0, 8.0)
"""Aspect ratios from portraits to landscapes, each with its inverse."""


def views_of(aspect, *operations, count=400):
    return matrices_of(large_schedule(*operations), 0, 0, torch.full((count,), aspect)).double()


def pixels_of(views, aspect):
    """Shifts of views that move only, in units of the original's shorter side."""
    width, height = aspect / min(aspect, 1), 1 / min(aspect, 1)
    return views[:, :2, 2] / 2 * torch.tensor([width, height], dtype=torch.float64)


@pytest.mark.parametrize("aspect", NARROW)
def test_padding_is_as_wide_on_all_sides_whatever_the_proportions(aspect):
    shifts = pixels_of(views_of(aspect, PAD), aspect)

    steps = shifts * 256
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
    assert steps.abs().amax(dim=0).round().tolist() == [32, 32]
    # A photograph that is turned by 90 degrees is shifted by as many pixels, in the same draws.
    turned = pixels_of(views_of(1 / aspect, PAD), 1 / aspect)
    torch.testing.assert_close(shifts, turned, rtol=0, atol=1e-6)
    frame = torch.eye(3, dtype=torch.float64).expand(400, 3, 3).clone()
    frame[:, :2, 2] = views_of(aspect, PAD)[:, :2, 2]
    assert torch.equal(frame, views_of(aspect, PAD))  # nothing but a shift


@pytest.mark.parametrize("aspect", NARROW)
def test_a_translation_is_a_fraction_of_width_and_height_as_torchvisions(aspect):
    width, height = round(2000 * aspect), 2000
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = torch.tensor(
            [
                RandomAffine.get_params([0, 0], [0.1, 0.2], None, None, [width, height])[1]
                for _ in range(2000)
            ]
        )
    views = views_of(aspect, MOVE, count=2000)

    fractions = views[:, :2, 2] / 2

    points = torch.tensor([0.01, 0.25, 0.5, 0.75, 0.99], dtype=torch.float64)
    expected = theirs.double() / torch.tensor([width, height])
    for axis in (0, 1):
        torch.testing.assert_close(
            fractions[:, axis].quantile(points),
            expected[:, axis].quantile(points),
            rtol=0,
            atol=0.02,
        )
    torch.testing.assert_close(
        fractions.abs().amax(dim=0), torch.tensor([0.1, 0.2]).double(), rtol=0, atol=2e-3
    )
    swapped = replace(MOVE, translate=(0.2, 0.1))
    turned = views_of(1 / aspect, swapped, count=2000)[:, [1, 0], 2] / 2
    assert turned.abs().max(dim=0).values.tolist() == pytest.approx([0.1, 0.2], abs=2e-3)


@pytest.mark.parametrize("aspect", [0.4, 1.0, 2.5])
def test_a_translation_after_a_turn_moves_the_view_along_the_originals_sides(aspect):
    """In pixels of the original, the view is turned, zoomed and slanted about the center, and then moved."""
    both = replace(SLANT, translate=(0.1, 0.2))
    true = diagonal(torch.full((400,), aspect))
    moved, still = (
        true @ views_of(aspect, each) @ torch.linalg.inv(true) for each in (both, SLANT)
    )

    linear = moved[:, :2, :2]
    shift = -torch.linalg.solve(linear, moved[:, :2, 2:])[..., 0] / 2 / torch.tensor([aspect, 1])

    assert still[:, :2, 2].abs().max() < 1e-6
    assert (shift.abs() <= torch.tensor([0.1, 0.2]) + 1e-5).all()
    assert shift.abs().amax(dim=0).tolist() == pytest.approx([0.1, 0.2], abs=5e-3)
    square = views_of(1.0, both)
    torch.testing.assert_close(linear, square[:, :2, :2], rtol=0, atol=1e-5)


# ---- dependencies of a view ----------------------------------------------------------------------


def test_a_view_depends_on_seed_epoch_position_and_its_own_aspect_alone():
    operations = (ROTATION, CROP, FLIP)
    aspects = mixed_aspects(2 * VIEW_BLOCK + 100)
    whole = matrices_of(large_schedule(*operations), 2, 0, aspects)

    for start, stop in ((0, 1), (5, 70), (1000, 1100), (VIEW_BLOCK - 1, 2 * VIEW_BLOCK + 1)):
        part = matrices_of(large_schedule(*operations), 2, start, aspects[start:stop])
        assert torch.equal(part, whole[start:stop])
    neighbors = aspects.clone()
    neighbors[::2] = 7.0
    other = matrices_of(large_schedule(*operations), 2, 0, neighbors)
    assert torch.equal(other[1::2], whole[1::2])
    assert not torch.equal(other[::2], whole[::2])
    for changed in (
        matrices_of(large_schedule(*operations, seed=1), 2, 0, aspects),
        matrices_of(large_schedule(*operations), 3, 0, aspects),
    ):
        assert (changed != whole).flatten(1).any(dim=1).float().mean() > 0.99


def test_where_all_proportions_are_equal_no_aspect_is_asked_for():
    operations = (ROTATION, CROP, FLIP)
    views = matrices_of(large_schedule(*operations, one_aspect=True), 0, 0, torch.ones(100))

    assert torch.equal(
        views, matrices_of(large_schedule(*operations, one_aspect=True), 0, 0, mixed_aspects(100))
    )


def test_the_global_generator_is_left_as_it_was():
    torch.manual_seed(3)
    expected = torch.rand(4)

    torch.manual_seed(3)
    matrices_of(large_schedule(ROTATION, CROP, FLIP), 0, 0, mixed_aspects(100))

    assert torch.equal(torch.rand(4), expected)


# ---- the center crop -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", [(375, 500), (500, 333), (256, 256), (1000, 301), (64, 64), (480, 640), (33, 257)]
)
def test_the_center_crop_is_resize_256_and_crop_224_within_half_a_pixel(size):
    resized = tv.resize(torch.empty(1, *size), [256], antialias=True).shape[-2:]
    rows, columns = torch.meshgrid(*(torch.arange(n) for n in resized), indexing="ij")
    cropped = tv.center_crop(torch.stack([columns, rows]), [224, 224])
    expected = torch.stack([cropped[:, 0, 0], cropped[:, -1, -1] + 1]).double()  # (x, y) corners

    matrix = center_crop(*(torch.tensor([float(n)]) for n in size), 0.875)[0].double()

    corners = torch.tensor([[-1.0, -1.0, 1.0], [1.0, 1.0, 1.0]], dtype=torch.float64) @ matrix.T
    pixels = (corners[:, :2] + 1) / 2 * torch.tensor([resized[1], resized[0]])
    # The longer side of the resized image and the margin are rounded down to whole pixels.
    assert (pixels - expected).abs().max() <= 1.0
    assert ((pixels.sum(0) - expected.sum(0)).abs() / 2).max() <= 0.5  # distance of the centers
    short = int(np.argmin(resized[::-1]))
    torch.testing.assert_close(pixels[:, short], expected[:, short], rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Ten smooth images, each of its own class and aspect ratio."""
    root = tmp_path_factory.mktemp("photographs")
    for label in range(10):
        height, width = 40 + 6 * label, 100 - 7 * label
        y, x = np.mgrid[:height, :width]
        waves = [np.sin(x / (5 + c + label)) * np.cos(y / (9 - c)) for c in range(3)]
        pixels = np.rint(127.5 + 100 * np.stack(waves, axis=-1)).astype(np.uint8)
        (root / f"class{label}").mkdir()
        Image.fromarray(pixels).save(root / f"class{label}" / "image.png")
    return ImageFolderDataConfig(path=str(root))


def annotated(photographs, store, teacher):
    precompute.run(precompute_config(store, teacher, data=photographs))
    opened = Store(store)
    dataset = StoreDataset(opened, np.arange(10), opened.open_passes())
    return opened, dataset.__getitems__(list(range(10)))


def test_the_map_of_a_center_crop_teacher_lies_where_its_teacher_looked(
    photographs, tmp_path, tiny_teacher
):
    teacher = replace(tiny_teacher, frame="center_crop", input_size=16)
    store, batch = annotated(photographs, tmp_path / "store", teacher)

    (spec,) = [s for s in store.open_passes()[0].manifest.fields if s.name == "map"]
    assert (spec.frame, spec.crop_fraction) == ("center_crop", 0.875)
    heights, widths = batch.original_size.unbind(1)
    assert len(set((heights / widths).tolist())) == 10
    crops = center_crop(heights, widths, 0.875)
    (stored,) = batch.targets
    eye = torch.eye(3).expand(10, 3, 3)
    torch.testing.assert_close(stored.map_from_canonical @ crops, eye, rtol=0, atol=1e-6)
    torch.testing.assert_close(crops @ stored.map_from_canonical, eye, rtol=0, atol=1e-6)

    # The map in the same crop is the stored one, whereas the map in the whole frame differs.
    evaluated = replace(batch, canonical_from_view=crops)
    grid = stored.maps.shape[-2:]
    torch.testing.assert_close(
        view_maps(evaluated, stored, grid), decode_maps(stored), rtol=0, atol=1e-5
    )
    assert (view_maps(batch, stored, grid) - decode_maps(stored)).abs().max() > 0.05


def test_the_map_of_a_teacher_of_whole_frames_is_in_place(photographs, tmp_path, tiny_teacher):
    teacher = replace(tiny_teacher, input_size=16)
    store, batch = annotated(photographs, tmp_path / "store", teacher)

    (spec,) = [s for s in store.open_passes()[0].manifest.fields if s.name == "map"]
    assert (spec.frame, spec.crop_fraction) == ("full", None)
    assert torch.equal(batch.targets[0].map_from_canonical, torch.eye(3).expand(10, 3, 3))
    maps = decode_maps(batch.targets[0])
    torch.testing.assert_close(
        view_maps(batch, batch.targets[0], maps.shape[-2:]), maps, rtol=0, atol=1e-6
    )
