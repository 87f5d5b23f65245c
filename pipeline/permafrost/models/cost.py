"""Cost of a network, and the digest of its tensors."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from permafrost.models.classifier import Classifier, eval_mode


class Cost(NamedTuple):
    """Cost of one network."""

    parameters: int
    """Number of parameters."""
    macs: int
    """Multiply-accumulates of convolutions and matrix products in a forward pass of one record."""


def count_parameters(network: nn.Module) -> int:
    """Count all parameters, each once."""
    return sum(parameter.numel() for parameter in network.parameters())


def sha256_tensors(network: nn.Module) -> str:
    """Compute the SHA-256 of a network's state: names, types, shapes and values of its tensors of any type.

    Other entries, such as the extra state of a module, are left out.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def measure_cost(model: Classifier, record: Tensor) -> Cost:
    """Measure the cost on the input of one record, [1, 3, H, W] or a table's row [1, d], in eval mode.

    The mode of the model is restored afterwards.
    """
    with eval_mode(model), FlopCounterMode(display=False) as counter:
        model(record)
    return Cost(count_parameters(model), counter.get_total_flops() // 2)
