"""Mixtures of two records: their draws, images, labels and stored targets, against closed forms written in the test."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from permafrost.config.augment import AugmentOptions, MixConfig
from permafrost.config.methods import E2KDConfig
from permafrost.core.batches import GridPlacement, MapTargets, MixedLogits, Targets, TopLogits
from permafrost.core.errors import ConfigError
from permafrost.core.records import FieldSpec
from permafrost.library import open_store
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.geometry import coverage_on, view_images
from permafrost.loading.loader import TrainLoader
from permafrost.loading.mixtures import mix_images, mix_targets, own_weights, paired_rows
from permafrost.loading.random_views import ViewSchedule
from permafrost.loading.recipes import BLOCK_SIZE, PixelAugmentSchedule
from permafrost.loading.record_loader import RecordLoader
from permafrost.loading.subset import rows_of_split
from permafrost.losses.base import StudentOutput
from permafrost.losses.e2kd import E2KDLoss
from permafrost.losses.feature_kd import class_map_loss, covered_mse
from permafrost.losses.logit_distances import kd_loss, mld_loss, softmax_mse_loss
from permafrost.models.classifier import ModelOutput
from permafrost.models.providers import build_model
from permafrost.training.step import batch_loss
from tests.support.batches import FRAME, NUM_CLASSES, random_batch
from tests.support.mixtures import PAIRS, boxes_of, mixed, share_of
from tests.support.runs import PAD_CROP
from tests.support.tensors import smooth_images
from tests.support.trainings import build_training

MIXUP, CUTMIX = MixConfig(kind="mixup", alpha=0.4), MixConfig(kind="cutmix")
BOX = (0.25, 0.1, 0.8, 0.65)
MIXTURES = {"mixup": share_of(0.3, 0.9, 0.5, 0.05), "cutmix": boxes_of(BOX)}


def drawn(*mix, start=0, count=4 * BLOCK_SIZE, seed=0, epoch=0):
    schedule = PixelAugmentSchedule(AugmentOptions(mix=mix), seed)
    return schedule.draw(epoch, start, count).mixture


def with_mixture(targets, mixture):
    """Return targets of the images of a mixture."""
    return replace(targets, mixture=mixture)


# ---- draws ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.3, 1.0, 4.0])
def test_shares_of_mixup_are_distributed_as_beta(alpha):
    mixture = drawn(MixConfig(kind="mixup", alpha=alpha))

    shares = mixture.shares.double()
    assert shares.mean().item() == pytest.approx(1 / 2, abs=0.03)
    assert shares.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.08)
    assert not mixture.boxes.any()


def test_a_box_inside_of_the_image_has_the_area_and_the_aspect_ratio_that_was_drawn():
    mixture = drawn(CUTMIX)

    x0, y0, x1, y1 = mixture.boxes.double().unbind(dim=1)
    assert torch.allclose(mixture.shares.double(), 1 - (x1 - x0) * (y1 - y0), atol=1e-6)
    assert (mixture.boxes >= 0).all()
    assert (mixture.boxes <= 1).all()
    whole = (x0 > 0) & (y0 > 0) & (x1 < 1) & (y1 < 1)
    assert 0.1 < whole.float().mean() < 0.9
    assert torch.allclose((x1 - x0)[whole], (y1 - y0)[whole], atol=1e-6)
    assert mixture.shares.mean() > 0.5  # a box that is cut leaves more than was drawn


def test_a_record_has_the_last_mixture_of_the_list_that_is_drawn():
    mixture = drawn(MIXUP, replace(CUTMIX, p=0.25))

    has_box = (mixture.boxes[:, 2:] > mixture.boxes[:, :2]).all(dim=1)
    assert has_box.float().mean().item() == pytest.approx(0.25, abs=0.03)
    rare = drawn(replace(MIXUP, p=0.1))
    assert (rare.shares == 1).float().mean().item() == pytest.approx(0.9, abs=0.03)


def test_what_is_drawn_depends_on_seed_epoch_and_position_alone():
    whole = drawn(MIXUP, CUTMIX, count=3000, epoch=2, seed=7)

    part = drawn(MIXUP, CUTMIX, start=1000, count=1100, epoch=2, seed=7)

    assert torch.equal(part.shares, whole.shares[1000:2100])
    assert torch.equal(part.boxes, whole.boxes[1000:2100])
    for other in ({"epoch": 3, "seed": 7}, {"epoch": 2, "seed": 8}):
        assert not torch.equal(drawn(MIXUP, CUTMIX, count=3000, **other).shares, whole.shares)


def test_partners_are_neighbors_and_a_last_row_without_one_is_not_mixed():
    assert paired_rows(5).tolist() == [1, 0, 3, 2, 4]
    assert paired_rows(8, per_step=2).tolist() == [2, 3, 0, 1, 6, 7, 4, 5]
    mixture = drawn(MIXUP, CUTMIX, count=5)
    assert mixture.shares[4] == 1
    images = smooth_images(5)
    assert torch.equal(mix_images(images, mixture)[4], images[4])


def loader_of_rank(frozen, mix, rank, world_size, passes=()):
    schedule = PixelAugmentSchedule(AugmentOptions(mix=mix), 5)
    dataset = StoreDataset(frozen.store, rows_of_split(frozen.store.index, "train"), passes)
    views = ViewSchedule(PAD_CROP, frozen.store.size, 5)
    ranks = {"rank": rank, "world_size": world_size}
    return TrainLoader(dataset, views, schedule, batch_size=12, seed=5, **ranks)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_any_number_of_ranks_has_the_same_mixtures_also_after_a_resume(frozen, ranks):
    def images(rank, world_size, first_step=0):
        loader = loader_of_rank(frozen, (MIXUP, replace(CUTMIX, p=0.5)), rank, world_size)
        return [view_images(batch, FRAME) for batch in loader.epoch(1, first_step)]

    whole = images(0, 1)
    parts = [images(rank, ranks) for rank in range(ranks)]
    for step, wanted in enumerate(whole):
        assert torch.equal(torch.cat([part[step] for part in parts]), wanted)
    for resumed, wanted in zip(images(0, 1, first_step=2), whole[2:], strict=True):
        assert torch.equal(resumed, wanted)


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_mean_over_ranks_is_the_loss_of_the_whole_batch(frozen, name, ranks):
    training = build_training(0, E2KDConfig(tau=2.0, lambda_ce=0.5))
    torch.manual_seed(3)
    training.model = build_model(replace(frozen.config.teacher, weights=None), 10)
    training.forward = training.model.eval()
    mix = {"mixup": (MIXUP,), "cutmix": (CUTMIX,)}[name]

    def loss(rank, world_size):
        loader = loader_of_rank(frozen, mix, rank, world_size, frozen.store.open_passes(()))
        return batch_loss(training, next(loader.epoch(0)), FRAME).total.item()

    slices = [loss(rank, ranks) for rank in range(ranks)]
    assert np.mean(slices) == pytest.approx(loss(0, 1), rel=1e-5)


# ---- images --------------------------------------------------------------------------------------


def test_a_mixup_is_the_sum_of_both_images_by_their_shares():
    images = torch.tensor([0.0, 0.4, 1.0, 0.2]).view(4, 1, 1, 1).expand(4, 3, 2, 2)

    found = mix_images(images, share_of(0.75, 0.75, 0.5, 1.0))

    expected = torch.tensor([0.1, 0.3, 0.6, 0.2]).view(4, 1, 1, 1)
    assert torch.allclose(found, expected.expand(4, 3, 2, 2))


def test_a_box_of_whole_pixels_is_pasted_as_it_is():
    images = smooth_images(4)
    height, width = images.shape[-2:]
    x0, y0, x1, y1 = 3, 5, 11, 8

    found = mix_images(images, boxes_of((x0 / width, y0 / height, x1 / width, y1 / height)))

    wanted = images.clone()
    wanted[:, :, y0:y1, x0:x1] = images[PAIRS][:, :, y0:y1, x0:x1]
    assert torch.allclose(found, wanted, atol=1e-6)
    outside = torch.ones_like(images, dtype=torch.bool)
    outside[:, :, y0:y1, x0:x1] = False
    assert torch.equal(found[outside], images[outside])


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("size", [(1, 1), (4, 4), (7, 5), (32, 32)])
def test_the_mean_weight_of_the_cells_is_the_share_at_any_resolution(name, size):
    mixture = MIXTURES[name]

    weights = own_weights(mixture, size)

    assert torch.allclose(weights.mean(dim=(1, 2, 3)), mixture.shares, atol=1e-6)
    assert 0 <= weights.min() <= weights.max() <= 1


# ---- logits --------------------------------------------------------------------------------------


def pair_of_logits(seed=0, classes=6):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(4, classes, generator=generator, dtype=torch.float64)
    teacher = 3 * torch.randn(4, classes, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), teacher


def with_pairs(teacher, shares):
    if isinstance(teacher, torch.Tensor):
        return MixedLogits(first=teacher, second=teacher[PAIRS], shares=shares)
    others = {name: getattr(teacher, name)[PAIRS] for name in ("values", "classes", "rest")}
    return MixedLogits(first=teacher, second=replace(teacher, **others), shares=shares)


SHARES = torch.tensor([0.3, 0.9, 0.5, 0.05], dtype=torch.float64)


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_the_gradient_of_mixed_kd_is_that_of_the_divergence_from_the_mixture(tau):
    student, teacher = pair_of_logits()

    (found,) = torch.autograd.grad(kd_loss(student, with_pairs(teacher, SHARES), tau), student)

    soft = (teacher / tau).softmax(dim=1)
    target = SHARES[:, None] * soft + (1 - SHARES)[:, None] * soft[PAIRS]
    divergence = F.kl_div((student / tau).log_softmax(dim=1), target, reduction="batchmean")
    (wanted,) = torch.autograd.grad(tau**2 * divergence, student)
    assert torch.allclose(found, wanted, atol=1e-12)


@pytest.mark.parametrize("loss", [kd_loss, mld_loss, softmax_mse_loss])
def test_a_mixed_distance_is_the_mean_of_both_by_their_shares(loss):
    student, teacher = pair_of_logits(1)

    found = loss(student, with_pairs(teacher, SHARES), 2.0)

    own = torch.stack([loss(student[i : i + 1], teacher[i : i + 1], 2.0) for i in range(4)])
    other = torch.stack([loss(student[i : i + 1], teacher[[PAIRS[i]]], 2.0) for i in range(4)])
    assert found.item() == pytest.approx((SHARES * own + (1 - SHARES) * other).mean().item())


def test_the_gradient_of_mixed_mld_is_that_of_the_mixed_probabilities():
    student, teacher = pair_of_logits(2)

    (found,) = torch.autograd.grad(mld_loss(student, with_pairs(teacher, SHARES), 2.0), student)

    yes = (teacher / 2).sigmoid()
    target = SHARES[:, None] * yes + (1 - SHARES)[:, None] * yes[PAIRS]
    bce = F.binary_cross_entropy_with_logits(student / 2, target, reduction="none")
    (wanted,) = torch.autograd.grad(2 * bce.sum(dim=1).mean(), student)
    assert torch.allclose(found, wanted, atol=1e-12)


def largest(teacher, k, tau):
    values, classes = teacher.topk(k, dim=1)
    rest = (teacher / tau).scatter(1, classes, -torch.inf).logsumexp(dim=1, keepdim=True)
    return TopLogits(
        values=values, classes=classes, rest=rest, temperatures=(tau,), num_classes=teacher.shape[1]
    )


def test_the_sum_over_largest_logits_bounds_the_divergence_from_both_and_grows_with_k():
    student, teacher = pair_of_logits(3)

    every = kd_loss(student, with_pairs(teacher, SHARES), 2.0).item()
    sums = [
        kd_loss(student, with_pairs(largest(teacher, k, 2.0), SHARES), 2.0).item()
        for k in (1, 2, 4, 6)
    ]

    assert sums == sorted(sums)
    assert 0 < sums[0] < sums[2] <= every + 1e-12
    assert sums[-1] == pytest.approx(every)


# ---- maps ----------------------------------------------------------------------------------------


GRID = (4, 4)


def random_maps(seed, classes=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(4, classes, 1, *GRID, generator=generator) - 0.3


def explained_targets(classes=1):
    explained = torch.arange(4 * classes).reshape(4, classes) % NUM_CLASSES
    return MapTargets(
        teacher="teacher",
        logits=None,
        target_class=explained,
        maps=random_maps(0, classes),
        map_valid=torch.ones(4, classes, dtype=torch.bool),
    )


def map_term(targets, maps, **options):
    """Compute e2KD's map term at the resolution of the maps."""
    config = E2KDConfig(lambda_map=1.0, **options)
    logits = torch.zeros(4, NUM_CLASSES)
    output = StudentOutput(output=ModelOutput(logits, logits), maps=maps, input_size=GRID)
    (term,) = (
        t
        for t in E2KDLoss(config).terms(output, replace(targets, logits=logits), logits)
        if t.name == "map"
    )
    return term.compute()


