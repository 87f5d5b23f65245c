"""Check that the outputs of a record are computed from that record alone.

What is stored, evaluated or exported for a record must not depend on the records that happened to be in its batch, on
their order, on the size of the batch, or on earlier batches. A repetition of one batch cannot tell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from permafrost.core.errors import ConfigError, first_line, shorten
from permafrost.models.classifier import Classifier, trial_copy

PROBED_RECORDS = 3
"""Records whose outputs are compared."""
_LARGE_BATCH = 16
"""Records of a batch among which one is compared, as some networks do something else in larger ones."""
_OF_VARIATION, _OF_SIZE = 1e-3, 1e-5
"""Largest difference that is rounding, in units of what tells records apart and of the largest output."""
_OF_SIZE_ON_GPU = 2e-3
"""The latter where convolutions round their inputs to 10 bits (TF32)."""

Run = Callable[[Tensor], Sequence[Tensor]]
"""Function from a batch [n, ...] to its outputs, each [n, ...]."""


class DependentRecordsError(ConfigError):
    """Error for a network whose outputs of a record depend on other records."""


def require_independent_records(
    subject: str,
    network: nn.Module,
    run: Run,
    records: Tensor,
    neighbors: Tensor,
    expected: Sequence[Tensor] | None = None,
) -> None:
    """Run records alone, in another order and among other records, and require equal outputs.

    Args:
        subject: Name of the network, for the message.
        network: Module that is run, in eval mode, for the cause.
        run: Function that runs it.
        records: Two records or more, [n, ...].
        neighbors: Records of other places of the data, [m, ...].
        expected: Outputs of the records in another batch, None to run them together first.

    Raises:
        DependentRecordsError: If an output differs.
    """
    if reason := _describe_difference(run, records, neighbors, expected):
        raise DependentRecordsError(
            f"{subject} computes different outputs for the same record {reason}{_cause(network)}; use a network whose "
            "outputs in eval mode depend on one record only"
        )


@torch.no_grad()
def require_no_memory(
    subject: str,
    network: nn.Module,
    run: Callable[[nn.Module, Tensor], Sequence[Tensor]],
    records: Tensor,
    neighbors: Tensor,
) -> None:
    """Run copies of a network on different batches, and require that they are still the same network.

    The size of a batch, or a counter, that a network keeps does not count as memory of its records.

    Args:
        subject: Name of the network, for the message.
        network: Module in eval mode, which is not run itself.
        run: Function that runs a copy of it.
        records: Two records or more, [n, ...].
        neighbors: Other records, [m, ...].

    Raises:
        DependentRecordsError: If outputs of the copies differ afterwards.
    """
    if any(map(is_lazy, _tensors(network).values())):  # whose weights are new in each copy
        return
    changed: dict[str, None] = {}
    outputs = []
    for batch in (records[:2], _stark(records[:2])):
        trial = trial_copy(network)  # one after the other, as a teacher may be large
        if trial is network:
            return
        run(trial, batch)
        outputs.append(list(run(trial, neighbors[:1])))
        before = _tensors(network)
        changed |= dict.fromkeys(
            name
            for name, tensor in _tensors(trial).items()
            if name not in before or not torch.equal(tensor.nan_to_num(), before[name].nan_to_num())
        )
    one, other = outputs
    precision = max(torch.finfo(output.dtype).eps for output in one)
    differences = [_difference(*pair, [0], precision) for pair in zip(one, other, strict=True)]
    if any(differences):
        what = f", {shorten(list(changed), 3)}" if changed else ""
        raise DependentRecordsError(
            f"{subject} keeps something of the records that it runs on in eval mode{what}, so its outputs depend on "
            f"the first ones ({next(filter(None, differences))}); use a network that keeps nothing in eval mode"
        )


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    return dict([*network.named_parameters(), *network.named_buffers()])


def _stark(records: Tensor) -> Tensor:
    """Return records of the two extreme values only."""
    return torch.where(records > records.double().mean(), records.max(), records.min())


def probe_positions(records: int) -> list[int]:
    """Return the positions of records to compare, and of two others at the end, none if there is only one record."""
    return [] if records < 2 else [*range(min(PROBED_RECORDS, records)), records // 2, records - 1]


@torch.no_grad()
def require_independent_network(network: Classifier, images: Tensor) -> None:
    """Require that a network in eval mode computes each record alone.

    Args:
        network: The network, or a `trial_copy` of it.
        images: Its inputs at `probe_positions`.

    Raises:
        DependentRecordsError: If an output of a record depends on other records.
    """

    def run(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        output = model(images)
        return output.logits, output.features

    name = type(network.network).__name__
    neighbors = images[-2:].repeat(_LARGE_BATCH // 2, *[1] * (images.ndim - 1))
    require_independent_records(name, network, partial(run, network), images[:-2], neighbors)
    require_no_memory(name, network, run, images[:-2], images[-2:])


def _describe_difference(
    run: Run, records: Tensor, neighbors: Tensor, expected: Sequence[Tensor] | None
) -> str:
    """Say in which batch the outputs of records are others, empty if they never are."""
    count = len(records)
    together = list(run(records)) if expected is None else list(expected)
    ends = [0, count - 1]
    try:
        parts = [run(records[end : end + 1]) for end in ends]
    except Exception as error:  # a network of somebody's own may raise anything
        return f"or none in a batch of one ({first_line(error)})"
    alone = [torch.cat(part) for part in zip(*parts, strict=True)]
    # A comparison of records shows best next to a nearly equal one, a scaling of them next to an extreme one.
    similar = (0.9 * records[:1].double() + 0.1 * neighbors[:1].double()).to(records.dtype)
    neighbors = torch.cat([neighbors, similar, _stark(records[:1])])
    among = run(torch.cat([neighbors, records[:1]]))
    batches = (
        ("in a batch of one", ends, alone),
        ("in another order", range(count), [output.flip(0) for output in run(records.flip(0))]),
        ("among other records", range(1), [output[len(neighbors) :] for output in among]),
    )
    precision = max(torch.finfo(output.dtype).eps for output in together)
    for words, rows, outputs in batches:
        for reference, output in zip(together, outputs, strict=True):
            if difference := _difference(reference, output, list(rows), precision):
                return f"{words} ({difference})"
    return ""


def _difference(reference: Tensor, output: Tensor, rows: list[int], precision: float) -> str:
    """Say by how much outputs of these rows of the reference differ, empty if it is rounding.

    Args:
        reference: Outputs [n, ...].
        output: Outputs of some of these records in another batch.
        rows: Their rows in the reference.
        precision: Relative precision of the least precise output, as a network may compute parts in half precision.
    """
    values = reference.detach().double().flatten(1)
    actual = output.detach().double().flatten(1)
    largest = float(values.abs().max())
    if not math.isfinite(largest):  # which has its own error
        return ""
    variation = float((values - values.mean(dim=0)).abs().max())
    of_size = max(4 * precision, _OF_SIZE_ON_GPU if reference.is_cuda else _OF_SIZE)
    difference = float((actual - values[rows]).abs().max())
    is_equal = difference <= _OF_VARIATION * variation + of_size * largest
    return "" if is_equal else f"by {difference:.2g}, where the largest is {largest:.2g}"


def _cause(network: nn.Module) -> str:
    """Name the modules that compute with the statistics of a batch, or are random, if there are any."""
    if by_batch := [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and (module.training or module.running_mean is None)
    ]:
        return f"; {shorten(by_batch, 3)} normalizes by the statistics of the batch"
    training = [name for name, module in network.named_modules() if name and module.training]
    return f"; {shorten(training, 3)} stays in training mode" if training else ""
