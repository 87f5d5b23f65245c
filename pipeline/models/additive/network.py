"""Superfeature-explaining networks (KED): logits are the sum of those of M subnets, each on its own features.

    logits = sum_m z_m(x restricted to S_m),    softmax(logits) = prod_m softmax(z_m), normalized

The partition into superfeatures is stored with the weights, with all its levels, so a weights file is self-contained.
Shape letters: B batch, M superfeatures, K classes, d features (cells of an image or a trunk, row by row, or columns
of a table), C channels of a feature.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.models import AdditiveModelConfig
from pipeline.core.errors import ConfigError, require
from pipeline.models.additive.chimeras import spread_cells
from pipeline.models.additive.partition import Partition, build_partition
from pipeline.models.cifar import CifarResNet
from pipeline.models.classifier import Classifier, Provider, require_size
from pipeline.models.output import Normalize, Stage, Standardize, Superfeatures, to_float32


def build_additive(config: AdditiveModelConfig, outputs: int) -> AdditiveClassifier:
    """Build the named network, newly initialized."""
    return _NETWORKS[config.name](config, outputs)


class AdditiveClassifier(Classifier):
    """Base of the three networks: the partition, and a prediction that is a sum."""

    assignments: Tensor

    def __init__(self, config: AdditiveModelConfig) -> None:
        super().__init__()
        partition = build_partition(config)
        self.grid = partition.grid
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
        return Partition(assignments=self.assignments.cpu(), grid=self.grid)

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

    def __init__(self, config: AdditiveModelConfig, layers: int, outputs: int) -> None:
        """Build the tail.

        layers  number of remaining hidden layers
        """
        super().__init__()
        subnets, width = config.superfeatures, config.width
        self.hidden = nn.ModuleList(SubnetLinear(subnets, width, width) for _ in range(layers))
        self.output = SubnetLinear(subnets, width, outputs)

    def forward(self, x: Tensor) -> Superfeatures:
        for layer in self.hidden:
            x = F.relu(layer(x))
        return Superfeatures(to_float32(self.output(x)), to_float32(x))


# ---- on the input --------------------------------------------------------------------------------


class _InputClassifier(AdditiveClassifier):
    """Base of networks whose superfeatures are parts of the input, one per subnet. Features are the input itself."""

    explainer = "superfeatures"
    normalize: Normalize | Standardize

    def __init__(self, config: AdditiveModelConfig) -> None:
        super().__init__(config)
        if config.columns is not None:
            self.normalize = Standardize(config.columns)
            return
        assert config.mean is not None
        assert config.std is not None
        self.normalize = Normalize(config.mean, config.std)

    def forward_trunk(self, images: Tensor) -> tuple[Tensor, None]:
        return self.normalize(images), None


class AdditiveMlp(_InputClassifier):
    """A multilayer perceptron on each superfeature, computed with one batched product per layer.

    With one superfeature it is a plain perceptron on all features. The first layer's weight is stored by feature,
    [d, C, width], so that its shape does not depend on the group sizes. It is gathered into
    [M, largest group * C, width], with its padding masked.
    """

    places: Tensor
    taken: Tensor

    def __init__(self, config: AdditiveModelConfig, num_classes: int) -> None:
        require(
            not config.infers_columns_from_store,
            "name=mlp needs the size of its inputs; set input_size to the images' side in pixels, or columns to the "
            "number of columns of a table",
        )
        super().__init__(config)
        self.columns = config.columns
        self.side = config.input_size
        channels = 1
        if self.columns is None:
            assert self.side is not None
            channels = 3 * (self.side // config.grid[0]) * (self.side // config.grid[1])
        group = self.assignments[-1]
        fan_in = channels * group.bincount()[group]  # [d]
        weight = torch.randn(config.features, channels, config.width)
        self.weight = nn.Parameter(weight * (2 / fan_in).sqrt()[:, None, None])
        self.bias = nn.Parameter(torch.zeros(config.superfeatures, config.width))
        self.tail = SubnetTail(config, config.depth - 1, num_classes)
        self.register_buffer("places", torch.empty(0, dtype=torch.int64), persistent=False)
        self.register_buffer("taken", torch.empty(0, dtype=torch.bool), persistent=False)
        self.place_features()
        self.register_load_state_dict_post_hook(_place_features)  # type: ignore[no-untyped-call]

    def place_features(self) -> None:
        """Compute the feature indices of each group: places i64 [M, largest group], taken bool of the same shape."""
        groups = [(self.assignments[-1] == m).nonzero()[:, 0] for m in range(len(self.assignments))]
        self.places = nn.utils.rnn.pad_sequence(groups, batch_first=True)
        sizes = torch.tensor([len(group) for group in groups], device=self.places.device)
        self.taken = torch.arange(self.places.shape[1], device=sizes.device) < sizes[:, None]

    def forward_trunk(self, images: Tensor) -> tuple[Tensor, None]:
        """Return normalized images, or standardized rows of a table [B, d] as [B, 1, 1, d]."""
        if self.columns is None:
            assert self.side is not None
            require_size("AdditiveMlp", images, (self.side, self.side))
            return super().forward_trunk(images)
        require(
            images.ndim == 2 and images.shape[1] == self.columns,
            f"columns={self.columns} needs rows of a table [B, {self.columns}], got {list(images.shape)}; set columns "
            "to the number of columns, or to null for images",
        )
        return self.normalize(images)[:, None, None], None

    def forward_superfeatures(self, features: Tensor) -> Superfeatures:
        values = self._by_feature(features)[:, self.places]  # [B, M, largest group, C]
        weight = self.weight[self.places] * self.taken[:, :, None, None]  # [M, group, C, width]
        x = torch.einsum("bmi,mih->bmh", values.flatten(2), weight.flatten(1, 2)) + self.bias
        return self.tail(F.relu(x))  # type: ignore[no-any-return]

    def _by_feature(self, features: Tensor) -> Tensor:
        """Reshape [B, C, H, W] to [B, d, values of a cell], or [B, 1, 1, d] to [B, d, 1]."""
        if self.grid is None:
            return features[:, 0, 0, :, None]
        rows, columns = self.grid
        records, channels, height, width = features.shape
        cells = features.reshape(records, channels, rows, height // rows, columns, width // columns)
        return cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _place_features(network: AdditiveMlp, _: object) -> None:
    """Update feature indices after a load, which may have changed the partition."""
    network.place_features()


class AdditiveConv(_InputClassifier):
    """Grouped convolutions on M copies of the image, each with one superfeature's pixels and the mean elsewhere."""

    def __init__(self, config: AdditiveModelConfig, num_classes: int) -> None:
        super().__init__(config)
        subnets = config.superfeatures
        self.convolutions = nn.ModuleList()
        channels = 3
        for number in range(config.depth):
            conv = nn.Conv2d(
                subnets * channels,
                subnets * config.width,
                3,
                stride=1 if number == 0 else 2,
                padding=1,
                groups=subnets,
                bias=False,
            )
            nn.init.kaiming_normal_(conv.weight)
            # Batch statistics are per channel, and each channel belongs to one subnet.
            norm = nn.BatchNorm2d(subnets * config.width)
            self.convolutions.append(nn.Sequential(conv, norm, nn.ReLU()))
            channels = config.width
        self.tail = SubnetTail(config, 0, num_classes)

    def forward_superfeatures(self, features: Tensor) -> Superfeatures:
        assert self.grid is not None
        size = (features.shape[2], features.shape[3])
        if size[0] % self.grid[0] or size[1] % self.grid[1]:
            raise ConfigError(
                f"grid={list(self.grid)} does not divide an input of {size[0]}x{size[1]} pixels; choose a divisor, or "
                "set augment.size (or input_size of a teacher)"
            )
        subnets = len(self.assignments)
        cells = self.assignments[-1].view(self.grid)
        number = torch.arange(subnets, device=features.device)[:, None, None]
        mask = spread_cells(cells == number, size)  # [M, H, W]
        x = (features[:, None] * mask[:, None]).flatten(1, 2)  # [B, M * 3, H, W]
        for layer in self.convolutions:
            x = layer(x)
        return self.tail(x.mean(dim=(2, 3)).view(len(x), subnets, -1))  # type: ignore[no-any-return]


