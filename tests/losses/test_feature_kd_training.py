"""AT, CAT-KD and ReviewKD: hand-computed values, each option, gradients, parameters in training, and mismatches."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from permafrost.annotation.teacher_fields import attention_fields, stage_fields
from permafrost.config.methods import (
    ATConfig,
    CatKDConfig,
    E2KDConfig,
    FeatureKDConfig,
    LabelsConfig,
)
from permafrost.config.training import OptimizerOptions
from permafrost.core.batches import StoredTargets, Targets
from permafrost.core.errors import ConfigError
from permafrost.loading.geometry import TargetRequest, view_targets
from permafrost.losses.base import StudentOutput, build_loss
from permafrost.losses.feature_kd import attention_loss, class_map_loss, pool_cells
from permafrost.losses.labels import bce_loss, cross_entropy_loss, off_label_bce_loss
from permafrost.losses.logit_distances import kd_loss
from permafrost.models.classifier import NO_INTERMEDIATES, Stage, attention_map
from permafrost.models.compute import ComputeSettings
from permafrost.training.optim import build_optimizer
from permafrost.training.state import Training
from permafrost.training.step import batch_loss, train_step
from permafrost_papers.bcos.options import BcosModelConfig
from permafrost_papers.e2kd.options import ReviewKDConfig
from permafrost_papers.e2kd.review_kd import Fusion, hierarchical_context_loss, review_levels
from tests.support.batches import FRAME, NUM_CLASSES, live_batch, random_frames
from tests.support.items import for_each
from tests.support.live_trainings import (
    STUDENT,
    gaussian_maps,
    live_teacher,
    seeded_model,
    training_with_live_teacher,
)
from tests.support.outputs import student_output
from tests.support.trainings import assert_same_state

BCOS = BcosModelConfig(name="resnet8", width=4)


METHODS = [ATConfig, CatKDConfig, ReviewKDConfig]


TERMS = {"at": "at", "cat_kd": "cat", "review_kd": "review"}


def take_live_steps(training: Training, seeds: range) -> None:
    for seed in seeds:
        train_step(training, live_batch(seed), FRAME, clip_norm=1.0)
        training.global_step += 1


def own_term(training: Training, seed: int = 0) -> Tensor:
    terms = batch_loss(training, live_batch(seed), FRAME).terms
    return terms[TERMS[training.loss.config.kind]]


def reached(training: Training) -> set[str]:
    """Modules of the student that receive a gradient from the method's term."""
    names = dict(training.model.named_parameters())
    gradients = torch.autograd.grad(
        own_term(training), list(names.values()), allow_unused=True, materialize_grads=True
    )
    return {name.split(".")[0] for name, grad in zip(names, gradients, strict=True) if grad.any()}


# ---- all three methods ---------------------------------------------------------------------------


@pytest.mark.parametrize("config", [STUDENT, BCOS], ids=["relu", "bcos"])
@pytest.mark.parametrize("method", [ATConfig, CatKDConfig])
def test_a_student_that_is_its_own_teacher_has_a_term_of_exactly_zero(method, config):
    training = training_with_live_teacher(method(), student=config, seed=3, config=config)
    training.model.load_state_dict(training.targets.model.state_dict())
    training.model.eval()

    assert own_term(training).item() == 0


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (ATConfig(), {"layer1", "layer2", "layer3"}),
        (ATConfig(stages=(1,)), {"layer1"}),
        (ATConfig(stages=(2,)), {"layer1", "layer2"}),
        (CatKDConfig(), {"layer1", "layer2", "layer3", "linear"}),
        (ReviewKDConfig(), {"layer1", "layer2", "layer3"}),
    ],
    ids=["at", "attention_1", "attention_2", "cat_kd", "review_kd"],
)
def test_gradients_reach_the_stages_that_are_compared(method, expected):
    assert reached(training_with_live_teacher(method)) == expected | {"conv1", "bn1"}