def cosine_distance(a, b):
    return 1 - float((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum()))


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("classes", [1, 2])
def test_the_map_term_is_that_of_both_records_on_their_cells_by_their_shares(name, classes):
    mixture, targets = MIXTURES[name], explained_targets(classes)
    student = random_maps(9, 2 * classes).double()

    found = mix_targets(with_mixture(replace(targets, maps=targets.maps.double()), mixture))

    explained = targets.target_class
    assert torch.equal(found.target_class, torch.cat([explained, explained[PAIRS]], dim=1))
    x0, y0, x1, y1 = (4 * each for each in BOX)
    inside = np.outer(
        *([max(0, min(b, i + 1) - max(a, i)) for i in range(4)] for a, b in ((y0, y1), (x0, x1)))
    )
    total = 0.0
    for i in range(4):
        share = float(mixture.shares[i])
        masks = (1 - inside, inside) if name == "cutmix" else (1, 1)
        for half, (row, weight) in enumerate(((i, share), (PAIRS[i], 1 - share))):
            for e in range(classes):
                teacher = targets.maps[row, e, 0].double().numpy() * masks[half]
                own = student[i, half * classes + e, 0].numpy() * masks[half]
                total += weight * cosine_distance(own, teacher) / classes
    assert map_term(found, student).value.item() == pytest.approx(total / 4, abs=1e-6)


