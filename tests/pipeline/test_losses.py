"""Losses: hand-computed values, invariances, and what a map that is zero does to them."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.methods import E2KDConfig, KDConfig, LabelsConfig
from pipeline.config.models import CifarModelConfig
from pipeline.config.teaching import LabelTeachingConfig
from pipeline.config.training import OptimizerOptions
from pipeline.core.errors import ConfigError
from pipeline.core.records import NO_LABEL, Batch, StoredTargets, Targets
from pipeline.losses.base import DistillationLoss, LossTerms
from pipeline.losses.build import build_loss
from pipeline.losses.e2kd import E2KDLoss
from pipeline.losses.kd import KDLoss, kd_loss
from pipeline.losses.labels import LabelsLoss, bce_loss, cross_entropy_loss, off_label_bce_loss
from pipeline.losses.map_cosine import map_cosine, upsampling_gram
from pipeline.losses.mld import mld_loss
from pipeline.models.cifar import CifarResNet
from pipeline.models.explainers.gradcam import gradcam
from pipeline.training.state import Training, build_optimizer
from pipeline.training.step import batch_loss, train_step
from tests.support.outputs import student_output

FRAME = (16, 16)
GRID = (4, 4)
NUM_CLASSES = 3


def random_logits(seed: int, *, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(4, 5, generator=generator, dtype=torch.float64)


def random_maps(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Non-negative maps [B = 4, E = 2, A = 1, 7, 7]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(4, 2, 1, 7, 7, generator=generator, dtype=torch.float64).to(dtype)


def one_row_maps(*rows: list[float]) -> Tensor:
    """Maps [B, 1, 1, 1, w] float64, one row of cells a record."""
    return torch.tensor(rows, dtype=torch.float64)[:, None, None, None]


def map_terms(
    student_maps: Tensor,
    teacher_maps: Tensor,
    size: tuple[int, int],
    *,
    map_valid: Tensor | None = None,
    **options: Any,
) -> LossTerms:
    """The e2KD loss of maps alone: both networks have the same logits."""
    records, explained = student_maps.shape[:2]
    logits = torch.zeros(records, 2, dtype=student_maps.dtype)
    targets = Targets(
        teacher="teacher",
        logits=logits,
        explained_class=torch.zeros(records, explained, dtype=torch.long),
        maps=teacher_maps,
        map_valid=torch.ones(records, explained, dtype=torch.bool)
        if map_valid is None
        else map_valid,
    )
    student = student_output(logits=logits, maps=student_maps, input_size=size)
    return E2KDLoss(E2KDConfig(**options))(student, targets, torch.zeros(records, dtype=torch.long))


def tiny_model(seed: int) -> CifarResNet:
    torch.manual_seed(seed)
    return CifarResNet(CifarModelConfig(name="resnet8", width=4), NUM_CLASSES)


def random_frames(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (4, 3, *FRAME), generator=generator, dtype=torch.uint8)


def whole_frames(inputs: Tensor, targets: StoredTargets) -> Batch:
    """A batch without views."""
    return Batch(
        keys=tuple(f"record-{index}" for index in range(len(inputs))),
        record_index=torch.arange(len(inputs)),
        inputs=inputs,
        canonical_from_view=None,
        view_index=torch.zeros(len(inputs), dtype=torch.long),
        original_size=torch.full((len(inputs), 2), 32.0),
        labels=torch.arange(len(inputs)) % NUM_CLASSES,
        groups=torch.full((len(inputs),), -1),
        targets=(targets,),
    )


def random_batch(seed: int) -> Batch:
    """Frames and targets of a teacher that has nothing to do with them."""
    generator = torch.Generator().manual_seed(seed)
    targets = StoredTargets(
        teacher="teacher",
        logits=torch.randn(4, NUM_CLASSES, generator=generator),
        explained_class=torch.randint(0, NUM_CLASSES, (4, 1), generator=generator),
        maps=torch.rand(4, 1, 1, *GRID, generator=generator),
        map_from_canonical=torch.eye(3).expand(4, 3, 3),
    )
    return whole_frames(random_frames(seed), targets)


def build_training(model: nn.Module, loss: DistillationLoss) -> Training:
    optimizer = build_optimizer(OptimizerOptions(lr=0.01), list(model.parameters()))
    return Training(model=model, loss=loss, optimizer=optimizer)


def test_kd_loss_matches_a_hand_computed_kl():
    student_logits = torch.zeros(1, 2, dtype=torch.float64)  # probs (1/2, 1/2)
    teacher_logits = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)  # probs (3/4, 1/4)

    loss = kd_loss(student_logits, teacher_logits, tau=1.0)

    assert loss.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-12)


def test_kd_loss_matches_a_hand_computed_kl_at_temperature_two():
    student_logits = torch.zeros(2, 2, dtype=torch.float64)  # probs (1/2, 1/2)
    teacher_logits = torch.tensor(
        [[2 * math.log(3.0), 0.0], [0.0, 0.0]], dtype=torch.float64
    )  # at tau = 2: probs (3/4, 1/4), and (1/2, 1/2), which adds nothing

    loss = kd_loss(student_logits, teacher_logits, tau=2.0)

    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2
    assert loss.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("tau", [0.1, 1.0, 4.0, 1e3])
def test_kd_loss_of_equal_logits_is_zero(tau):
    logits = random_logits(0, scale=20.0)

    loss = kd_loss(logits, logits.clone(), tau)

    assert abs(loss.item()) <= 1e-12


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_kd_loss_equals_tau_squared_times_torch_batchmean_kl(tau):
    student_logits, teacher_logits = random_logits(0).requires_grad_(), random_logits(1)
    torch_kl = torch.nn.KLDivLoss(reduction="batchmean")(
        F.log_softmax(student_logits / tau, dim=1), F.softmax(teacher_logits / tau, dim=1)
    )

    loss = kd_loss(student_logits, teacher_logits, tau)

    (gradient,) = torch.autograd.grad(loss, student_logits)
    (torch_gradient,) = torch.autograd.grad(tau**2 * torch_kl, student_logits)
    assert loss.item() == pytest.approx(tau**2 * torch_kl.item(), rel=0, abs=1e-10)
    torch.testing.assert_close(gradient, torch_gradient, rtol=0, atol=1e-10)


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_kd_loss_equals_the_papers_cross_entropy_less_the_teachers_entropy(tau):
    student_logits, teacher_logits = random_logits(0).requires_grad_(), random_logits(1)
    teacher_probs = F.softmax(teacher_logits / tau, dim=1)
    entropy = -(teacher_probs * teacher_probs.log()).sum(dim=1).mean()
    student_log_probs = F.log_softmax(student_logits / tau, dim=1)
    paper_loss = tau**2 * -(teacher_probs * student_log_probs).sum(dim=1).mean()

    loss = kd_loss(student_logits, teacher_logits, tau)

    (gradient,) = torch.autograd.grad(loss, student_logits)
    (paper_gradient,) = torch.autograd.grad(paper_loss, student_logits)
    expected = paper_loss - tau**2 * entropy
    assert loss.item() == pytest.approx(expected.item(), rel=0, abs=1e-10)
    torch.testing.assert_close(gradient, paper_gradient, rtol=0, atol=1e-10)


def test_kd_loss_at_high_temperature_is_half_the_mean_square_of_centered_differences():
    student_logits, teacher_logits = random_logits(0), random_logits(1)
    difference = student_logits - teacher_logits
    centered = difference - difference.mean(dim=1, keepdim=True)
    expected = centered.square().sum(dim=1).mean() / (2 * difference.shape[1])

    loss = kd_loss(student_logits, teacher_logits, tau=1e3)

    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_kd_loss_ignores_a_constant_added_to_a_records_logits(tau):
    student_logits, teacher_logits = random_logits(0), random_logits(1)
    constants = torch.tensor([[-50.0], [0.3], [7.0], [100.0]], dtype=torch.float64)
    expected = kd_loss(student_logits, teacher_logits, tau).item()

    student_moved = kd_loss(student_logits + constants, teacher_logits, tau)
    teacher_moved = kd_loss(student_logits, teacher_logits + constants, tau)

    assert student_moved.item() == pytest.approx(expected, rel=0, abs=1e-10)
    assert teacher_moved.item() == pytest.approx(expected, rel=0, abs=1e-10)


def test_kd_loss_module_weighs_its_terms():
    student_logits = torch.zeros(1, 2, dtype=torch.float64)
    teacher_logits = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    targets = Targets(teacher="teacher", logits=teacher_logits)
    loss = KDLoss(KDConfig(lambda_ce=0.5, lambda_kd=2.0))

    terms = loss(student_output(logits=student_logits), targets, torch.tensor([1]))

    kl, ce = 0.75 * math.log(1.5) + 0.25 * math.log(0.5), math.log(2.0)
    assert terms.terms["kd"].item() == pytest.approx(kl, abs=1e-12)
    assert terms.terms["ce"].item() == pytest.approx(ce, abs=1e-12)
    assert terms.total.item() == pytest.approx(2.0 * kl + 0.5 * ce, abs=1e-12)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_labels_loss_equals_torch_cross_entropy(label_smoothing):
    logits, labels = random_logits(0), torch.tensor([0, 4, 2, 2])
    loss = build_loss(LabelsConfig(label_smoothing=label_smoothing))

    terms = loss(student_output(logits=logits), None, labels)

    expected = F.cross_entropy(logits, labels, label_smoothing=label_smoothing).item()
    assert isinstance(loss, LabelsLoss)
    assert terms.total.item() == pytest.approx(expected, rel=0, abs=1e-12)
    assert terms.terms["ce"].item() == pytest.approx(expected, rel=0, abs=1e-12)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_cross_entropy_is_the_mean_over_records_whose_label_is_known(label_smoothing):
    logits = random_logits(0).requires_grad_()
    labels = torch.tensor([NO_LABEL, 4, NO_LABEL, 2])
    known_only = cross_entropy_loss(logits[[1, 3]], torch.tensor([4, 2]), label_smoothing)

    loss = cross_entropy_loss(logits, labels, label_smoothing)

    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == pytest.approx(known_only.item(), rel=0, abs=1e-12)
    assert gradient[[0, 2]].count_nonzero() == 0
    assert gradient[[1, 3]].count_nonzero() == 10


def test_cross_entropy_of_a_batch_without_any_label_is_zero_with_zero_gradient():
    logits = random_logits(0).requires_grad_()

    loss = cross_entropy_loss(logits, torch.full((4,), NO_LABEL))

    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_off_label_bce_has_targets_of_1_and_1_over_k_and_the_mean_over_both():
    logits = random_logits(0).requires_grad_()  # [4, 5]
    labels = torch.tensor([1, NO_LABEL, 4, 0])
    targets = torch.full((3, 5), 0.2, dtype=torch.float64)
    for row, label in enumerate([1, 4, 0]):
        targets[row, label] = 1.0
    known = logits[[0, 2, 3]]
    expected = -(targets * F.logsigmoid(known) + (1 - targets) * F.logsigmoid(-known)).mean()

    terms = LabelsLoss(LabelsConfig(loss="bce_offlabel"))(
        student_output(logits=logits), None, labels
    )

    (gradient,) = torch.autograd.grad(terms.total, logits)
    assert terms.total.item() == pytest.approx(expected.item(), rel=0, abs=1e-12)
    assert list(terms.terms) == ["bce"]
    assert gradient[1].count_nonzero() == 0
    # Each class pulls toward its own target, divided by records and classes.
    assert torch.allclose(gradient[[0, 2, 3]], (known.sigmoid() - targets) / 15, atol=1e-12)
    nothing = LabelsLoss(LabelTeachingConfig(loss="bce_offlabel"))
    assert nothing(student_output(logits=logits), None, torch.full((4,), NO_LABEL)).total == 0


def test_bce_of_many_labels_is_the_mean_over_classes_and_records_with_labels():
    logits = random_logits(0).requires_grad_()  # [4, 5]
    labels = torch.tensor([[1, 0, 0, 1, 0], [0] * 5, [0, 0, 0, 0, 1], [1] * 5]).float()
    counted = logits[[0, 2, 3]]
    targets = labels[[0, 2, 3]].double()
    expected = -(targets * F.logsigmoid(counted) + (1 - targets) * F.logsigmoid(-counted)).mean()

    terms = LabelsLoss(LabelsConfig(loss="bce"))(student_output(logits=logits), None, labels)

    (gradient,) = torch.autograd.grad(terms.total, logits)
    assert terms.total.item() == pytest.approx(expected.item(), rel=0, abs=1e-12)
    assert list(terms.terms) == ["bce"]
    assert gradient[1].count_nonzero() == 0  # no label of it is known
    assert torch.allclose(gradient[[0, 2, 3]], (counted.sigmoid() - targets) / 15, atol=1e-12)
    assert bce_loss(logits, torch.zeros(4, 5)) == 0


def test_off_label_bce_of_many_labels_has_the_target_1_for_each_of_them():
    logits = random_logits(0)[:1]
    labels = torch.tensor([[1, 0, 1, 0, 0]]).float()
    targets = torch.tensor([[1, 0.2, 1, 0.2, 0.2]], dtype=torch.float64)

    loss = off_label_bce_loss(logits, labels)

    expected = F.binary_cross_entropy_with_logits(logits, targets).item()
    assert loss.item() == pytest.approx(expected, rel=0, abs=1e-12)
    plain = bce_loss(logits, labels).item()
    assert abs(plain - expected) > 1e-3  # the control: 0 off the labels is another loss


@pytest.mark.parametrize("loss", [bce_loss, off_label_bce_loss])
def test_a_single_label_is_a_set_of_one(loss):
    labels = torch.tensor([3, NO_LABEL, 0, 4])
    sets = torch.zeros(4, 5)
    sets[[0, 2, 3], [3, 0, 4]] = 1

    assert torch.equal(loss(random_logits(0), labels), loss(random_logits(0), sets))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (LabelsConfig(), r"loss=ce takes one label a record.*set method\.loss=bce"),
        (LabelTeachingConfig(), r"stages\.teach teaching\.loss=bce"),
        (KDConfig(), r"method\.logits=softmax.*set method\.logits=mld"),
        (E2KDConfig(), r"method\.logits=softmax.*set method\.logits=mld"),
    ],
)
def test_a_loss_for_one_label_refuses_many_and_says_what_to_set(method, message):
    loss = (LabelsLoss if isinstance(method, LabelTeachingConfig) else build_loss)(method)

    loss.check_labels(many=False)
    with pytest.raises(ConfigError, match=message):
        loss.check_labels(many=True)


def test_label_smoothing_belongs_to_the_cross_entropy():
    for config in (LabelsConfig, LabelTeachingConfig):
        with pytest.raises(ConfigError, match=r"label_smoothing=0\.1 is an option of loss=ce"):
            config(loss="bce_offlabel", label_smoothing=0.1)


# ---- soft targets of many labels -----------------------------------------------------------------


def bernoulli_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || student) of each class, [B, K], as torch has it."""
    teacher, student = (
        torch.distributions.Bernoulli(logits=logits) for logits in (teacher_logits, student_logits)
    )
    return torch.distributions.kl_divergence(teacher, student)


