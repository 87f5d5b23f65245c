"""Widths of subnets that make networks of different numbers of superfeatures comparable."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from permafrost.core.errors import ConfigError
from permafrost.models.cost import count_parameters
from permafrost.models.providers import build_model
from permafrost_papers.ked.options import AdditiveModelConfig
from permafrost_papers.ked.subnets import count_subnet_parameters, subnet_width

K = 10
IMAGES = AdditiveModelConfig(name="mlp", grid=(8, 8), input_size=32, width=64, depth=2)
DIGITS = replace(IMAGES, input_size=8)
TABLE = AdditiveModelConfig(name="mlp", columns=30, width=32, depth=2)
CONV = AdditiveModelConfig(name="conv", width=16, depth=3)
CELLS = AdditiveModelConfig(name="trunk", trunk="resnet8", width=32, depth=2)
CHANNELS = replace(CELLS, trunk_features="channels")
INPUTS = {"images": 3072, "digits": 192, "table": 30, "conv": 3, "cells": 64, "channels": 64}
NETWORKS = {
    "images": IMAGES,
    "digits": DIGITS,
    "table": TABLE,
    "conv": CONV,
    "cells": CELLS,
    "channels": CHANNELS,
}


def parameters_of(config):
    """Number of parameters without those of the trunk."""
    model = build_model(config, K)
    trunk = getattr(model, "trunk", None)
    return count_parameters(model) - (0 if trunk is None else count_parameters(trunk))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("superfeatures", [1, 3, 8])
def test_the_count_is_that_of_the_network(name, superfeatures):
    config = replace(NETWORKS[name], superfeatures=superfeatures)

    counted = count_subnet_parameters(config, superfeatures, config.width, K, INPUTS[name])

    assert counted == parameters_of(config)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("superfeatures", [1, 2, 4, 8, 16])
def test_constant_parameters_are_those_of_one_superfeature(name, superfeatures):
    config = replace(NETWORKS[name], constant="parameters", superfeatures=superfeatures)

    found, one = parameters_of(config), parameters_of(replace(config, superfeatures=1))

    width = subnet_width(config, K, inputs=INPUTS[name])
    wider = count_subnet_parameters(config, superfeatures, width + 1, K, INPUTS[name])
    assert one == parameters_of(replace(NETWORKS[name], superfeatures=1))
    assert abs(found - one) <= wider - found
    # The narrower the subnets, the more one unit is worth.
    assert found == pytest.approx(one, rel=0.03 if name in ("images", "digits") else 0.15)


@pytest.mark.parametrize(("width", "superfeatures"), [(16, 64), (32, 64)])
def test_parameters_that_no_width_has_are_refused(width, superfeatures):
    config = replace(
        CELLS, constant="parameters", width=width, depth=1, superfeatures=superfeatures
    )

    with pytest.raises(ConfigError, match=rf"superfeatures=64 and width={width} .* raise width or"):
        build_model(config, K)


def test_a_total_width_is_divided_evenly():
    config = replace(DIGITS, constant="total_width", width=64, superfeatures=16)

    model = build_model(config, K)

    assert model.bias.shape == (16, 4)
    assert model.bias.numel() == 64
    assert torch.equal(torch.tensor([*model.tail.output.weight.shape]), torch.tensor([16, 4, K]))


def test_a_total_width_that_cannot_be_divided_is_refused():
    with pytest.raises(ConfigError, match=r"width=64 with constant=total_width.*superfeatures=3"):
        replace(DIGITS, constant="total_width", superfeatures=3)
