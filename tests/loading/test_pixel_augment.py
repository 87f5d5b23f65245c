"""Pixel augmentation after the warp: drawn from the seed alone, and equal for the student and a live teacher."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from permafrost.config.augment import AugmentOptions, MixConfig, PolicyConfig
from permafrost.config.evaluation import EvaluateOptions
from permafrost.config.methods import E2KDConfig, KDConfig, LabelsConfig
from permafrost.config.store import StoreOptions
from permafrost.config.teaching import LabelTeachingConfig, TeachConfig
from permafrost.core.errors import ConfigError
from permafrost.core.records import NO_LABEL
from permafrost.loading import geometry, transfer
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.geometry import TargetRequest, view_images
from permafrost.loading.loader import TrainLoader
from permafrost.loading.mixtures import mix_images
from permafrost.loading.pixel_changes import change_rows
from permafrost.loading.random_views import ViewSchedule
from permafrost.loading.recipes import PixelAugmentSchedule
from permafrost.loading.subset import rows_of_split
from permafrost.models.explanations import gradcam
from permafrost.models.providers import freeze
from permafrost.runs.mirrors import RUNS
from permafrost.training.metric_log import read_metrics
from permafrost.training.step import batch_loss
from permafrost.training.targets import LiveTeacher
from tests.support.batches import (
    FLIP,
    FRAME,
    NUM_CLASSES,
    build_batch,
    random_batch,
    random_frames,
    random_targets,
    tiny_model,
)
from tests.support.kills import killed_at
from tests.support.mixtures import PAIRS, mixed, share_of
from tests.support.runs import PAD_CROP, TRAINER, assert_equal_states, distill_config, weights_of
from tests.support.tensors import smooth_images
from tests.support.trainings import build_training
from tests.support.verbs import distill, teach

MIXUP = MixConfig(kind="mixup")
MIXED = AugmentOptions(mix=(MIXUP,))
RANDAUGMENT = PolicyConfig(kind="randaugment", magnitude=10)
BOTH = AugmentOptions(mix=(MIXUP,), operations=(RANDAUGMENT,))


def frozen_loader(frozen, pixel_augment, *, batch_size=8, **options):
    dataset = StoreDataset(frozen.store, rows_of_split(frozen.store.index, "train"))
    views = ViewSchedule(PAD_CROP, frozen.store.size, 5)
    return TrainLoader(dataset, views, pixel_augment, batch_size=batch_size, seed=5, **options)


def drawn_for(count):
    """Return what randaugment draws for some records."""
    return PixelAugmentSchedule(AugmentOptions(operations=(RANDAUGMENT,)), seed=1).draw(0, 0, count)


# ---- draws ---------------------------------------------------------------------------------------


def test_without_options_nothing_is_drawn():
    assert PixelAugmentSchedule(PAD_CROP, seed=0).draw(0, 0, 8) is None


def test_ranks_and_restarts_draw_the_same(frozen):
    schedule = PixelAugmentSchedule(BOTH, seed=5)
    wanted = [batch.pixel_augment for batch in frozen_loader(frozen, schedule).epoch(1)]
    shares = torch.cat([pixel_augment.mixture.shares for pixel_augment in wanted])
    assert len(shares.unique()) == 40

    ranks = [
        [b.pixel_augment for b in frozen_loader(frozen, schedule, rank=rank, world_size=2).epoch(1)]
        for rank in range(2)
    ]
    for whole, *slices in zip(wanted, *ranks, strict=True):
        shares = [part.mixture.shares for part in slices]
        assert torch.equal(torch.cat(shares), whole.mixture.shares)
        images = smooth_images(8)
        halves = [change_rows(images[4 * n :][:4].clone(), p.changes) for n, p in enumerate(slices)]
        assert torch.equal(torch.cat(halves), change_rows(images.clone(), whole.changes))
    again = frozen_loader(frozen, PixelAugmentSchedule(BOTH, seed=5))
    resumed = [batch.pixel_augment.mixture.shares for batch in again.epoch(1, first_step=2)]
    assert torch.equal(torch.cat(resumed), torch.cat([p.mixture.shares for p in wanted[2:]]))


def test_a_record_keeps_its_randaugment_whatever_the_batch_size(frozen):
    schedule = PixelAugmentSchedule(AugmentOptions(operations=(RANDAUGMENT,)), seed=5)
    found = {}

    for batch_size in (8, 20):
        for batch in frozen_loader(frozen, schedule, batch_size=batch_size).epoch(1):
            images = view_images(batch, FRAME)
            for key, image in zip(batch.keys, images, strict=True):
                assert torch.equal(found.setdefault(key, image), image)

    assert len(found) == 40


# ---- pixels --------------------------------------------------------------------------------------


def test_changes_of_pixels_come_first_then_the_mixture_and_both_after_the_warp():
    pixel_augment = replace(drawn_for(4), mixture=share_of(0.3))
    batch = build_batch(random_frames(0), random_targets(0), FLIP)

    found = view_images(replace(batch, pixel_augment=pixel_augment), FRAME)

    changed = change_rows(view_images(batch, FRAME), pixel_augment.changes)
    assert torch.allclose(found, 0.3 * changed + 0.7 * changed[PAIRS], atol=1e-6)
    assert torch.equal(mix_images(changed, pixel_augment.mixture), found)


# ---- training steps ------------------------------------------------------------------------------


def mixed_batch(share, labels=None):
    batch = mixed(random_batch(0), share_of(share))
    return batch if labels is None else replace(batch, labels=labels)


def mixed_logits(training, share):
    """Logits of the student on mixtures that are computed in the test."""
    images = view_images(random_batch(0), FRAME)
    return training.model(share * images + (1 - share) * images[PAIRS]).logits


def test_a_mixed_step_on_labels_is_the_mean_of_two_cross_entropies_by_their_shares():
    training = build_training(0, LabelsConfig())
    labels = torch.tensor([0, 1, 2, 0])

    terms = batch_loss(training, mixed_batch(0.3, labels), FRAME)

    log_probs = mixed_logits(training, 0.3).log_softmax(dim=1)
    own = -log_probs[range(4), labels]
    partners = -log_probs[range(4), labels[PAIRS]]
    assert terms.total.item() == pytest.approx((0.3 * own + 0.7 * partners).mean().item(), rel=1e-5)
    assert terms.terms.keys() == {"ce"}


@pytest.mark.parametrize("off_label", [0.0, 1 / NUM_CLASSES])
def test_a_mixed_step_on_many_labels_is_bce_with_the_mixed_target(off_label):
    method = LabelsConfig(loss="bce_offlabel" if off_label else "bce")
    training = build_training(0, method)
    hot = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 1], [0, 1, 1]]).float()

    total = batch_loss(training, mixed_batch(0.3, hot), FRAME).total

    targets = hot.clamp(min=off_label)
    targets = 0.3 * targets + 0.7 * targets[PAIRS]
    expected = F.binary_cross_entropy_with_logits(mixed_logits(training, 0.3), targets)
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_label_that_is_not_known_weighs_nothing_in_either_place():
    training = build_training(0, LabelsConfig())
    labels = torch.tensor([0, NO_LABEL, 2, 1])

    total = batch_loss(training, mixed_batch(0.3, labels), FRAME).total

    log_probs = mixed_logits(training, 0.3).log_softmax(dim=1)
    own = log_probs[0, 0] + log_probs[2, 2] + log_probs[3, 1]
    partners = log_probs[1, 0] + log_probs[3, 2] + log_probs[2, 1]
    assert total.item() == pytest.approx(-(0.3 * own + 0.7 * partners).item() / 3, rel=1e-5)


def live_training(method, size=FRAME):
    training = build_training(0, method)
    training.targets = LiveTeacher("teacher", freeze(tiny_model(1)), gradcam, size)
    return training


def test_a_live_teacher_speaks_of_the_very_mixtures_that_its_student_sees():
    method = KDConfig(tau=2.0, lambda_ce=0.5)
    training = live_training(method)
    batch = mixed_batch(0.3)

    terms = batch_loss(training, batch, FRAME)

    images = view_images(random_batch(0), FRAME)
    mixed = 0.3 * images + 0.7 * images[PAIRS]
    (targets,) = training.targets(batch, TargetRequest((4, 4), with_maps=False))
    taught = training.targets.model(mixed).logits
    assert torch.allclose(targets.logits, taught, atol=1e-5)
    learned = mixed_logits(training, 0.3)
    kd = 4 * F.kl_div(
        F.log_softmax(learned / 2, 1), F.softmax(taught / 2, 1), reduction="batchmean"
    )
    ce = 0.3 * F.cross_entropy(learned, batch.labels) + 0.7 * F.cross_entropy(
        learned, batch.labels[PAIRS]
    )
    assert terms.terms["kd"].item() == pytest.approx(kd.item(), rel=1e-4)
    assert terms.total.item() == pytest.approx((kd + 0.5 * ce).item(), rel=1e-4)


@pytest.mark.parametrize("method", [LabelsConfig(), KDConfig(), E2KDConfig(lambda_ce=1.0)])
def test_student_and_teacher_are_shown_the_same_images_each_at_its_size(method):
    shown = {}
    training = live_training(method, size=(32, 32))
    for name, model in (("student", training.model), ("teacher", training.targets.model)):
        model.register_forward_pre_hook(lambda m, args, name=name: shown.update({name: args[0]}))
    pixel_augment = replace(drawn_for(4), mixture=share_of(0.4))
    batch = replace(random_batch(0), pixel_augment=pixel_augment)

    batch_loss(training, batch, FRAME)

    assert torch.equal(shown["student"], view_images(batch, FRAME))
    if "teacher" in shown:
        assert torch.equal(shown["teacher"], view_images(batch, (32, 32)))
    assert ("teacher" in shown) == (method.kind != "labels")


@pytest.mark.parametrize(("size", "calls"), [(FRAME, 1), ((32, 32), 2)])
def test_a_step_augments_its_images_once_for_both_networks_of_one_size(size, calls, monkeypatch):
    pixel_augment = replace(drawn_for(4), mixture=share_of(0.4))
    batch = replace(random_batch(0), pixel_augment=pixel_augment)
    training = live_training(E2KDConfig(lambda_ce=1.0), size=size)
    own = training.targets
    # Each network renders the batch itself.
    training.targets = lambda seen, *rest, **options: own(
        replace(seen, rendered=None), *rest, **options
    )
    apart = batch_loss(training, batch, FRAME)
    training.targets = own
    counted = []
    augment = geometry.change_rows
    monkeypatch.setattr(
        geometry, "change_rows", lambda images, *rest: counted.append(1) or augment(images, *rest)
    )

    terms = batch_loss(training, batch, FRAME)

    assert len(counted) == calls
    assert torch.equal(terms.total, apart.total)


def test_a_share_of_one_mixes_nothing():
    for method in (LabelsConfig(), E2KDConfig(lambda_ce=1.0)):
        training = live_training(method)

        mixed, plain_ = (
            batch_loss(training, batch, FRAME).total
            for batch in (mixed_batch(1.0), random_batch(0))
        )

        assert mixed.item() == pytest.approx(plain_.item(), rel=1e-6)


# ---- whole runs ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_live_student_of_mixtures_trains_resumes_and_is_another(frozen):
    options = {
        "mode": "live",
        "teacher": frozen.config.teacher,
        "trainer": replace(TRAINER, epochs=2, checkpoint_every_steps=3),
    }
    for run, augment in (
        ("plain", PAD_CROP),
        ("mixed", replace(BOTH, operations=(*PAD_CROP.operations, RANDAUGMENT))),
    ):
        distill.run(replace(distill_config(frozen, run=run, **options), augment=augment))

    lines = list(read_metrics(RUNS / "mixed" / "distill"))
    assert {"kd", "map"} <= set(lines[0])
    assert not torch.equal(
        weights_of("plain")["linear.weight"], weights_of("mixed")["linear.weight"]
    )

    killed = replace(distill_config(frozen, run="killed", **options), augment=augment)
    with killed_at(transfer, "move_batch", 5):
        distill.run(killed)
    distill.run(killed)
    assert_equal_states(weights_of("killed"), weights_of("mixed"))


def test_a_student_on_labels_mixes_whatever_the_mode(frozen):
    config = distill_config(
        frozen, method=LabelsConfig(), trainer=replace(TRAINER, epochs=1), run="labels"
    )

    assert distill.run(replace(config, augment=BOTH)).trained_epochs == 1


def test_a_teacher_is_taught_on_mixtures_and_evaluated_on_images(frozen, monkeypatch):
    evaluated = []
    monkeypatch.setattr(
        "permafrost.evaluation.forward.view_images",
        lambda batch, size: evaluated.append(batch.pixel_augment) or view_images(batch, size),
    )
    config = TeachConfig(
        store=StoreOptions(path=str(frozen.store.path)),
        teacher=replace(frozen.config.teacher, weights=None),
        teaching=LabelTeachingConfig(
            split="teacher", trainer=replace(TRAINER, epochs=1, batch_size=4), augment=BOTH
        ),
        evaluate=EvaluateOptions(splits=("test",)),
        run="t",
    )

    assert 0 <= teach.run(config).accuracy["test"] <= 1
    assert set(evaluated) == {None}


def test_a_rank_of_records_without_partners_is_refused(frozen):
    few = replace(TRAINER, batch_size=6, ranks=2)
    config = distill_config(frozen, method=LabelsConfig(), trainer=few)

    with pytest.raises(ConfigError, match=r"batch_size=6 leaves 2 ranks 3 rows .* multiple of 4"):
        replace(config, augment=MIXED)
    with pytest.raises(ConfigError, match=r"batch_size=1 leaves 1 rank 1 rows .* multiple of 2"):
        LabelTeachingConfig(trainer=replace(TRAINER, batch_size=1), augment=MIXED)
