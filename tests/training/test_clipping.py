"""Adaptive gradient clipping, the option trainer.agc."""

from __future__ import annotations

import pytest
import torch
from timm.utils.agc import adaptive_clip_grad

from permafrost.config.methods import KDConfig
from permafrost.config.training import TrainerOptions
from permafrost.core.errors import ConfigError
from permafrost.training.step import clip_by_unit, train_step
from tests.support.batches import FRAME, random_batch
from tests.support.trainings import build_training


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


@pytest.mark.parametrize("factor", [1e-3, 0.05, 10.0])
def test_gradients_are_clipped_as_timm_clips_them(factor):
    generator = torch.Generator().manual_seed(0)
    shapes = (4, 3, 3, 3), (5, 7), (6,), ()
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    parameters.append(torch.nn.Parameter(torch.zeros(3, 2)))  # units of norm 0
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    parameters[1].grad[2] = 0.0
    parameters.append(torch.nn.Parameter(torch.ones(2)))  # without a gradient
    others = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    for other, parameter in zip(others[:-1], parameters, strict=False):
        other.grad = parameter.grad.clone()

    clip_by_unit(parameters, factor)
    adaptive_clip_grad(others, factor)

    assert all(torch.equal(a.grad, b.grad) for a, b in zip(parameters[:-1], others, strict=False))
    assert parameters[-1].grad is None


def test_agc_takes_the_place_of_the_norm():
    assert TrainerOptions(clip_norm=None, agc=0.01).agc == 0.01
    with pytest.raises(ConfigError, match=r"trainer\.agc=0\.01 replaces.*clip_norm=null"):
        TrainerOptions(agc=0.01)
    with pytest.raises(ConfigError, match=r"trainer\.agc must be > 0 or null, got 0"):
        TrainerOptions(clip_norm=None, agc=0.0)
