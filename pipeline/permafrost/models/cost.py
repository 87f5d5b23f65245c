"""Cost of a network: its parameters and multiply-accumulates per record."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from permafrost.models.classifier import Classifier


class Cost(NamedTuple):
    """Cost of one network."""

    parameters: int
    """Number of parameters."""
    macs: int
    """Multiply-accumulates of convolutions and matrix products in a forward pass of one record."""


def count_parameters(network: nn.Module) -> int:
    """Count all parameters, each once."""
    return sum(parameter.numel() for parameter in network.parameters())


@torch.no_grad()
def measure_cost(model: Classifier, record: Tensor) -> Cost:
    """Measure the cost on the input of one record, [1, 3, H, W] or a table's row [1, d], in eval mode.

    The mode of the model is restored afterwards.
    """
    training = model.training
    model.eval()
    with FlopCounterMode(display=False) as counter:
        model(record)
    model.train(training)
    return Cost(count_parameters(model), counter.get_total_flops() // 2)
