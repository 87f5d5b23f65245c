"""Operations that change pixels: drawn from the seed and the position, and applied to images alone."""

from dataclasses import fields, replace

import kornia.augmentation as K
import pytest
import torch
from kornia.filters import gaussian_blur2d

from permafrost.config.augment import AugmentOptions, PixelOperationConfig
from permafrost.config.evaluation import EvaluateOptions
from permafrost.config.methods import E2KDConfig, LabelsConfig
from permafrost.config.store import StoreOptions
from permafrost.config.teaching import LabelTeachingConfig, TeachConfig
from permafrost.core.batches import PixelAugment
from permafrost.core.errors import ConfigError
from permafrost.loading import transfer
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.geometry import TargetRequest, view_images, view_targets
from permafrost.loading.loader import TrainLoader
from permafrost.loading.pixel_changes import change_rows
from permafrost.loading.random_views import ViewSchedule
from permafrost.loading.recipes import BLOCK_SIZE, PixelAugmentSchedule, PixelSchedule
from permafrost.loading.subset import rows_of_split
from permafrost.loading.transfer import move_batch
from permafrost.models.explanations import gradcam
from permafrost.models.providers import freeze
from permafrost.training.step import batch_loss, train_step
from permafrost.training.targets import LiveTeacher
from permafrost_papers.e2kd.options import GuidedTeachingConfig
from tests.support.batches import FRAME, random_batch, tiny_model
from tests.support.composition import config_of
from tests.support.items import for_each
from tests.support.kills import killed_at
from tests.support.runs import PAD_CROP, TRAINER, assert_equal_states, distill_config, weights_of
from tests.support.tensors import smooth_images
from tests.support.trainings import HostReads, build_training
from tests.support.verbs import distill, teach

JITTER = PixelOperationConfig(kind="color_jitter", p=1.0)
GRAY = PixelOperationConfig(kind="grayscale", p=1.0)
BLUR = PixelOperationConfig(kind="gaussian_blur", p=1.0, sigma=(0.02, 0.05))
ERASE = PixelOperationConfig(kind="random_erasing", p=1.0)
ALL = tuple(replace(operation, p=0.5) for operation in (JITTER, GRAY, BLUR, ERASE))
PIXELS = AugmentOptions(operations=ALL)


def apply(images, changes):
    return change_rows(images.clone(), changes)


def changed(operation, images, seed=0):
    return apply(images, PixelSchedule([operation], seed).draw(0, 0, len(images)))


def frozen_loader(frozen, *, batch_size=8, **options):
    dataset = StoreDataset(frozen.store, rows_of_split(frozen.store.index, "train"))
    views = ViewSchedule(PAD_CROP, frozen.store.size, 5)
    schedule = PixelAugmentSchedule(PIXELS, 5)
    return TrainLoader(dataset, views, schedule, batch_size=batch_size, seed=5, **options)


def images_by_key(batches):
    return {
        (key, int(view)): image
        for batch in batches
        for key, view, image in zip(
            batch.keys, batch.view_index, view_images(batch, FRAME), strict=True
        )
    }


def assert_same_images(found, wanted):
    assert found.keys() == wanted.keys()
    for key, image in wanted.items():
        assert torch.equal(found[key], image), key


# ---- draws ---------------------------------------------------------------------------------------


def test_ranks_batch_sizes_and_restarts_change_nothing(frozen):
    plain = TrainLoader(
        frozen_loader(frozen).dataset,
        ViewSchedule(PAD_CROP, frozen.store.size, 5),
        batch_size=8,
        seed=5,
    )
    wanted = images_by_key(frozen_loader(frozen).epoch(1))
    undisturbed = images_by_key(plain.epoch(1))
    disturbed = [key for key, image in wanted.items() if not torch.equal(image, undisturbed[key])]
    assert len(wanted) == 40
    assert 30 <= len(disturbed) < 40  # control: one in sixteen records draws nothing

    assert_same_images(images_by_key(frozen_loader(frozen, batch_size=20).epoch(1)), wanted)
    ranks = [
        images_by_key(frozen_loader(frozen, rank=rank, world_size=2).epoch(1)) for rank in range(2)
    ]
    assert_same_images(ranks[0] | ranks[1], wanted)
    resumed = images_by_key(frozen_loader(frozen).epoch(1, first_step=2))
    assert len(resumed) == 24
    assert_same_images(resumed, {key: wanted[key] for key in resumed})


def test_a_slice_across_two_blocks_is_that_of_the_whole():
    schedule, images = PixelSchedule(ALL, 3), torch.rand(16, 3, 16, 16)
    start = BLOCK_SIZE - 6

    whole = apply(images, schedule.draw(2, start, 16))
    parts = [
        apply(images[begin : begin + 4], schedule.draw(2, start + begin, 4))
        for begin in range(0, 16, 4)
    ]

    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(whole, images)