@pytest.mark.parametrize("tau", [0.1, 1.0, 4.0, 1e3])
@pytest.mark.parametrize("scale", [3.0, 1e3])
def test_mld_of_equal_logits_is_exactly_zero(tau, scale):
    for dtype in (torch.float64, torch.float32):
        logits = random_logits(0, scale=scale).to(dtype)

        assert mld_loss(logits, logits.clone(), tau).item() == 0


def test_mld_matches_a_hand_computed_divergence():
    student_logits = torch.zeros(2, 2, dtype=torch.float64)  # (1/2, 1/2)
    teacher_logits = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]]).double()  # (3/4, 1/2)

    loss = mld_loss(student_logits, teacher_logits, tau=1.0)

    expected = (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2
    assert loss.item() == pytest.approx(expected, rel=0, abs=1e-7)


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_mld_is_tau_times_the_sum_over_classes_of_bernoulli_divergences(tau):
    student_logits, teacher_logits = random_logits(0), random_logits(1)
    divergence = bernoulli_kl(student_logits / tau, teacher_logits / tau).sum(dim=1).mean().item()

    loss = mld_loss(student_logits, teacher_logits, tau).item()

    assert loss == pytest.approx(tau * divergence, rel=0, abs=1e-10)
    if tau != 1:  # the control: the softmax's factor is another loss
        assert abs(loss - tau**2 * divergence) > 1


@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0])
def test_the_factor_tau_keeps_the_scale_of_mlds_gradient(tau):
    student_logits, teacher_logits = random_logits(0).requires_grad_(), random_logits(1)

    loss = mld_loss(student_logits, teacher_logits, tau)

    (gradient,) = torch.autograd.grad(loss, student_logits)
    difference = (student_logits / tau).sigmoid() - (teacher_logits / tau).sigmoid()
    torch.testing.assert_close(gradient, difference / 4, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mld_of_huge_logits_is_finite_and_still_pulls(dtype):
    student_logits = torch.tensor([[1e3, -1e3, 5.0]], dtype=dtype, requires_grad=True)
    teacher_logits = torch.tensor([[-1e3, 1e3, 5.0]], dtype=dtype)

    loss = mld_loss(student_logits, teacher_logits, tau=1.0)

    (gradient,) = torch.autograd.grad(loss, student_logits)
    assert loss.item() == pytest.approx(2000)
    assert gradient[0].tolist() == pytest.approx([1, -1, 0], rel=0, abs=1e-12)
    clamped = student_logits.sigmoid().clamp(1e-6, 1 - 1e-6)  # the control: a clamp lets go
    target = teacher_logits.sigmoid()
    (let_go,) = torch.autograd.grad(F.binary_cross_entropy(clamped, target), student_logits)
    assert let_go[0, :2].tolist() == [0, 0]


def test_mld_ignores_the_order_of_classes_and_sees_what_softmax_does_not():
    student_logits, teacher_logits = random_logits(0), random_logits(1)
    order = torch.tensor([3, 0, 4, 1, 2])

    loss = mld_loss(student_logits, teacher_logits, tau=2.0).item()

    permuted = mld_loss(student_logits[:, order], teacher_logits[:, order], tau=2.0)
    assert permuted.item() == pytest.approx(loss, rel=0, abs=1e-10)
    assert abs(mld_loss(student_logits + 1, teacher_logits, tau=2.0).item() - loss) > 0.1


def test_kd_of_many_labels_weighs_mld_and_bce():
    student_logits, teacher_logits = random_logits(0), random_logits(1).requires_grad_()
    labels = torch.zeros(4, 5)
    labels[:, 2] = 1
    loss = KDLoss(KDConfig(logits="mld", tau=2.0, lambda_ce=0.5, lambda_kd=3.0))
    student = student_output(logits=student_logits.requires_grad_())

    loss.check_labels(many=True)
    terms = loss(student, Targets(teacher="teacher", logits=teacher_logits), labels)

    mld = mld_loss(student_logits, teacher_logits, 2.0).item()
    bce = bce_loss(student_logits, labels).item()
    assert list(terms.terms) == ["kd", "bce"]
    assert terms.terms["kd"].item() == pytest.approx(mld, rel=0, abs=1e-12)
    assert terms.total.item() == pytest.approx(3.0 * mld + 0.5 * bce, rel=0, abs=1e-10)
    terms.total.backward()
    assert teacher_logits.grad is None


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
    student_maps, teacher_maps = random_maps(0).requires_grad_(), random_maps(1)
    weights = torch.arange(1.0, 9.0, dtype=torch.float64).view(4, 2)  # no two pairs count alike
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
    student_maps, teacher_maps = random_maps(0), random_maps(1)
    native = F.cosine_similarity(student_maps.flatten(2), teacher_maps.flatten(2), dim=2)

    cosine, _ = map_cosine(student_maps, teacher_maps, (224, 224))

    assert (cosine - native).abs().min() > 1e-4


def test_map_term_of_equal_maps_is_zero():
    maps = random_maps(0)

    terms = map_terms(maps, maps.clone(), (224, 224))

    assert abs(terms.terms["map"].item()) <= 1e-9
    assert terms.statistics["valid_map_fraction"].item() == 1


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6, 1e12])
def test_map_term_ignores_a_positive_scale_of_either_map_in_float32(scale):
    student_maps, teacher_maps = random_maps(0, torch.float32), random_maps(1, torch.float32)
    expected = map_terms(student_maps, teacher_maps, (224, 224)).terms["map"].item()

    student_scaled = map_terms(student_maps * scale, teacher_maps, (224, 224))
    teacher_scaled = map_terms(student_maps, teacher_maps * scale, (224, 224))
    both_scaled = map_terms(student_maps * scale, teacher_maps * scale, (224, 224))

    assert expected > 0.1
    for terms in (student_scaled, teacher_scaled, both_scaled):
        assert terms.terms["map"].item() == pytest.approx(expected, rel=0, abs=1e-6)