def test_a_pair_whose_map_is_zero_is_left_out_by_both_ways_of_counting():
    targets = explained_targets()
    maps = targets.maps.clone()
    maps[1] = 0
    targets = replace(targets, maps=maps, map_valid=maps.flatten(2).any(dim=2))
    student = random_maps(9, 2)

    mixture = share_of(0.3)
    found = mix_targets(with_mixture(targets, mixture))

    d = [
        [cosine_distance(student[i, h, 0], maps[row, 0, 0]) for h, row in enumerate((i, PAIRS[i]))]
        for i in range(4)
    ]
    both = [0.3 * d[i][0] + 0.7 * d[i][1] for i in (2, 3)]
    by_batch = [0.3 * d[0][0], 0.7 * d[1][1], *both]
    by_valid = [d[0][0], d[1][1], *both]
    term = map_term(found, student)
    assert term.value.item() == pytest.approx(sum(by_batch) / 4, abs=1e-5)
    assert term.statistics["valid_map_fraction"].item() == pytest.approx(6 / 8)
    valid = map_term(found, student, normalize_by="valid")
    assert valid.value.item() == pytest.approx(sum(by_valid) / 4, abs=1e-5)


def test_a_share_of_one_leaves_the_terms_of_the_record_itself():
    targets, student = explained_targets(), random_maps(9, 2)

    found = mix_targets(with_mixture(targets, share_of(1.0)))

    alone = map_term(targets, student[:, :1])
    assert map_term(found, student).value.item() == pytest.approx(alone.value.item(), abs=1e-6)
    assert (found.target_class[:, 1] == -1).all()


