"""Recipes of strong views: what policies draw, how a row of values becomes pixels, and both against torchvision."""

import math
from dataclasses import replace

import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import RandAugment, TrivialAugmentWide

from permafrost.config.augment import (
    AugmentOptions,
    OperationConfig,
    PixelOperationConfig,
    PolicyConfig,
)
from permafrost.core.batches import PixelAugment
from permafrost.core.errors import ConfigError
from permafrost.loading import recipes
from permafrost.loading.geometry import warp
from permafrost.loading.pixel_changes import blank_maps, change_rows
from permafrost.loading.random_views import ViewSchedule
from permafrost.loading.recipes import (
    BLOCK_SIZE,
    MOVING,
    SPACE,
    PixelSchedule,
    Recipe,
    draw_policy,
    policy_matrices,
)
from tests.support.items import for_each
from tests.support.tensors import smooth_images
from tests.support.view_matrices import matrices_of

RANDAUGMENT = PolicyConfig(kind="randaugment")
TRIVIAL = PolicyConfig(kind="trivialaugment")
NAMES = dict(
    zip(
        (
            *("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"),
            *("Brightness", "Color", "Contrast", "Sharpness"),
            *("Posterize", "Solarize", "AutoContrast", "Equalize"),
        ),
        SPACE,
        strict=True,
    )
)
POLICIES = {"randaugment": RandAugment, "trivialaugment": TrivialAugmentWide}
ONE = torch.ones(1, dtype=torch.float64)


def by_torchvision(policy, name, images, magnitude, sign):
    """Apply one operation of torchvision's policy to images f32 [n, 3, h, w]; None where the sign has no meaning."""
    transform = POLICIES[policy](interpolation=InterpolationMode.BILINEAR)
    magnitudes, signed = transform._AUGMENTATION_SPACE[name]
    strengths = magnitudes(31, *images.shape[-2:])
    if sign < 0 and not signed:
        return None
    strength = 0.0 if strengths is None else sign * float(strengths[magnitude])
    return transform._apply_image_or_video_transform(
        images, name, strength, interpolation=transform.interpolation, fill=transform._fill
    )


def strength_of(policy, kind, magnitude, sign):
    kinds = torch.tensor([SPACE.index(kind)])
    fraction = torch.tensor([magnitude / 30], dtype=torch.float64)
    return kinds, recipes._strengths(policy, kinds, fraction, torch.tensor([sign < 0]))


# ---- one operation against torchvision -------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "name", [name for name, kind in NAMES.items() if SPACE.index(kind) not in MOVING]
)
def test_each_operation_of_color_is_torchvisions_on_floats(policy, name):
    images = smooth_images(4, size=48)
    recipe = Recipe([PolicyConfig(kind="randaugment", count=1)])
    largest = 0.0
    for magnitude in (0, 9, 17, 30):
        for sign in (1, -1):
            wanted = by_torchvision(policy, name, images, magnitude, sign)
            if wanted is None:
                continue
            kinds, strength = strength_of(policy, NAMES[name], magnitude, sign)
            rows = torch.stack([kinds.double(), strength], dim=1).expand(4, 2)
            found = change_rows(images.clone(), recipe.changes(rows))
            largest = max(largest, float((found - wanted).abs().max()))

    # Torchvision rounds a weight of gray to 0.2989; the others are equal to rounding.
    assert largest < (2e-4 if name in ("Color", "Contrast") else 2e-6)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"])
def test_each_operation_of_geometry_is_torchvisions_inside_of_the_image(policy, name):
    images = smooth_images(4, size=48)
    for magnitude in (9, 17, 30):
        for sign in (1, -1):
            kinds, strength = strength_of(policy, NAMES[name], magnitude, sign)
            if name.startswith(
                "Translate"
            ):  # torchvision's are whole pixels, and up to 32 in TrivialAugment
                pixels = int(float(strength) * 48)
                strength = ONE * pixels / 48
                transform = RandAugment(interpolation=InterpolationMode.BILINEAR)
                wanted, whole = (
                    transform._apply_image_or_video_transform(
                        each, name, float(pixels), transform.interpolation, transform._fill
                    )
                    for each in (images, torch.ones_like(images))
                )
            else:
                wanted = by_torchvision(policy, name, images, magnitude, sign)
                whole = by_torchvision(policy, name, torch.ones_like(images), magnitude, sign)
            matrix = policy_matrices(kinds, strength, ONE).float().expand(4, 3, 3)

            found = warp(images, matrix, (48, 48))

            inside = whole > 0.9999  # torchvision fades the edge
            assert inside.float().mean() > 0.2
            assert (found - wanted)[inside].abs().max() < 2e-4
            assert (found - images).abs().max() > 0.01


