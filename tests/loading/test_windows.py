"""Windows of original images: their pixels, their matrices, and the path from files to views."""

import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import obstore
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from PIL import Image, ImageOps

from permafrost import RecordLoader, open_store
from permafrost.annotation import shard_tasks
from permafrost.annotation.annotator import TeacherAnnotator
from permafrost.config.augment import (
    AugmentOptions,
    MixConfig,
    OperationConfig,
    PixelOperationConfig,
    PolicyConfig,
    RandomViewsConfig,
)
from permafrost.config.data import ImageFolderDataConfig
from permafrost.config.models import CifarModelConfig
from permafrost.config.store import PassOptions
from permafrost.core.batches import Moves, Rendering
from permafrost.core.errors import ConfigError
from permafrost.loading import transfer
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.geometry import (
    TargetRequest,
    render_frames,
    render_windows,
    view_images,
    view_targets,
)
from permafrost.loading.loader import TrainLoader
from permafrost.loading.random_views import ViewSchedule, schedule_views
from permafrost.loading.regions import regions_of
from permafrost.loading.replayed_views import check_replayed
from permafrost.loading.sampler import EpochSlice
from permafrost.loading.subset import rows_of_split
from permafrost.loading.windows import (
    Views,
    cut_window,
    pixel_boxes,
    stored_views_of,
    windows_of_boxes,
)
from permafrost.storage import buckets
from permafrost.storage.rooted_paths import rooted
from permafrost.store.entries import ManifestError, StoreMismatchError
from permafrost.store.reader import Store
from permafrost.store.record_form import resize_pixels
from permafrost_estimate.freezing import measure_views
from permafrost_estimate.turns import TimeBudget
from tests.support.buckets import files_below, memory_buckets
from tests.support.kills import killed_at
from tests.support.runs import TRAINER, assert_equal_states, distill_config, weights_of
from tests.support.slow import slow
from tests.support.stores import Frozen, precompute_config
from tests.support.verbs import distill, precompute

CROP = OperationConfig(kind="resized_crop", scale=(0.08, 1.0))
FLIP = OperationConfig(kind="horizontal_flip")
PADDED = OperationConfig(kind="pad_crop", padding=6)
SHEARS = PolicyConfig(kind="randaugment", magnitude=20.0)
SIZES = [(64, 96), (120, 80), (75, 75), (40, 130), (33, 57), (100, 64), (90, 91), (200, 150)]
FRAME = 32


