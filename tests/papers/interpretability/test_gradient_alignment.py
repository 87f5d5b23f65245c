"""Gradient alignment of networks that can be differentiated by hand."""

import math

import pytest
import torch

from permafrost_papers.interpretability.gradient_alignment import (
    energy_cosine,
    input_gradient,
    margin,
    margin_alignment,
    mask_energy,
)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def double_inputs(generator, count=3, side=6):
    return torch.rand(count, 3, side, side, generator=generator, dtype=torch.float64)


def inside(count, side=6):
    regions = torch.zeros(count, side, side, dtype=torch.bool)
    regions[:, 1:3, 2:5] = True
    return regions


def test_a_linear_network_that_looks_at_the_object_alone_has_all_that_area_leaves(generator):
    x, regions = double_inputs(generator), inside(3)
    weight = torch.randn(4, 3, 6, 6, generator=generator, dtype=torch.float64) * regions[0]
    labels = torch.tensor([0, 2, 3])

    gradients = input_gradient(
        x,
        lambda x: torch.nn.functional.cross_entropy(
            torch.einsum("kchw,bchw->bk", weight, x), labels, reduction="none"
        ),
    )

    assert mask_energy(gradients, regions).tolist() == pytest.approx([1 - 6 / 36] * 3, abs=1e-12)
    assert mask_energy(gradients, ~regions).tolist() == pytest.approx([-30 / 36] * 3, abs=1e-12)


def test_noise_has_the_energy_of_its_area(generator):
    noise = torch.randn(400, 3, 6, 6, generator=generator, dtype=torch.float64)

    excess = mask_energy(noise, inside(400))

    assert abs(excess.mean()) < 3 * excess.std() / math.sqrt(400)
    assert excess.std() > 0.01


def test_energy_knows_no_scale_and_needs_an_object_and_a_gradient(generator):
    gradients, regions = double_inputs(generator) - 0.5, inside(3)
    regions[1] = False
    gradients[2] = 0

    excess = mask_energy(gradients, regions)

    assert excess.isnan().tolist() == [False, True, True]
    assert mask_energy(-7 * gradients, regions)[0].item() == pytest.approx(excess[0].item())
    assert mask_energy(gradients, torch.ones_like(regions))[0].item() == pytest.approx(0)


def test_the_margins_gradient_is_the_difference_of_two_rows(generator):
    """m = (w_1 - w_2) x + b_1 - b_2, so |<x, g>| / ||g|| is the distance from x to the hyperplane, without bias."""
    x = double_inputs(generator)
    weight = torch.randn(4, 3, 6, 6, generator=generator, dtype=torch.float64)

    def logits(x):
        return torch.einsum("kchw,bchw->bk", weight, x)

    gradients = input_gradient(x, lambda x: margin(logits(x)))

    first, second = logits(x).topk(2, dim=1).indices.T
    assert torch.allclose(gradients, weight[first] - weight[second], rtol=0, atol=1e-12)
    distance = margin(logits(x)) / (weight[first] - weight[second]).flatten(1).norm(dim=1)
    assert torch.allclose(margin_alignment(x, gradients), distance, rtol=1e-12)
    assert margin_alignment(x, torch.zeros_like(x)).isnan().all()


def test_a_map_of_the_pooled_energy_has_cosine_one(generator):
    gradients = double_inputs(generator) - 0.5
    pooled = torch.nn.functional.avg_pool2d(gradients.abs().sum(dim=1)[:, None], 2)[:, 0]
    elsewhere = pooled.clone()
    elsewhere[1] *= -1  # negative everywhere, so nothing is shown

    assert torch.allclose(energy_cosine(gradients, 3 * pooled), torch.ones(3).double())
    assert energy_cosine(gradients, elsewhere).isnan().tolist() == [False, True, False]