def test_the_finest_level_of_review_teaches_the_deepest_stage_too():
    training = training_with_live_teacher(ReviewKDConfig())
    loss = training.loss.eval()
    output = training.model.eval()(random_frames(0).float() / 255, loss.needs.intermediates)
    deeper = None
    for fusion, level in reversed(
        list(zip(loss.fusions, review_levels(output.stages), strict=True))
    ):
        finest, deeper = fusion(level, deeper, level.shape[-2:])

    deepest = training.model.layer3[0].conv2.weight
    (gradient,) = torch.autograd.grad(finest.square().sum(), deepest)

    assert finest.shape[-2:] == FRAME
    assert gradient.any()


@pytest.mark.parametrize("label_loss", ["ce", "bce_offlabel"])
@pytest.mark.parametrize("config", METHODS)
def test_without_their_term_they_are_the_supervised_loss_bit_for_bit(config, label_loss):
    method = config(label_loss=label_loss, **{f"lambda_{TERMS[config().kind]}": 0.0})
    labels = training_with_live_teacher(LabelsConfig(loss=label_loss))
    training = training_with_live_teacher(method)
    assert training.loss.needs.intermediates == NO_INTERMEDIATES
    assert training.loss.needs.outputs == ()

    take_live_steps(labels, range(3))
    take_live_steps(training, range(3))

    assert list(training.loss.parameters()) == []
    assert_same_state(training, labels)


def batch_terms(method: FeatureKDConfig) -> Any:
    training = training_with_live_teacher(method)
    training.model.eval()
    return batch_loss(training, live_batch(0), FRAME)


@pytest.mark.parametrize("method", METHODS)
def test_labels_logits_and_the_own_term_are_weighed_by_their_options(method):
    term = TERMS[method().kind]
    labels = torch.arange(4) % NUM_CLASSES
    own = batch_terms(method(lambda_ce=0.0, lambda_kd=1.0)).terms[term]
    student = seeded_model(STUDENT, 0).eval()(random_frames(0).float() / 255)
    (taught,) = live_teacher()(live_batch(0), TargetRequest((4, 4), with_maps=False))

    terms = batch_terms(method(lambda_ce=0.5, lambda_kd=3.0, tau=2.0, **{f"lambda_{term}": 7.0}))

    ce = cross_entropy_loss(student.logits, labels)
    kd = kd_loss(student.logits, taught.logits, tau=2.0)
    assert set(terms.terms) == {"ce", "kd", term}
    assert own > 0
    assert terms.terms[term].item() == pytest.approx(own.item())
    assert terms.total.item() == pytest.approx((0.5 * ce + 3 * kd + 7 * own).item(), rel=1e-5)


