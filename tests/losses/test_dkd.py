"""DKD: its two parts make up the divergence of KD, and each has the value of its definition."""

import pytest
import torch
import torch.nn.functional as F

from permafrost.config.methods import DKDConfig
from permafrost.core.batches import Targets
from permafrost.core.errors import ConfigError
from permafrost.core.records import NO_LABEL
from permafrost.losses.base import build_loss
from permafrost.losses.dkd import split_divergence
from permafrost.losses.logit_distances import divergence
from tests.support.composition import config_of
from tests.support.items import for_each
from tests.support.outputs import student_output

LABELS = torch.tensor([0, 3, 4, 1])


def logits(seed, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(4, 5, generator=generator, dtype=torch.float64)


@for_each("tau", [0.5, 1.0, 4.0, 1e3])
def test_the_parts_make_up_the_divergence(tau):
    student, teacher = logits(0), logits(1)
    p = (teacher / tau).softmax(dim=1).gather(1, LABELS[:, None])[:, 0]

    target, others = split_divergence(student, teacher, LABELS, tau)

    whole = divergence(student, teacher, tau)
    torch.testing.assert_close(target + (1 - p) * others, whole, rtol=1e-9, atol=1e-15)


def test_each_part_is_that_of_its_definition():
    student, teacher = logits(0), logits(1)
    target, others = split_divergence(student, teacher, LABELS, 2.0)

    for row, label in enumerate(LABELS.tolist()):
        q, p = ((x[row] / 2.0).softmax(dim=0) for x in (student, teacher))
        two = [torch.stack((x[label], 1 - x[label])) for x in (q, p)]
        rest = [torch.cat((x[:label], x[label + 1 :])) / (1 - x[label]) for x in (q, p)]
        for part, (q, p) in ((target, two), (others, rest)):
            expected = F.kl_div(q.log(), p, reduction="sum").item()
            assert part[row].item() == pytest.approx(expected)


def test_the_loss_weighs_its_terms_over_the_known_labels():
    loss = build_loss(DKDConfig(tau=2.0, lambda_ce=0.5, lambda_target=3.0, lambda_others=7.0))
    student, teacher = logits(0).requires_grad_(), logits(1)
    labels = LABELS.clone()
    labels[2] = NO_LABEL
    known = labels != NO_LABEL

    terms = loss(student_output(logits=student), Targets(teacher="t", logits=teacher), labels)

    parts = split_divergence(student[known], teacher[known], labels[known], 2.0)
    expected = {"target": 4 * parts[0].mean(), "others": 4 * parts[1].mean()}
    expected["ce"] = F.cross_entropy(student[known], labels[known])
    assert {n: v.item() for n, v in terms.terms.items()} == pytest.approx(
        {n: v.item() for n, v in expected.items()}
    )
    weights = {"ce": 0.5, "target": 3.0, "others": 7.0}
    assert terms.total.item() == pytest.approx(
        sum(weights[n] * expected[n].item() for n in weights)
    )
    terms.total.backward()
    assert student.grad[2].abs().max() == 0


def test_equal_logits_have_no_loss_and_far_ones_a_finite_gradient():
    same = split_divergence(logits(0), logits(0), LABELS, 1.0)
    assert max(part.abs().max().item() for part in same) < 1e-12

    student = logits(0, 1e4).float().requires_grad_()
    torch.stack(split_divergence(student, logits(1, 1e4), LABELS, 1.0)).sum().backward()
    assert student.grad.isfinite().all()


def test_what_it_needs_is_refused_before_the_first_step():
    for mode in ("frozen", "live"):
        words = ["method=dkd", "teacher=cifar", f"mode={mode}", "augment.mix=[{kind: mixup}]"]
        with pytest.raises(ConfigError, match="method=dkd needs one label; set"):
            config_of("distill", *words)
    with pytest.raises(ConfigError, match="have many labels; set method=kd"):
        build_loss(DKDConfig()).check_labels(many=True)
    assert DKDConfig().all_logits_option == "method=dkd"