def test_seed_epoch_and_position_each_change_the_draws():
    images = smooth_images(8)

    def at(seed, epoch, start):
        return apply(images, PixelSchedule([JITTER], seed).draw(epoch, start, 8))

    first = at(0, 0, 0)

    assert torch.equal(at(0, 0, 0), first)
    for other in (at(1, 0, 0), at(0, 1, 0), at(0, 0, 8)):
        assert not torch.equal(other, first)


def test_two_operations_of_a_kind_draw_separately():
    half = replace(GRAY, p=0.5)
    first, second = PixelSchedule([half, half], 0).draw(0, 0, 64)

    assert first.rows.tolist() != second.rows.tolist()
    assert len({*first.rows.tolist(), *second.rows.tolist()}) > 40  # three quarters of 64


@pytest.mark.parametrize("operation", ALL, ids=lambda operation: operation.kind)
def test_a_probability_is_the_fraction_of_changed_records_and_0_is_the_identity(operation):
    images = torch.rand(400, 3, 8, 8)
    few = changed(replace(operation, p=0.25), images)
    share = (few != images).flatten(1).any(dim=1).float().mean().item()

    assert share == pytest.approx(0.25, abs=0.07)
    assert torch.equal(changed(replace(operation, p=0.0), images), images)


def test_equal_draws_are_the_same_disturbance_at_another_size():
    small = smooth_images(16, size=32)
    large = torch.nn.functional.interpolate(small, (64, 64), mode="bilinear", align_corners=False)

    def distance(one, other):
        return (torch.nn.functional.avg_pool2d(one, 2) - other).abs().mean()

    changes = PixelSchedule(ALL, 0).draw(0, 0, 16)
    others = PixelSchedule(ALL, 1).draw(0, 0, 16)
    same = distance(apply(large, changes), apply(small, changes))
    assert same < 0.2 * distance(apply(large, changes), apply(small, others))


# ---- closed forms --------------------------------------------------------------------------------


def test_gray_images_have_three_equal_channels_of_the_luminance():
    images = torch.rand(4, 3, 8, 8)

    gray = changed(GRAY, images)

    luminance = 0.299 * images[:, 0] + 0.587 * images[:, 1] + 0.114 * images[:, 2]
    assert torch.equal(gray[:, 0], gray[:, 1])
    assert torch.equal(gray[:, 1], gray[:, 2])
    assert torch.allclose(gray[:, 0], luminance, atol=1e-6)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.4])
def test_the_erased_share_of_the_area_is_the_drawn_one_and_the_rest_stays(share):
    images = 0.1 + 0.8 * torch.rand(64, 3, 128, 128)
    operation = replace(ERASE, scale=(share, share), value=1.0)

    erased = changed(operation, images)

    hit = (erased == 1).all(dim=1)
    # Each side is rounded to whole pixels.
    assert torch.allclose(hit.float().mean(dim=(1, 2)), torch.tensor(share), atol=0.015)
    assert hit.float().mean().item() == pytest.approx(share, rel=0.03)
    assert torch.equal(
        erased[~hit[:, None].expand_as(images)], images[~hit[:, None].expand_as(images)]
    )
    rows, columns = hit.any(dim=2).sum(dim=1), hit.any(dim=1).sum(dim=1)
    assert torch.equal(rows * columns, hit.sum(dim=(1, 2)))  # one rectangle each
    ratios = columns / rows
    assert ratios.min() > 0.2
    assert ratios.max() < 5
    assert ratios.std() > 0.3


def test_a_rectangle_wider_than_the_image_keeps_its_area():
    images = torch.ones(8, 3, 100, 100)
    operation = replace(ERASE, scale=(0.5, 0.5), ratio=(10.0, 10.0))

    erased = changed(operation, images)

    assert torch.allclose((erased == 0).float().mean(dim=(1, 2, 3)), torch.tensor(0.5), atol=0.011)
    assert (erased[:, 0] == 0).any(dim=1).all()  # from edge to edge


def test_jitter_of_nothing_is_the_identity_bit_for_bit():
    images = torch.rand(8, 3, 8, 8)
    still = replace(JITTER, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0)

    assert torch.equal(changed(still, images), images)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_each_color_is_adjusted_as_by_kornias_color_jitter(name):
    images = smooth_images(16)
    only = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0, name: 0.3}
    (change,) = _merged(PixelSchedule([replace(JITTER, **only)], 0).draw(0, 0, 16))

    found = apply(images, [change])

    factors = {f"{key}_factor": torch.ones(16) for key in only} | {"hue_factor": torch.zeros(16)}
    if name == "hue":  # Kornia's factor is a fraction of the circle
        factors["hue_factor"] = change.values[:, 0] / (2 * torch.pi)
        assert factors["hue_factor"].abs().max() <= 0.3
    else:
        factors[f"{name}_factor"] = change.values[:, 0]
        assert change.values.min() >= 0.7
        assert change.values.max() <= 1.3
    jitter = K.ColorJitter(0.3, 0.3, 0.3, 0.3, p=1.0)
    parameters = jitter.forward_parameters(images.shape) | factors
    assert torch.allclose(found, jitter(images, params=parameters), atol=1e-5)
    assert (found - images).abs().max() > 0.01
    assert 0 <= found.min() <= found.max() <= 1