def test_zero_teacher_maps_give_a_finite_loss_and_exactly_no_gradient():
    student_maps = random_maps(0, torch.float32).requires_grad_()

    terms = map_terms(student_maps, torch.zeros(4, 2, 1, 7, 7), (224, 224))

    (gradient,) = torch.autograd.grad(terms.total, student_maps)
    assert terms.total.item() == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))
    assert terms.statistics["valid_map_fraction"].item() == 0


def test_zero_student_map_has_a_small_gradient_and_leaves_the_others_theirs():
    student_maps = random_maps(0, torch.float32)
    student_maps[0, 0] = 0
    student_maps.requires_grad_()

    terms = map_terms(student_maps, random_maps(1, torch.float32), (224, 224))

    (gradient,) = torch.autograd.grad(terms.total, student_maps)
    assert terms.total.isfinite()
    assert gradient.isfinite().all()
    assert gradient.norm() < 10
    assert (gradient.flatten(2).norm(dim=2) > 0).sum() == 7
    assert terms.statistics["valid_map_fraction"].item() == 7 / 8


@pytest.mark.parametrize(("normalize_by", "expected"), [("batch", 0.02), ("valid", 0.04)])
def test_map_term_of_a_batch_with_one_zero_map_matches_hand_computation(normalize_by, expected):
    # At its own resolution the first pair has cosine (3 * 4 + 4 * 3) / (5 * 5) = 0.96.
    student_maps = one_row_maps([3.0, 4.0], [1.0, 2.0])
    teacher_maps = one_row_maps([4.0, 3.0], [0.0, 0.0])

    terms = map_terms(student_maps, teacher_maps, (1, 2), lambda_map=5.0, normalize_by=normalize_by)

    assert terms.terms["map"].item() == pytest.approx(expected, abs=1e-12)
    assert terms.total.item() == pytest.approx(5.0 * expected, abs=1e-12)
    assert terms.statistics["valid_map_fraction"].item() == 0.5