def test_several_teachers_are_weighed_and_the_labels_count_once():
    def stored(seed: int) -> StoredTargets:
        attention = gaussian_maps(seed, 4, 4, 4).square().float()
        return StoredTargets(
            teacher=str(seed),
            logits=torch.zeros(4, NUM_CLASSES),
            intermediates={"attention_3": attention},
        )

    training = training_with_live_teacher(ATConfig(stages=(3,)))
    training.targets = view_targets
    training.model.eval()

    def terms(*teachers: StoredTargets) -> Any:
        batch = replace(live_batch(0), targets=teachers)
        return batch_loss(training, batch, FRAME).terms

    first, second = terms(stored(0)), terms(stored(1))
    both = terms(stored(0), stored(1))

    assert first["at"] != second["at"]
    mean = (first["at"] + second["at"]) / 2
    assert both["at"].item() == pytest.approx(mean.item(), rel=1e-6)
    assert both["ce"].item() == pytest.approx(first["ce"].item(), rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_the_label_term_of_bcos_students_is_the_off_label_bce(method):
    student = seeded_model(STUDENT, 0).eval()(random_frames(0).float() / 255)

    terms = batch_terms(method(label_loss="bce_offlabel")).terms

    expected = off_label_bce_loss(student.logits, torch.arange(4) % NUM_CLASSES)
    assert "ce" not in terms
    assert terms["bce"].item() == pytest.approx(expected.item())


def test_the_defaults_are_the_papers_baselines():
    assert [(m().lambda_ce, m().lambda_kd, m().label_loss) for m in METHODS] == [(1, 0, "ce")] * 3
    assert (ATConfig().lambda_at, ATConfig().stages) == (1000, ())
    cat = CatKDConfig()
    assert (cat.lambda_cat, cat.resolution, cat.normalize) == (1, 2, False)
    assert ReviewKDConfig().lambda_review == 1


def test_resolution_and_normalize_of_cat_kd_change_its_term():
    plain, coarse, unit = (
        own_term(training_with_live_teacher(CatKDConfig(**options))).item()
        for options in ({}, {"resolution": 1}, {"normalize": True})
    )

    assert len({plain, coarse, unit}) == 3
    assert coarse < plain  # averages are closer than the values themselves
    assert unit < 4 / 4  # two unit vectors of four cells


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("label_loss", ["ce", "bce_offlabel"])
def test_bcos_networks_learn_by_them(method, label_loss):
    training = training_with_live_teacher(
        method(label_loss=label_loss), student=BCOS, config=BcosModelConfig(name="resnet8", width=8)
    )
    before = own_term(training).item()

    take_live_steps(training, range(3))

    assert before > 0
    assert own_term(training).isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in training.model.parameters())
    assert all(p.grad is not None for p in training.loss.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_terms_are_float32_in_half_precision_and_near_those_in_full(method):
    full = own_term(training_with_live_teacher(method()))
    half_training = training_with_live_teacher(method())
    half_training.compute_settings = ComputeSettings(precision=torch.bfloat16)

    half = own_term(half_training)

    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(full.item(), rel=0.1)
    assert half.item() != full.item()


# ---- parameters of a loss ------------------------------------------------------------------------


def test_a_step_trains_the_fusions_and_clips_them_with_the_student():
    training = training_with_live_teacher(ReviewKDConfig())
    before = copy.deepcopy(training.loss.state_dict())
    sgd = build_optimizer(
        OptimizerOptions(kind="sgd", lr=1.0, momentum=0.0, weight_decay=0.0),
        [*training.model.parameters(), *training.loss.parameters()],
    )
    training.optimizer = sgd
    parameters = [*training.model.parameters(), *training.loss.parameters()]
    start = [p.detach().clone() for p in parameters]

    train_step(training, live_batch(0), FRAME, clip_norm=1e-3)

    moved = torch.stack(
        [(p.detach() - s).square().sum() for p, s in zip(parameters, start, strict=True)]
    )
    assert moved.sum().sqrt().item() == pytest.approx(1e-3, rel=1e-2)
    for name, tensor in training.loss.named_parameters():
        assert not torch.equal(tensor, before[name]), name


def test_training_with_fusions_continues_bit_for_bit():
    method = ReviewKDConfig(lambda_kd=1.0)
    uninterrupted, first = training_with_live_teacher(method), training_with_live_teacher(method)
    take_live_steps(uninterrupted, range(6))
    take_live_steps(first, range(3))
    buffer = io.BytesIO()
    torch.save(first.state(), buffer)
    buffer.seek(0)

    resumed = training_with_live_teacher(method, seed=5)
    resumed.load_state(torch.load(buffer, weights_only=True))
    take_live_steps(resumed, range(3, 6))

    assert_same_state(resumed, uninterrupted)
    assert len(uninterrupted.loss.state_dict()) > 0
    for name, tensor in uninterrupted.loss.state_dict().items():
        assert torch.equal(resumed.loss.state_dict()[name], tensor), name


# ---- mismatches ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (ATConfig(), r"student has 3 stages, the teacher 4.*method\.stages=\[-3, -2, -1\]"),
        (ATConfig(stages=(2, 4)), r"method\.stages=\[2, 4\]: the student has 3"),
        (ATConfig(stages=(-4,)), r"method\.stages=\[-4\]: the student has 3"),
        (ReviewKDConfig(), r"the student has 3 stages, the targets .* 1, 2, 3, 4; choose networks"),
    ],
    ids=["at", "attention_4", "attention_-4", "review_kd"],
)
def test_networks_of_other_stages_are_refused_before_training(method, message):
    teacher = BcosModelConfig(name="resnet18", width=4, stem="small")

    with pytest.raises(ConfigError, match=message):
        training_with_live_teacher(method, config=teacher)