def _merged(changes):
    """Join changes of one name, each record of which has one, in the order of their rows."""
    rows = torch.cat([change.rows for change in changes])
    order = rows.argsort()
    values = torch.cat([change.values for change in changes])[order]
    return [replace(changes[0], rows=rows[order], values=values)]


def test_the_order_of_the_colors_is_drawn_per_record():
    changes = PixelSchedule([JITTER], 0).draw(0, 0, 240)
    orders = {row: [] for row in range(240)}
    for change in changes:
        for row in change.rows.tolist():
            orders[row].append(change.name)

    assert all(len(set(order)) == 4 for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 24


def test_blur_is_a_gaussian_of_the_drawn_width():
    images = torch.zeros(8, 3, 65, 65)
    images[:, :, 32, 32] = 1
    (change,) = PixelSchedule([BLUR], 0).draw(0, 0, 8)

    blurred = apply(images, [change])

    assert torch.allclose(blurred.sum(dim=(2, 3)), torch.ones(8, 3), atol=1e-4)
    places = torch.arange(65.0) - 32
    variance = (blurred[:, 0].sum(dim=1) * places**2).sum(dim=1)
    sigma = 65 * change.values[:, 0]
    assert torch.allclose(variance.sqrt(), sigma, rtol=0.05)
    wanted = gaussian_blur2d(images, (21, 21), sigma[:, None].expand(-1, 2))
    assert torch.allclose(blurred, wanted, atol=1e-6)
    assert sigma.min() >= 65 * 0.02
    assert sigma.max() <= 65 * 0.05


# ---- images alone --------------------------------------------------------------------------------


def disturbed_batch(seed=0):
    batch = random_batch(seed)
    drawn = PixelAugmentSchedule(PIXELS, 1).draw(0, 0, len(batch.keys))
    return replace(batch, pixel_augment=drawn)


@pytest.mark.parametrize("operation", [JITTER, GRAY, BLUR, ERASE], ids=lambda o: o.kind)
def test_an_operation_changes_images_and_leaves_maps_logits_and_boxes(operation):
    boxes = tuple(torch.tensor([[0.0, -0.5, -0.5, 0.5, 0.5]]) for _ in range(4))
    plain = replace(random_batch(0), boxes=boxes)
    schedule = PixelAugmentSchedule(AugmentOptions(operations=(operation,)), 1)
    batch = replace(plain, pixel_augment=schedule.draw(0, 0, 4))

    assert not torch.equal(view_images(batch, FRAME), view_images(plain, FRAME))
    (found,), (wanted,) = (view_targets(b, TargetRequest((4, 4))) for b in (batch, plain))
    assert torch.equal(found.maps, wanted.maps)
    assert torch.equal(found.logits, wanted.logits)
    unchanged = [f.name for f in fields(batch) if f.name not in ("pixel_augment",)]
    assert all(getattr(batch, name) is getattr(plain, name) for name in unchanged)


def test_a_live_teacher_receives_the_disturbed_images_and_stored_targets_do_not_change():
    training = build_training(0, E2KDConfig(lambda_ce=1.0))
    shown = {}
    hook = lambda name: lambda m, args: shown.update({name: args[0]})  # noqa: E731
    training.model.register_forward_pre_hook(hook("student"))
    batch = disturbed_batch()
    stored = batch_loss(training, batch, FRAME)
    assert torch.equal(shown["student"], view_images(batch, FRAME))

    training.targets = LiveTeacher("teacher", freeze(tiny_model(1)), gradcam, (32, 32))
    training.targets.model.register_forward_pre_hook(hook("teacher"))
    live = batch_loss(training, batch, FRAME)

    assert torch.equal(shown["student"], view_images(batch, FRAME))
    assert torch.equal(shown["teacher"], view_images(batch, (32, 32)))
    plain = view_images(replace(batch, pixel_augment=None), (32, 32))
    assert not torch.equal(shown["teacher"], plain)
    assert stored.total.item() != live.total.item()


def test_a_disturbed_step_reads_nothing_back_from_the_device():
    training = build_training(0, E2KDConfig(lambda_ce=1.0))
    train_step(training, disturbed_batch(0), FRAME, clip_norm=1.0)
    batch = disturbed_batch(1)
    assert {change.name for change in batch.pixel_augment.changes} >= {
        "grayscale",
        "gaussian_blur",
        "random_erasing",
    }

    with HostReads(training.optimizer) as reads:
        train_step(training, batch, FRAME, clip_norm=1.0)

    assert reads.found == []


def test_changes_go_to_the_device_with_their_batch():
    moved = move_batch(disturbed_batch(), torch.device("meta")).pixel_augment

    assert len(moved.changes) > 3
    assert all(change.rows.is_meta and change.values.is_meta for change in moved.changes)


# ---- whole runs ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_frozen_student_trains_resumes_and_is_another(frozen):
    trainer = replace(TRAINER, epochs=2, checkpoint_every_steps=3)
    plain = distill_config(frozen, run="plain", trainer=trainer)
    config = replace(
        plain, run="disturbed", augment=replace(PAD_CROP, operations=(*PAD_CROP.operations, *ALL))
    )
    for one in (plain, config):
        distill.run(one)
    assert not torch.equal(
        weights_of("plain")["linear.weight"], weights_of("disturbed")["linear.weight"]
    )

    with killed_at(transfer, "move_batch", 5):
        distill.run(replace(config, run="killed"))
    distill.run(replace(config, run="killed"))
    assert_equal_states(weights_of("killed"), weights_of("disturbed"))


def test_a_teacher_is_taught_on_disturbed_images_and_evaluated_on_others(frozen, monkeypatch):
    seen = {"training": [], "evaluation": []}
    for name, module in (
        ("evaluation", "permafrost.evaluation.forward"),
        ("training", "permafrost.training.step"),
    ):
        monkeypatch.setattr(
            f"{module}.view_images",
            lambda batch, size, name=name: (
                seen[name].append(batch.pixel_augment) or view_images(batch, size)
            ),
        )
    config = TeachConfig(
        store=StoreOptions(path=str(frozen.store.path)),
        teacher=replace(frozen.config.teacher, weights=None),
        teaching=LabelTeachingConfig(
            split="teacher", trainer=replace(TRAINER, epochs=1, batch_size=4), augment=PIXELS
        ),
        evaluate=EvaluateOptions(splits=("test",)),
        run="t",
    )

    teach.run(config)

    assert all(type(drawn) is PixelAugment and drawn.changes for drawn in seen["training"])
    assert set(seen["evaluation"]) == {None}


# ---- options -------------------------------------------------------------------------------------


def test_named_operations_are_options_of_every_mode(frozen):
    for options in (
        {"mode": "frozen"},
        {"mode": "replay"},
        {"mode": "live", "teacher": frozen.config.teacher},
        {"method": LabelsConfig()},
    ):
        config = replace(distill_config(frozen, **options), augment=PIXELS)
        assert config.augment.on_pixels == ALL
    assert GuidedTeachingConfig(augment=PIXELS).augment.on_pixels == ALL


def test_operations_are_given_as_a_list_on_the_command_line():
    words = (
        "augment=pad_crop",
        "augment.operations=[{kind: grayscale, p: 0.2}, {kind: color_jitter, hue: 0}]",
    )

    config = config_of("distill", *words)

    assert config.augment.operations == (
        replace(GRAY, p=0.2),
        PixelOperationConfig(kind="color_jitter", hue=0.0),
    )


@for_each(
    "options,message",
    [
        (
            {"kind": "gaussian_blur", "sigma": (0.02, 0.01)},
            r"sigma must be 0 < low <= high <= 0\.1",
        ),
        ({"kind": "gaussian_blur", "sigma": (0.01, 2.0)}, r"got \(0\.01, 2\.0\)"),
        ({"kind": "random_erasing", "scale": (0.0, 0.3)}, r"scale must be 0 < low <= high <= 1"),
        ({"kind": "random_erasing", "ratio": (2.0, 1.0)}, r"ratio must be 0 < low <= high, got"),
        ({"kind": "gaussian_blur", "sigma": (1e-6, 0.01)}, r"sigma must be >= 0\.0001, got"),
        ({"kind": "color_jitter", "contrast": 101.0}, r"contrast must be in \[0, 100"),
        ({"kind": "color_jitter", "hue": 0.6}, r"augment\.operations\.hue must be in \[0, 0\.5\]"),
        ({"kind": "grayscale", "p": 1.5}, r"augment\.operations\.p must be in \[0, 1\]"),
        ({"kind": "solarize", "threshold": 1.5}, r"threshold must be in \[0, 1\]"),
        ({"kind": "posterize", "bits": 9}, r"bits must be in \[1, 8\]"),
        ({"kind": "random_erasing", "maps": "drop"}, r"maps must be one of keep, blank"),
    ],
)
def test_a_mistake_names_the_option_and_its_limits(options, message):
    with pytest.raises(ConfigError, match=message):
        PixelOperationConfig(**options)
