"""B-cos ResNets: no ReLU, no bias, average instead of max pooling, and the classifier before the global pool.

Parameter names are those of the published B-cos v2 checkpoints: torchvision's names, with the weight of each
convolution under `linear`.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from permafrost.models.bcos.layers import (
    BcosConv2d,
    BcosSettings,
    ClassMapOutput,
    LogitLayer,
    UncenteredBatchNorm2d,
)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, shared: BcosSettings, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = BcosConv2d(shared, in_channels, channels, 3, stride, padding=1)
        self.bn1 = UncenteredBatchNorm2d(shared, channels)
        self.conv2 = BcosConv2d(shared, channels, channels, 3, padding=1)
        self.bn2 = UncenteredBatchNorm2d(shared, channels)
        self.downsample = _shortcut(shared, in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        residual: Tensor = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        shortcut: Tensor = self.downsample(x)
        return residual + shortcut


class Bottleneck(nn.Module):
    """Convolutions 1x1, 3x3 with the stride (v1.5) and 1x1 to four times the channels, and a shortcut."""

    expansion = 4

    def __init__(self, shared: BcosSettings, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        wide = channels * self.expansion
        self.conv1 = BcosConv2d(shared, in_channels, channels, 1)
        self.bn1 = UncenteredBatchNorm2d(shared, channels)
        self.conv2 = BcosConv2d(shared, channels, channels, 3, stride, padding=1)
        self.bn2 = UncenteredBatchNorm2d(shared, channels)
        self.conv3 = BcosConv2d(shared, channels, wide, 1)
        self.bn3 = UncenteredBatchNorm2d(shared, wide)
        self.downsample = _shortcut(shared, in_channels, wide, stride)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        residual: Tensor = self.bn3(self.conv3(inner))
        shortcut: Tensor = self.downsample(x)
        return residual + shortcut


def _shortcut(shared: BcosSettings, in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(
        BcosConv2d(shared, in_channels, out_channels, 1, stride),
        UncenteredBatchNorm2d(shared, out_channels),
    )


class ResNetShape(NamedTuple):
    """Parameters of a ResNet architecture."""

    block: type[BasicBlock | Bottleneck]
    blocks: tuple[int, ...]
    """Number of blocks of each stage. Each stage after the first doubles the channels and halves the resolution."""
    width: int
    """Channels of the first stage."""
    small_stem: bool
    """True for a 3x3 stem at full resolution, for small images, False for a 7x7 stem with stride 2 and a pool."""


class BcosResNet(nn.Module):
    """ResNet [B, 6, H, W] -> logits [B, K]."""

    def __init__(
        self, shared: BcosSettings, shape: ResNetShape, num_classes: int, logit_layer: LogitLayer
    ) -> None:
        super().__init__()
        self.conv1 = stem_conv(shared, shape.width, small=shape.small_stem)
        self.bn1 = UncenteredBatchNorm2d(shared, shape.width)
        self.pool = stem_pool(small=shape.small_stem)
        channels, stages = shape.width, []
        for index, blocks in enumerate(shape.blocks):
            width = shape.width * 2**index
            stage = nn.Sequential()
            for number in range(blocks):
                stride = 2 if index > 0 and number == 0 else 1
                stage.append(shape.block(shared, channels, width, stride))
                channels = width * shape.block.expansion
            self.add_module(f"layer{index + 1}", stage)
            stages.append(f"layer{index + 1}")
        self.stages = tuple(stages)
        self.fc = BcosConv2d(shared, channels, num_classes, 1)
        self.logit_layer = logit_layer

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.bn1(self.conv1(x)))
        for name in self.stages:
            x = self.get_submodule(name)(x)
        logits: Tensor = self.logit_layer(self.fc(x).mean(dim=(2, 3)))
        return logits

    def forward_intermediates(self, x: Tensor) -> ClassMapOutput:
        """Compute logits, class maps and the outputs of the stages."""
        x, stages = self.pool(self.bn1(self.conv1(x))), []
        for name in self.stages:
            x = self.get_submodule(name)(x)
            stages.append(x)
        return self.logit_layer.inside(stages, self.fc(x))


def stem_conv(shared: BcosSettings, channels: int, *, small: bool) -> BcosConv2d:
    """Build the first layer of a network for images of 224 pixels, or of about 32 if `small`."""
    if small:
        return BcosConv2d(shared, 6, channels, 3, padding=1)
    return BcosConv2d(shared, 6, channels, 7, stride=2, padding=3)


def stem_pool(*, small: bool) -> nn.Module:
    """Build the stem's pool: a 3x3 average that halves the resolution and includes zero padding, or the identity."""
    return nn.Identity() if small else nn.AvgPool2d(3, stride=2, padding=1)
