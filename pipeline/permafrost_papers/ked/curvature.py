"""Probe directions, one for each feature, and second derivatives of one record's logits along them, by three methods.

The directions of two features have no input value in common. One tensor of the input's shape therefore contains the
feature of each value, and another the displacement of each value by one step.

Shape letters: d features, N records, H W image, K classes or channels of a trunk, h w its grid, R draws of signs,
n rows of one pass (one draw and one feature each).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from permafrost.core.errors import ConfigError, require


@dataclass(frozen=True, kw_only=True)
class Probes:
    """One direction per feature, for inputs of one shape."""

    feature_of: Tensor
    """Feature, 0 to d - 1, of each value of an input, i64 [*shape]."""
    amplitude: Tensor
    """Displacement of each value by one step, f64 [*shape]."""

    @cached_property
    def num_features(self) -> int:
        """Number d of features."""
        return int(self.feature_of.max()) + 1

    def steps(self, record: Tensor) -> Tensor:
        """Return the displacement of each value of one input [*shape] by one step along its feature.

        Raises:
            ValueError: If the input has another shape than the probes.
        """
        require(
            record.shape == self.feature_of.shape,
            f"probes for inputs {tuple(self.feature_of.shape)} do not fit an input {tuple(record.shape)}",
            ValueError,
        )
        return self.amplitude.to(record)

    @cached_property
    def members(self) -> Tensor:
        """Membership of flattened values in features, bool [values, d]."""
        return self.feature_of.flatten()[:, None] == torch.arange(self.num_features)

    def scale_amplitudes(self, scales: Tensor) -> Probes:
        """Return the same directions with the step of feature j scaled by scales[j].

        Args:
            scales: [d].
        """
        return replace(self, amplitude=self.amplitude * scales.double()[self.feature_of])


def table_probes(num_features: int) -> Probes:
    """Probe each column of a table [N, d] separately. Scale them by standard deviations to be independent of units."""
    return Probes(
        feature_of=torch.arange(num_features),
        amplitude=torch.ones(num_features, dtype=torch.float64),
    )


def pixel_probes(size: tuple[int, int], grid: tuple[int, int], channels: int = 3) -> Probes:
    """Probe blocks of an image [channels, H, W], each along gray: all values of a block move together in all channels.

    A direction has length 1. There are no separate color directions, because a superfeature is a region. The hue of a
    block is therefore only measured as far as the network's response to it changes with the brightness.

    Args:
        size: (H, W).
        grid: (rows, columns) of blocks, whose sizes differ by one pixel if the grid does not divide the image.
        channels: Number of channels of the image.

    Raises:
        ValueError: If there are more blocks than pixels along a side.
    """
    require(
        not any(blocks > pixels for blocks, pixels in zip(grid, size, strict=True)),
        f"an image of {size} pixels cannot be divided into {grid} blocks; choose at most one block per pixel",
        ValueError,
    )
    row, column = (
        torch.arange(length) * blocks // length for length, blocks in zip(size, grid, strict=True)
    )
    feature_of = (row[:, None] * grid[1] + column).expand(channels, *size).contiguous()
    num_values = torch.bincount(feature_of.flatten())
    return Probes(feature_of=feature_of, amplitude=num_values.double().rsqrt()[feature_of])


def feature_scales(batches: Iterable[Tensor], probes: Probes) -> Tensor:
    """Compute the standard deviation sigma over records of each feature's coordinate along its direction, f64 [d].

    Args:
        batches: Inputs [B, *shape].
        probes: Directions of the features.
    """
    members, amplitude = probes.members.to(probes.amplitude), probes.amplitude
    places = torch.cat([(batch.cpu() * amplitude).flatten(1) @ members for batch in batches])
    # Sorting makes the sum independent of the order of the records, down to the last bit.
    return places.sort(dim=0).values.std(dim=0, correction=0)


LogitFunction = Callable[[Tensor], Tensor]
"""Inputs [B, *shape] -> logits [B, K], not probabilities. The logits of a record depend on that record only."""

PIECEWISE_LINEAR = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.RReLU,
    nn.Threshold,
    nn.Hardtanh,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardshrink,
    nn.Softshrink,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
)
_PIECEWISE_LINEAR_STEPS = (
    "Relu",
    "LeakyRelu",
    "PreluKernel",
    "RreluWithNoise",
    "Threshold",
    "Hardtanh",
    "Hardsigmoid",
    "Hardswish",
    "Hardshrink",
    "Softshrink",
    "MaxPool",
    "AdaptiveMaxPool",
    "Maximum",
    "Max",
    "Amax",
)
"""Prefixes of the names of autograd nodes created by functional calls."""


def squared_curvature(
    network: LogitFunction,
    record: Tensor,
    probes: Probes,
    signs: Tensor,
    *,
    step: float | None,
    directions_per_pass: int,
) -> Tensor:
    """Estimate sum_c (d^2 g_c / dP_i dP_j)^2 of one input with random signs: f64 [d, d] on the CPU.

    Args:
        network: Frozen network.
        record: Input [*shape].
        probes: Directions P of the features.
        signs: +-1 [R, K], minus their mean if g is centered over classes.
        step: Step of central differences of gradients, None for the exact second derivative.
        directions_per_pass: Number of inputs per forward pass (twice as many with a step), which limits the memory.
    """
    steps, members = probes.steps(record), probes.members.to(record)
    num_features = probes.num_features
    second = torch.empty(len(signs) * num_features, num_features, dtype=torch.float64)
    for rows in torch.arange(len(second)).chunk(_passes(len(second), directions_per_pass)):
        directions = _displace(probes, steps, members, rows % num_features)
        weights = signs.to(record)[rows // num_features]
        change = (
            _hessian_rows(network, record, directions, weights)
            if step is None
            else _differences(network, record, directions, weights, step)
        )
        second[rows] = ((change * steps).flatten(1) @ members).double().cpu()
    return second.view(len(signs), num_features, num_features).square().mean(dim=0)


def _passes(rows: int, directions_per_pass: int) -> int:
    """Number of forward passes, with about the same number of rows each."""
    return max(1, -(-rows // directions_per_pass))


def _displace(probes: Probes, steps: Tensor, members: Tensor, features: Tensor) -> Tensor:
    """Displacements [n, *shape] by one step along each of some features."""
    return members.T[features.to(members.device)].view(-1, *probes.feature_of.shape) * steps


def _differences(
    network: LogitFunction, record: Tensor, directions: Tensor, weights: Tensor, step: float
) -> Tensor:
    """Central differences of the gradient of each row's weighted logits: [n, *shape]."""
    ends = torch.cat([record + step * directions, record - step * directions]).requires_grad_()
    with torch.enable_grad():
        total = (network(ends) * weights.repeat(2, 1)).sum()
    ahead, behind = torch.autograd.grad(total, ends)[0].chunk(2)
    return (ahead - behind) / (2 * step)