def test_without_second_maps_a_record_explains_its_own_class_by_its_share():
    targets, student = explained_targets(), random_maps(9)
    mixture = MIXTURES["mixup"]

    found = mix_targets(with_mixture(targets, mixture), second_maps=False)

    assert torch.equal(found.target_class, targets.target_class)
    alone = [cosine_distance(student[i, 0, 0], targets.maps[i, 0, 0]) for i in range(4)]
    wanted = np.mean([float(s) * d for s, d in zip(mixture.shares, alone, strict=True)])
    assert map_term(found, student).value.item() == pytest.approx(wanted, abs=1e-5)


# ---- other fields --------------------------------------------------------------------------------


def field_targets(**coverage):
    generator = torch.Generator().manual_seed(4)
    shapes = {
        "class_maps": ((NUM_CLASSES, *GRID), ("class", "y", "x")),
        "attention_1": (GRID, ("y", "x")),
        "features_1": ((5, *GRID), ("channel", "y", "x")),
        "pooled": ((5,), ("feature",)),
    }
    return Targets(
        teacher="teacher",
        logits=None,
        intermediates={
            name: torch.randn(4, *shape, generator=generator) for name, (shape, _) in shapes.items()
        },
        specs={
            name: FieldSpec(name=name, shape=shape, dtype="float16", axes=axes)
            for name, (shape, axes) in shapes.items()
        },
        **coverage,
    )