def test_stages_that_both_networks_have_can_be_chosen():
    teacher = BcosModelConfig(name="resnet18", width=4, stem="small")

    assert own_term(training_with_live_teacher(ATConfig(stages=(2, 3)), config=teacher)) > 0


def test_stages_counted_from_the_deepest_pair_networks_with_different_numbers_of_stages():
    teacher = BcosModelConfig(name="resnet18", width=4, stem="small")
    training = training_with_live_teacher(ATConfig(stages=(-3, -2, -1)), config=teacher)
    loss, images = training.loss, random_frames(0).float() / 255
    student = training.model.eval()(images, loss.needs.intermediates)
    taught = training.targets.model(images, loss.needs.intermediates)
    fields = attention_fields(taught)
    targets = Targets(teacher="t", logits=taught.logits, intermediates=fields)

    found = loss.compare(StudentOutput(output=student), targets)

    pairs = zip(student.stages, taught.stages[1:], strict=True)
    expected = sum(
        attention_loss(attention_map(own.output), attention_map(other.output))
        for own, other in pairs
    )
    assert found.item() == pytest.approx(expected.item())


@pytest.mark.parametrize(
    "method", [CatKDConfig(resolution=5), E2KDConfig(lambda_cat=1.0, resolution=5)]
)
def test_class_maps_coarser_than_they_are_compared_are_refused(method):
    with pytest.raises(
        ConfigError, match=r"resolution=5 is finer .* 4x4 cells.*annotate\.class_map_size"
    ):
        training_with_live_teacher(method)


def test_e2kd_with_class_maps_adds_the_term_of_cat_kd_with_its_own_weight():
    alone = batch_terms(E2KDConfig(lambda_map=2.0, lambda_ce=0.5))
    cat = batch_terms(CatKDConfig(resolution=3)).terms["cat"]

    both = batch_terms(E2KDConfig(lambda_map=2.0, lambda_ce=0.5, lambda_cat=7.0, resolution=3))

    assert cat > 0
    assert both.terms["cat"].item() == pytest.approx(cat.item())
    assert set(alone.terms) == {"ce", "kd", "map"}
    assert both.total.item() == pytest.approx((alone.total + 7 * cat).item(), rel=1e-5)


@for_each(
    "method,options,message",
    [
        *[(m, {"lambda_ce": 0.0}, r"lambda_ce or method\.lambda_kd above 0") for m in METHODS],
        *[(m, {"tau": 0.0}, r"method\.tau must be > 0") for m in METHODS],
        (ATConfig, {"lambda_at": -1.0}, r"method\.lambda_at must be >= 0, got -1"),
        (ATConfig, {"stages": (0,)}, r"method\.stages must list stages from 1"),
        (ATConfig, {"stages": (-1, 1)}, r"stages from 1, or all from -1"),
        (ATConfig, {"stages": (2, 2)}, r"each once, got \[2, 2\]"),
        (CatKDConfig, {"lambda_cat": -1.0}, r"method\.lambda_cat must be >= 0"),
        (CatKDConfig, {"resolution": 0}, r"method\.resolution must be >= 1, got 0"),
        (ReviewKDConfig, {"lambda_review": -1.0}, r"method\.lambda_review must be >= 0"),
    ],
)
def test_options_out_of_range_say_so(method, options, message):
    with pytest.raises(ConfigError, match=message):
        method(**options)


