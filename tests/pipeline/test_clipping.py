"""Adaptive gradient clipping, unit by unit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.clipping import clip_by_unit
from pipeline.config import ConfigError, TrainerConfig
from tests.pipeline.test_training import FRAME, KDConfig, build_training, random_batch, train_step

RATIO = 0.01


def parameter_of(weight: torch.Tensor, gradient: torch.Tensor) -> nn.Parameter:
    parameter = nn.Parameter(weight)
    parameter.grad = gradient.clone()
    return parameter


def test_a_gradient_below_its_threshold_is_left_alone():
    gradient = torch.tensor([[0.003, 0.004], [0.0, 0.0]])  # norms 0.005 and 0
    parameter = parameter_of(torch.tensor([[0.6, 0.8], [3.0, 4.0]]), gradient)

    clip_by_unit([parameter], RATIO)

    assert torch.equal(parameter.grad, gradient)


def test_rows_are_clipped_one_by_one():
    gradient = torch.tensor([[3.0, 4.0], [0.003, 0.004], [5.0, 12.0]])
    weight = torch.tensor([[0.6, 0.8], [0.6, 0.8], [0.0, 0.0]])
    parameter = parameter_of(weight, gradient)

    clip_by_unit([parameter], RATIO)

    expected = torch.stack(
        [gradient[0] * 0.01 / 5, gradient[1], gradient[2] * 0.01 * 1e-3 / 13]
    )  # the last row's weight counts as 1e-3
    assert torch.allclose(parameter.grad, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("shape", "units"),
    [
        ((4, 3, 2, 2), [(slice(o, o + 1),) for o in range(4)]),
        ((4, 6), [(slice(o, o + 1),) for o in range(4)]),
        ((5,), [(slice(None),)]),
        ((5, 1, 1, 1), [(slice(None),)]),
        ((), [()]),
    ],
)
def test_a_clipped_units_norm_is_its_share_of_the_weights(shape, units):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    gradient = 10 * torch.randn(shape, generator=generator)
    parameter = parameter_of(weight, gradient)

    clip_by_unit([parameter], RATIO)

    for unit in units:
        assert parameter.grad[unit].norm().item() == pytest.approx(
            RATIO * weight[unit].norm().item(), rel=1e-5
        )
        ratio = parameter.grad[unit] / gradient[unit]
        assert torch.allclose(ratio, ratio.flatten()[0].expand(ratio.shape))  # the direction stays


def test_a_parameter_without_a_gradient_is_passed_over():
    parameter = nn.Parameter(torch.ones(2))

    clip_by_unit([parameter], RATIO)

    assert parameter.grad is None


def test_a_step_with_agc_moves_no_unit_further_than_its_share():
    training = build_training(0, KDConfig(), kind="sgd", lr=1.0, momentum=0.0, weight_decay=0.0)
    before = [parameter.detach().clone() for parameter in training.model.parameters()]

    train_step(training, random_batch(0), FRAME, clip_norm=None, agc=1e-5)

    moved = 0.0
    for start, parameter in zip(before, training.model.parameters(), strict=True):
        if start.ndim == 4:
            norms = start.flatten(1).norm(dim=1).clamp(min=1e-3)
            moves = (parameter.detach() - start).flatten(1).norm(dim=1)
            assert (moves <= 1.1e-5 * norms + 1e-7).all()
            moved = max(moved, float(moves.max()))
    assert moved > 0


def test_agc_takes_the_place_of_the_norm():
    assert TrainerConfig(clip_norm=None, agc=0.01).agc == 0.01
    with pytest.raises(ConfigError, match=r"trainer\.agc=0\.01 takes the place.*clip_norm=null"):
        TrainerConfig(agc=0.01)
    with pytest.raises(ConfigError, match=r"trainer\.agc must be > 0 or null, got 0"):
        TrainerConfig(clip_norm=None, agc=0.0)