def smooth_picture(number, height, width):
    """Picture of few waves with some noise, u8 [H, W, 3]."""
    generator = np.random.default_rng(number)
    y, x = np.mgrid[0:height, 0:width] / 20
    waves = [np.sin(x * a + y * b + c) for a, b, c in generator.uniform(-3, 3, (3, 3))]
    noise = generator.normal(scale=4, size=(height, width, 3))
    return (np.stack(waves, axis=2) * 90 + 127 + noise).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Folder of images of many sizes, of which one is turned by EXIF."""
    folder = tmp_path_factory.mktemp("pictures")
    for split, first in (("train", 0), ("test", 100)):
        for number, (height, width) in enumerate(SIZES):
            path = (
                folder / split / f"class{number % 2}" / f"{number}.{'jpg' if number % 3 else 'png'}"
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            exif = Image.Exif()
            exif[274] = 6 if number == 1 else 1
            picture = Image.fromarray(smooth_picture(first + number, height, width))
            picture.save(path, exif=exif, **({"quality": 95} if number % 3 else {}))
    return folder


def options(photographs, store, **others):
    teacher = CifarModelConfig(name="resnet8", weights="random", width=4, input_size=FRAME)
    return precompute_config(
        store,
        teacher,
        data=ImageFolderDataConfig(path=str(photographs)),
        image_size=FRAME,
        shard_size=4,
        **others,
    )


@pytest.fixture(scope="module")
def store(photographs, tmp_path_factory):
    """Store of the originals with a pass of whole frames."""
    path = tmp_path_factory.mktemp("originals") / "store"
    precompute.run(options(photographs, path))
    return Store(path)


def files_of(store):
    """Bytes of each record, by key."""
    files = {}
    for number, shard in enumerate(store.shards):
        data = Path(str(store.folder), shard.path).read_bytes()
        columns = store.index.take(("offset", "size"), store.rows_of_shard(number))
        keys = store.index.shard_keys(number)
        for key, offset, size in zip(keys, columns["offset"], columns["size"], strict=True):
            files[key] = data[offset : offset + size]
    return files


def originals(store):
    """Upright pixels of each record as Pillow decodes them, by key."""
    pixels = {}
    for key, data in files_of(store).items():
        with Image.open(io.BytesIO(data)) as image:
            pixels[key] = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    return pixels


def loader_of(store, *operations, size=24, **arguments):
    augment = AugmentOptions(operations=operations, size=size)
    dataset = StoreDataset(store, rows_of_split(store.index, "train"), store.open_passes())
    views = schedule_views(dataset, augment, arguments.pop("seed", 0))
    return TrainLoader(dataset, views, view_size=(size, size), batch_size=4, seed=0, **arguments)


# ---- pixels --------------------------------------------------------------------------------------


def test_a_window_is_what_pillow_crops_and_resizes():
    """To one level: both round, and torch's kernel for bytes rounds after each axis."""
    generator = np.random.default_rng(0)
    worst, total = 0, 0.0
    for number in range(60):
        height, width = generator.integers(20, 300, 2)
        pixels = smooth_picture(number, height, width)
        x, y = (
            np.sort(generator.choice(np.arange(side + 1), 2, False)) for side in (width, height)
        )
        box, flips = (x[0], y[0], x[1], y[1]), (bool(number % 2), bool(number % 3 == 0))
        size = tuple(generator.integers(8, 64, 2))
        memory = np.empty((*size, 3), np.uint8)

        cut_window(pixels, tuple(map(int, box)), flips, "black", memory)

        wanted = Image.fromarray(pixels).crop(box).resize(size[::-1], Image.Resampling.BILINEAR)
        for flip, method in zip(flips, (0, 1), strict=True):
            wanted = wanted.transpose(Image.Transpose(method)) if flip else wanted
        difference = np.abs(memory.astype(int) - np.array(wanted).astype(int))
        worst, total = max(worst, difference.max()), total + difference.mean()
    assert worst <= 1
    assert total / 60 < 0.1


@pytest.mark.parametrize(("border", "mode"), [("black", "constant"), ("edge", "edge")])
def test_padding_is_that_of_torchvision(border, mode):
    pixels = smooth_picture(3, 40, 30)
    padded = tv.pad(torch.from_numpy(pixels).permute(2, 0, 1), [25, 25], padding_mode=mode)
    for box in ((-6, -3, 24, 37), (12, 20, 50, 52), (-20, -20, 50, 60), (5, -9, 25, 9)):
        memory = np.empty((24, 24, 3), np.uint8)

        cut_window(pixels, box, (False, False), border, memory)

        left, top, right, bottom = (side + 25 for side in box)
        part = padded[:, top:bottom, left:right].permute(1, 2, 0).numpy()
        wanted = Image.fromarray(part).resize((24, 24), Image.Resampling.BILINEAR)
        assert np.abs(memory.astype(int) - np.array(wanted).astype(int)).max() <= 1


def test_a_window_beside_the_image_is_black():
    memory = np.full((8, 8, 3), 7, np.uint8)

    cut_window(smooth_picture(0, 20, 20), (30, 0, 40, 10), (False, False), "black", memory)

    assert not memory.any()


PROGRAM = """
import hashlib, numpy as np, torch
from permafrost.store.record_form import resize_pixels
generator = np.random.default_rng(0)
digest = hashlib.sha256()
for _ in range(40):
    pixels = generator.integers(0, 256, (*generator.integers(10, 400, 2), 3), dtype=np.uint8)
    for size in ((32, 32), (224, 224)):
        digest.update(resize_pixels(pixels, size).tobytes())
print(digest.hexdigest(), torch.backends.cpu.get_cpu_capability())
"""


@pytest.mark.slow
def test_bytes_of_a_resized_image_are_the_same_with_any_instructions():
    def run(**variables):
        result = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env=os.environ | variables,
            capture_output=True,
            text=True,
            check=True,
        )
        return result.stdout.split()

    (plain, _), (fast, _) = run(ATEN_CPU_CAPABILITY="default"), run()
    assert plain == fast


