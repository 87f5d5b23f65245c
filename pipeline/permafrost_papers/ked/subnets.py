"""Parts that additive networks share: the partition, the layers and width of M subnets, and a prediction that is a sum.

Shape letters: B batch, M superfeatures, K classes, d features, C values of a feature.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from permafrost.core.errors import require
from permafrost.models.classifier import Classifier, to_float32
from permafrost_papers.ked.options import HIDDEN_OUTPUT, OUTPUT, AdditiveModelConfig
from permafrost_papers.ked.partition import Partition, build_partition

LOGITS = OUTPUT
"""Name in ModelOutput.extras of the logits of each superfeature, [B, M, K]."""
HIDDEN = HIDDEN_OUTPUT
"""Name in ModelOutput.extras of the last hidden layer of each subnet, [B, M, width]."""


class Superfeatures(NamedTuple):
    """Separate outputs of each of M superfeatures."""

    logits: Tensor
    """Logits [B, M, K], float32 or wider, which sum to the network's logits."""
    hidden: Tensor
    """Last hidden layer of each subnet, [B, M, width]."""


class AdditiveClassifier(Classifier):
    """Base of additive networks."""

    assignments: Tensor
    head = None
    """None, because a mask is applied before the average."""

    def __init__(self, config: AdditiveModelConfig, num_features: int | None = None) -> None:
        """Build the partition.

        Args:
            config: Options of the network.
            num_features: Number of features if the config does not determine it.
        """
        super().__init__()
        partition = build_partition(config, num_features)
        self.grid = partition.grid
        self.of_channels = partition.of_channels
        self.register_buffer("assignments", partition.assignments)

    @property
    def network(self) -> AdditiveClassifier:
        """The network itself."""
        return self

    @property
    def partition(self) -> Partition:
        """Partition stored with the weights."""
        return Partition(
            assignments=self.assignments.cpu(), grid=self.grid, of_channels=self.of_channels
        )

    @abstractmethod
    def forward_superfeatures(self, features: Tensor) -> Superfeatures:
        """Compute the outputs of each superfeature from the features that `forward_trunk` returns."""

    def forward_head(self, features: Tensor, context: Tensor | None) -> Tensor:
        return self.forward_superfeatures(features).logits.sum(dim=1)

    def forward_extras(
        self, features: Tensor, context: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        each = self.forward_superfeatures(features)
        return each.logits.sum(dim=1), {LOGITS: each.logits, HIDDEN: each.hidden}


class SubnetLinear(nn.Module):
    """Batch of M linear layers: [B, M, in] -> [B, M, out]."""

    def __init__(self, subnets: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(subnets, inputs, outputs) * math.sqrt(2 / inputs))
        self.bias = nn.Parameter(torch.zeros(subnets, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bmi,mio->bmo", x, self.weight) + self.bias


class SubnetTail(nn.Module):
    """Layers from each subnet's first hidden layer [B, M, width], after its activation, to its logits."""

    def __init__(self, subnets: int, width: int, layers: int, outputs: int) -> None:
        """Build the tail.

        Args:
            subnets: Number M of subnets.
            width: Width of each hidden layer.
            layers: Number of remaining hidden layers.
            outputs: Number K of classes.
        """
        super().__init__()
        self.hidden = nn.ModuleList(SubnetLinear(subnets, width, width) for _ in range(layers))
        self.output = SubnetLinear(subnets, width, outputs)

    def forward(self, x: Tensor) -> Superfeatures:
        for layer in self.hidden:
            x = F.relu(layer(x))
        return Superfeatures(to_float32(self.output(x)), to_float32(x))


class GroupedFeatures(nn.Module):
    """Features of each group, padded to the size of the largest one, for one batched product over the groups."""

    places: Tensor
    taken: Tensor

    def __init__(self, assignment: Tensor) -> None:
        super().__init__()
        self.register_buffer("places", torch.empty(0, dtype=torch.int64), persistent=False)
        self.register_buffer("taken", torch.empty(0, dtype=torch.bool), persistent=False)
        self.assign(assignment)

    def assign(self, assignment: Tensor) -> None:
        """Compute the feature indices of each group: places i64 [M, largest group], taken bool of the same shape."""
        groups = [
            (assignment == group).nonzero()[:, 0] for group in range(int(assignment.max()) + 1)
        ]
        self.places = nn.utils.rnn.pad_sequence(groups, batch_first=True)
        sizes = torch.tensor([len(group) for group in groups], device=self.places.device)
        self.taken = torch.arange(self.places.shape[1], device=sizes.device) < sizes[:, None]

    def product(self, values: Tensor, weight: Tensor) -> Tensor:
        """Multiply the values of each group's features by their weights.

        Args:
            values: [B, d, C].
            weight: [d, C, width].

        Returns:
            [B, M, width].
        """
        gathered = weight[self.places] * self.taken[:, :, None, None]  # [M, largest, C, width]
        return torch.einsum(
            "bmi,mih->bmh", values[:, self.places].flatten(2), gathered.flatten(1, 2)
        )


def initial_weight(assignment: Tensor, channels: int, width: int) -> Tensor:
    """Draw weights [d, C, width] of a first layer, each scaled by the number of values that its group has.

    Args:
        assignment: Group of each feature, i64 [d].
        channels: Number C of values of a feature.
        width: Width of each subnet.
    """
    fan_in = channels * assignment.bincount()[assignment]  # [d]
    return torch.randn(len(assignment), channels, width) * (2 / fan_in).sqrt()[:, None, None]


_TOLERANCE = 0.2
"""Largest part of the parameters by which a network of constant=parameters may differ from one superfeature's."""


def subnet_width(config: AdditiveModelConfig, outputs: int, *, inputs: int) -> int:
    """Return the width of each subnet, which `constant` derives from `width`.

    Args:
        config: Options of the network.
        outputs: Number of classes.
        inputs: Values of the input that all subnets read together: of an image or a row with name=mlp, channels
            otherwise.

    Raises:
        ConfigError: If no width has nearly as many parameters as constant=parameters asks for.
    """
    match config.constant:
        case "subnet_width":
            return config.width
        case "total_width":
            return config.width // config.superfeatures
    wanted = count_subnet_parameters(config, 1, config.width, outputs, inputs)

    def difference(width: int) -> int:
        count = count_subnet_parameters(config, config.superfeatures, width, outputs, inputs)
        return abs(count - wanted)

    width = min(range(1, config.width + 1), key=difference)
    share = difference(width) / wanted
    require(
        share <= _TOLERANCE,
        f"constant=parameters: with superfeatures={config.superfeatures} and width={config.width} the subnets of "
        f"{width} units differ by {share:.0%} from the {wanted:,} parameters of one superfeature; raise width or lower "
        "superfeatures",
    )
    return width


def count_subnet_parameters(
    config: AdditiveModelConfig, subnets: int, width: int, outputs: int, inputs: int
) -> int:
    """Count the parameters of all subnets, without those of a trunk.

    Args:
        config: Options of the network.
        subnets: Number of subnets.
        width: Width of each subnet.
        outputs: Number of classes.
        inputs: Values of the input that all subnets read together, as in `subnet_width`.
    """
    output = subnets * (width + 1) * outputs
    if config.name == "conv":
        norms = 2 * subnets * width * config.depth
        first, further = 9 * inputs * width, (config.depth - 1) * 9 * width**2
        return subnets * (first + further) + norms + output
    # Each column, pixel or channel of a group has one weight for each unit, each cell of a trunk shares those of its
    # subnet.
    shared = config.name == "trunk" and config.trunk_features == "cells"
    first = (inputs * (subnets if shared else 1) + subnets) * width
    return first + (config.depth - 1) * subnets * (width + 1) * width + output