@pytest.mark.parametrize(
    ("operation", "wanted"),
    [
        (PixelOperationConfig(kind="solarize", p=1.0, threshold=0.3), ("solarize", 0.3)),
        (PixelOperationConfig(kind="posterize", p=1.0, bits=3), ("posterize", 3)),
        (PixelOperationConfig(kind="sharpness", p=1.0, factor=1.7), ("adjust_sharpness", 1.7)),
        (PixelOperationConfig(kind="equalize", p=1.0), ("equalize",)),
        (PixelOperationConfig(kind="autocontrast", p=1.0), ("autocontrast",)),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_an_operation_alone_is_torchvisions(operation, wanted):
    from torchvision.transforms.v2 import functional

    name, *values = wanted
    images = smooth_images(4)

    found = change_rows(images.clone(), PixelSchedule([operation], 0).draw(0, 0, 4))

    assert torch.allclose(found, getattr(functional, name)(images, *values), atol=2e-6)
    assert not torch.equal(found, images)


def test_a_mean_gray_is_the_same_in_any_batch_and_with_any_number_of_threads():
    images = torch.rand(9, 3, 224, 224)
    contrast = PixelOperationConfig(
        kind="color_jitter", p=1.0, brightness=0.0, saturation=0.0, hue=0.0
    )
    blur = PixelOperationConfig(kind="gaussian_blur", p=1.0)
    every = [contrast, blur, RANDAUGMENT, replace(RANDAUGMENT, magnitude=20.0)]
    rows = PixelSchedule(every, 0).rows(0, 0, 9)
    recipe, threads = Recipe(every), torch.get_num_threads()

    whole = change_rows(images.clone(), recipe.changes(rows))
    alone = [
        change_rows(images[n : n + 1].clone(), recipe.changes(rows[n : n + 1])) for n in range(9)
    ]
    try:
        torch.set_num_threads(3 if threads != 3 else 2)
        other = change_rows(images.clone(), recipe.changes(rows))
    finally:
        torch.set_num_threads(threads)

    assert torch.equal(torch.cat(alone), whole)
    assert torch.equal(other, whole)


# ---- draws ---------------------------------------------------------------------------------------


def test_a_policy_draws_every_kind_equally_often_and_both_signs():
    drawn = [draw_policy(RANDAUGMENT, 0, 0, 0, block) for block in range(20)]
    kinds = torch.cat([each[0] for each in drawn]).flatten()
    strengths = torch.cat([each[1] for each in drawn]).flatten()

    counts = torch.bincount(kinds, minlength=14) / len(kinds)
    assert len(kinds) == 2 * 20 * BLOCK_SIZE
    assert torch.allclose(counts, torch.tensor(1 / 14), atol=0.005)
    turns = strengths[kinds == SPACE.index("rotate")]
    assert torch.allclose(turns.abs(), torch.tensor(9.0, dtype=torch.float64))
    assert (turns > 0).double().mean().item() == pytest.approx(0.5, abs=0.04)
    thresholds = strengths[kinds == SPACE.index("solarize")]
    assert torch.allclose(thresholds, torch.tensor(0.7, dtype=torch.float64))
    assert set(strengths[kinds == SPACE.index("posterize")].tolist()) == {7.0}  # 8 - round(1.2)


def test_a_spread_is_the_standard_deviation_of_the_magnitude():
    policy = replace(RANDAUGMENT, magnitude=15.0, spread=3.0)
    kinds, strengths = draw_policy(policy, 0, 0, 0, 0)
    magnitudes = 30 * strengths[kinds == SPACE.index("translate_x")].abs() / (150 / 331)

    assert magnitudes.mean().item() == pytest.approx(15, abs=1)
    assert magnitudes.std().item() == pytest.approx(3, rel=0.2)
    wide, _ = (draw_policy(replace(policy, spread=30.0), 0, 0, 0, 0)[1], None)
    assert wide.abs().max() <= 30


def test_trivialaugment_draws_one_operation_of_any_of_31_magnitudes():
    kinds, strengths = draw_policy(TRIVIAL, 0, 0, 0, 0)
    degrees = strengths[kinds == SPACE.index("rotate")].abs()

    assert kinds.shape == (BLOCK_SIZE, 1)
    assert degrees.max() > 100
    assert torch.allclose((degrees / 4.5).round(), degrees / 4.5)


def test_a_probability_is_that_of_each_operation():
    kinds, strengths = draw_policy(replace(RANDAUGMENT, p=0.25), 0, 0, 0, 0)
    wanted = 0.25 * 13 / 14

    assert (kinds > 0).double().mean().item() == pytest.approx(wanted, abs=0.03)
    assert (strengths[kinds == 0] == 0).all()


def test_geometry_and_colors_of_a_record_are_those_of_one_draw():
    augment = AugmentOptions(operations=(RANDAUGMENT, TRIVIAL))
    views = matrices_of(ViewSchedule(augment, (32, 32), 7), 3, 1000, torch.ones(40))
    rows = PixelSchedule(augment.operations, 7).rows(3, 1000, 40)

    wanted = []
    for position in range(1000, 1040):
        block, place = divmod(position, BLOCK_SIZE)
        matrix = torch.eye(3, dtype=torch.float64)[None]
        for number, policy in enumerate(augment.operations):
            kinds, strengths = draw_policy(policy, number, 7, 3, block, 32)
            for kind, strength in zip(kinds[place], strengths[place], strict=True):
                matrix = matrix @ policy_matrices(kind[None], strength[None], ONE)
        wanted.append(matrix[0])
    assert torch.allclose(views, torch.stack(wanted).float(), atol=1e-6)
    kinds, _ = draw_policy(RANDAUGMENT, 0, 7, 3, 0)
    codes = (kinds[:, 0] + 14 * kinds[:, 1])[1000:1024]
    assert torch.equal(rows[:24, 0], codes.double())


def test_translations_are_whole_pixels_of_the_view_as_in_torchvision():
    kinds, strengths = draw_policy(TRIVIAL, 0, 0, 0, 0, 224)
    _, exact = draw_policy(TRIVIAL, 0, 0, 0, 0)

    moved = (kinds == SPACE.index("translate_x")) | (kinds == SPACE.index("translate_y"))
    assert torch.equal((strengths[moved] * 224).round(), (exact[moved] * 224).trunc())
    assert torch.equal(strengths[~moved], exact[~moved])
    assert moved.sum() > 100


def test_a_policy_after_geometry_leaves_the_draws_of_geometry_as_they_were():
    geometry = (OperationConfig(kind="pad_crop"), OperationConfig(kind="horizontal_flip"))
    still = replace(RANDAUGMENT, p=0.0)
    alone, beside = (
        ViewSchedule(AugmentOptions(operations=operations), (32, 32), 1)
        for operations in (geometry, (geometry[0], still, geometry[1], TRIVIAL))
    )
    aspects = torch.ones(64)
    first = matrices_of(alone, 0, 0, aspects)
    moved = matrices_of(beside, 0, 0, aspects)

    kinds, strengths = draw_policy(TRIVIAL, 1, 1, 0, 0, 32)
    steps = policy_matrices(kinds[:64, 0], strengths[:64, 0], torch.ones(64, dtype=torch.float64))
    assert torch.allclose(moved, (first.double() @ steps).float(), atol=1e-5)


@pytest.mark.parametrize("kind", [SPACE[number] for number in MOVING])
def test_an_image_of_another_aspect_ratio_is_moved_as_in_its_own_proportions(kind):
    """Compare with a frame of that ratio: the same pixels, squeezed into a square."""
    aspect = 2.0
    kinds = torch.full((1,), SPACE.index(kind))
    strength = ONE * (20.0 if kind == "rotate" else 0.2)
    square = policy_matrices(kinds, strength, ONE)
    wide = policy_matrices(kinds, strength, aspect * ONE)
    points = torch.tensor([[-0.5, -0.2, 1.0], [0.3, 0.6, 1.0], [0.0, 0.0, 1.0]]).double().T

    # In units of the height, with the corner of shears at the left edge.
    scaled = torch.tensor([aspect, 1.0, 1.0]).double().diag()
    found = (scaled @ wide[0] @ points)[:2]
    place = (scaled @ points)[:2]
    x, y, v = place[0], place[1], float(strength)
    wanted = {
        "shear_x": (x + v * (y + 1), y),
        "shear_y": (x, y + v * (x + aspect)),
        "translate_x": (x - 2 * v * aspect, y),
        "translate_y": (x, y - 2 * v),
        "rotate": (
            x * math.cos(math.radians(v)) - y * math.sin(math.radians(v)),
            x * math.sin(math.radians(v)) + y * math.cos(math.radians(v)),
        ),
    }[kind]
    assert torch.allclose(found, torch.stack(wanted))
    assert not torch.allclose(square, wide) or kind.startswith("translate")


# ---- rows of values ------------------------------------------------------------------------------


EVERY = (
    RANDAUGMENT,
    PixelOperationConfig(kind="color_jitter"),
    PixelOperationConfig(kind="random_erasing"),
)


def test_two_operations_color_jitter_and_an_erasing_take_24_bytes():
    rows = PixelSchedule(EVERY, 0).rows(0, 0, 8).half()

    assert rows.shape == (8, 12)
    assert rows.element_size() * rows.shape[1] + 6 * 4 == 48  # with the matrix


def test_rounded_values_are_nearly_the_same_pixels_and_kinds_are_exact():
    images = smooth_images(64)
    rows = PixelSchedule(EVERY, 0).rows(0, 0, 64)
    recipe = Recipe(EVERY)

    exact, rounded = (
        change_rows(images.clone(), recipe.changes(each)) for each in (rows, rows.half())
    )

    assert torch.equal(rows[:, 0], rows[:, 0].half().double())
    assert (exact - rounded).abs().mean() < 2e-3
    assert not torch.equal(exact, images)


def test_four_operations_of_a_policy_keep_their_kinds():
    policy = replace(RANDAUGMENT, count=4)
    kinds, strengths = draw_policy(policy, 0, 0, 0, 0)
    rows = recipes._policy_row(kinds, strengths).half()

    changes = Recipe([policy]).changes(rows)

    assert rows.shape == (BLOCK_SIZE, 6)
    for kind in ("brightness", "equalize"):
        times = sum(len(change.rows) for change in changes if change.name == kind)
        assert times == int((kinds == SPACE.index(kind)).sum())


# ---- maps ----------------------------------------------------------------------------------------


def test_blank_maps_are_0_in_the_erased_rectangle_and_keep_their_values_outside():
    operation = PixelOperationConfig(kind="random_erasing", p=1.0, maps="blank")
    recipe = Recipe([operation])
    # A quarter of the columns and all rows; cells are half, fully and not covered.
    rows = torch.tensor([[0.125, 0.0, 0.375, 1.0], [-1.0] * 4]).double()
    maps = torch.rand(2, 1, 1, 4, 4) + 0.5
    changes = PixelAugment(changes=recipe.changes(rows))

    found = blank_maps(maps, changes)

    wanted = maps[0] * torch.tensor([0.5, 0.5, 1.0, 1.0])
    assert torch.allclose(found[0], wanted)
    assert torch.equal(found[1], maps[1])
    kept = Recipe([replace(operation, maps="keep")]).changes(rows)
    assert torch.equal(blank_maps(maps, PixelAugment(changes=kept)), maps)
    assert blank_maps(maps, None) is maps


# ---- options -------------------------------------------------------------------------------------


@for_each(
    "options,message",
    [
        ({"magnitude": 31.0}, r"augment\.operations\.magnitude must be in \[0, 30\]"),
        ({"count": 5}, r"augment\.operations\.count must be in \[1, 4\]"),
        ({"spread": -1.0}, r"augment\.operations\.spread must be in \[0, 30\]"),
        ({"kind": "autoaugment"}, r"augment\.operations\.kind must be one of randaugment"),
    ],
)
def test_a_value_out_of_range_names_its_limits(options, message):
    with pytest.raises(ConfigError, match=message):
        PolicyConfig(**{"kind": "randaugment", **options})
