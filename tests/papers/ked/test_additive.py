"""Additive networks: sums of subnets that each receive one superfeature."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from permafrost_papers.ked.additive_network import network_partition
from permafrost_papers.ked.chimeras import mix_inputs, mix_rows, spread_cells
from permafrost_papers.ked.partition import coarsen, hierarchy_of
from permafrost_papers.ked.subnets import HIDDEN, LOGITS
from tests.support.additive import (
    CHANNELS,
    CONV,
    GRID,
    MLP,
    NETWORKS,
    NUM_CLASSES,
    ON_IMAGES,
    SIDE,
    TRUNK,
    M,
    additive_model,
    inputs_of,
    save_partition,
    scattered,
)


def each_of(model, inputs):
    return model(inputs).extras[LOGITS]


# ---- the sum -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_the_prediction_is_the_normalized_product_of_the_superfeatures(scale):
    generator = torch.Generator().manual_seed(0)
    each = scale * torch.randn(6, 4, 10, generator=generator, dtype=torch.float64)

    summed = each.sum(dim=1).log_softmax(dim=1)
    product = F.log_softmax(each, dim=2).sum(dim=1)  # log of prod_m q_m, not normalized

    assert summed.isfinite().all()
    assert (summed.exp() - product.softmax(dim=1)).abs().max() < 1e-12


@pytest.mark.parametrize("name", [*NETWORKS, "channels"])
def test_a_pass_has_superfeatures_that_sum_to_the_logits_of_the_head(name):
    config = NETWORKS.get(name, CHANNELS)
    model = additive_model(config)

    output = model(inputs_of(config))

    assert output.extras[LOGITS].shape == (4, M, NUM_CLASSES)
    assert output.extras[HIDDEN].shape == (4, M, config.width)
    assert torch.equal(output.extras[LOGITS].sum(dim=1), output.logits)
    assert torch.equal(model.forward_head(*model.forward_trunk(inputs_of(config))), output.logits)


def test_superfeatures_are_float32_in_a_half_precision_pass():
    for config in ON_IMAGES:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = additive_model(config)(inputs_of(config))

        assert output.extras[LOGITS].dtype == output.logits.dtype == torch.float32


# ---- inputs of each subnet -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "table", "conv"])
def test_a_subnet_sees_nothing_outside_its_group(name, tmp_path):
    config = NETWORKS[name]
    config = replace(config, partition=save_partition(tmp_path / "p", scattered(config)))
    model = additive_model(config)
    inputs = inputs_of(config).requires_grad_()
    assignment = network_partition(model).assignment(M)
    group = assignment if config.columns else spread_cells(assignment.view(GRID), (SIDE, SIDE))

    each = each_of(model, inputs)

    for m in range(M):
        (gradient,) = torch.autograd.grad(each[:, m].square().sum(), inputs, retain_graph=True)
        seen = gradient.abs().sum(dim=0 if config.columns else (0, 1))
        assert (seen[group != m] == 0).all()
        assert (seen[group == m] > 0).any()


@pytest.mark.parametrize("name", ["mlp", "table", "conv"])
def test_removing_a_feature_changes_its_own_superfeature_alone(name):
    config = NETWORKS[name]
    model = additive_model(config)
    whole, without = inputs_of(config), inputs_of(config)
    feature = 1
    if config.columns:
        without[:, feature] = 0
    else:
        without[:, :, :4, 4:8] = 0  # cell 1 of the first row
    own = int(network_partition(model).assignment(M)[feature])

    changed = (each_of(model, whole) != each_of(model, without)).flatten(2).any(dim=2).all(dim=0)

    assert changed.tolist() == [m == own for m in range(M)]


@pytest.mark.parametrize("features", ["cells", "channels"])
def test_a_head_sees_nothing_but_its_own(tmp_path, features):
    config, others = CHANNELS, (0, 2, 3)
    if features == "cells":
        config = replace(TRUNK, partition=save_partition(tmp_path / "p", scattered(TRUNK)))
        others = (0, 1)
    model = additive_model(config)
    features = model(inputs_of(config)).features.detach().requires_grad_()
    assignment = network_partition(model).assignment(M)

    each = model.forward_superfeatures(features).logits

    for m in range(M):
        (gradient,) = torch.autograd.grad(each[:, m].square().sum(), features, retain_graph=True)
        seen = gradient.abs().sum(dim=others).flatten()
        assert (seen[assignment != m] == 0).all()
        own = seen[assignment == m] > 0
        assert own.all() if features == "channels" else own.any()


def test_through_a_trunk_a_pixel_reaches_other_superfeatures():
    model = additive_model(TRUNK)
    inputs = inputs_of(TRUNK).requires_grad_()

    (gradient,) = torch.autograd.grad(each_of(model, inputs)[:, 0].sum(), inputs)

    group = spread_cells(network_partition(model).assignment(M).view(GRID), (SIDE, SIDE))
    assert (gradient[:, :, group != 0] != 0).any()


# ---- equality with separate subnets --------------------------------------------------------------


def linear_of(layer, m):
    """Separate copy of one of M linear layers."""
    linear = nn.Linear(*layer.weight.shape[1:]).double()
    linear.weight.data, linear.bias.data = layer.weight[m].T, layer.bias[m]
    return linear


def tail_of(tail, m, x):
    for layer in tail.hidden:
        x = linear_of(layer, m)(x).relu()
    return linear_of(tail.output, m)(x)


@pytest.mark.parametrize("name", ["mlp", "table"])
def test_batched_perceptrons_equal_as_many_separate_ones(name):
    config = replace(NETWORKS[name], partition_control="random")
    model = additive_model(config).double()
    inputs = inputs_of(config).double()
    features = inputs[:, :, None]
    if not config.columns:
        patches = model.normalize(inputs).unfold(2, 4, 4).unfold(3, 4, 4)  # [B, 3, 4, 4, 4, 4]
        features = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    assignment = network_partition(model).assignment(M)

    for m, found in enumerate(each_of(model, inputs).unbind(dim=1)):
        own = features[:, assignment == m].flatten(1)
        hidden = own @ model.weight[assignment == m].flatten(0, 1) + model.bias[m]

        assert torch.allclose(found, tail_of(model.tail, m, hidden.relu()), atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
def test_grouped_convolutions_equal_as_many_networks_with_norms_of_their_own(training):
    model = additive_model(CONV).double().train(training)
    images = inputs_of(CONV).double()
    group = spread_cells(network_partition(model).assignment(M).view(GRID), (SIDE, SIDE))

    for m, found in enumerate(each_of(model, images).unbind(dim=1)):
        x = model.normalize(images) * (group == m)
        for (conv, norm, _), stride in zip(model.convolutions, (1, 2), strict=True):
            own = slice(m * CONV.width, (m + 1) * CONV.width)
            x = F.conv2d(x, conv.weight[own], stride=stride, padding=1)
            alone = nn.BatchNorm2d(CONV.width).double().train(training)
            alone.weight.data, alone.bias.data = norm.weight[own], norm.bias[own]
            x = alone(x).relu()

        expected = tail_of(model.tail, m, x.mean(dim=(2, 3)))
        assert torch.allclose(found, expected, atol=1e-4 if not training else 1e-12)


def test_heads_equal_as_many_1x1_convolutions_with_a_masked_average():
    model = additive_model(TRUNK).double()
    features = model(inputs_of(TRUNK).double()).features
    group = network_partition(model).assignment(M).view(GRID)

    for m, found in enumerate(model.forward_superfeatures(features).logits.unbind(dim=1)):
        weight = model.cells.weight[m].T[:, :, None, None]
        x = F.conv2d(features, weight, model.cells.bias[m]).relu()
        pooled = (x * (group == m)).sum(dim=(2, 3)) / (group == m).sum()

        assert torch.allclose(found, tail_of(model.tail, m, pooled), atol=1e-12)


# ---- levels and chimeras -------------------------------------------------------------------------


def test_coarsened_superfeatures_are_group_sums_down_to_the_logits():
    model = additive_model(replace(MLP, superfeatures=7))
    output = model(inputs_of(MLP))
    partition = network_partition(model)
    hierarchy = hierarchy_of(partition)
    fine = output.extras[LOGITS]

    for number in range(1, 8):
        coarse = coarsen(fine, hierarchy[number - 1].group_of_finest, number)
        for group in range(number):
            members = partition.assignment(7)[partition.assignment(number) == group].unique()
            assert torch.allclose(coarse[:, group], fine[:, members].sum(dim=1), atol=1e-6)

    assert torch.allclose(
        coarsen(fine, hierarchy[0].group_of_finest, 1)[:, 0], output.logits, atol=1e-6
    )
    assert torch.equal(coarsen(fine, hierarchy[6].group_of_finest, 7), fine)
    assert coarsen(fine.half(), hierarchy[1].group_of_finest, 2).dtype == torch.float32


DONORS = torch.tensor([[0, 1, 2], [3, 3, 0], [2, 2, 2]])


def chimeras_of(model, inputs):
    partition = network_partition(model)
    each = each_of(model, inputs)
    mixed = mix_inputs(inputs, partition.assignment(M), DONORS, partition.grid)
    return mixed, mix_rows(each, DONORS)


@pytest.mark.parametrize("name", ["mlp", "table", "conv"])
def test_a_chimera_has_its_donors_superfeatures_exactly(name):
    model = additive_model(replace(NETWORKS[name], partition_control="random"))
    inputs = inputs_of(NETWORKS[name])

    mixed, promised = chimeras_of(model, inputs)

    assert torch.equal(mixed[2], inputs[2])
    assert not torch.equal(mixed[0], inputs[0])
    assert torch.allclose(each_of(model, mixed), promised, atol=1e-6)


def test_through_a_trunk_a_chimera_of_pixels_is_not_the_sum_of_its_donors():
    model = additive_model(TRUNK)

    mixed, promised = chimeras_of(model, inputs_of(TRUNK))

    difference = (each_of(model, mixed) - promised).abs().flatten(1)
    assert difference[:2].max() > 1e-3
    assert difference[2].max() < 1e-5  # all parts are of one donor