def test_a_part_of_an_image_in_any_layout_is_resized_alike():
    pixels = smooth_picture(1, 90, 120)
    part = pixels[10:70, 20:100]

    assert np.array_equal(
        resize_pixels(part, (24, 24)), resize_pixels(np.ascontiguousarray(part), (24, 24))
    )


# ---- numbers -------------------------------------------------------------------------------------


def test_boxes_become_windows_and_the_same_boxes_again():
    generator = np.random.default_rng(0)
    sizes = generator.integers(1, 20_000, (5000, 2))
    starts = (generator.uniform(-0.9, 0.99, (5000, 2)) * sizes[:, ::-1]).astype(int)
    sides = 1 + (generator.uniform(0, 2, (5000, 2)) * sizes[:, ::-1]).astype(int)
    boxes = np.concatenate([starts, starts + sides], axis=1)
    flips = torch.from_numpy(generator.choice([-1.0, 1.0], (5000, 2)))
    sizes = torch.from_numpy(sizes)

    windows = windows_of_boxes(boxes, flips, sizes)

    assert windows.dtype == torch.float32
    assert np.array_equal(pixel_boxes(windows, sizes), boxes)
    assert torch.equal(windows[:, :2].sign().double(), flips)


def test_drawn_windows_are_whole_pixels_inside_of_the_image():
    schedule = ViewSchedule(
        AugmentOptions(operations=(CROP, FLIP)), (32, 32), 0, one_aspect=False, whole_pixels=True
    )
    sizes = torch.randint(5, 4000, (4000, 2), generator=torch.Generator().manual_seed(0))
    windows = schedule.views(0, 0, sizes).windows
    boxes = torch.from_numpy(pixel_boxes(windows, sizes))

    assert boxes[:, :2].min() >= 0
    assert (boxes[:, 2:] <= sizes.flip(1)).all()
    area = ((boxes[:, 2:] - boxes[:, :2]).prod(dim=1) / sizes.prod(dim=1))[sizes.amin(dim=1) > 500]
    assert 0.075 < area.min() < 0.1
    assert area.max() > 0.95
    assert 0.45 < (windows[:, 0] < 0).double().mean() < 0.55


def test_the_matrix_of_a_view_is_the_product_of_window_and_moves():
    generator = torch.Generator().manual_seed(0)
    windows = torch.rand(50, 4, generator=generator) - 0.5
    moves = torch.rand(50, 2, 3, 3, generator=generator)
    moves[:, :, 2] = torch.tensor([0.0, 0.0, 1.0])
    matrices = torch.diag_embed(torch.cat([windows[:, :2], torch.ones(50, 1)], dim=1))
    matrices[:, :2, 2] = windows[:, 2:]

    views = Views.of(windows, moves)

    assert torch.allclose(
        views.canonical_from_view, matrices @ moves[:, 0] @ moves[:, 1], atol=1e-6
    )
    assert torch.equal(Views.of(windows, None).canonical_from_view, matrices)
    assert torch.equal(
        Views.of(windows[:9], moves[:9]).canonical_from_view, views.canonical_from_view[:9]
    )


@pytest.mark.parametrize(
    ("window", "problem"),
    [
        ((np.nan, 1, 0, 0), "has numbers that are not finite"),
        ((1, np.inf, 0, 0), "has numbers that are not finite"),
        ((0, 1, 0, 0), "is empty"),
        ((1, 9, 0, 0), "is more than 8 times as large as the image"),
        ((0.5, 0.5, 1.5, 0), "is wholly outside of the image"),
        ((0.5, -0.5, 0, -1.6), "is wholly outside of the image"),
    ],
)
def test_a_window_that_shows_nothing_is_named(window, problem):
    windows = np.array([[1, 1, 0, 0], window], np.float32)

    values = {"canonical_from_window": windows}
    with pytest.raises(StoreMismatchError, match=f"pass, record b: its window {problem}"):
        stored_views_of(values, None, torch.ones(2, 2), (32, 32), "pass", ["a", "b"])


# ---- batches -------------------------------------------------------------------------------------


