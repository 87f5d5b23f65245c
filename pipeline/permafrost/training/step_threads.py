"""Number of torch threads of a training on the CPU, chosen by the work of a step.

The operations of small networks take less than a millisecond. Several threads then wait for each other more than they
compute, above all next to other processes, and the last digits of the weights depend on the machine's cores.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from permafrost.models.classifier import Classifier
from permafrost.models.cost import measure_cost

_MACS_PER_THREAD = 250 * 10**6
"""Multiply-accumulates of a step's forward passes for each of which a thread is used (docs/results/benchmarks.md)."""


def step_threads(
    networks: Sequence[tuple[Classifier, tuple[int, ...]]], records: int, available: int
) -> int:
    """Return the number of threads of a step, from 1 to `available`.

    networks  networks that a step runs on the CPU, each with the shape of one record's input
    records   number of records in a step of this process
    """
    if available == 1:
        return 1
    macs = sum(measure_cost(network, torch.zeros(1, *shape)).macs for network, shape in networks)
    return min(max(macs * records // _MACS_PER_THREAD, 1), available)