def test_map_term_leaves_out_pairs_that_the_targets_call_invalid():
    student_maps = one_row_maps([3.0, 4.0], [1.0, 0.0])
    teacher_maps = one_row_maps([4.0, 3.0], [0.0, 1.0])
    map_valid = torch.tensor([[True], [False]])

    terms = map_terms(student_maps, teacher_maps, (1, 2), map_valid=map_valid, normalize_by="valid")

    assert terms.terms["map"].item() == pytest.approx(0.04, abs=1e-12)
    assert terms.statistics["valid_map_fraction"].item() == 0.5


@pytest.mark.parametrize(("normalize_by", "expected"), [("batch", 0.06 / 3), ("valid", 0.06 / 2)])
def test_every_record_weighs_the_same_however_many_classes_it_has(normalize_by, expected):
    near, far, zero = [4.0, 3.0], [3.0, 4.0], [0.0, 0.0]  # cosine 0.96 of the first two
    pairs = [  # of three records: two classes, one and a place left over, one whose map is zero
        [(near, far), (near, near)],
        [(near, far), (zero, zero)],
        [(near, zero), (zero, zero)],
    ]
    student, teacher = (
        torch.tensor([[pair[side] for pair in record] for record in pairs]).double()
        for side in (0, 1)
    )
    explained_class = torch.tensor([[0, 1], [1, -1], [0, -1]])
    targets = Targets(
        teacher="teacher",
        logits=torch.zeros(3, 2).double(),
        explained_class=explained_class,
        maps=teacher[:, :, None, None],
        map_valid=teacher.any(dim=2) & (explained_class >= 0),
    )
    loss = E2KDLoss(E2KDConfig(normalize_by=normalize_by))
    output = student_output(
        logits=targets.logits, maps=student[:, :, None, None], input_size=(1, 2)
    )

    terms = loss(output, targets, torch.zeros(3, dtype=torch.long))

    # 0.02, 0.04 and nothing, over all three records or over the two with a map.
    assert terms.terms["map"].item() == pytest.approx(expected, rel=0, abs=1e-12)
    assert terms.statistics["valid_map_fraction"].item() == 3 / 4
    over_places = 0.08 / 6  # the control: padding and crowded records must not weigh
    assert abs(expected - over_places) > 1e-3


