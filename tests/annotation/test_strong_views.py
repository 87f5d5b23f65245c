"""Strong stored views: values in place of seeds, the teacher's pixels bit for bit, and a reference from the page."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from permafrost import RecordLoader, open_store
from permafrost.annotation.annotator import TeacherAnnotator
from permafrost.annotation.stored_views import DrawnViews, plan_stored_views
from permafrost.config.augment import (
    AugmentOptions,
    MixConfig,
    OperationConfig,
    PixelOperationConfig,
    PolicyConfig,
    RandomViewsConfig,
    describe_operations,
)
from permafrost.config.methods import E2KDConfig, KDConfig
from permafrost.config.store import SubsetOptions
from permafrost.core.batches import PixelAugment, Rendering, StoredTargets
from permafrost.core.records import FieldSpec
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.geometry import TargetRequest, view_images, view_targets
from permafrost.loading.loader import TrainLoader
from permafrost.loading.random_views import ViewSchedule
from permafrost.loading.recipes import SPACE, PixelSchedule, Recipe
from permafrost.loading.replayed_views import check_replayed
from permafrost.loading.subset import rows_of_split
from permafrost.loading.windows import Views, in_views, stack_views, stored_views_of
from permafrost.storage import buckets
from permafrost.storage.rooted_paths import rooted
from permafrost.store.entries import ManifestError, StoreMismatchError
from permafrost.store.reader import Store
from permafrost.store.verification import verify_store
from tests.support.buckets import contents, files_below, memory_buckets
from tests.support.geometry import frames_of_size, make_batch
from tests.support.runs import TRAINER, distill_config
from tests.support.slow import slow
from tests.support.stores import Frozen, precompute_config
from tests.support.trees import tree_bytes
from tests.support.verbs import distill, precompute
from tests.support.views import interrupt_second_shard_of_views

STRONG = AugmentOptions(
    operations=(
        OperationConfig(kind="pad_crop", padding=3),
        OperationConfig(kind="horizontal_flip"),
        PolicyConfig(kind="randaugment"),
        PixelOperationConfig(kind="color_jitter"),
        PixelOperationConfig(kind="gaussian_blur"),
        PixelOperationConfig(kind="random_erasing"),
    )
)
VIEWS = RandomViewsConfig(count=3, seed=1)
SIZE = (16, 16)


@pytest.fixture(scope="module", params=["zarr", slow("webdataset")])
def strong(request, tmp_path_factory, tiny_teacher):
    """A store with a canonical pass and one of three strong views."""
    folder = tmp_path_factory.mktemp("strong") / "store"
    config = replace(
        precompute_config(folder, tiny_teacher, backend=request.param), views=VIEWS, augment=STRONG
    )
    precompute.run(config)
    return Frozen(Store(Path(config.store.path)), config)


def replay_loader(strong, batch_size=12, **options):
    (teacher,) = strong.store.open_passes(stored_views=True)
    dataset = StoreDataset(strong.store, rows_of_split(strong.store.index, "train"), [teacher])
    return TrainLoader(dataset, None, batch_size=batch_size, seed=0, **options)


def images_of(loader):
    return {
        (key, int(view)): image
        for batch in loader.epoch(0)
        for key, view, image in zip(
            batch.keys, batch.view_index, view_images(batch, SIZE), strict=True
        )
    }


# ---- the teacher's pixels --------------------------------------------------------------------------


def test_a_student_receives_the_pixels_of_its_teacher_bit_for_bit(
    tmp_path, tiny_teacher, monkeypatch
):
    seen = []
    inputs = TeacherAnnotator.annotate_inputs
    monkeypatch.setattr(
        TeacherAnnotator,
        "annotate_inputs",
        lambda self, images, records: (
            seen.append((records.keys, images.clone())) or inputs(self, images, records)
        ),
    )
    config = replace(
        precompute_config(tmp_path / "store", tiny_teacher), views=VIEWS, augment=STRONG
    )
    precompute.run(config)
    strong = Frozen(Store(Path(config.store.path)), config)
    by_key = {}  # the views of a record come in the order of their numbers
    for keys, images in seen:
        for key, image in zip(keys, images, strict=True):
            by_key.setdefault(key, []).append(image)

    checked, threads = set(), torch.get_num_threads()
    try:
        for batch_size, number in ((12, 1), (5, 3), (40, 2)):
            torch.set_num_threads(number)
            for epoch in range(3):
                for batch in replay_loader(strong, batch_size).epoch(epoch):
                    images = view_images(batch, SIZE)
                    for key, view, image in zip(batch.keys, batch.view_index, images, strict=True):
                        assert torch.equal(image, by_key[key][int(view)].cpu()), (
                            key,
                            view,
                            batch_size,
                        )
                        checked.add((key, int(view)))
    finally:
        torch.set_num_threads(threads)
    assert len(checked) == 3 * 40
    plain = replay_loader(strong, 12)
    batch = next(plain.epoch(0))
    without = view_images(replace(batch, pixel_augment=None), SIZE)
    assert not torch.equal(view_images(batch, SIZE), without)  # control: colors are disturbed


def test_a_pass_stores_48_bytes_per_view_and_verifies(strong):
    (teacher,) = strong.store.open_passes(stored_views=True)
    shapes = {spec.name: (spec.shape, spec.dtype) for spec in teacher.manifest.fields}

    assert shapes["canonical_from_window"] == ((4,), "float32")
    assert "moves" not in shapes  # those of policies follow from their values
    assert shapes["pixel_values"] == ((13,), "float16")  # one more than 48 bytes hold: the blur
    assert [each["kind"] for each in teacher.manifest.views["operations"]] == [
        operation.kind for operation in STRONG.operations
    ]
    assert list(verify_store(strong.store.path)) == []


def test_both_readers_replay_the_same_images(strong):
    wanted = images_of(replay_loader(strong))
    records = open_store(strong.store.path).select("train")
    (name,) = (folder.name for folder in strong.store.pass_folders(stored_views=True))

    loader = RecordLoader(records, batch_size=12, teacher=name, replay=True, seed=0)

    found = {
        (key, int(view)): image
        for batch in loader
        for key, view, image in zip(batch.keys, batch.stored.view_index, batch.images, strict=True)
    }
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_loader_processes_and_ranks_replay_the_same_images(strong):
    wanted = images_of(replay_loader(strong))

    ranks = [images_of(replay_loader(strong, rank=rank, world_size=2)) for rank in range(2)]
    assert (ranks[0] | ranks[1]).keys() == wanted.keys()
    for key, image in (ranks[0] | ranks[1]).items():
        assert torch.equal(image, wanted[key])


@pytest.mark.slow
def test_loader_processes_replay_the_same_images(strong):
    wanted = images_of(replay_loader(strong))
    found = images_of(replay_loader(strong, loader_processes=1))

    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_a_killed_pass_of_strong_views_is_finished_to_the_same_bytes(strong, tmp_path, monkeypatch):
    config = replace(strong.config, store=replace(strong.config.store, path=str(tmp_path / "s")))
    with monkeypatch.context() as patch:
        interrupt_second_shard_of_views(patch)
        with pytest.raises(KeyboardInterrupt):
            precompute.run(config)
    assert Store(tmp_path / "s").pass_folders(stored_views=True) == []

    assert 0 < precompute.run(config).teacher_records < 3 * 40
    assert tree_bytes(tmp_path / "s") == tree_bytes(strong.store.path)


def test_a_pass_in_a_bucket_has_the_same_bytes_and_images(strong, tmp_path):
    wanted = images_of(replay_loader(strong))
    local = files_below(strong.store.path)
    with memory_buckets(tmp_path / "cache"):
        address = "s3://bucket/strong"
        config = replace(strong.config, store=replace(strong.config.store, path=address))
        precompute.run(config)
        assert contents(buckets._client("s3://bucket"), "strong") == local

        found = images_of(replay_loader(Frozen(Store(rooted(address)), config)))

    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_values_of_a_record_do_not_depend_on_who_is_selected_with_it(strong):
    store = strong.store
    whole = plan_stored_views(store, VIEWS, STRONG, "train", SubsetOptions(), 8)
    few = plan_stored_views(store, VIEWS, STRONG, "train", SubsetOptions(shots=1), 8)

    for shard in store.manifest.shards:
        rows = few.rows_of(store, shard)
        if len(rows):
            every, some = whole.draw(store, shard), few.draw(store, shard)
            assert torch.equal(some.pixels, every.pixels[rows])
            assert torch.equal(some.views.windows, every.views.windows[rows])
            assert torch.equal(some.views.steps, every.views.steps[rows])
    windows = every.views.windows
    assert not torch.equal(windows[:, 0], windows[:, 1])


# ---- students ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [KDConfig(), E2KDConfig()], ids=lambda method: method.kind)
def test_a_student_replays_strong_views_resumes_and_is_the_same(strong, method):
    options = {"mode": "replay", "method": method, "trainer": replace(TRAINER, epochs=2)}
    config = distill_config(strong, run=f"strong-{method.kind}", **options)

    assert distill.run(replace(config, augment=STRONG)).trained_epochs == 2
    assert distill.run(replace(config, augment=STRONG)).trained_epochs == 0


def test_a_student_is_told_how_often_it_sees_each_view(strong, caplog):
    config = distill_config(strong, mode="replay", run="seen", trainer=replace(TRAINER, epochs=2))

    with caplog.at_level("INFO"):
        distill.run(config)

    assert "(3 stored views, each seen 0.667 times)" in caplog.text


def test_a_recipe_that_the_pass_does_not_have_is_refused_before_anything_is_computed(strong):
    config = distill_config(strong, mode="replay", run="other")
    other = AugmentOptions(operations=(PixelOperationConfig(kind="solarize"),))

    with pytest.raises(
        StoreMismatchError, match=r"solarize.* which the stored views of .* do not have"
    ):
        distill.run(replace(config, augment=other))
    geometry = AugmentOptions(operations=STRONG.operations[:2])  # replayed as stored
    assert (
        distill.run(
            replace(config, augment=geometry, trainer=replace(TRAINER, epochs=1))
        ).trained_epochs
        == 1
    )


@pytest.mark.parametrize(
    ("operations", "fits"),
    [
        (STRONG.operations, True),
        (STRONG.operations[::-1][1:3], False),  # in another order
        (STRONG.operations[3:4] * 2, False),  # the pass has one
        (STRONG.operations[3:5], True),
        ((*STRONG.operations[3:4], PixelOperationConfig(kind="solarize", p=0.0)), True),
        ((replace(STRONG.operations[4], hue=0.3),), True),  # which a blur does not read
        ((replace(STRONG.operations[5], maps="blank"),), True),  # an option of the student
        ((replace(STRONG.operations[3], hue=0.3),), False),
    ],
)
def test_changes_of_pixels_are_those_of_the_pass_in_their_order(strong, operations, fits):
    (teacher,) = strong.store.open_passes(stored_views=True)
    augment = AugmentOptions(operations=operations)

    if fits:
        check_replayed(augment, teacher)
    else:
        with pytest.raises(StoreMismatchError, match="do not have in this order"):
            check_replayed(augment, teacher)


def test_a_pass_is_the_same_wherever_geometry_stands_among_colors():
    flip, jitter = STRONG.operations[1], STRONG.operations[3]
    policy = STRONG.operations[2]

    assert describe_operations([jitter, flip]) == describe_operations([flip, jitter])
    assert describe_operations([jitter, policy]) != describe_operations([policy, jitter])
    assert describe_operations([policy, flip]) != describe_operations([flip, policy])
    assert "hue" not in describe_operations([STRONG.operations[4]])[0]
    assert describe_operations([flip])[0].keys() >= {"kind", "p", "padding", "shear"}  # as ever


def test_a_student_of_blank_maps_replays_a_pass_that_knows_nothing_of_them(strong):
    blank = replace(STRONG.operations[5], maps="blank")
    records = open_store(strong.store.path).select("train")
    (name,) = (folder.name for folder in strong.store.pass_folders(stored_views=True))
    options = {"batch_size": 40, "teacher": name, "replay": True, "shuffle": False}

    (kept,) = RecordLoader(records, **options)
    (blanked,) = RecordLoader(records, augment=AugmentOptions(operations=(blank,)), **options)

    assert torch.equal(kept.images, blanked.images)
    assert (blanked.maps == 0).sum() > (kept.maps == 0).sum()


def test_replayed_views_are_mixed_after_their_changes(strong):
    records = open_store(strong.store.path).select("train")
    (name,) = (folder.name for folder in strong.store.pass_folders(stored_views=True))
    mixed = AugmentOptions(mix=(MixConfig(kind="mixup"),))

    (batch,) = RecordLoader(records, batch_size=40, teacher=name, replay=True, augment=mixed)

    assert batch.stored.pixel_augment.mixture is not None
    assert batch.stored.pixel_augment.changes


# ---- a manifest of strangers -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda operations: None, "not a list of operations"),
        (lambda operations: [{"kind": "warp_drive"}], "must be one of"),
        (lambda operations: [{**operations[2], "speed": 9}], "have no"),
        (lambda operations: operations[:2], "have 0 values"),
    ],
    ids=["none", "unknown kind", "unknown option", "fewer values"],
)
def test_a_manifest_whose_recipe_is_not_that_of_the_values_is_refused(strong, change, message):
    (teacher,) = strong.store.open_passes(stored_views=True)
    views = dict(teacher.manifest.views)
    views["operations"] = change(views["operations"])
    object.__setattr__(teacher, "manifest", replace(teacher.manifest, views=views))

    with pytest.raises(ManifestError, match=message):
        StoreDataset(strong.store, rows_of_split(strong.store.index, "train"), [teacher])


# ---- a reference -----------------------------------------------------------------------------------


def sample(source, matrix, size):
    """Sample [C, h, w] bilinearly at the cell centers of a view, continued at the border; also what is inside."""
    height, width = source.shape[1:]
    y, x = ((2 * np.arange(count) + 1) / count - 1 for count in size)
    u, v = np.moveaxis(
        np.stack(np.broadcast_arrays(x, y[:, None], 1.0), axis=-1) @ matrix[:2].T, -1, 0
    )
    inside = np.maximum(abs(u), abs(v)) <= 1 + 1e-6
    u = np.clip((u + 1) * width / 2 - 0.5, 0, width - 1)
    v = np.clip((v + 1) * height / 2 - 0.5, 0, height - 1)
    left, top = np.minimum(u.astype(int), width - 2), np.minimum(v.astype(int), height - 2)
    a, b = u - left, v - top
    upper = (1 - a) * source[:, top, left] + a * source[:, top, left + 1]
    lower = (1 - a) * source[:, top + 1, left] + a * source[:, top + 1, left + 1]
    return (1 - b) * upper + b * lower, inside.astype(float)


def coverage_of(matrix, moves, size):
    """Fraction of each cell inside of image and windows, measured on 56 points along the shorter side or more."""
    finer = max(1, 56 // min(size))
    fine = (size[0] * finer, size[1] * finer)
    inside = np.ones(fine)
    for each in (matrix, *moves):
        inside = inside * sample(np.zeros((1, 2, 2)), each, fine)[1]
    return inside.reshape(size[0], finer, size[1], finer).mean(axis=(1, 3))


GRAY = np.array([0.299, 0.587, 0.114])


def blend(image, other, factor):
    return np.clip(factor * image + (1 - factor) * other, 0, 1)


def gray_of(image):
    return np.tensordot(GRAY, image, axes=1)[None]


def change(image, name, value):
    """Change one image [3, h, w] as the page says."""
    if name == "brightness":
        return np.clip(value * image, 0, 1)
    if name == "contrast":
        return blend(image, gray_of(image).mean(), value)
    if name == "saturation":
        return blend(image, gray_of(image), value)
    if name == "grayscale":
        return np.repeat(gray_of(image), 3, axis=0)
    if name == "posterize":
        return np.minimum(np.floor(image * 2**value), 2**value - 1) / 2**value
    if name == "solarize":
        return np.where(image >= np.float32(value), 1 - image, image)
    if name == "autocontrast":
        low, high = (f(image, axis=(1, 2), keepdims=True) for f in (np.min, np.max))
        return np.where(high > low, (image - low) / np.where(high > low, high - low, 1), image)
    if name == "sharpness":
        smooth = image.copy()
        for row in range(1, image.shape[1] - 1):
            for column in range(1, image.shape[2] - 1):
                part = image[:, row - 1 : row + 2, column - 1 : column + 2]
                smooth[:, row, column] = (part.sum(axis=(1, 2)) + 4 * part[:, 1, 1]) / 13
        return blend(image, smooth, value)
    if name == "equalize":
        levels = np.floor(image.astype(np.float32) * np.float32(255.999)).astype(int)
        equal = levels.copy()
        for channel in range(3):
            counts = np.bincount(levels[channel].ravel(), minlength=256)
            step = (counts.sum() - counts[counts.nonzero()[0][-1]]) // 255
            if step:
                table = np.clip((np.cumsum(counts) - counts + step // 2) // step, 0, 255)
                equal[channel] = table[levels[channel]]
        return equal / 255
    raise AssertionError(name)


def erase(image, corners, value):
    image, (x0, y0, x1, y1) = image.copy(), corners
    height, width = image.shape[1:]
    for row in range(height):
        for column in range(width):
            x, y = np.float32((column + 0.5) / width), np.float32((row + 0.5) / height)
            if x0 <= x < x1 and y0 <= y < y1:
                image[:, row, column] = value
    return image


def changed(image, operations, row):
    """Change an image by a row of values, whose columns are those of the page."""
    row = list(row)
    for operation in operations:
        if isinstance(operation, OperationConfig):
            continue
        if isinstance(operation, PolicyConfig):
            codes = [row.pop(0) for _ in range(math.ceil(operation.num_operations / 2))]
            for turn in range(operation.num_operations):
                kind = int(codes[turn // 2]) // 14 ** (turn % 2) % 14
                value = row.pop(0)
                if kind >= 6:
                    image = change(image, SPACE[kind], 1 + value if kind < 10 else value)
            continue
        count = {"color_jitter": 5, "random_erasing": 4}.get(operation.kind, 1)
        values = [row.pop(0) for _ in range(count)]
        if values[0] < 0:
            continue
        if operation.kind == "random_erasing":
            image = erase(image, values, operation.value)
        elif operation.kind == "color_jitter":
            names = list(permutations_of_four()[int(values[0])])
            for index in names:
                if index < 3:
                    image = change(
                        image, ("brightness", "contrast", "saturation")[index], values[1 + index]
                    )
        else:
            image = change(image, operation.kind, values[0])
    return image


def permutations_of_four():
    from itertools import permutations

    return list(permutations(range(4)))


SMOOTH = {"equalize", "posterize", "solarize"}
"""Operations with steps, at which rounding may decide."""


def random_recipe(generator):
    """Return operations of geometry and pixels, with random options. Hue and blur have tests of their own."""
    choices = [
        lambda: OperationConfig(kind="resized_crop", scale=(0.3, 1.0)),
        lambda: OperationConfig(kind="pad_crop", padding=int(generator.integers(1, 5))),
        lambda: OperationConfig(kind="horizontal_flip"),
        lambda: PolicyConfig(
            kind="randaugment",
            count=int(generator.integers(1, 5)),
            magnitude=float(generator.uniform(0, 30)),
            spread=float(generator.uniform(0, 5)),
        ),
        lambda: PolicyConfig(kind="trivialaugment"),
        lambda: PixelOperationConfig(kind="color_jitter", hue=0.0),
        lambda: PixelOperationConfig(kind="random_erasing", value=0.5, maps="blank"),
        lambda: PixelOperationConfig(kind="solarize", threshold=float(generator.uniform(0, 1))),
        lambda: PixelOperationConfig(kind="posterize", bits=int(generator.integers(1, 9))),
        lambda: PixelOperationConfig(kind="sharpness", factor=float(generator.uniform(0, 3))),
        lambda: PixelOperationConfig(kind="equalize"),
        lambda: PixelOperationConfig(kind="autocontrast"),
        lambda: PixelOperationConfig(kind="grayscale"),
    ]
    return tuple(
        choices[number]()
        for number in generator.choice(len(choices), generator.integers(1, 6), False)
    )


def compare_recipe(number):
    """Return the largest errors of image, map and features of one random recipe on one record."""
    generator = np.random.default_rng(number)
    operations, size = random_recipe(generator), (12, 12)
    augment = AugmentOptions(operations=operations)
    frames = frames_of_size(1, (10, 10), number)
    sizes = torch.ones(1, 2)
    drawn = ViewSchedule(augment, (10, 10), number).views(0, 0, sizes)
    views = Views.of(torch.tensor([[1.0, 1.0, 0.0, 0.0]]), None) if drawn is None else drawn
    recipe = Recipe(operations)
    rows = PixelSchedule(operations, number).rows(0, 0, 1).half()
    stored = DrawnViews(stack_views([views]), rows[:, None], recipe)
    values = {name: array[:, 0] for name, array in stored.fields().items()}
    views = stored_views_of(values, recipe, sizes, (10, 10), "")
    maps = torch.from_numpy(generator.normal(size=(1, 1, 1, 4, 4))).float()
    features = torch.from_numpy(generator.normal(size=(1, 3, 5, 5))).float()
    spec = FieldSpec(
        name="features_0", shape=(3, 5, 5), dtype="float16", when_moved="warp_covered", frame="full"
    )
    targets = StoredTargets(
        teacher="t",
        logits=torch.zeros(1, 2),
        maps=maps,
        target_class=torch.zeros(1, 1, dtype=torch.int64),
        map_from_canonical=torch.eye(3)[None],
        intermediates={"features_0": features},
        specs={"features_0": spec},
    )
    batch = replace(
        in_views(make_batch(frames, None, (targets,)), views, Rendering()),
        pixel_augment=PixelAugment(changes=stored.changes(0)),
    )
    image = view_images(batch, size)[0].numpy()
    (viewed,) = view_targets(batch, TargetRequest((4, 4)))

    exact = views.canonical_from_view[0].double().numpy()
    moves = []
    if views.moves is not None:
        places = (views.moves.window_from_view, *views.moves.between)
        moves = [matrices[0].double().numpy() for matrices in places]
    view, _ = sample(frames[0].double().numpy(), exact, size)
    view *= coverage_of(exact, moves, size)
    wanted = changed(view / 255, operations, rows[0].double().tolist())
    moved, _ = sample(maps[0, 0].double().numpy(), exact, (4, 4))
    moved *= coverage_of(exact, moves, (4, 4))
    position = 0
    for operation in recipe.operations:
        width = Recipe([operation]).width
        values = rows[0, position : position + width].double().tolist()
        position += width
        if operation.kind == "random_erasing" and values[0] >= 0:
            x0, y0, x1, y1 = (4 * value for value in values)
            for row in range(4):
                for column in range(4):
                    across = max(0, min(x1, column + 1) - max(x0, column))
                    down = max(0, min(y1, row + 1) - max(y0, row))
                    moved[:, row, column] *= 1 - across * down
    seen, _ = sample(features[0].double().numpy(), exact, (5, 5))
    errors = [
        np.abs(viewed.maps[0, 0].numpy() - moved).max(),
        np.abs(viewed.intermediates["features_0"][0].numpy() - seen).max(),
    ]
    covered = viewed.coverage["features_0"][0, 0].numpy()
    errors.append(np.abs(covered - coverage_of(exact, moves, (5, 5))).max())
    return operations, np.abs(image - wanted), errors


@pytest.mark.parametrize("count", [100, slow(1000)])
def test_random_recipes_are_those_of_a_reference(count):
    images, stepped, targets = [], [], []
    for number in range(count):
        operations, error, of_targets = compare_recipe(number)
        has_steps = any(
            isinstance(each, PolicyConfig) or each.kind in SMOOTH for each in operations
        )
        (stepped if has_steps else images).append(error)
        targets += of_targets

    assert len(images) > count / 5
    assert max(error.max() for error in images) < 1e-4
    assert max(targets) < 1e-4
    # A value next to a step may fall on its other side, and an equalized image has steps of many levels.
    errors = np.stack(stepped)
    assert (errors > 1e-4).mean() < 2e-3
    assert errors.mean() < 1e-4
