"""B-cos DenseNets: no ReLU, no bias, average instead of max pooling, and the classifier before the global pool.

Parameter names are those of the published B-cos v2 checkpoints.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from permafrost.models.bcos.layers import (
    BcosConv2d,
    BcosSettings,
    ClassMapOutput,
    LogitLayer,
    UncenteredBatchNorm2d,
)
from permafrost.models.bcos.resnet import stem_conv, stem_pool

_BOTTLENECK = 4
"""Channels of a layer's 1x1 convolution, in multiples of the growth."""


class DenseLayer(nn.Module):
    """Dense layer [B, C, h, w] -> [B, C + growth, h, w]: its input concatenated with new channels."""

    def __init__(self, shared: BcosSettings, in_channels: int, growth: int) -> None:
        super().__init__()
        self.norm1 = UncenteredBatchNorm2d(shared, in_channels)
        self.conv1 = BcosConv2d(shared, in_channels, _BOTTLENECK * growth, 1)
        self.norm2 = UncenteredBatchNorm2d(shared, _BOTTLENECK * growth)
        self.conv2 = BcosConv2d(shared, _BOTTLENECK * growth, growth, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv2(self.norm2(self.conv1(self.norm1(x))))
        return torch.cat([x, new], dim=1)


class DenseNetShape(NamedTuple):
    """Parameters of a DenseNet architecture."""

    layers: tuple[int, ...]
    """Number of layers of each block."""
    growth: int
    """Number of channels that a layer adds. The stem has twice as many."""
    small_stem: bool
    """True for a 3x3 stem at full resolution, for small images, False for a 7x7 stem with stride 2 and a pool."""


class BcosDenseNet(nn.Module):
    """DenseNet [B, 6, H, W] -> logits [B, K]."""

    def __init__(
        self, shared: BcosSettings, shape: DenseNetShape, num_classes: int, logit_layer: LogitLayer
    ) -> None:
        super().__init__()
        channels = 2 * shape.growth
        features = nn.Sequential()
        features.add_module("conv0", stem_conv(shared, channels, small=shape.small_stem))
        features.add_module("norm0", UncenteredBatchNorm2d(shared, channels))
        features.add_module("pool0", stem_pool(small=shape.small_stem))
        for index, layers in enumerate(shape.layers, start=1):
            block = nn.Sequential()
            for number in range(1, layers + 1):
                block.add_module(f"denselayer{number}", DenseLayer(shared, channels, shape.growth))
                channels += shape.growth
            features.add_module(f"denseblock{index}", block)
            if index < len(shape.layers):
                features.add_module(f"transition{index}", _transition(shared, channels))
                channels //= 2
        features.add_module("norm5", UncenteredBatchNorm2d(shared, channels))
        self.features = features
        self.classifier = BcosConv2d(shared, channels, num_classes, 1)
        self.logit_layer = logit_layer

    def forward(self, x: Tensor) -> Tensor:
        classes = self.classifier(self.features(x))
        logits: Tensor = self.logit_layer(classes.mean(dim=(2, 3)))
        return logits

    def forward_intermediates(self, x: Tensor) -> ClassMapOutput:
        """Compute logits, class maps and the outputs of the dense blocks, the last one after its norm."""
        stages = []
        for name, layer in self.features.named_children():
            x = layer(x)
            if name.startswith("denseblock"):
                stages.append(x)
        stages[-1] = x
        return self.logit_layer.inside(stages, self.classifier(x))


def _transition(shared: BcosSettings, channels: int) -> nn.Sequential:
    """Build a transition to half the channels at half the resolution."""
    transition = nn.Sequential()
    transition.add_module("norm", UncenteredBatchNorm2d(shared, channels))
    transition.add_module("conv", BcosConv2d(shared, channels, channels // 2, 1))
    transition.add_module("pool", nn.AvgPool2d(2))
    return transition