def test_frozen_loss_of_a_student_that_is_its_own_teacher_is_zero():
    student = tiny_model(0).double().eval()
    inputs = random_frames(0)
    with torch.no_grad():
        output = student(inputs.float() / 255)
        explained_class = output.logits.argmax(dim=1, keepdim=True)
        maps = gradcam(student, output, explained_class)
    targets = StoredTargets(
        teacher="itself",
        logits=output.logits,
        explained_class=explained_class,
        maps=maps,
        map_from_canonical=torch.eye(3).expand(4, 3, 3),
    )
    training = build_training(student, E2KDLoss(E2KDConfig(tau=4.0)))

    terms = batch_loss(training, whole_frames(inputs, targets), FRAME)

    assert terms.statistics["valid_map_fraction"].item() == 1
    assert abs(terms.terms["kd"].item()) <= 1e-12
    assert abs(terms.terms["map"].item()) <= 1e-9
    assert abs(terms.total.item()) <= 1e-9


def test_e2kd_steps_without_lambda_map_are_bit_equal_to_kd_steps():
    kd_student = tiny_model(0)
    e2kd_student = copy.deepcopy(kd_student)
    kd = build_training(kd_student, build_loss(KDConfig(tau=2.0, lambda_ce=0.5)))
    e2kd = build_training(
        e2kd_student, build_loss(E2KDConfig(tau=2.0, lambda_ce=0.5, lambda_map=0.0))
    )

    for seed in range(3):
        kd_terms = train_step(kd, random_batch(seed), FRAME, clip_norm=1.0)
        e2kd_terms = train_step(e2kd, random_batch(seed), FRAME, clip_norm=1.0)

    assert torch.equal(kd_terms.total, e2kd_terms.total)
    assert kd_terms.terms.keys() == e2kd_terms.terms.keys()
    for name, tensor in kd_student.state_dict().items():
        assert torch.equal(tensor, e2kd_student.state_dict()[name]), name


def test_map_term_enters_every_third_step_unscaled():
    loss = build_loss(E2KDConfig(lambda_map=5.0, guided_step_interval=3))
    training = build_training(tiny_model(0), loss)

    steps = []
    for global_step in range(7):
        training.global_step = global_step
        steps.append(train_step(training, random_batch(global_step), FRAME, clip_norm=None))

    guided = [terms for terms in steps if "map" in terms.terms]
    unguided = [terms for terms in steps if "map" not in terms.terms]
    assert [index for index, terms in enumerate(steps) if "map" in terms.terms] == [0, 3, 6]
    for terms in guided:
        assert terms.terms["map"] > 0
        assert torch.equal(terms.total, terms.terms["kd"] + 5.0 * terms.terms["map"])
    for terms in unguided:
        assert torch.equal(terms.total, terms.terms["kd"])