@pytest.mark.parametrize("name", MIXTURES)
def test_grids_are_mixed_cell_by_cell_and_vectors_by_the_share(name):
    mixture, targets = MIXTURES[name], field_targets()

    found = mix_targets(with_mixture(targets, mixture)).intermediates

    weights = own_weights(mixture, GRID)
    for field, values in targets.intermediates.items():
        w = {2: mixture.shares[:, None], 3: weights[:, 0], 4: weights}[values.ndim]
        assert torch.allclose(found[field], w * values + (1 - w) * values[PAIRS], atol=1e-6)


def test_a_pasted_grid_has_the_cells_of_each_record_where_the_box_has_whole_cells():
    targets = field_targets()

    found = mix_targets(with_mixture(targets, boxes_of((0.25, 0.5, 0.75, 1.0)))).intermediates[
        "class_maps"
    ]

    own, other = targets.intermediates["class_maps"], targets.intermediates["class_maps"][PAIRS]
    assert torch.equal(found[:, :, 2:, 1:3], other[:, :, 2:, 1:3])
    assert torch.equal(found[:, :, :2], own[:, :, :2])
    assert torch.equal(found[:, :, :, 0], own[:, :, :, 0])


def test_the_gradient_of_a_squared_distance_from_the_mixture_is_that_of_both_by_their_shares():
    targets, mixture = field_targets(), MIXTURES["mixup"]
    teacher = targets.intermediates["class_maps"]
    student = torch.randn(4, NUM_CLASSES, *GRID).requires_grad_()

    found = mix_targets(with_mixture(targets, mixture)).intermediates["class_maps"]
    (gradient,) = torch.autograd.grad(class_map_loss(student, found, 4), student)

    total = sum(
        share * class_map_loss(student[[i]], teacher[[row]], 4) / 4
        for i in range(4)
        for row, share in ((i, mixture.shares[i]), (PAIRS[i], 1 - mixture.shares[i]))
    )
    (wanted,) = torch.autograd.grad(total, student)
    assert torch.allclose(gradient, wanted, atol=1e-7)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixed_cell_weights_each_record_by_its_coverage_too(name):
    coverage = torch.rand(4, 1, *GRID, generator=torch.Generator().manual_seed(1))
    coverage[0, :, :2] = 0
    coverage[1, :, 1:3] = 0
    mixture = MIXTURES[name]
    targets = field_targets(coverage={"features_1": coverage})
    teacher = targets.intermediates["features_1"]
    student = torch.randn(teacher.shape, generator=torch.Generator().manual_seed(2))
    student.requires_grad_()

    found = mix_targets(with_mixture(targets, mixture))

    covered = found.coverage["features_1"]
    w = own_weights(mixture, GRID)
    assert torch.allclose(covered, w * coverage + (1 - w) * coverage[PAIRS], atol=1e-6)
    loss = covered_mse(student, found.intermediates["features_1"], covered)
    (gradient,) = torch.autograd.grad(loss * covered.sum() * 5, student)
    own = w * coverage * (student - teacher).square()
    other = (1 - w) * coverage[PAIRS] * (student - teacher[PAIRS]).square()
    (wanted,) = torch.autograd.grad((own + other).sum(), student)
    assert torch.allclose(gradient, wanted, atol=1e-4)


