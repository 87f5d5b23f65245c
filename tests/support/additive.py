"""Additive networks of every kind."""

from __future__ import annotations

from dataclasses import replace

import torch
from safetensors.torch import save_file

from permafrost.models.providers import build_model, freeze
from permafrost_papers.ked.options import AdditiveModelConfig
from permafrost_papers.ked.partition import PARTITION_NAME, build_partition

NUM_CLASSES = 5


SIDE = 16


GRID = (4, 4)


M = 3


MLP = AdditiveModelConfig(name="mlp", superfeatures=M, grid=GRID, width=6, depth=3, input_size=SIDE)


TABLE = AdditiveModelConfig(name="mlp", superfeatures=M, columns=11, width=6, depth=2)


CONV = AdditiveModelConfig(name="conv", superfeatures=M, grid=GRID, width=4, depth=2)


TRUNK = AdditiveModelConfig(
    superfeatures=M, grid=GRID, width=6, depth=2, trunk="resnet8", trunk_width=4
)


CHANNELS = replace(TRUNK, trunk_features="channels", grid=(8, 8), partition_control="random")
"""Three groups of the sixteen channels of a ResNet-8, not contiguous."""


NETWORKS = {"mlp": MLP, "table": TABLE, "conv": CONV, "trunk": TRUNK}


ON_IMAGES = [MLP, CONV, TRUNK]


def additive_model(config, seed=0):
    torch.manual_seed(seed)
    model = freeze(build_model(replace(config, weights=None), NUM_CLASSES))
    for parameter in model.parameters():  # so that no bias is zero
        parameter.add_(0.01 * torch.randn_like(parameter))
    return model


def inputs_of(config, records=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (config.columns,) if config.columns else (3, SIDE, SIDE)
    return torch.rand(records, *shape, generator=generator)


def save_partition(folder, assignments):
    folder.mkdir(exist_ok=True)
    save_file({"assignments": assignments}, folder / PARTITION_NAME)
    return str(folder)


def scattered(config, most=None):
    """Random partition, whose groups are not blocks."""
    control = replace(
        config,
        superfeatures=most or config.superfeatures,
        partition_control="random",
        partition=None,
    )
    return build_partition(control).assignments