# ---- on a trunk ----------------------------------------------------------------------------------


class AdditiveTrunk(AdditiveClassifier):
    """One shared ResNet, and M heads on the cells of its last stage: 1x1 convolution, masked average, linear.

    Cells depend on their surroundings, so the explained features are cells of the trunk, not pixels.
    """

    def __init__(self, config: AdditiveModelConfig, num_classes: int) -> None:
        super().__init__(config)
        self.trunk = CifarResNet(config.trunk_config, num_classes)
        channels = self.trunk.linear.in_features
        del self.trunk.linear
        self.cells = SubnetLinear(config.superfeatures, channels, config.width)
        self.tail = SubnetTail(config, config.depth - 1, num_classes)

    def forward_trunk(self, images: Tensor) -> tuple[Tensor, None]:
        features, context = self.trunk.forward_trunk(images)
        self._check_grid(features)
        return features, context

    def forward_stages(self, images: Tensor) -> tuple[tuple[Stage, ...], Tensor, None]:
        stages, features, context = self.trunk.forward_stages(images)
        self._check_grid(features)
        return stages, features, context

    def forward_superfeatures(self, features: Tensor) -> Superfeatures:
        # Each cell only needs the convolution of its own superfeature, because the others are masked.
        group = self.assignments[-1]
        x = features.flatten(2).transpose(1, 2)  # [B, d, C]
        x = torch.einsum("bdc,dch->bdh", x, self.cells.weight[group]) + self.cells.bias[group]
        x = F.relu(x)
        total = x.new_zeros(len(x), len(self.assignments), x.shape[2]).index_add(1, group, x)
        sizes = group.bincount(minlength=len(self.assignments))
        return self.tail(total / sizes[:, None])  # type: ignore[no-any-return]

    def _check_grid(self, features: Tensor) -> None:
        found = (features.shape[2], features.shape[3])
        if found != self.grid:
            raise ConfigError(
                f"grid={self.grid} of name=trunk must be that of its last stage, {found[0]}x{found[1]} cells for this "
                f"input; set grid=[{found[0]},{found[1]}], or another augment.size, input_size or stem_stride"
            )


_NETWORKS: dict[str, Callable[[AdditiveModelConfig, int], AdditiveClassifier]] = {
    "mlp": AdditiveMlp,
    "conv": AdditiveConv,
    "trunk": AdditiveTrunk,
}


def network_partition(model: Any) -> Partition:
    """Return the partition of an additive network, or raise ConfigError for any other."""
    if not isinstance(model, AdditiveClassifier):
        raise ConfigError(
            f"{type(model.network).__name__} has no superfeatures, which method=ked and the payload "
            "superfeature_logits need; set teacher=additive, leave superfeature_logits out of annotate.payloads, or "
            "choose another method"
        )
    return model.partition


PROVIDER = Provider(build_additive, lambda config: None)