def test_a_batch_has_the_pixels_of_the_files(store):
    pictures = originals(store)
    assert len(pictures) == 16
    compared = 0
    for batch in loader_of(store, CROP, FLIP).epoch(1):
        assert batch.has_windows
        assert batch.inputs.shape[1:] == (3, 24, 24)
        images = view_images(batch, (24, 24))
        for key, image, matrix in zip(batch.keys, images, batch.canonical_from_view, strict=True):
            picture = Image.fromarray(pictures[key])
            (sx, _, tx), (_, sy, ty), _ = matrix.double().tolist()
            edges = [
                ((center + sign * abs(scale)) + 1) / 2 * side
                for sign in (-1, 1)
                for scale, center, side in ((sx, tx, picture.width), (sy, ty, picture.height))
            ]
            assert np.allclose(edges, np.round(edges), atol=1e-3)
            part = picture.crop(tuple(np.round(edges).astype(int)))
            wanted = part.resize((24, 24), Image.Resampling.BILINEAR)
            wanted = wanted.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if sx < 0 else wanted
            assert np.abs(image.permute(1, 2, 0).numpy() * 255 - np.array(wanted)).max() <= 1.001
            compared += 1
    assert compared == 8


def test_small_images_and_recipes_that_enlarge_what_was_moved_are_sampled_from_frames(
    store, frozen
):
    late = loader_of(store, OperationConfig(kind="rotation", degrees=20.0), CROP)

    assert not next(late.epoch(0)).has_windows
    assert store.has_larger_images
    assert not frozen.store.has_larger_images  # no larger than their frame
    augment = AugmentOptions(operations=(CROP,))
    dataset = StoreDataset(frozen.store, rows_of_split(frozen.store.index, "train"))
    assert not schedule_views(dataset, augment, 0).whole_pixels
    assert next(loader_of(store, PADDED, FLIP, CROP).epoch(0)).has_windows


def test_what_is_outside_of_a_moved_window_is_black_and_not_covered(store):
    """At the corners of a crop that is turned by 45 degrees the image goes on, and nothing of it is shown."""
    turn = OperationConfig(kind="affine", p=1.0, degrees=180.0)
    bright = smooth_picture(0, 64, 64) // 2 + 128
    for batch in loader_of(store, CROP, turn).epoch(0):
        lit = replace(
            batch, inputs=torch.from_numpy(bright[:24, :24]).permute(2, 0, 1).expand(4, -1, -1, -1)
        )
        images = view_images(lit, (24, 24))
        (targets,) = view_targets(batch, TargetRequest((24, 24)))
        grid = (2 * torch.arange(24) + 1) / 24 - 1
        points = torch.stack(
            [*torch.meshgrid(grid, grid, indexing="xy"), torch.ones(24, 24)], dim=-1
        )
        assert batch.moves.rows.tolist() == [0, 1, 2, 3]
        for row, matrix in enumerate(batch.moves.window_from_view):
            distance = (points @ matrix.T)[..., :2].abs().amax(dim=-1)
            outside, inside = distance > 1 + 1.5 / 24, distance < 1 - 1.5 / 24  # of whole cells
            assert (images[row][:, outside] == 0).all()
            assert (images[row][:, inside] > 0.4).all()
            assert (targets.maps[row][..., outside] == 0).all()


@pytest.mark.parametrize("kind", ["rotate", "shear_x", "translate_y"])
def test_moves_of_nearest_pixels_are_those_of_torchvision(kind):
    window = torch.from_numpy(smooth_picture(3, 40, 40)).permute(2, 0, 1)
    angle, shear, shift = 20.0, 0.3, 7
    arguments = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    linear = torch.eye(3)
    if kind == "rotate":
        arguments["angle"] = angle
        cosine, sine = np.cos(np.radians(angle)), np.sin(np.radians(angle))
        linear[:2, :2] = torch.tensor([[cosine, sine], [-sine, cosine]])
    elif kind == "shear_x":
        arguments |= {"shear": [float(np.degrees(np.arctan(shear))), 0.0]}
        linear[0, 1] = shear
    else:
        arguments["translate"] = [0, shift]
        linear[1, 2] = -2 * shift / 40
    theirs = tv.affine(window, interpolation=tv.InterpolationMode.NEAREST, fill=0.0, **arguments)
    moves = Moves(rows=torch.tensor([0]), window_from_view=linear[None])

    ours = render_windows(window[None], moves, (40, 40), Rendering(interpolation="nearest"))
    smooth = render_windows(window[None], moves, (40, 40), Rendering())

    same = (ours[0] * 255 - theirs).abs().amax(dim=0) < 0.01
    assert (
        same.float().mean() > 0.98
    )  # where the nearest of two pixels is not a matter of the last bit
    colors = {tuple(color) for color in window.flatten(1).T.tolist()} | {(0, 0, 0)}
    assert all(tuple(color) in colors for color in (ours[0] * 255).round().flatten(1).T.tolist())
    assert torch.allclose(ours, smooth, atol=0.01) == (kind == "translate_y")


