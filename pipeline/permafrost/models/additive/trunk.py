"""Additive networks on a shared trunk, whose superfeatures are groups of its last stage's cells or channels.

Cells and channels depend on their surroundings, so the explained features are those of the trunk, not pixels.
Shape letters: B batch, M superfeatures, K classes, C channels and d = h * w cells of the trunk's last stage.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from permafrost.config.models import AdditiveModelConfig
from permafrost.core.errors import ConfigError
from permafrost.models.additive.base import (
    AdditiveClassifier,
    GroupedFeatures,
    SubnetLinear,
    SubnetTail,
    initial_weight,
)
from permafrost.models.additive.width import subnet_width
from permafrost.models.cifar import CifarResNet
from permafrost.models.classifier import Classifier
from permafrost.models.output import Stage, Superfeatures
from permafrost.models.providers import provider_of, published

_SIDE_OF_UNKNOWN = 224
"""Side in pixels of the images on which a network without published weights is run once."""


def build_trunk_network(config: AdditiveModelConfig, num_classes: int) -> AdditiveClassifier:
    """Build the network of name=trunk."""
    if config.trunk_features == "channels":
        return AdditiveChannels(config, num_classes)
    return AdditiveTrunk(config, num_classes)


class _TrunkClassifier(AdditiveClassifier):
    """Base of networks with one shared trunk and M heads."""

    def __init__(self, config: AdditiveModelConfig, trunk: Classifier, channels: int) -> None:
        super().__init__(config, channels if config.trunk_features == "channels" else None)
        self.trunk = trunk

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
        trunk, channels = build_trunk(config, num_classes)
        super().__init__(config, trunk, channels)
        subnets, width = config.superfeatures, subnet_width(config, num_classes, inputs=channels)
        self.cells = SubnetLinear(subnets, channels, width)
        self.tail = SubnetTail(subnets, width, config.depth - 1, num_classes)

    def forward_superfeatures(self, features: Tensor) -> Superfeatures:
        # Each cell only needs the convolution of its own superfeature, because the others are masked.
        group = self.assignments[-1]
        x = features.flatten(2).transpose(1, 2)  # [B, d, C]
        x = torch.einsum("bdc,dch->bdh", x, self.cells.weight[group]) + self.cells.bias[group]
        x = F.relu(x)
        total = x.new_zeros(len(x), len(self.assignments), x.shape[2]).index_add(1, group, x)
        sizes = group.bincount(minlength=len(self.assignments))
        return self.tail(total / sizes[:, None])  # type: ignore[no-any-return]

    def _check(self, features: Tensor) -> None:
        found = (features.shape[2], features.shape[3])
        if found != self.grid:
            raise ConfigError(
                f"grid={self.grid} of name=trunk must be that of its last stage, {found[0]}x{found[1]} cells for this "
                f"input; set grid=[{found[0]},{found[1]}], or another augment.size, input_size or stem_stride"
            )


class AdditiveChannels(_TrunkClassifier):
    """M heads on groups of the channels of the trunk's last stage: 1x1 convolution, average, linear.

    The weight of the convolution is stored by channel, [C, 1, width], so that its shape does not depend on the group
    sizes.
    """

    def __init__(self, config: AdditiveModelConfig, num_classes: int) -> None:
        trunk, channels = build_trunk(config, num_classes)
        super().__init__(config, trunk, channels)
        subnets, width = config.superfeatures, subnet_width(config, num_classes, inputs=channels)
        group = self.assignments[-1]
        self.weight = nn.Parameter(initial_weight(group, 1, width))
        self.bias = nn.Parameter(torch.zeros(subnets, width))
        self.tail = SubnetTail(subnets, width, config.depth - 1, num_classes)
        self.groups = GroupedFeatures(group)
        self.register_load_state_dict_post_hook(_place_channels)  # type: ignore[no-untyped-call]

    def forward_superfeatures(self, features: Tensor) -> Superfeatures:
        records, channels, height, width = features.shape
        cells = features.permute(0, 2, 3, 1).reshape(-1, channels, 1)  # [B * d, C, 1]
        x = F.relu(self.groups.product(cells, self.weight) + self.bias)
        return self.tail(x.view(records, height * width, *x.shape[1:]).mean(dim=1))  # type: ignore[no-any-return]


def _place_channels(network: AdditiveChannels, _: object) -> None:
    """Update channel indices after a load, which may have changed the partition."""
    network.groups.place(network.assignments[-1])


# ---- the trunk -----------------------------------------------------------------------------------


def build_trunk(config: AdditiveModelConfig, num_classes: int) -> tuple[Classifier, int]:
    """Build the shared network without its classifier, and return it with the number of channels of its features."""
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
        if context is not None:
            raise ConfigError(
                f"trunk={name} has a head that reads more than a grid of features (a class token), which name=trunk "
                "cannot divide into superfeatures; choose a convolutional network or Swin"
            )
        found = torch.autograd.grad(features.sum(), list(parameters.values()), allow_unused=True)
    trunk.train()
    unused = {name for name, gradient in zip(parameters, found, strict=True) if gradient is None}
    removed: list[str] = []
    for path, module in list(trunk.named_modules()):  # from the outermost on
        own = {f"{path}.{name}" for name, _ in module.named_parameters()}
        if own and own <= unused and not path.startswith(tuple(f"{outer}." for outer in removed)):
            owner, _, attribute = path.rpartition(".")
            setattr(trunk.get_submodule(owner), attribute, nn.Identity())
            removed.append(path)
    for name, parameter in trunk.named_parameters():
        if name in unused:
            parameter.requires_grad_(False)
    return features.shape[1]
