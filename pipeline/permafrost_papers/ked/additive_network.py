"""Superfeature-explaining networks (KED): logits are the sum of those of M subnets, each on its own features.

    logits = sum_m z_m(x restricted to S_m),    softmax(logits) = prod_m softmax(z_m), normalized

The partition into superfeatures is stored with the weights, with all its levels, so a weights file is self-contained.
The superfeatures of an input network are parts of the input, so that no subnet receives another one's part. Those of a
trunk network are cells or channels of a shared trunk's last stage. These depend on their surroundings, so the explained
features are those of the trunk, not pixels.

Shape letters: B batch, M superfeatures, K classes, d features (cells of an image or of a trunk, row by row, columns of
a table, or channels), C values of a feature, or channels of a trunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from permafrost.core.errors import ConfigError, require
from permafrost.models.cifar import CifarResNet
from permafrost.models.classifier import Classifier, Normalize, Provider, Stage, require_size
from permafrost.models.providers import model_normalization, provider_of, published
from permafrost_papers.ked.chimeras import spread_cells
from permafrost_papers.ked.moments import Standardize, column_moments
from permafrost_papers.ked.options import AdditiveModelConfig
from permafrost_papers.ked.partition import Partition, describe_partition
from permafrost_papers.ked.subnets import (
    AdditiveClassifier,
    GroupedFeatures,
    SubnetLinear,
    SubnetTail,
    Superfeatures,
    initial_weight,
    subnet_width,
)


class _InputClassifier(AdditiveClassifier):
    """Base of networks whose superfeatures are parts of the input, one per subnet. Features are the input itself."""

    explainer = "superfeatures"
    normalize: Normalize | Standardize

    def __init__(self, config: AdditiveModelConfig) -> None:
        super().__init__(config)
        self.normalize = (
            Normalize(*model_normalization(config))
            if config.columns is None
            else Standardize(config.columns)
        )

    def learn_moments(self, frames: Callable[[], Iterator[Tensor]]) -> None:
        if isinstance(self.normalize, Standardize):
            self.normalize.set_moments(*column_moments(frames()))

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
        self.register_load_state_dict_post_hook(_place_groups)  # type: ignore[no-untyped-call]

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
        x = self.groups.product(self._split_by_feature(features), self.weight) + self.bias
        return self.tail(F.relu(x))  # type: ignore[no-any-return]

    def _split_by_feature(self, features: Tensor) -> Tensor:
        """Reshape [B, C, H, W] to [B, d, values of a cell], or [B, 1, 1, d] to [B, d, 1]."""
        if self.grid is None:
            return features[:, 0, 0, :, None]
        rows, columns = self.grid
        records, channels, height, width = features.shape
        cells = features.reshape(records, channels, rows, height // rows, columns, width // columns)
        return cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _place_groups(network: AdditiveMlp | AdditiveChannels, _: object) -> None:
    """Update the indices of features or channels after a load, which may have changed the partition."""
    network.groups.assign(network.assignments[-1])


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
        require(
            not (size[0] % self.grid[0] or size[1] % self.grid[1]),
            f"grid={list(self.grid)} does not divide an input of {size[0]}x{size[1]} pixels; choose a divisor, or "
            "set augment.size (or input_size of a teacher)",
        )
        subnets = len(self.assignments)
        number = torch.arange(subnets, device=features.device)[:, None, None]
        mask = spread_cells(self.assignments[-1].view(self.grid) == number, size)  # [M, H, W]
        x = (features[:, None] * mask[:, None]).flatten(1, 2)  # [B, M * 3, H, W]
        for layer in self.convolutions:
            x = layer(x)
        return self.tail(x.mean(dim=(2, 3)).view(x.shape[0], subnets, -1))  # type: ignore[no-any-return]


_SIDE_OF_UNKNOWN = 224
"""Side in pixels of the images on which a network without published weights is run once."""


class _TrunkClassifier(AdditiveClassifier):
    """Base of networks with one shared trunk and M heads."""

    def __init__(self, config: AdditiveModelConfig, num_classes: int) -> None:
        trunk, channels = build_trunk(config, num_classes)
        super().__init__(config, channels if config.trunk_features == "channels" else None)
        self.trunk, self.channels = trunk, channels
        self.width = subnet_width(config, num_classes, inputs=channels)

    def forward_trunk(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        features, context = self.trunk.forward_trunk(images)
        self._check(features)
        return features, context

    def forward_stages(self, images: Tensor) -> tuple[tuple[Stage, ...], Tensor, Tensor | None]:
        stages, features, context = self.trunk.forward_stages(images)
        self._check(features)
        return stages, features, context

    def _check(self, features: Tensor) -> None:
        """Raise ConfigError if the heads do not fit the features."""


class AdditiveTrunk(_TrunkClassifier):
    """M heads on the cells of the trunk's last stage: 1x1 convolution, masked average, linear."""

    def __init__(self, config: AdditiveModelConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        subnets, width = config.superfeatures, self.width
        self.cells = SubnetLinear(subnets, self.channels, width)
        self.tail = SubnetTail(subnets, width, config.depth - 1, num_classes)

    def forward_superfeatures(self, features: Tensor) -> Superfeatures:
        # Each cell only needs the convolution of its own superfeature, because the others are masked.
        group = self.assignments[-1]
        x = features.flatten(2).transpose(1, 2)  # [B, d, C]
        x = torch.einsum("bdc,dch->bdh", x, self.cells.weight[group]) + self.cells.bias[group]
        x = F.relu(x)
        total = x.new_zeros(x.shape[0], len(self.assignments), x.shape[2]).index_add(1, group, x)
        return self.tail(total / group.bincount(minlength=len(self.assignments))[:, None])  # type: ignore[no-any-return]

    def _check(self, features: Tensor) -> None:
        grid = (features.shape[2], features.shape[3])
        require(
            grid == self.grid,
            f"grid={self.grid} of name=trunk must be that of its last stage, {grid[0]}x{grid[1]} cells for this "
            f"input; set grid=[{grid[0]},{grid[1]}], or another augment.size, input_size or stem_stride",
        )


class AdditiveChannels(_TrunkClassifier):
    """M heads on groups of the channels of the trunk's last stage: 1x1 convolution, average, linear.

    The weight of the convolution is stored by channel, [C, 1, width], so that its shape does not depend on the group
    sizes.
    """

    def __init__(self, config: AdditiveModelConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        subnets, width, group = config.superfeatures, self.width, self.assignments[-1]
        self.weight = nn.Parameter(initial_weight(group, 1, width))
        self.bias = nn.Parameter(torch.zeros(subnets, width))
        self.tail = SubnetTail(subnets, width, config.depth - 1, num_classes)
        self.groups = GroupedFeatures(group)
        self.register_load_state_dict_post_hook(_place_groups)  # type: ignore[no-untyped-call]

    def forward_superfeatures(self, features: Tensor) -> Superfeatures:
        records, channels, height, width = features.shape
        cells = features.permute(0, 2, 3, 1).reshape(-1, channels, 1)  # [B * d, C, 1]
        x = F.relu(self.groups.product(cells, self.weight) + self.bias)
        return self.tail(x.view(records, height * width, *x.shape[1:]).mean(dim=1))  # type: ignore[no-any-return]


# ---- the trunk -----------------------------------------------------------------------------------


def build_trunk(config: AdditiveModelConfig, num_classes: int) -> tuple[Classifier, int]:
    """Build the shared network without its classifier, and return it with the number of channels of its features.

    Raises:
        ConfigError: If its head reads more than a grid of features.
    """
    inner = config.trunk_config
    trunk: Classifier = provider_of(inner).build(inner, num_classes)
    if isinstance(trunk, CifarResNet):
        channels = trunk.linear.in_features
        del trunk.linear
        return trunk, channels
    source = published(inner)
    side = inner.input_size or (_SIDE_OF_UNKNOWN if source is None else source.input_size)
    return trunk, _remove_head(trunk, config.trunk, side)


def _remove_head(trunk: Classifier, name: str, side: int) -> int:
    """Remove the modules that the trunk's features do not depend on, and return the features' number of channels.

    Ranks wait for the gradients of all parameters, so a network must not have any that it does not use.
    """
    trunk.eval()
    parameters = dict(trunk.named_parameters())
    with torch.enable_grad():
        features, context = trunk.forward_trunk(torch.zeros(1, 3, side, side))
        require(
            context is None,
            f"trunk={name} has a head that reads more than a grid of features (a class token), which name=trunk "
            "cannot divide into superfeatures; choose a convolutional network or Swin",
        )
        gradients = torch.autograd.grad(
            features.sum(), list(parameters.values()), allow_unused=True
        )
    trunk.train()
    unused = {
        name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None
    }
    removed: list[str] = []
    for path, module in list(trunk.named_modules()):  # from the outermost on
        parameter_names = {f"{path}.{name}" for name, _ in module.named_parameters()}
        if (
            parameter_names
            and parameter_names <= unused
            and not path.startswith(tuple(f"{outer}." for outer in removed))
        ):
            owner, _, attribute = path.rpartition(".")
            setattr(trunk.get_submodule(owner), attribute, nn.Identity())
            removed.append(path)
    for name, parameter in trunk.named_parameters():
        if name in unused:
            parameter.requires_grad_(False)
    return features.shape[1]


def build_additive(config: AdditiveModelConfig, outputs: int) -> AdditiveClassifier:
    """Build the named network, newly initialized."""
    kind = config.trunk_features if config.name == "trunk" else config.name
    return _NETWORKS[kind](config, outputs)


_NETWORKS: dict[str, Callable[[AdditiveModelConfig, int], AdditiveClassifier]] = {
    "mlp": AdditiveMlp,
    "conv": AdditiveConv,
    "cells": AdditiveTrunk,
    "channels": AdditiveChannels,
}


def network_partition(model: Any) -> Partition:
    """Return the partition of an additive network.

    Raises:
        ConfigError: If the network is not an additive one.
    """
    if not isinstance(model, AdditiveClassifier):
        raise ConfigError(
            f"{type(model.network).__name__} has no superfeatures, which method=ked and its outputs need; set "
            "teacher=additive, leave superfeature_logits and superfeature_hidden out of annotate.outputs, or choose "
            "another method"
        )
    return model.partition


def describe_levels(model: Any) -> dict[str, Any]:
    """Describe the partition of an additive network for the manifest of a pass.

    Raises:
        ConfigError: If the network is not an additive one.
    """
    return describe_partition(network_partition(model))


PROVIDER = Provider(build_additive, lambda config: None)