def test_nearest_pixels_of_frames_are_those_of_their_windows():
    frame = torch.from_numpy(smooth_picture(5, 40, 40)).permute(2, 0, 1)[None]
    window = torch.tensor(
        [[-0.5, 0.5, 0.25, -0.1]]
    )  # half of the frame, flipped, from whole pixels
    angle = np.radians(30)
    turn = torch.tensor(
        [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]
    ).float()
    views = Views.of(window, torch.linalg.inv(turn)[None, None])
    rendering = Rendering(interpolation="nearest")

    sampled = render_frames(frame, views.canonical_from_view, views.moves, rendering, (20, 20))
    memory = np.empty((20, 20, 3), np.uint8)
    box = tuple(pixel_boxes(window, torch.tensor([[40, 40]]))[0].tolist())
    cut_window(frame[0].permute(1, 2, 0).numpy(), box, (True, False), "black", memory)
    cut = torch.from_numpy(memory).permute(2, 0, 1)[None]

    assert torch.allclose(sampled, render_windows(cut, views.moves, (20, 20), rendering), atol=1e-5)
    assert (sampled == 0).all(dim=1).float().mean() > 0.02


def test_edges_of_the_image_are_those_of_before(store):
    """`edges: image` shows the image around the crop, sampled from the frame by one matrix."""
    turn = OperationConfig(kind="rotation", p=1.0, degrees=45.0)
    dataset = StoreDataset(store, rows_of_split(store.index, "train"))
    shown = {}
    for edges in ("window", "image"):
        augment = AugmentOptions(operations=(CROP, turn), edges=edges)
        views = schedule_views(dataset, augment, 0)
        shown[edges] = next(TrainLoader(dataset, views, batch_size=8, seed=0).epoch(0))

    assert shown["image"].moves is None
    assert not shown["image"].has_windows
    assert torch.allclose(
        shown["image"].canonical_from_view, shown["window"].canonical_from_view, atol=0.05
    )
    window, image = (view_images(batch, (FRAME, FRAME)) for batch in shown.values())
    assert (window == 0).float().mean() > (image == 0).float().mean() + 0.05


@pytest.mark.parametrize("workers", [slow(1), 2])
def test_bits_do_not_depend_on_processes_threads_ranks_or_kept_images(store, workers):
    operations = (CROP, FLIP, SHEARS)
    wanted = {
        key: image
        for batch in loader_of(store, *operations).epoch(3)
        for key, image in zip(batch.keys, view_images(batch, (24, 24)), strict=True)
    }
    assert len(wanted) == 8

    def check(batches, count=8):
        seen = 0
        for batch in batches:
            for key, image in zip(batch.keys, view_images(batch, (24, 24)), strict=True):
                assert torch.equal(image, wanted[key])
                seen += 1
        assert seen == count

    check(loader_of(store, *operations, loader_processes=workers).epoch(3))
    check(loader_of(store, *operations).epoch(3, 1), 4)
    for rank in range(2):
        check(loader_of(store, *operations, rank=rank, world_size=2).epoch(3), 4)
    augment = AugmentOptions(operations=operations, size=24)
    for keep_bytes in (0, 2**26):
        rows = rows_of_split(store.index, "train")
        dataset = StoreDataset(store, rows, keep_bytes=keep_bytes, decode_threads=3)
        views = schedule_views(dataset, augment, 0)
        loader = TrainLoader(dataset, views, view_size=(24, 24), batch_size=4, seed=0)
        check(loader.epoch(3))
        check(loader.epoch(3))  # of the images that are kept now