@pytest.mark.parametrize("label_loss", ["ce", "bce_offlabel"])
def test_many_labels_a_record_have_a_supervised_term_of_their_own(label_loss):
    loss = build_loss(CatKDConfig(lambda_cat=0.0, label_loss=label_loss))
    logits, labels = torch.randn(3, 4), torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    targets = Targets(teacher="any", logits=torch.zeros(3, 4))

    terms = loss(student_output(logits=logits), targets, labels).terms

    wanted = off_label_bce_loss if label_loss == "bce_offlabel" else bce_loss
    assert terms == {"bce": wanted(logits, labels)}


def test_soft_targets_beside_a_baseline_are_refused_for_many_labels():
    build_loss(ATConfig()).check_labels(many=True)
    with pytest.raises(ConfigError, match=r"method\.lambda_kd=0\.5 compares one distribution"):
        build_loss(ATConfig(lambda_kd=0.5)).check_labels(many=True)


def grid(*rows: list[float]) -> Tensor:
    """Map [1, h, w] of one record."""
    return torch.tensor([list(rows)], dtype=torch.float64)


def test_attention_is_the_mean_square_over_channels():
    features = torch.tensor([[[[3.0, 0.0], [-2.0, 1.0]], [[1.0, 0.0], [2.0, 1.0]]]])  # [1, 2, 2, 2]

    assert attention_map(features).tolist() == [[[5.0, 0.0], [4.0, 1.0]]]


def test_attention_loss_of_2x2_maps_matches_hand_computation():
    student, teacher = grid([9.0, 0.0], [0.0, 0.0]), grid([0.0, 3.0], [4.0, 0.0])

    loss = attention_loss(student, teacher)

    # At unit norm (1, 0, 0, 0) and (0, 0.6, 0.8, 0), with a squared distance of 1 + 0.36 + 0.64.
    assert loss.item() == pytest.approx(2.0 / 4, abs=1e-12)
    same = torch.cat([teacher, teacher])
    assert attention_loss(torch.cat([student, teacher]), same).item() == pytest.approx(2.0 / 8)


def test_attention_loss_is_the_squared_norm_over_the_places():
    """The published form is the squared norm of the difference per record."""
    student, teacher = gaussian_maps(0, 3, 7, 7).square(), gaussian_maps(1, 3, 7, 7).square()
    difference = F.normalize(student.flatten(1)) - F.normalize(teacher.flatten(1))

    loss = attention_loss(student, teacher)

    assert (loss * 49).item() == pytest.approx(difference.square().sum(dim=1).mean().item())


def test_attention_ignores_the_order_of_channels_and_any_positive_scale():
    features, teacher = gaussian_maps(0, 2, 5, 4, 4), gaussian_maps(1, 2, 4, 4).square()
    expected = attention_loss(attention_map(features), teacher).item()

    shuffled = attention_map(features[:, [3, 1, 4, 0, 2]])

    assert attention_loss(shuffled, teacher).item() == pytest.approx(expected, abs=1e-15)
    assert attention_loss(attention_map(7 * features), 0.01 * teacher).item() == pytest.approx(
        expected, abs=1e-15
    )


def test_the_finer_of_two_attention_maps_is_averaged_over_the_coarser_ones_cells():
    fine = grid(
        [1.0, 3.0, 0.0, 0.0], [5.0, 7.0, 0.0, 0.0], [0.0, 0.0, 8.0, 0.0], [0.0, 0.0, 0.0, 0.0]
    )
    coarse = grid([4.0, 0.0], [0.0, 2.0])

    assert attention_loss(fine, coarse).item() == 0
    assert attention_loss(coarse, fine).item() == 0
    assert attention_loss(fine, coarse.flip(2)).item() > 0.1


def test_an_attention_map_of_zeros_pulls_nowhere():
    student = gaussian_maps(0, 1, 4, 4).square().requires_grad_()

    (gradient,) = torch.autograd.grad(
        attention_loss(student, torch.zeros(1, 4, 4).to(student)), student, retain_graph=True
    )
    dead = torch.zeros(1, 2, 4, 4, requires_grad=True)
    (dead_gradient,) = torch.autograd.grad(
        attention_loss(attention_map(dead), student.float()), dead
    )

    assert gradient.abs().max() < 1e-15
    assert not dead_gradient.any()


