"""Views of every recipe against Kornia's own pipeline with the same parameters: image, map, boxes and points.

Kornia moves an image once per operation, and this project once in all, so its images differ by what interpolation in
between costs, and maps that are linear, which bilinear interpolation keeps as they are, by rounding alone.
"""

import kornia.augmentation as K
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kornia.augmentation.container.params import ParamItem
from kornia.constants import DataKey, Resample

from permafrost import augmentation
from permafrost.config.augment import AugmentOptions, OperationConfig, PolicyConfig
from permafrost.core.batches import Rendering
from permafrost.core.digests import derive_seed
from permafrost.core.generators import SeededDraws
from permafrost.loading.geometry import render_windows, warp
from permafrost.loading.random_views import VIEW_BLOCK, ViewSchedule, build_operations
from permafrost.loading.recipes import MOVING, SPACE, draw_policy
from permafrost.loading.windows import cut_window, pixel_boxes
from tests.support.paths import ROOT

SIDE, COUNT, SEED = 96, 24, 5
RECIPES = sorted(path.stem for path in (ROOT / "conf" / "augment").glob("*.yaml"))
WINDOWS = {
    "crop": (OperationConfig(kind="resized_crop", scale=(0.2, 1.0)),),
    "padded": (OperationConfig(kind="pad_crop", padding=12),),
    "flips": (OperationConfig(kind="horizontal_flip"), OperationConfig(kind="vertical_flip")),
    "all": (
        OperationConfig(kind="horizontal_flip"),
        OperationConfig(kind="pad_crop", padding=8),
        OperationConfig(kind="resized_crop", scale=(0.3, 0.8)),
        OperationConfig(kind="vertical_flip"),
    ),
}
MOVES = {
    "rotation": (OperationConfig(kind="rotation", p=0.8, degrees=30.0),),
    "affine": (
        OperationConfig(
            kind="affine", p=0.9, degrees=15.0, translate=(0.1, 0.2), scale=(0.8, 1.2), shear=10.0
        ),
    ),
    "randaugment": (PolicyConfig(kind="randaugment", magnitude=18.0),),
    "trivialaugment": (PolicyConfig(kind="trivialaugment"),),
    "turned and moved": (
        OperationConfig(kind="rotation", p=1.0, degrees=20.0),
        PolicyConfig(kind="randaugment", count=1, magnitude=9.0),
        OperationConfig(kind="horizontal_flip"),
    ),
}
OPTIONS = {name: augmentation(name) for name in RECIPES} | {
    f"{window}, {move}": AugmentOptions(operations=(*WINDOWS[window], *MOVES[move]))
    for window in WINDOWS
    for move in MOVES
}


def affine_of(kinds, strengths):
    """Parameters of Kornia's RandomAffine for one operation of a policy on each record."""
    with SeededDraws(0):  # which leaves the draws of the others as they are
        parameters = K.RandomAffine(0.0, shear=(0.0, 0.0, 0.0, 0.0), p=1.0).forward_parameters(
            torch.Size((len(kinds), 1, SIDE, SIDE))
        )
    middle, corner = (SIDE - 1) / 2, -0.5  # in pixels, whose centers are whole numbers

    def values_of(kind):
        return strengths.where(kinds == SPACE.index(kind), torch.zeros_like(strengths)).float()

    sheared = (kinds == SPACE.index("shear_x")) | (kinds == SPACE.index("shear_y"))
    center = torch.where(sheared, corner, middle).float()
    return parameters | {
        "center": center[:, None].expand(-1, 2).contiguous(),
        "translations": SIDE * torch.stack([values_of("translate_x"), values_of("translate_y")], 1),
        "angle": -values_of("rotate"),
        "shear_x": values_of("shear_x").atan().rad2deg(),
        "shear_y": values_of("shear_y").atan().rad2deg(),
    }


def kornia_pipeline(options):
    """Kornia's operations and parameters for the views of the first COUNT positions of epoch 0."""
    operations, parameters, numbers = [], [], 0
    built = iter(build_operations(options, (SIDE, SIDE)))
    with SeededDraws(derive_seed(SEED, "views", 0, 0)):
        for operation in options.moving:
            if isinstance(operation, PolicyConfig):
                kinds, strengths = draw_policy(
                    operation, numbers, SEED, 0, 0, options.side_of((SIDE, SIDE))
                )
                numbers += 1
                for turn in range(operation.num_operations):
                    moving = (kinds[:, turn] >= MOVING.start) & (kinds[:, turn] < MOVING.stop)
                    drawn = kinds[:, turn].where(moving, torch.zeros_like(kinds[:, turn]))
                    operations.append(K.RandomAffine(0.0, shear=0.0, p=1.0, align_corners=False))
                    parameters.append(affine_of(drawn, strengths[:, turn]))
            else:
                operations.append(next(built))
                shape = torch.Size((VIEW_BLOCK, 1, SIDE, SIDE))
                parameters.append(operations[-1].forward_parameters(shape))
    first = [
        {name: value[:COUNT] for name, value in each.items() if name != "forward_input_shape"}
        | {"forward_input_shape": torch.tensor([COUNT, 1, SIDE, SIDE])}
        for each in parameters
    ]
    sequence = K.AugmentationSequential(
        *operations,
        data_keys=["input", "mask", "bbox_xyxy", "keypoints"],
        extra_args={DataKey.MASK: {"resample": Resample.BILINEAR, "align_corners": False}},
    )
    names = [name for name, _ in sequence.named_children()]
    return sequence, [ParamItem(*item) for item in zip(names, first, strict=True)]