def scaled_views(store, side=12, **others):
    """Views of a store in an epoch, by key, with scaled decoding and without."""
    views = {}
    for scaled in (True, False):
        augment = AugmentOptions(operations=(CROP, FLIP), size=side, scaled_decoding=scaled)
        dataset = StoreDataset(store, rows_of_split(store.index, "train"), **others)
        loader = TrainLoader(
            dataset,
            schedule_views(dataset, augment, 0),
            view_size=(side, side),
            batch_size=4,
            seed=0,
        )
        views[scaled] = {
            key: (image.float(), window)
            for batch in loader.epoch(1)
            for key, image, window in zip(
                batch.keys, batch.inputs, batch.canonical_from_view, strict=True
            )
        }
    return views


def test_large_windows_are_decoded_to_less_and_show_the_same_place(store):
    views = scaled_views(store)
    again = scaled_views(store, keep_bytes=0, decode_threads=3)
    files, changed = files_of(store), 0
    for key, (scaled, window) in views[True].items():
        full, other = views[False][key]
        assert torch.equal(scaled, again[True][key][0])
        assert torch.equal(window, other)
        with Image.open(io.BytesIO(files[key])) as image:
            lengths = window.diagonal()[:2].abs() * torch.tensor(image.size)
            is_plain = image.format == "JPEG" and image.getexif().get(274, 1) == 1
        if is_plain and lengths.min() > 24.5:
            assert 0 < (scaled - full).abs().mean() < 12
            changed += 1
        elif not is_plain or lengths.min() < 23.5:
            assert torch.equal(scaled, full)
    assert changed > 2


def test_scaled_decoding_of_what_is_not_decoded_for_a_view_is_refused(store, photographs, tmp_path):
    scaled = AugmentOptions(operations=(CROP,), scaled_decoding=True)
    records = store_records(store)
    with pytest.raises(ConfigError, match="scaled_decoding=true: these views are sampled"):
        RecordLoader(records, augment=replace(scaled, edges="image"))
    with pytest.raises(ConfigError, match="an option of trainings"):
        precompute.run(
            options(
                photographs, tmp_path / "store", views=RandomViewsConfig(count=1), augment=scaled
            )
        )
    (teacher,) = store.open_passes()
    with pytest.raises(StoreMismatchError, match="replayed views have the pixels of"):
        check_replayed(scaled, teacher)


def test_an_own_loop_has_the_views_of_a_training(store):
    augment = AugmentOptions(operations=(CROP, FLIP, SHEARS), size=24)
    records = store_records(store)
    loader = RecordLoader(records, augment=augment, batch_size=4)
    theirs = loader_of(store, *augment.operations)

    for batch, other in zip(loader, theirs.epoch(0), strict=True):
        assert batch.keys == other.keys
    loader.set_epoch(0)
    for batch, other in zip(loader, theirs.epoch(0), strict=True):
        # Changes of color are drawn by both, here by none.
        assert torch.equal(batch.stored.inputs, other.inputs)
        assert torch.equal(batch.stored.canonical_from_view, other.canonical_from_view)


def store_records(store):
    return open_store(str(store.folder)).select("train")


def test_views_of_a_sampler_depend_on_its_order(store):
    augment = AugmentOptions(operations=(CROP,), size=24)
    records = store_records(store)
    loader = RecordLoader(records, augment=augment, sampler=[5, 5, 2, 1], batch_size=2)

    first, second = loader

    assert first.keys[0] == first.keys[1]
    assert not torch.equal(first.images[0], first.images[1])  # two views of one record
    sizes = records.sizes([2, 1])
    schedule = schedule_views(StoreDataset(store, records.rows), augment, 0)
    assert torch.equal(
        second.stored.canonical_from_view, schedule.views(0, 2, sizes).canonical_from_view
    )


