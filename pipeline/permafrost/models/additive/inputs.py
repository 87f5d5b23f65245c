"""Additive networks whose superfeatures are parts of the input, so that no subnet receives another one's part.

Shape letters: B batch, M superfeatures, K classes, d features (cells of an image, row by row, or columns of a table),
C values of a feature.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from permafrost.config.models import AdditiveModelConfig
from permafrost.core.errors import ConfigError, require
from permafrost.models.additive.base import (
    AdditiveClassifier,
    GroupedFeatures,
    SubnetTail,
    initial_weight,
)
from permafrost.models.additive.chimeras import spread_cells
from permafrost.models.additive.width import subnet_width
from permafrost.models.classifier import require_size
from permafrost.models.output import Normalize, Standardize, Superfeatures


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
        subnets, group = config.superfeatures, self.assignments[-1]
        width = subnet_width(config, num_classes, inputs=channels * len(group))
        self.weight = nn.Parameter(initial_weight(group, channels, width))
        self.bias = nn.Parameter(torch.zeros(subnets, width))
        self.tail = SubnetTail(subnets, width, config.depth - 1, num_classes)
        self.groups = GroupedFeatures(group)
        self.register_load_state_dict_post_hook(_place_features)  # type: ignore[no-untyped-call]

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
        x = self.groups.product(self._by_feature(features), self.weight) + self.bias
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
    network.groups.place(network.assignments[-1])


class AdditiveConv(_InputClassifier):
    """Grouped convolutions on M copies of the image, each with one superfeature's pixels and the mean elsewhere."""

    def __init__(self, config: AdditiveModelConfig, num_classes: int) -> None:
        super().__init__(config)
        subnets = config.superfeatures
        width = subnet_width(config, num_classes, inputs=3)
        self.convolutions = nn.ModuleList()
        channels = 3
        for number in range(config.depth):
            conv = nn.Conv2d(
                subnets * channels,
                subnets * width,
                3,
                stride=1 if number == 0 else 2,
                padding=1,
                groups=subnets,
                bias=False,
            )
            nn.init.kaiming_normal_(conv.weight)
            # Batch statistics are per channel, and each channel belongs to one subnet.
            norm = nn.BatchNorm2d(subnets * width)
            self.convolutions.append(nn.Sequential(conv, norm, nn.ReLU()))
            channels = width
        self.tail = SubnetTail(subnets, width, 0, num_classes)

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