def smooth_photographs():
    generator = np.random.default_rng(0)
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    waves = generator.uniform(-4, 4, (COUNT, 3, 3))
    pictures = [[np.sin(a * x + b * y + c) for a, b, c in picture] for picture in waves]
    return ((np.array(pictures) * 0.4 + 0.5) * 255).round().astype(np.uint8)


def normalized(pixels):
    """Points in pixels, whose centers are whole numbers, as coordinates from -1 to 1."""
    return (2 * pixels + 1) / SIDE - 1


def points_in_view(matrices, pixels):
    """Move points [n, m, 2] in pixels of the image to the views."""
    points = torch.cat([normalized(pixels), torch.ones(*pixels.shape[:2], 1)], dim=2).double()
    moved = points @ torch.linalg.inv(matrices.double()).mT
    return (((moved[..., :2] / moved[..., 2:] + 1) * SIDE - 1) / 2).float()


def inner(views):
    """Pixels of views inside of their window and image, some pixels from their edges: [n, h, w]."""
    line = normalized(torch.arange(SIDE).float())
    grid = torch.stack([*torch.meshgrid(line, line, indexing="xy"), torch.ones(SIDE, SIDE)], dim=-1)
    places = []  # of a point in the window, and before some of the operations
    for matrices in (
        () if views.moves is None else (views.moves.window_from_view, *views.moves.between)
    ):
        places.append(torch.eye(3).repeat(COUNT, 1, 1))
        places[-1][views.moves.rows[: len(matrices)]] = matrices
    clips = torch.stack(places or [torch.eye(3).repeat(COUNT, 1, 1)], dim=1)
    in_window = torch.einsum("nsij,hwj->nhwsi", clips, grid)[..., :2].abs().amax(dim=-2)
    in_image = torch.einsum("nij,hwj->nhwi", views.canonical_from_view, grid)[..., :2]
    pixels = views.windows[:, None, None, :2].abs() * SIDE
    return (in_window.abs() < 1 - 6 / pixels).all(dim=-1) & (in_image.abs() < 1 - 6 / SIDE).all(
        dim=-1
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_a_view_is_that_of_kornia(name):
    options = OPTIONS[name]
    if not options.moving:
        pytest.skip("nothing moves")
    schedule = ViewSchedule(options, (SIDE, SIDE), SEED, whole_pixels=True)
    sizes = torch.full((COUNT, 2), SIDE)
    views = schedule.views(0, 0, sizes)
    photographs = smooth_photographs()
    line = torch.linspace(-1, 1, SIDE)
    maps = torch.stack([line.expand(SIDE, -1), line[:, None].expand(-1, SIDE)]).expand(
        COUNT, -1, -1, -1
    )
    corners = torch.tensor([[30.0, 20.0, 70.0, 64.0]])[None].repeat(COUNT, 1, 1)
    points = torch.tensor([[10.0, 12.0], [48.0, 47.0], [80.0, 30.0]])[None].repeat(COUNT, 1, 1)

    windows = np.empty((COUNT, SIDE, SIDE, 3), np.uint8)
    boxes, flips = pixel_boxes(views.windows, sizes), (views.windows[:, :2] < 0).tolist()
    for picture, box, flip, memory in zip(photographs, boxes.tolist(), flips, windows, strict=True):
        cut_window(picture.transpose(1, 2, 0), tuple(box), tuple(flip), "black", memory)
    inputs = torch.from_numpy(windows).permute(0, 3, 1, 2)
    images = render_windows(inputs, views.moves, (SIDE, SIDE), Rendering())
    warped = warp(maps, views.canonical_from_view, (SIDE, SIDE), moves=views.moves)

    sequence, parameters = kornia_pipeline(options)
    pixels = torch.from_numpy(photographs).float() / 255
    image, mask, box, point = sequence(pixels, maps, corners, points, params=parameters)

    shown = inner(views)[:, None]
    assert shown.float().mean() > 0.3
    error = ((images - image).abs() * shown).amax(dim=(1, 2, 3))
    assert error.max() < 3 / 255
    assert (
        (warped - mask).abs() * shown
    ).max() < 2e-6 * 4  # of a range of 2, after up to four operations
    everywhere = torch.ones(COUNT, 1, SIDE, SIDE)
    covered = warp(everywhere, views.canonical_from_view, (SIDE, SIDE), moves=views.moves)
    beyond = F.max_pool2d(covered, 5, stride=1, padding=2) == 0  # two pixels and more
    assert (images * beyond).max() == 0
    expected = points_in_view(views.canonical_from_view, points)
    assert torch.allclose(point.data if hasattr(point, "data") else point, expected, atol=2e-3)
    x0, y0, x1, y1 = corners.unbind(dim=-1)
    around = torch.stack([x0, y0, x1, y0, x1, y1, x0, y1], dim=-1).view(COUNT, 4, 2)
    moved = points_in_view(views.canonical_from_view, around)
    expected = torch.cat([moved.amin(dim=1), moved.amax(dim=1)], dim=-1)
    assert torch.allclose(box[:, 0], expected, atol=1.01)