def test_at_sums_its_stages():
    stages = [gaussian_maps(seed, 2, 3, size, size) for seed, size in enumerate((8, 4, 2))]
    student = student_output(
        logits=torch.zeros(2, 3), stages=tuple(Stage(output, output) for output in stages)
    )
    taught = {
        f"attention_{n}": gaussian_maps(9, 2, size, size).square()
        for n, size in ((1, 8), (2, 4), (3, 2))
    }
    targets = Targets(teacher="t", logits=torch.zeros(2, 3), intermediates=taught)
    single = [
        attention_loss(attention_map(output), taught[f"attention_{n}"]).item()
        for n, output in enumerate(stages, start=1)
    ]

    found = {
        chosen: build_loss(ATConfig(stages=chosen)).compare(student, targets).item()
        for chosen in ((), (1, 3), (2,))
    }

    assert found[()] == pytest.approx(sum(single), abs=1e-12)
    assert found[1, 3] == pytest.approx(single[0] + single[2], abs=1e-12)
    assert found[2,] == pytest.approx(single[1], abs=1e-12)


@pytest.mark.parametrize(
    ("resolution", "normalize", "expected"),
    [
        (2, False, (1 + 4 + 9 + 16) / 4),
        (1, False, 2.5**2),
        (2, True, 1 / 4),  # a unit vector of four cells against zeros
        (1, True, 1.0),
    ],
)
def test_class_map_loss_of_one_class_matches_hand_computation(resolution, normalize, expected):
    teacher_maps = grid([1.0, 2.0], [3.0, 4.0])[:, None]  # [1, 1, 2, 2]

    loss = class_map_loss(
        torch.zeros_like(teacher_maps), teacher_maps, resolution, normalize=normalize
    )

    assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_class_map_loss_is_the_mean_over_records_classes_and_cells():
    student, teacher = gaussian_maps(0, 3, 5, 4, 4), gaussian_maps(1, 3, 5, 6, 6)
    blocks = [
        maps.unflatten(2, (2, side)).unflatten(4, (2, side)).mean(dim=(3, 5))
        for maps, side in ((student, 2), (teacher, 3))
    ]

    loss = class_map_loss(student, teacher, 2)

    expected = (blocks[0] - blocks[1]).square().sum() / (3 * 5 * 4)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)


def test_normalized_class_maps_ignore_their_magnitude():
    student, teacher = gaussian_maps(0, 2, 3, 4, 4), gaussian_maps(1, 2, 3, 4, 4)

    plain, scaled = (class_map_loss(student, s * teacher, 2, normalize=True) for s in (1, 1000))

    assert scaled.item() == pytest.approx(plain.item(), abs=1e-12)


def test_hierarchical_context_loss_of_2x2_features_matches_hand_computation():
    teacher = grid([1.0, 2.0], [3.0, 4.0])[:, None]
    zeros = torch.zeros_like(teacher)

    loss = hierarchical_context_loss(zeros, teacher)

    # The grid has weight 1, and its average, the only coarser pooling, weight 1 / 2.
    assert loss.item() == pytest.approx((7.5 + 0.5 * 6.25) / 1.5, abs=1e-12)
    assert hierarchical_context_loss(zeros[..., :1, :1], teacher[..., 1:, 1:]).item() == 16.0


