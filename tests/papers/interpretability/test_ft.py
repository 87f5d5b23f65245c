"""Factor transfer: the loss against hand computation, its invariances, and the frozen paraphraser."""

from __future__ import annotations

import pytest
import torch

from permafrost.core.batches import Targets
from permafrost.core.errors import ConfigError
from permafrost.losses.base import build_loss
from permafrost.models.classifier import NO_INTERMEDIATES, Stage
from permafrost_papers.interpretability.ft import factor_loss
from permafrost_papers.interpretability.options import FTConfig
from tests.support.outputs import student_output
from tests.support.tensors import gaussian


def ft_loss(**options):
    torch.manual_seed(0)
    loss = build_loss(FTConfig(**options))
    loss.build(*ft_example())
    return loss.double()


def ft_example(scale=1.0):
    logits = torch.zeros(2, 3, dtype=torch.float64)
    own = scale * gaussian(1, 2, 4, 4, 4)
    student = student_output(logits=logits, stages=(Stage(own, own),))
    return student, Targets(
        teacher="t", logits=logits, intermediates={"ft": gaussian(2, 2, 6, 4, 4).relu()}
    )


def test_a_factor_loss_matches_hand_computation():
    student = torch.tensor([[[[3.0, 0.0]], [[0.0, 4.0]]]], dtype=torch.float64)  # [1, 2, 1, 2]
    teacher = torch.tensor([[[[0.0, 0.0]], [[2.0, 0.0]]]], dtype=torch.float64)

    loss = factor_loss(student, teacher)

    # At unit norm (0.6, 0, 0, 0.8) and (0, 0, 1, 0).
    assert loss.item() == pytest.approx((0.6 + 0.8 + 1.0) / 4, abs=1e-12)


def test_it_is_invariant_to_the_scale_of_either_factor_and_not_to_a_records_place():
    student, teacher = gaussian(0, 3, 5, 4, 4), gaussian(1, 3, 5, 4, 4)
    expected = factor_loss(student, teacher).item()
    scales = torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64).view(3, 1, 1, 1)

    assert factor_loss(scales * student, teacher).item() == pytest.approx(expected, abs=1e-14)
    assert factor_loss(student, scales * teacher).item() == pytest.approx(expected, abs=1e-14)
    assert factor_loss(student, 5 * student).item() < 1e-15
    assert abs(factor_loss(student.roll(1, dims=0), teacher).item() - expected) > 1e-4
    assert abs(factor_loss(student.flip(3), teacher).item() - expected) > 1e-4


def test_the_finer_of_two_grids_is_averaged():
    coarse = gaussian(0, 2, 3, 2, 2)
    fine = coarse.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)

    assert factor_loss(fine, coarse).item() < 1e-15
    assert factor_loss(coarse, fine).item() < 1e-15


@pytest.mark.parametrize(("rate", "channels"), [(0.5, 3), (1.0, 6), (0.01, 1)])
def test_factors_have_their_share_of_the_teachers_channels_and_its_grid(rate, channels):
    loss = ft_loss(paraphrase_rate=rate)
    student, targets = ft_example()

    factor = loss.paraphraser(targets.intermediates["ft"])

    assert (
        factor.shape
        == loss.translator(student.output.stages[-1].output).shape
        == (2, channels, 4, 4)
    )
    assert loss.reconstruction(factor).shape == targets.intermediates["ft"].shape


def test_the_paraphraser_learns_to_give_features_back_and_the_student_never_moves_it():
    loss = ft_loss()
    student, targets = ft_example()
    phase = loss.pretraining
    optimizer = torch.optim.Adam(phase.parameters, 0.01)
    before = loss.pretraining.loss(targets, torch.zeros(2)).item()
    for _ in range(60):
        optimizer.zero_grad()
        loss.pretraining.loss(targets, torch.zeros(2)).backward()
        optimizer.step()
    optimizer.zero_grad()

    loss.compare(student, targets).backward()

    assert loss.pretraining.loss(targets, torch.zeros(2)).item() < 0.5 * before
    assert all(parameter.grad is None for parameter in phase.parameters)
    assert all(p.grad.abs().sum() > 0 for p in loss.translator.parameters())


def test_without_weight_there_is_nothing_to_train_or_to_ask():
    loss = build_loss(FTConfig(lambda_ft=0.0))

    assert (loss.needs.intermediates, loss.needs.outputs) == (NO_INTERMEDIATES, ())
    assert not loss.before_first_step(None)


def test_options_out_of_range_are_refused():
    for options in (
        {"lambda_ft": -1},
        {"paraphrase_rate": 0},
        {"paraphraser_epochs": -1},
        {"paraphraser_lr": 0},
    ):
        with pytest.raises(ConfigError, match=f"method.{next(iter(options))}"):
            FTConfig(**options)