def test_coverage_on_another_grid_is_that_of_both_records():
    shifted = torch.eye(3).repeat(4, 1, 1)
    shifted[0, 0, 2], shifted[1, 1, 2] = 0.5, 1.0
    mixture = MIXTURES["cutmix"]
    targets = field_targets(placements={"features_1": GridPlacement(source_from_view=shifted)})

    found = coverage_on(mix_targets(with_mixture(targets, mixture)), "features_1", (8, 8))

    alone, w = coverage_on(targets, "features_1", (8, 8)), own_weights(mixture, (8, 8))
    assert torch.allclose(found, w * alone + (1 - w) * alone[PAIRS], atol=1e-6)
    assert found.min() < 1


def test_a_field_of_neither_grid_nor_vector_is_refused():
    targets = field_targets()
    strange = replace(targets, intermediates={"tokens": torch.zeros(4, 3, 2)}, specs={})

    with pytest.raises(ConfigError, match=r"no rule for the field tokens of teacher"):
        mix_targets(with_mixture(strange, MIXTURES["mixup"]))


# ---- steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIXTURES)
def test_a_step_on_frozen_targets_is_the_sum_of_its_terms_written_out(name):
    training = build_training(0, E2KDConfig(tau=2.0, lambda_ce=0.5, lambda_map=3.0))
    training.model.eval()
    batch, mixture = random_batch(0), MIXTURES[name]

    terms = batch_loss(training, mixed(batch, mixture), FRAME)

    images = mix_images(view_images(batch, FRAME), mixture)
    logits = training.model(images).logits
    stored = batch.targets[0].logits
    kd = kd_loss(logits, with_pairs(stored, mixture.shares), 2.0)
    log_probs = logits.log_softmax(dim=1)
    own, other = (-log_probs[range(4), each] for each in (batch.labels, batch.labels[PAIRS]))
    ce = (mixture.shares * own + (1 - mixture.shares) * other).mean()
    assert terms.terms["kd"].item() == pytest.approx(kd.item(), rel=1e-5)
    assert terms.terms["ce"].item() == pytest.approx(ce.item(), rel=1e-5)
    total = kd + 0.5 * ce + 3 * terms.terms["map"]
    assert terms.total.item() == pytest.approx(total.item(), rel=1e-5)


def test_second_maps_cost_one_explanation_more_and_may_be_left_out():
    counts = {}
    for second in (True, False):
        training = build_training(0, E2KDConfig(second_maps=second))
        explain = training.explain

        def count(model, output, classes, explain=explain, second=second):
            counts[second] = classes.shape[1]
            return explain(model, output, classes)

        training.explain = count
        batch_loss(training, mixed(random_batch(0), share_of(0.3)), FRAME)

    assert counts == {True: 2, False: 1}


def test_a_loader_of_a_loop_of_ones_own_says_what_is_mixed(frozen):
    records = open_store(frozen.store.path).select("train")
    augment = AugmentOptions(mix=(MIXUP,))

    batch = next(iter(RecordLoader(records, augment=augment, batch_size=8)))

    assert batch.mixture is not None
    (targets,) = batch.targets()
    assert isinstance(targets.logits, MixedLogits)
    assert torch.equal(targets.logits.second, targets.logits.first[batch.mixture.partners])
    assert torch.equal(batch.mixed_labels.first, batch.stored.labels)
    with pytest.raises(ConfigError, match="labels of two records; read mixed_labels"):
        batch.labels  # noqa: B018
    for name in ("logits", "maps"):
        with pytest.raises(ConfigError, match=rf"ViewBatch\.{name} are those of one record"):
            getattr(batch, name)
    whole = next(iter(RecordLoader(records, batch_size=8)))
    with pytest.raises(ConfigError, match="not mixtures; read labels"):
        whole.mixed_labels  # noqa: B018
