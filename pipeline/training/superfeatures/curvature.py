"""Second derivatives of one record's logits along probe directions, in three ways.

Shape letters: d features, K classes, R draws of signs, n rows of one pass (a draw and a feature each).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipeline.core.errors import ConfigError
from pipeline.training.superfeatures.probes import Probes

Network = Callable[[Tensor], Tensor]
"""Inputs [B, *shape] -> logits [B, K], never probabilities; each record's alone decide its logits."""

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
"""How autograd's steps begin that are called without a module."""


def squared_curvature(
    network: Network,
    record: Tensor,
    probes: Probes,
    signs: Tensor,
    *,
    step: float | None,
    directions_per_pass: int,
) -> Tensor:
    """sum_c (d^2 g_c / dP_i dP_j)^2 of one input [*shape], estimated with random signs: f64 [d, d] on the CPU.

    signs                +-1 [R, K], minus their mean where g is centered over classes
    step                 of central differences of gradients; None for the exact second derivative
    directions_per_pass  bounds the memory: so many inputs (twice as many with a step) pass the network together
    """
    steps, members = probes.steps(record), probes.members(record)
    num_features = probes.num_features
    second = torch.empty(len(signs) * num_features, num_features, dtype=torch.float64)
    for rows in torch.arange(len(second)).chunk(_passes(len(second), directions_per_pass)):
        directions = _moved(probes, steps, members, rows % num_features)
        weights = signs.to(record)[rows // num_features]
        if step is None:
            change = _hessian_rows(network, record, directions, weights)
        else:
            change = _differences(network, record, directions, weights, step)
        second[rows] = ((change * steps).flatten(1) @ members).double().cpu()
    return second.view(len(signs), num_features, num_features).square().mean(dim=0)


def _passes(rows: int, directions_per_pass: int) -> int:
    """How many times the network is asked, about as many rows each time."""
    return max(1, -(-rows // directions_per_pass))


def _moved(probes: Probes, steps: Tensor, members: Tensor, features: Tensor) -> Tensor:
    """One step along each of some features: [n, *shape]."""
    belongs = members.T[features.to(members.device)].view(-1, *probes.feature_of.shape)
    return belongs * steps


def _differences(
    network: Network, record: Tensor, directions: Tensor, weights: Tensor, step: float
) -> Tensor:
    """Central differences of the gradient of each row's weighted logits: [n, *shape]."""
    ends = torch.cat([record + step * directions, record - step * directions]).requires_grad_()
    with torch.enable_grad():
        total = (network(ends) * weights.repeat(2, 1)).sum()
    ahead, behind = torch.autograd.grad(total, ends)[0].chunk(2)
    return (ahead - behind) / (2 * step)


def _hessian_rows(network: Network, record: Tensor, directions: Tensor, weights: Tensor) -> Tensor:
    """The same at the limit of a small step: [n, *shape].

    By a second reverse pass: PyTorch compiles its forward-over-reverse rules, GELU's among them, for ten
    seconds when they are first used, and has none for some operations.
    """
    places = record.expand_as(directions).clone().requires_grad_()
    with torch.enable_grad():
        total = (network(places) * weights).sum()
        (gradient,) = torch.autograd.grad(total, places, create_graph=True)
        along = (gradient * directions).sum()
    if not along.requires_grad:  # a network that is linear
        return torch.zeros_like(directions)
    return torch.autograd.grad(along, places, materialize_grads=True)[0]


def squared_ablations(
    network: Network,
    record: Tensor,
    probes: Probes,
    *,
    step: float,
    centered: bool,
    directions_per_pass: int,
) -> Tensor:
    """The same by mixed differences of two steps back, without a gradient: zero on the diagonal.

    Passes give every class at once, so that no signs are drawn; there is one for each pair of features.
    """
    steps, members = probes.steps(record), probes.members(record)
    first, second = torch.combinations(torch.arange(probes.num_features)).T

    def without(*features: Tensor) -> Tensor:
        """Logits [n, K] with the n-th of each features a step back."""
        answers = []
        for rows in zip(
            *(f.chunk(_passes(len(f), directions_per_pass)) for f in features), strict=True
        ):
            back = torch.stack([_moved(probes, steps, members, f) for f in rows]).sum(dim=0)
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
    network: Network, record: Tensor, modules: nn.Module | None = None
) -> None:
    """Raise ConfigError where second derivatives are zero, or undefined, because a part has corners.

    modules  what `network` calls, for their names; None for the network itself, where it is one
    """
    owner = network if modules is None and isinstance(network, nn.Module) else modules
    found = [
        f"{name} ({type(module).__name__})"
        for name, module in (owner.named_modules() if owner is not None else ())
        if isinstance(module, PIECEWISE_LINEAR)
    ]
    if not found:
        with torch.enable_grad():
            found = _piecewise_linear_steps(network(record.detach()[None].requires_grad_()))
    if found:
        more = f" (+{len(found) - 4} more)" if len(found) > 4 else ""
        raise ConfigError(
            f"derivative=hvp: {', '.join(found[:4])}{more}: the exact second derivative of what is "
            "piecewise linear says nothing on dependence; choose derivative=fd, which is right for every "
            "activation, or give a copy of the network with smooth ones (Softplus, average pooling)"
        )


def _piecewise_linear_steps(logits: Tensor) -> list[str]:
    """Autograd's names of them in the computation of the logits, sorted."""
    found, seen, waiting = set(), set(), [logits.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = node.name().split("Backward")[0].split("WithIndices")[0].rstrip("123D")
        if name in _PIECEWISE_LINEAR_STEPS:
            found.add(name)
        waiting += [child for child, _ in node.next_functions]
    return sorted(found)