def test_an_image_of_another_size_than_its_index_stops(photographs, tmp_path):
    precompute.run(options(photographs, tmp_path / "store"))
    store = Store(tmp_path / "store")
    dataset = StoreDataset(store, rows_of_split(store.index, "train"))
    dataset = dataset.in_views(schedule_views(dataset, AugmentOptions(operations=(CROP,)), 0))
    take = store.index.take

    def swapped(names, rows):
        columns = take(names, rows)
        return columns | {"height": columns["height"] + 1} if "height" in columns else columns

    store.index.take = swapped
    with pytest.raises(ManifestError, match=r"has \d+x\d+ pixels, and \d+x\d+ in the index; run"):
        dataset.__getitems__(EpochSlice([0, 1], 0, 0))


def test_padding_of_an_edge_that_follows_a_rotation_is_refused():
    rotation = OperationConfig(kind="rotation", degrees=10.0)
    edge = OperationConfig(kind="pad_crop", padding_mode="edge")

    assert AugmentOptions(operations=(edge, rotation)).border == "edge"
    with pytest.raises(ConfigError, match="padding_mode: edge continues the image"):
        AugmentOptions(operations=(rotation, edge))


def test_regions_of_objects_follow_the_window(store):
    """A box is where the matrix sends its corners, at the resolution of the view."""
    batch = next(loader_of(store, CROP).epoch(0))
    boxes = torch.tensor([[0, -0.6, -0.5, 0.4, 0.7]])
    batch = replace(batch, boxes=(boxes,) * 4, masks=torch.zeros(4, 1, 96, 96, dtype=torch.uint8))

    regions = regions_of(batch, torch.zeros(4, dtype=torch.int64), "boxes", (24, 24))

    centers = (2 * torch.arange(24) + 1) / 24 - 1
    for region, matrix in zip(regions, batch.canonical_from_view, strict=True):
        x, y = centers * matrix[0, 0] + matrix[0, 2], centers * matrix[1, 1] + matrix[1, 2]
        wanted = ((x > -0.6) & (x < 0.4))[None] & ((y > -0.5) & (y < 0.7))[:, None]
        assert (region != wanted).float().mean() < 0.1
        assert region.any() == wanted.any()


# ---- stored views --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "mix"),
    [("zarr", ()), ("webdataset", ()), ("zarr", (MixConfig(kind="cutmix"),))],
    ids=["zarr", "webdataset", "mixtures"],
)
def test_a_student_receives_the_pixels_of_the_teacher(
    photographs, tmp_path, monkeypatch, backend, mix
):
    received = {}
    run = TeacherAnnotator.annotate_inputs

    def note(self, inputs, records):
        for key, image in zip(records.keys, inputs, strict=True):
            received.setdefault(key, []).append(image.clone())
        return run(self, inputs, records)

    monkeypatch.setattr(TeacherAnnotator, "annotate_inputs", note)
    config = options(
        photographs,
        tmp_path / "store",
        backend=backend,
        views=RandomViewsConfig(count=3, mix=mix),
        augment=AugmentOptions(operations=(CROP, FLIP, SHEARS)),
        annotate=PassOptions(batch_size=3),
    )
    precompute.run(config)
    store = Store(tmp_path / "store")
    (teacher,) = store.open_passes(stored_views=True)
    dataset = StoreDataset(store, rows_of_split(store.index, "train"), [teacher])
    fields = {spec.name: spec.shape for spec in teacher.manifest.fields}

    assert fields["canonical_from_window"] == (4,)
    assert "moves" not in fields  # those of policies follow from their values
    assert teacher.manifest.views["pixels"] == "originals"
    compared = set()
    loader = TrainLoader(dataset, None, view_size=(FRAME, FRAME), batch_size=4, seed=0)
    for epoch in range(3):
        for batch in loader.epoch(epoch):
            assert batch.has_windows
            images = view_images(batch, (FRAME, FRAME))
            for key, view, image in zip(batch.keys, batch.view_index, images, strict=True):
                assert torch.equal(image, received[key][int(view)].cpu())
                compared.add((key, int(view)))
    assert len(compared) == 3 * 8


STRONG = AugmentOptions(
    operations=(
        CROP,
        FLIP,
        SHEARS,
        PixelOperationConfig(kind="color_jitter", brightness=0.4, saturation=0.4),
        PixelOperationConfig(kind="random_erasing", p=0.5),
    )
)


