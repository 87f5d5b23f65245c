"""Parts that additive networks share: the partition, the layers of M subnets, and a prediction that is a sum.

Shape letters: B batch, M superfeatures, K classes, d features, C values of a feature.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from permafrost.config.models import AdditiveModelConfig
from permafrost.models.additive.partition import Partition, build_partition
from permafrost.models.classifier import Classifier
from permafrost.models.output import Superfeatures, to_float32


class AdditiveClassifier(Classifier):
    """Base of additive networks."""

    assignments: Tensor

    def __init__(self, config: AdditiveModelConfig, num_features: int | None = None) -> None:
        """Build the partition.

        num_features  number of features if the config does not determine it
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
    def head(self) -> None:
        """None, because a mask is applied before the average."""
        return None

    @property
    def partition(self) -> Partition:
        """Partition stored with the weights."""
        return Partition(
            assignments=self.assignments.cpu(), grid=self.grid, of_channels=self.of_channels
        )

    @abstractmethod
    def forward_superfeatures(self, features: Tensor) -> Superfeatures: ...

    def forward_head(self, features: Tensor, context: Tensor | None) -> Tensor:
        return self.forward_superfeatures(features).logits.sum(dim=1)


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

        layers  number of remaining hidden layers
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
        self.place(assignment)

    def place(self, assignment: Tensor) -> None:
        """Compute the feature indices of each group: places i64 [M, largest group], taken bool of the same shape."""
        groups = [(assignment == m).nonzero()[:, 0] for m in range(int(assignment.max()) + 1)]
        self.places = nn.utils.rnn.pad_sequence(groups, batch_first=True)
        sizes = torch.tensor([len(group) for group in groups], device=self.places.device)
        self.taken = torch.arange(self.places.shape[1], device=sizes.device) < sizes[:, None]

    def product(self, values: Tensor, weight: Tensor) -> Tensor:
        """Multiply the values [B, d, C] of each group's features by their weights [d, C, width]: [B, M, width]."""
        gathered = weight[self.places] * self.taken[:, :, None, None]  # [M, largest, C, width]
        return torch.einsum(
            "bmi,mih->bmh", values[:, self.places].flatten(2), gathered.flatten(1, 2)
        )


def initial_weight(assignment: Tensor, channels: int, width: int) -> Tensor:
    """Draw weights [d, C, width] of a first layer, each scaled by the number of values that its group has."""
    fan_in = channels * assignment.bincount()[assignment]  # [d]
    weight = torch.randn(len(assignment), channels, width)
    return weight * (2 / fan_in).sqrt()[:, None, None]
