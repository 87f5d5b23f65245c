"""Building blocks of Han et al. (2023): label smoothing as distillation, and both forms of KD and of AT."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from permafrost.config.methods import ATConfig, KDConfig, LabelsConfig
from permafrost.core.batches import Targets
from permafrost.losses.base import build_loss
from permafrost.losses.feature_kd import attention_loss
from permafrost.losses.labels import cross_entropy_loss
from permafrost.losses.logit_distances import kd_loss
from permafrost.models.classifier import Stage
from tests.support.outputs import student_output
from tests.support.tensors import gaussian

ALPHA = 0.1


def soft_cross_entropy(student, teacher, tau):
    """Cross-entropy tau^2 CE(softmax(teacher / tau), softmax(student / tau)), as printed in the paper."""
    return tau**2 * F.cross_entropy(student / tau, (teacher / tau).softmax(dim=1))


def test_label_smoothing_is_distillation_from_a_uniform_teacher():
    logits, labels = 3 * gaussian(0, 16, 10), torch.arange(16) % 10
    uniform = torch.zeros(16, 10, dtype=torch.float64)

    smoothed = cross_entropy_loss(logits, labels, ALPHA)

    ce = cross_entropy_loss(logits, labels)
    distilled = (1 - ALPHA) * ce + ALPHA * soft_cross_entropy(logits, uniform, tau=1.0)
    assert smoothed.item() == pytest.approx(distilled.item(), abs=1e-12)
    assert abs(smoothed.item() - ce.item()) > 1e-3


def test_students_of_smoothed_labels_and_of_a_uniform_teacher_have_one_gradient():
    labels = torch.arange(16) % 10
    uniform = Targets(teacher="t", logits=torch.zeros(16, 10, dtype=torch.float64))
    gradients = []
    for method in (
        LabelsConfig(label_smoothing=ALPHA),
        KDConfig(lambda_ce=1 - ALPHA, lambda_kd=ALPHA),
    ):
        logits = (3 * gaussian(0, 16, 10)).requires_grad_()
        terms = build_loss(method)(student_output(logits=logits), uniform, labels)
        gradients += torch.autograd.grad(terms.total, logits)

    assert (gradients[0] - gradients[1]).abs().max() < 1e-12
    assert gradients[0].abs().max() > 1e-3


@pytest.mark.parametrize("tau", [1.0, 2.0, 4.0, 8.0])
def test_both_forms_of_kd_differ_by_the_teachers_entropy_and_have_one_gradient(tau):
    student, teacher = (2 * gaussian(0, 8, 10)).requires_grad_(), 2 * gaussian(1, 8, 10)
    forms = [form(student, teacher, tau) for form in (kd_loss, soft_cross_entropy)]

    gradients = [torch.autograd.grad(form, student)[0] for form in forms]

    probabilities = (teacher / tau).softmax(dim=1)
    entropy = -(probabilities * probabilities.log()).sum(dim=1).mean()
    assert (forms[1] - forms[0]).item() == pytest.approx(tau**2 * entropy.item(), rel=1e-12)
    assert (gradients[0] - gradients[1]).abs().max() < 1e-12


def test_at_as_printed_is_the_mean_of_norms():
    student, teacher = gaussian(0, 3, 7, 7).square(), gaussian(1, 3, 7, 7).square()
    difference = F.normalize(student.flatten(1)) - F.normalize(teacher.flatten(1))

    printed = attention_loss(student, teacher, "l2")

    assert printed.item() == pytest.approx(difference.norm(dim=1).mean().item(), abs=1e-14)
    squares = 49 * attention_loss(student, teacher)
    assert squares.item() == pytest.approx(difference.norm(dim=1).square().mean().item(), abs=1e-14)
    same = student.clone().requires_grad_()
    zero = attention_loss(same, student, "l2")
    (gradient,) = torch.autograd.grad(zero, same)
    assert zero.item() == 0
    assert gradient.isfinite().all()


def test_the_norm_of_at_is_an_option():
    features = gaussian(0, 2, 3, 4, 4)
    student = student_output(logits=gaussian(1, 2, 3), stages=(Stage(features, features),))
    intermediates = {"attention_1": gaussian(2, 2, 4, 4).square()}
    targets = Targets(teacher="t", logits=student.logits, intermediates=intermediates)

    values = {
        norm: build_loss(ATConfig(norm=norm)).compare(student, targets).item()
        for norm in ("mse", "l2")
    }

    attention = features.square().mean(dim=1)
    for norm, value in values.items():
        assert value == pytest.approx(
            attention_loss(attention, intermediates["attention_1"], norm).item()
        )