def replayed(store, batch_size, first_step=0, **options):
    """Images and windows of three epochs of replays, by epoch, key and view."""
    (teacher,) = store.open_passes(stored_views=True)
    dataset = StoreDataset(store, rows_of_split(store.index, "train"), [teacher])
    loader = TrainLoader(
        dataset, None, view_size=(FRAME, FRAME), batch_size=batch_size, seed=0, **options
    )
    return {
        (epoch, key, int(view)): (image, window)
        for epoch in range(3)
        for batch in loader.epoch(epoch, first_step)
        for key, view, image, window in zip(
            batch.keys,
            batch.view_index,
            view_images(batch, (FRAME, FRAME)),
            batch.canonical_from_view,
            strict=True,
        )
    }


@pytest.mark.parametrize("backend", ["zarr", "webdataset"])
def test_replays_have_the_same_bits_after_a_kill_in_a_bucket_and_on_any_rank(
    photographs, tmp_path, backend
):
    def config(path):
        return options(
            photographs,
            path,
            backend=backend,
            views=RandomViewsConfig(count=3),
            augment=STRONG,
            annotate=PassOptions(batch_size=3),
        )

    precompute.run(config(tmp_path / "whole"))
    with killed_at(shard_tasks, "read_arrays", 6):  # an image of the second shard
        precompute.run(config(tmp_path / "killed"))
    precompute.run(config(tmp_path / "killed"))
    wanted = replayed(Store(tmp_path / "whole"), 4)
    assert len(wanted) == 3 * 8

    def check(images, count):
        assert len(images) == count
        for place, (image, window) in images.items():
            assert torch.equal(image, wanted[place][0])
            assert torch.equal(window, wanted[place][1])

    with memory_buckets(tmp_path / "cache"):
        for path, data in files_below(tmp_path / "killed").items():
            obstore.put(buckets._client("s3://bucket"), f"store/{path}", data)
        for store in (Store(tmp_path / "killed"), Store(rooted("s3://bucket/store"))):
            check(replayed(store, 4), 24)
            check(replayed(store, 4, first_step=1), 12)
            for world_size, batch_size, records in ((2, 4, 8), (3, 3, 6)):
                parts = [
                    replayed(store, batch_size, rank=rank, world_size=world_size)
                    for rank in range(world_size)
                ]
                assert not parts[0].keys() & parts[1].keys()
                check({place: each for part in parts for place, each in part.items()}, 3 * records)
    received = torch.stack([image for image, _ in wanted.values()])
    assert received.std() > 0.1


@pytest.mark.parametrize("backend", ["zarr", slow("webdataset")])
def test_a_student_of_windows_is_the_same_after_a_kill(photographs, tmp_path, backend):
    config = options(
        photographs,
        tmp_path / "store",
        backend=backend,
        views=RandomViewsConfig(count=2),
        augment=STRONG,
    )
    precompute.run(config)
    frozen = Frozen(Store(tmp_path / "store"), config)
    trainer = replace(TRAINER, epochs=3, batch_size=4, checkpoint_every_steps=1)
    student = {"augment": STRONG, "mode": "replay", "trainer": trainer}
    distill.run(distill_config(frozen, run="whole", **student))
    with killed_at(transfer, "move_batch", 4):
        distill.run(distill_config(frozen, run="killed", **student))
    distill.run(distill_config(frozen, run="killed", **student))
    assert_equal_states(weights_of("killed"), weights_of("whole"))


def test_an_estimate_measures_views_of_the_files(photographs, tmp_path):
    config = options(photographs, tmp_path / "store")
    precompute.run(config)
    shown = []
    annotate = TeacherAnnotator.inputs_of_views

    def note(self, batch, views):
        shown.append((views.cuts_originals, batch.frames.ndim))
        return annotate(self, batch, views)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TeacherAnnotator, "inputs_of_views", note)
        strong = replace(config, augment=STRONG)
        cost = measure_views(strong, Store(tmp_path / "store"), 1, TimeBudget(None))

    assert shown == [(True, 5)] * 2  # the first one warms up
    assert cost.seconds > 0
    assert 0 < cost.distances["logits"] < np.inf
