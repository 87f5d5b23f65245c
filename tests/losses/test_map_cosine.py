"""Losses on maps: hand-computed values, and the effect of zero maps."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from permafrost.config.methods import E2KDConfig, KDConfig
from permafrost.config.training import OptimizerOptions
from permafrost.core.batches import Batch, MapTargets, StoredTargets
from permafrost.core.errors import ConfigError
from permafrost.losses.base import DistillationLoss, LossTerms, build_loss
from permafrost.losses.e2kd import E2KDLoss
from permafrost.losses.map_distances import map_cosine, upsampling_gram
from permafrost.models.explanations import gradcam
from permafrost.training.optim import build_optimizer
from permafrost.training.state import Training
from permafrost.training.step import batch_loss, train_step
from tests.support.batches import (
    FRAME,
    GRID,
    NUM_CLASSES,
    build_batch,
    random_frames,
    random_targets,
    tiny_model,
)
from tests.support.outputs import student_output


def nonnegative_maps(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Non-negative maps [B = 4, E = 2, A = 1, 7, 7]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(4, 2, 1, 7, 7, generator=generator, dtype=torch.float64).to(dtype)


def one_row_maps(*rows: list[float]) -> Tensor:
    """Maps f64 [B, 1, 1, 1, w] with one row of cells per record."""
    return torch.tensor(rows, dtype=torch.float64)[:, None, None, None]


def map_terms(
    student_maps: Tensor,
    teacher_maps: Tensor,
    size: tuple[int, int],
    *,
    map_valid: Tensor | None = None,
    **options: Any,
) -> LossTerms:
    """Terms of the e2KD loss where both networks have the same logits and only their maps differ."""
    records, explained = student_maps.shape[:2]
    logits = torch.zeros(records, 2, dtype=student_maps.dtype)
    targets = MapTargets(
        teacher="teacher",
        logits=logits,
        target_class=torch.zeros(records, explained, dtype=torch.long),
        maps=teacher_maps,
        map_valid=torch.ones(records, explained, dtype=torch.bool)
        if map_valid is None
        else map_valid,
    )
    student = student_output(logits=logits, maps=student_maps, input_size=size)
    return E2KDLoss(E2KDConfig(**options))(student, targets, torch.zeros(records, dtype=torch.long))


def unrelated_batch(seed: int) -> Batch:
    """Random frames with unrelated random targets."""
    return build_batch(random_frames(seed), random_targets(seed), None)


def batch_of_two_classes(seed: int) -> Batch:
    """The batch of `unrelated_batch`, with a second target class and map per record."""
    batch = unrelated_batch(seed)
    (first,) = batch.targets
    second = torch.rand(4, 1, 1, *GRID, generator=torch.Generator().manual_seed(seed + 1))
    classes = torch.cat([first.target_class, (first.target_class + 1) % NUM_CLASSES], dim=1)
    targets = replace(first, target_class=classes, maps=torch.cat([first.maps, second], dim=1))
    return replace(batch, targets=(targets,))


def training_of_loss(model: nn.Module, loss: DistillationLoss) -> Training:
    optimizer = build_optimizer(OptimizerOptions(lr=0.01), list(model.parameters()))
    return Training(model=model, loss=loss, optimizer=optimizer)


# ---- maps ----------------------------------------------------------------------------------------


def test_upsampling_gram_of_two_cells_to_four_matches_hand_computation():
    # Half-pixel centers: the rows of U are (1, 0), (3/4, 1/4), (1/4, 3/4), (0, 1).
    expected = torch.tensor([[1.625, 0.375], [0.375, 1.625]], dtype=torch.float64)

    gram = upsampling_gram(2, 4)

    assert torch.equal(gram, expected)


@pytest.mark.parametrize(("n", "full"), [(1, 5), (7, 7), (7, 224), (8, 30)])
def test_upsampling_gram_gives_the_inner_product_of_interpolated_rows(n, full):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, n, generator=generator, dtype=torch.float64)
    upsampled_a, upsampled_b = (
        F.interpolate(row[None, None], full, mode="linear", align_corners=False)[0, 0]
        for row in (a, b)
    )

    inner_product = a @ upsampling_gram(n, full) @ b

    expected = (upsampled_a @ upsampled_b).item()
    assert inner_product.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_map_cosine_of_two_cells_at_four_pixels_matches_hand_computation():
    student_maps, teacher_maps = one_row_maps([1.0, 0.0]), one_row_maps([0.0, 1.0])

    cosine, valid = map_cosine(student_maps, teacher_maps, (1, 4))

    # Upsampled: (1, 3/4, 1/4, 0) and (0, 1/4, 3/4, 1).
    assert cosine.item() == pytest.approx(0.375 / 1.625, abs=1e-12)
    assert valid.item() is True


def test_map_cosine_equals_the_cosine_of_upsampled_maps_and_so_do_its_gradients():
    student_maps, teacher_maps = nonnegative_maps(0).requires_grad_(), nonnegative_maps(1)
    # Every pair has another weight.
    weights = torch.arange(1.0, 9.0, dtype=torch.float64).view(4, 2)
    student_pixels, teacher_pixels = (
        F.interpolate(maps.flatten(0, 1), (224, 192), mode="bilinear", align_corners=False)
        for maps in (student_maps, teacher_maps)
    )
    expected = F.cosine_similarity(student_pixels.flatten(1), teacher_pixels.flatten(1)).view(4, 2)

    cosine, valid = map_cosine(student_maps, teacher_maps, (224, 192))

    (gradient,) = torch.autograd.grad((weights * cosine).sum(), student_maps)
    (expected_gradient,) = torch.autograd.grad((weights * expected).sum(), student_maps)
    assert valid.all()
    torch.testing.assert_close(cosine, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-10)


def test_map_cosine_is_not_the_cosine_at_the_native_grid():
    student_maps, teacher_maps = nonnegative_maps(0), nonnegative_maps(1)
    native = F.cosine_similarity(student_maps.flatten(2), teacher_maps.flatten(2), dim=2)

    cosine, _ = map_cosine(student_maps, teacher_maps, (224, 224))

    assert (cosine - native).abs().min() > 1e-4


def test_map_term_of_equal_maps_is_zero():
    maps = nonnegative_maps(0)

    terms = map_terms(maps, maps.clone(), (224, 224))

    assert abs(terms.terms["map"].item()) <= 1e-9
    assert terms.statistics["valid_map_fraction"].item() == 1


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6, 1e12])
def test_map_term_ignores_a_positive_scale_of_either_map_in_float32(scale):
    student_maps, teacher_maps = (
        nonnegative_maps(0, torch.float32),
        nonnegative_maps(1, torch.float32),
    )
    expected = map_terms(student_maps, teacher_maps, (224, 224)).terms["map"].item()

    student_scaled = map_terms(student_maps * scale, teacher_maps, (224, 224))
    teacher_scaled = map_terms(student_maps, teacher_maps * scale, (224, 224))
    both_scaled = map_terms(student_maps * scale, teacher_maps * scale, (224, 224))

    assert expected > 0.1
    for terms in (student_scaled, teacher_scaled, both_scaled):
        assert terms.terms["map"].item() == pytest.approx(expected, rel=0, abs=1e-6)


def test_zero_teacher_maps_give_a_finite_loss_and_exactly_no_gradient():
    student_maps = nonnegative_maps(0, torch.float32).requires_grad_()

    terms = map_terms(student_maps, torch.zeros(4, 2, 1, 7, 7), (224, 224))

    (gradient,) = torch.autograd.grad(terms.total, student_maps)
    assert terms.total.item() == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))
    assert terms.statistics["valid_map_fraction"].item() == 0


def test_zero_student_map_has_a_small_gradient_and_leaves_the_others_theirs():
    student_maps = nonnegative_maps(0, torch.float32)
    student_maps[0, 0] = 0
    student_maps.requires_grad_()

    terms = map_terms(student_maps, nonnegative_maps(1, torch.float32), (224, 224))

    (gradient,) = torch.autograd.grad(terms.total, student_maps)
    assert terms.total.isfinite()
    assert gradient.isfinite().all()
    assert gradient.norm() < 10
    assert (gradient.flatten(2).norm(dim=2) > 0).sum() == 7
    assert terms.statistics["valid_map_fraction"].item() == 7 / 8


@pytest.mark.parametrize(
    ("normalize_by", "second", "valid", "expected"),
    [
        ("batch", [0.0, 0.0], None, 0.02),
        ("valid", [0.0, 0.0], None, 0.04),
        ("valid", [0.0, 1.0], torch.tensor([[True], [False]]), 0.04),
    ],
)
def test_map_term_of_one_pair_of_two_matches_hand_computation(
    normalize_by, second, valid, expected
):
    # Without upsampling, the first pair has the cosine (3 * 4 + 4 * 3) / (5 * 5) = 0.96.
    student_maps = one_row_maps([3.0, 4.0], [1.0, 0.0])
    teacher_maps = one_row_maps([4.0, 3.0], second)
    options = {"lambda_map": 5.0, "normalize_by": normalize_by, "map_valid": valid}

    terms = map_terms(student_maps, teacher_maps, (1, 2), **options)

    assert terms.terms["map"].item() == pytest.approx(expected, abs=1e-12)
    assert terms.total.item() == pytest.approx(5.0 * expected, abs=1e-12)
    assert terms.statistics["valid_map_fraction"].item() == 0.5


@pytest.mark.parametrize(("normalize_by", "expected"), [("batch", 0.06 / 3), ("valid", 0.06 / 2)])
def test_every_record_weighs_the_same_however_many_classes_it_has(normalize_by, expected):
    near, far, zero = [4.0, 3.0], [3.0, 4.0], [0.0, 0.0]  # near and far have the cosine 0.96
    pairs = [  # three records: two classes, one class and padding, one class with a zero map
        [(near, far), (near, near)],
        [(near, far), (zero, zero)],
        [(near, zero), (zero, zero)],
    ]
    student, teacher = (
        torch.tensor([[pair[side] for pair in record] for record in pairs]).double()
        for side in (0, 1)
    )
    target_class = torch.tensor([[0, 1], [1, -1], [0, -1]])
    targets = MapTargets(
        teacher="teacher",
        logits=torch.zeros(3, 2).double(),
        target_class=target_class,
        maps=teacher[:, :, None, None],
        map_valid=teacher.any(dim=2) & (target_class >= 0),
    )
    loss = E2KDLoss(E2KDConfig(normalize_by=normalize_by))
    output = student_output(
        logits=targets.logits, maps=student[:, :, None, None], input_size=(1, 2)
    )

    terms = loss(output, targets, torch.zeros(3, dtype=torch.long))

    # 0.02, 0.04 and no value, divided by all three records or by the two with a map.
    assert terms.terms["map"].item() == pytest.approx(expected, rel=0, abs=1e-12)
    assert terms.statistics["valid_map_fraction"].item() == 3 / 4
    # Control: padding and the number of classes must not affect the weight of a record.
    over_places = 0.08 / 6
    assert abs(expected - over_places) > 1e-3


def test_frozen_loss_of_a_student_that_is_its_own_teacher_is_zero():
    student = tiny_model(0).double().eval()
    inputs = random_frames(0)
    with torch.no_grad():
        output = student(inputs.float() / 255)
        target_class = output.logits.argmax(dim=1, keepdim=True)
        maps = gradcam(student, output, target_class)
    targets = StoredTargets(
        teacher="itself",
        logits=output.logits,
        target_class=target_class,
        maps=maps,
        map_from_canonical=torch.eye(3).expand(4, 3, 3),
    )
    training = training_of_loss(student, E2KDLoss(E2KDConfig(tau=4.0)))

    terms = batch_loss(training, build_batch(inputs, targets, None), FRAME)

    assert terms.statistics["valid_map_fraction"].item() == 1
    assert abs(terms.terms["kd"].item()) <= 1e-12
    assert abs(terms.terms["map"].item()) <= 1e-9
    assert abs(terms.total.item()) <= 1e-9


def test_e2kd_steps_without_lambda_map_are_bit_equal_to_kd_steps():
    kd_student = tiny_model(0)
    e2kd_student = copy.deepcopy(kd_student)
    kd = training_of_loss(kd_student, build_loss(KDConfig(tau=2.0, lambda_ce=0.5)))
    e2kd = training_of_loss(
        e2kd_student, build_loss(E2KDConfig(tau=2.0, lambda_ce=0.5, lambda_map=0.0))
    )

    for seed in range(3):
        kd_terms = train_step(kd, unrelated_batch(seed), FRAME, clip_norm=1.0)
        e2kd_terms = train_step(e2kd, unrelated_batch(seed), FRAME, clip_norm=1.0)

    assert torch.equal(kd_terms.total, e2kd_terms.total)
    assert kd_terms.terms.keys() == e2kd_terms.terms.keys()
    for name, tensor in kd_student.state_dict().items():
        assert torch.equal(tensor, e2kd_student.state_dict()[name]), name


def test_map_term_enters_every_third_step_unscaled():
    loss = build_loss(E2KDConfig(lambda_map=5.0, guided_step_interval=3))
    training = training_of_loss(tiny_model(0), loss)

    steps = []
    for global_step in range(7):
        training.global_step = global_step
        steps.append(train_step(training, unrelated_batch(global_step), FRAME, clip_norm=None))

    guided = [terms for terms in steps if "map" in terms.terms]
    unguided = [terms for terms in steps if "map" not in terms.terms]
    assert [index for index, terms in enumerate(steps) if "map" in terms.terms] == [0, 3, 6]
    for terms in guided:
        assert terms.terms["map"] > 0
        assert torch.equal(terms.total, terms.terms["kd"] + 5.0 * terms.terms["map"])
    for terms in unguided:
        assert torch.equal(terms.total, terms.terms["kd"])


def test_a_student_of_the_first_class_ignores_the_other_maps_of_a_pass():
    model = tiny_model(0).eval()

    def map_term(batch: Batch, **options: Any) -> float:
        training = training_of_loss(model, build_loss(E2KDConfig(**options)))
        return batch_loss(training, batch, FRAME).terms["map"].item()

    first, both = map_term(unrelated_batch(0)), map_term(batch_of_two_classes(0))

    assert map_term(batch_of_two_classes(0), max_classes=1) == first
    assert map_term(batch_of_two_classes(0), max_classes=2) == both
    assert both != pytest.approx(first, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_classes": 1, "lambda_map": 0}, r"max_classes=1 has no effect with .*lambda_map=0"),
        ({"resolution": 4}, r"resolution=4 has no effect with method\.lambda_cat=0; leave it at 2"),
    ],
)
def test_an_option_of_a_term_that_is_disabled_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        E2KDConfig(**options)