def test_hierarchical_context_loss_pools_to_4_2_and_1_cells():
    student, teacher = gaussian_maps(0, 2, 3, 8, 8), gaussian_maps(1, 2, 3, 8, 8)
    difference = student - teacher
    means = [F.avg_pool2d(difference, 8 // size).square().mean() for size in (8, 4, 2, 1)]

    loss = hierarchical_context_loss(student, teacher)

    weights = (1, 1 / 2, 1 / 4, 1 / 8)
    expected = sum(w * m for w, m in zip(weights, means, strict=True)) / sum(weights)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    assert hierarchical_context_loss(student, student).item() == 0


def test_levels_are_the_stages_and_the_average_of_the_last_output():
    output, residual_sum = gaussian_maps(0, 2, 3, 4, 4), gaussian_maps(1, 2, 3, 4, 4)

    stage = Stage(output, residual_sum)
    student = review_levels([stage])
    teacher = stage_fields(student_output(logits=output, stages=(stage,)).output)

    assert torch.equal(student[0], output)
    assert torch.equal(teacher["features_1"], residual_sum)
    assert torch.equal(student[1], output.mean(dim=(2, 3), keepdim=True))
    assert torch.equal(teacher["features_pooled"], output.mean(dim=(2, 3)))


def test_a_fusion_mixes_its_level_with_the_upsampled_deeper_one():
    fusion = Fusion(3, 2, 5, is_deepest=False).eval()
    level, deeper = gaussian_maps(0, 1, 3, 4, 4).float(), gaussian_maps(1, 1, 2, 2, 2).float()
    torch.nn.init.zeros_(fusion.mix.weight)
    fusion.mix.bias.data = torch.tensor([50.0, -50.0])  # selects the level itself
    alone, passed = fusion(level, deeper, (4, 4))
    fusion.mix.bias.data = torch.tensor([-50.0, 50.0])  # selects the deeper level
    _, from_below = fusion(level, deeper, (4, 4))

    assert alone.shape == (1, 5, 4, 4)
    assert torch.allclose(passed, fusion.reduce(level), atol=1e-6)
    assert torch.allclose(
        from_below, deeper.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3), atol=1e-6
    )
    assert Fusion(3, 2, 5, is_deepest=True)(level, None, (8, 8))[0].shape == (1, 5, 8, 8)


def test_fusions_have_the_networks_channels_and_at_most_512_between():
    training = training_with_live_teacher(ReviewKDConfig())

    fusions = training.loss.fusions

    assert [f.reduce[0].in_channels for f in fusions] == [4, 8, 16, 16]
    assert [f.expand[0].out_channels for f in fusions] == [6, 12, 24, 24]
    assert {f.reduce[0].out_channels for f in fusions} == {16}
    assert [f.mix is None for f in fusions] == [False, False, False, True]


def test_fusions_have_at_most_512_channels_between_the_networks():
    loss = build_loss(ReviewKDConfig())
    own, taught = torch.zeros(1, 1024, 1, 1), torch.zeros(1, 1, 1, 1)

    loss.build(
        student_output(logits=own, stages=(Stage(own, own),)),
        Targets(
            teacher="t",
            logits=own,
            intermediates={"features_1": taught, "features_pooled": taught[:, :, 0, 0]},
        ),
    )

    assert {f.reduce[0].out_channels for f in loss.fusions} == {512}


def pooled_and_gradient(pool, values, size):
    values = values.clone().requires_grad_()
    pooled = pool(values, size)
    pooled.square().sum().backward()
    return pooled.detach(), values.grad


WHOLE = [(8, 12), (4, 4), (2, 6), 4, 1]
PARTS = [(4, 2), (3, 3), (7, 4), (9, 11), 2]


@pytest.mark.parametrize(
    ("grid", "size", "dtype", "tolerance"),
    [
        *[((8, 12), size, torch.float32, 0) for size in WHOLE],
        *[((7, 5), size, torch.float64, 1e-12) for size in PARTS],
    ],
)
@pytest.mark.parametrize("records", [(2, 3), (3,)])
def test_cells_are_averaged_as_by_torch_and_whole_ones_to_the_bit(
    records, grid, size, dtype, tolerance
):
    values = torch.randn(*records, *grid, dtype=dtype)
    for one, other in zip(
        pooled_and_gradient(pool_cells, values, size),
        pooled_and_gradient(F.adaptive_avg_pool2d, values, size),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
