"""Losses on logits: hand-computed values and invariances."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from permafrost.config.methods import E2KDConfig, KDConfig, LabelsConfig
from permafrost.config.teaching import LabelTeachingConfig
from permafrost.core.batches import Targets
from permafrost.core.errors import ConfigError
from permafrost.core.records import NO_LABEL
from permafrost.losses.base import build_loss
from permafrost.losses.kd import KDLoss
from permafrost.losses.labels import LabelsLoss, bce_loss, cross_entropy_loss, off_label_bce_loss
from permafrost.losses.logit_distances import kd_loss, mld_loss, softmax_mse_loss
from tests.support.outputs import student_output


def random_logits(seed: int, *, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(4, 5, generator=generator, dtype=torch.float64)


def test_squared_differences_of_softened_probabilities_match_hand_computation():
    student_logits = torch.zeros(2, 2, dtype=torch.float64)  # probs (1/2, 1/2)
    teacher_logits = torch.tensor([[2 * math.log(3.0), 0.0], [0.0, 0.0]], dtype=torch.float64)

    loss = softmax_mse_loss(student_logits, teacher_logits, tau=2.0)  # teacher (3/4, 1/4)
    chosen = build_loss(KDConfig(logits="softmax_mse", tau=2.0))(
        student_output(logits=student_logits),
        Targets(teacher="teacher", logits=teacher_logits),
        torch.zeros(2, dtype=torch.long),
    )

    assert loss.item() == pytest.approx(4 * (2 * 0.25**2) / 4, abs=1e-12)
    assert chosen.terms["kd"].item() == loss.item()


@pytest.mark.parametrize("tau", [0.1, 1.0, 4.0, 1e3])
def test_kd_loss_of_equal_logits_is_zero(tau):
    logits = random_logits(0, scale=20.0)

    loss = kd_loss(logits, logits.clone(), tau)

    assert abs(loss.item()) <= 1e-12


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
    # The gradient is divided by the numbers of records and classes.
    assert torch.allclose(gradient[[0, 2, 3]], (known.sigmoid() - targets) / 15, atol=1e-12)
    nothing = LabelsLoss(LabelTeachingConfig(loss="bce_offlabel"))
    assert nothing(student_output(logits=logits), None, torch.full((4,), NO_LABEL)).total == 0


def test_bce_of_many_labels_is_the_mean_over_classes_and_records_with_labels():
    logits = random_logits(0).requires_grad_()  # [4, 5]
    labels = torch.tensor([[1, 0, 0, 1, 0], [torch.nan] * 5, [0, 0, 0, 0, 1], [1] * 5])
    counted = logits[[0, 2, 3]]
    targets = labels[[0, 2, 3]].double()
    expected = -(targets * F.logsigmoid(counted) + (1 - targets) * F.logsigmoid(-counted)).mean()

    terms = LabelsLoss(LabelsConfig(loss="bce"))(student_output(logits=logits), None, labels)

    (gradient,) = torch.autograd.grad(terms.total, logits)
    assert terms.total.item() == pytest.approx(expected.item(), rel=0, abs=1e-12)
    assert list(terms.terms) == ["bce"]
    assert gradient[1].count_nonzero() == 0  # its labels are unknown
    assert torch.allclose(gradient[[0, 2, 3]], (counted.sigmoid() - targets) / 15, atol=1e-12)
    assert bce_loss(logits, torch.full((4, 5), torch.nan)) == 0
    none = torch.zeros(4, 5)  # known to have no class
    assert bce_loss(logits, none).item() == pytest.approx(F.softplus(logits).mean().item())


def test_off_label_bce_of_many_labels_has_the_target_1_for_each_of_them():
    logits = random_logits(0)[:1]
    labels = torch.tensor([[1, 0, 1, 0, 0]]).float()
    targets = torch.tensor([[1, 0.2, 1, 0.2, 0.2]], dtype=torch.float64)

    loss = off_label_bce_loss(logits, labels)

    expected = F.binary_cross_entropy_with_logits(logits, targets).item()
    assert loss.item() == pytest.approx(expected, rel=0, abs=1e-12)
    plain = bce_loss(logits, labels).item()
    # Control: targets of 0 for the other classes give another loss.
    assert abs(plain - expected) > 1e-3


@pytest.mark.parametrize("loss", [bce_loss, off_label_bce_loss])
def test_a_single_label_is_a_set_of_one(loss):
    labels = torch.tensor([3, NO_LABEL, 0, 4])
    sets = torch.zeros(4, 5)
    sets[[0, 2, 3], [3, 0, 4]] = 1
    sets[1] = torch.nan

    assert torch.equal(loss(random_logits(0), labels), loss(random_logits(0), sets))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (LabelsConfig(), r"loss=ce needs one label per record.*set method\.loss=bce"),
        (LabelTeachingConfig(), r"teaching\.loss=bce for permafrost teach"),
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


# ---- soft targets for many labels ----------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.1, 1.0, 4.0, 1e3])
@pytest.mark.parametrize("scale", [3.0, 1e3])
def test_mld_of_equal_logits_is_exactly_zero(tau, scale):
    for dtype in (torch.float64, torch.float32):
        logits = random_logits(0, scale=scale).to(dtype)

        assert mld_loss(logits, logits.clone(), tau).item() == 0


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
    # Control: clamping removes the gradient.
    clamped = student_logits.sigmoid().clamp(1e-6, 1 - 1e-6)
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
