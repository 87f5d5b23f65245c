"""What a network costs: parameters, and multiply-accumulates a record."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.models.classifier import Classifier


class Cost(NamedTuple):
    """Of one network."""

    parameters: int
    """Numbers that are trained."""
    macs: int
    """Multiply-accumulates of convolutions and matrix products, of one forward pass of one record."""


def count_parameters(network: nn.Module) -> int:
    """All of them, each once."""
    return sum(parameter.numel() for parameter in network.parameters())


@torch.no_grad()
def measure_cost(model: Classifier, record: Tensor) -> Cost:
    """Of a model on one record's input, [1, 3, H, W] or a table's row [1, d]; the model stays as it is."""
    training = model.training
    model.eval()
    with FlopCounterMode(display=False) as counter:
        model(record)
    model.train(training)
    return Cost(count_parameters(model), counter.get_total_flops() // 2)