def _hessian_rows(
    network: LogitFunction, record: Tensor, directions: Tensor, weights: Tensor
) -> Tensor:
    """Exact derivatives of the gradient of each row's weighted logits along its direction: [n, *shape].

    They are computed by a second backward pass. PyTorch takes ten seconds to compile its forward-over-reverse rules,
    such as that of GELU, on first use, and has none for some operations.
    """
    places = record.expand_as(directions).clone().requires_grad_()
    with torch.enable_grad():
        total = (network(places) * weights).sum()
        (gradient,) = torch.autograd.grad(total, places, create_graph=True)
        along = (gradient * directions).sum()
    if not along.requires_grad:  # the network is linear
        return torch.zeros_like(directions)
    return torch.autograd.grad(along, places, materialize_grads=True)[0]


def squared_ablations(
    network: LogitFunction,
    record: Tensor,
    probes: Probes,
    *,
    step: float,
    centered: bool,
    directions_per_pass: int,
) -> Tensor:
    """Estimate the squared curvature by mixed differences of backward steps, without gradients, zero on the diagonal.

    Each pair of features takes one forward pass, which returns the logits of all classes, so no signs are needed.

    Args:
        network: Frozen network.
        record: Input [*shape].
        probes: Directions of the features.
        step: Length of a step back, in units of the probes' steps.
        centered: Subtract the mean over classes from the logits.
        directions_per_pass: Number of inputs per forward pass, which limits the memory.

    Returns:
        f64 [d, d] on the CPU.
    """
    steps, members = probes.steps(record), probes.members.to(record)
    first, second = torch.combinations(torch.arange(probes.num_features)).T

    def without(*features: Tensor) -> Tensor:
        """Logits [n, K] after one step back along the n-th feature of each argument."""
        answers = []
        for rows in zip(
            *(numbers.chunk(_passes(len(numbers), directions_per_pass)) for numbers in features),
            strict=True,
        ):
            back = torch.stack(
                [_displace(probes, steps, members, numbers) for numbers in rows]
            ).sum(dim=0)
            answers.append(network(record - step * back).double().cpu())
        return torch.cat(answers)

    with torch.no_grad():
        single = without(torch.arange(probes.num_features))
        whole = network(record[None]).double().cpu()
        mixed = whole - single[first] - single[second] + without(first, second)
    if centered:
        mixed = mixed - mixed.mean(dim=1, keepdim=True)
    squares = torch.zeros(probes.num_features, probes.num_features, dtype=torch.float64)
    squares[first, second] = mixed.square().sum(dim=1) / step**4
    return squares + squares.T


def refuse_piecewise_linear(
    network: LogitFunction, record: Tensor, owner: nn.Module | None
) -> None:
    """Raise ConfigError if a part of the network is piecewise linear, with zero or undefined second derivatives.

    Args:
        network: Frozen network.
        record: Input [*shape], on which it is run if no module tells.
        owner: Module that `network` calls or is, for the names of its parts; None if it is not known.
    """
    parts = [
        f"{name} ({type(module).__name__})"
        for name, module in (owner.named_modules() if owner is not None else ())
        if isinstance(module, PIECEWISE_LINEAR)
    ]
    if not parts:
        with torch.enable_grad():
            parts = _piecewise_linear_steps(network(record.detach()[None].requires_grad_()))
    if parts:
        more = f" (+{len(parts) - 4} more)" if len(parts) > 4 else ""
        raise ConfigError(
            f"derivative=hvp does not support {', '.join(parts[:4])}{more}, because exact second derivatives of "
            "piecewise linear functions do not measure dependence; choose derivative=fd, which supports every "
            "activation, or use a copy of the network with smooth ones (Softplus, average pooling)"
        )


def _piecewise_linear_steps(logits: Tensor) -> list[str]:
    """Sorted names of the piecewise linear autograd nodes in the computation of the logits."""
    names, visited, waiting = set(), set(), [logits.grad_fn]
    while waiting:
        if (node := waiting.pop()) is None or node in visited:
            continue
        visited.add(node)
        name = node.name().split("Backward")[0].split("WithIndices")[0].rstrip("123D")
        if name in _PIECEWISE_LINEAR_STEPS:
            names.add(name)
        waiting += [child for child, _ in node.next_functions]
    return sorted(names)
