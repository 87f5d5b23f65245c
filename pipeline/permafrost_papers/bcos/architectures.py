"""B-cos ResNets, DenseNets and vision transformers.

Parameter names are those of the published B-cos v2 checkpoints: torchvision's names, with the weight of each
convolution under `linear`. The position embedding of a ViT is a separate input, whose contribution to a logit belongs
to no pixel (e2KD: the sum of W x over pixels is not the logit).

Shape letters: B batch, n tokens, d their width, p side of a patch.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor, nn

from permafrost.core.errors import require
from permafrost_papers.bcos.layers import (
    BcosConv2d,
    BcosLinear,
    BcosSettings,
    CenteredNorm,
    ClassMapOutput,
    LogitLayer,
    UncenteredBatchNorm2d,
    hold_factor,
)


class BcosBasicBlock(nn.Module):
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
        return residual + self.downsample(x)  # type: ignore[no-any-return]


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
        return residual + self.downsample(x)  # type: ignore[no-any-return]


def _shortcut(shared: BcosSettings, in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(
        BcosConv2d(shared, in_channels, out_channels, 1, stride),
        UncenteredBatchNorm2d(shared, out_channels),
    )


def _named_layers(**layers: nn.Module) -> nn.Sequential:
    """Build a sequence of layers with these names."""
    return nn.Sequential(OrderedDict(layers))


class ResNetShape(NamedTuple):
    """Parameters of a ResNet architecture."""

    block: type[BcosBasicBlock | Bottleneck]
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
        return self.logit_layer(self.fc(x).mean(dim=(2, 3)))  # type: ignore[no-any-return]

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


# ---- densenet --------------------------------------------------------------------------------------


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
        return torch.cat([x, self.conv2(self.norm2(self.conv1(self.norm1(x))))], dim=1)


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
        features = _named_layers(
            conv0=stem_conv(shared, channels, small=shape.small_stem),
            norm0=UncenteredBatchNorm2d(shared, channels),
            pool0=stem_pool(small=shape.small_stem),
        )
        for index, layers in enumerate(shape.layers, start=1):
            block = nn.Sequential()
            for number in range(1, layers + 1):
                block.add_module(f"denselayer{number}", DenseLayer(shared, channels, shape.growth))
                channels += shape.growth
            features.add_module(f"denseblock{index}", block)
            if index < len(shape.layers):
                # Half the channels at half the resolution.
                transition = _named_layers(
                    norm=UncenteredBatchNorm2d(shared, channels),
                    conv=BcosConv2d(shared, channels, channels // 2, 1),
                    pool=nn.AvgPool2d(2),
                )
                features.add_module(f"transition{index}", transition)
                channels //= 2
        features.add_module("norm5", UncenteredBatchNorm2d(shared, channels))
        self.features = features
        self.classifier = BcosConv2d(shared, channels, num_classes, 1)
        self.logit_layer = logit_layer

    def forward(self, x: Tensor) -> Tensor:
        classes = self.classifier(self.features(x))
        return self.logit_layer(classes.mean(dim=(2, 3)))  # type: ignore[no-any-return]

    def forward_intermediates(self, x: Tensor) -> ClassMapOutput:
        """Compute logits, class maps and the outputs of the dense blocks, the last one after its norm."""
        stages = []
        for name, layer in self.features.named_children():
            x = layer(x)
            if name.startswith("denseblock"):
                stages.append(x)
        stages[-1] = x
        return self.logit_layer.inside(stages, self.classifier(x))


# ---- vit -------------------------------------------------------------------------------------------


HEAD_WIDTH = 64
_MLP_WIDTH = 4
"""Width of the hidden layer of an MLP, in multiples of the token width."""
_PERIOD = 10_000


class Attention(nn.Module):
    """Attention x -> to_out(softmax(q k' / sqrt(64)) v), with the softmax as factor and linear values and output."""

    def __init__(self, shared: BcosSettings, width: int) -> None:
        super().__init__()
        self.mode = shared.mode
        self.norm = CenteredNorm(shared, width)
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.to_out = BcosLinear(shared, width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply attention to tokens [B, n, d], keeping the shape."""
        heads = self.to_qkv(self.norm(x)).view(*x.shape[:2], 3, -1, HEAD_WIDTH)
        # [B, n, 3, heads, 64] -> three times [B, heads, n, 64]
        queries, keys, values = heads.permute(2, 0, 3, 1, 4).unbind()
        attention = torch.softmax(queries @ keys.transpose(2, 3) / HEAD_WIDTH**0.5, dim=3)
        attended = hold_factor(attention.to(values.dtype), self.mode) @ values
        return self.to_out(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """Attention and an MLP of two B-cos layers, each with a shortcut."""

    def __init__(self, shared: BcosSettings, width: int) -> None:
        super().__init__()
        self.attn = Attention(shared, width)
        net = _named_layers(
            norm=CenteredNorm(shared, width),
            linear1=BcosLinear(shared, width, _MLP_WIDTH * width),
            linear2=BcosLinear(shared, _MLP_WIDTH * width, width),
        )
        self.ff = nn.ModuleDict({"net": net})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.ff["net"](x)  # type: ignore[no-any-return]


class PatchEmbedding(nn.Module):
    """Embedding [B, 6, H, W] -> tokens [B, n, d], one for each p x p patch of the image or of a stem's output."""

    def __init__(self, shared: BcosSettings, shape: VitShape) -> None:
        super().__init__()
        self.patch = shape.patch
        channels = 6
        self.conv_stem = nn.Sequential()
        for width in shape.stem:
            self.conv_stem.extend(
                [
                    BcosConv2d(shared, channels, width, 3, stride=2, padding=1),
                    CenteredNorm(shared, width, is_spatial=True),
                    # A placeholder for the ReLU of other networks, counted in the published names.
                    nn.Identity(),
                ]
            )
            channels = width
        self.linear = BcosLinear(shared, channels * self.patch**2, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        x, p = self.conv_stem(x), self.patch
        require(
            not (x.shape[2] % p or x.shape[3] % p),
            f"a B-cos ViT needs an input whose sides are multiples of its patches of {p} pixels, got "
            f"{x.shape[2]}x{x.shape[3]}; set teacher.input_size, or augment.size for a student, to a multiple",
        )
        batch, channels, height, width = x.shape
        patches = x.reshape(batch, channels, height // p, p, width // p, p)
        return self.linear(  # type: ignore[no-any-return]
            patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        )

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Grid (rows, columns) of the tokens of an image."""
        for _ in range(len(self.conv_stem) // 3):
            height, width = (height + 1) // 2, (width + 1) // 2
        return height // self.patch, width // self.patch


class VitShape(NamedTuple):
    """Parameters of a ViT architecture."""

    width: int
    depth: int
    patch: int
    stem: tuple[int, ...] = ()
    """Channels of the convolutions before the patches, each with stride 2."""


class BcosSimpleVit(nn.Module):
    """SimpleViT [B, 6, H, W] -> raw logits [B, K], computed from the average of the tokens."""

    def __init__(self, shared: BcosSettings, shape: VitShape, num_classes: int) -> None:
        super().__init__()
        self.to_patch_embedding = PatchEmbedding(shared, shape)
        self.transformer = _named_layers(
            **{f"encoder_{index}": Encoder(shared, shape.width) for index in range(shape.depth)}
        )
        self.linear_head = _named_layers(
            norm=CenteredNorm(shared, shape.width),
            linear=BcosLinear(shared, shape.width, num_classes),
        )
        self.width = shape.width

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.to_patch_embedding(x) + self.positions(x))

    def positions(self, x: Tensor) -> Tensor:
        """Compute the positions [n, d] of images [B, 6, H, W]: a quarter each of sin x, cos x, sin y and cos y."""
        rows, columns = self.to_patch_embedding.grid(x.shape[2], x.shape[3])
        # On the device of the images, because a copy would require a synchronization.
        place = torch.arange(rows * columns, device=x.device)[:, None]
        quarter = self.width // 4
        frequencies = _PERIOD ** -(torch.arange(quarter, device=x.device) / (quarter - 1))
        along_x, along_y = place % columns * frequencies, place // columns * frequencies
        waves = [along_x.sin(), along_x.cos(), along_y.sin(), along_y.cos()]
        return torch.cat(waves, dim=1).to(x.dtype)

    def classify(self, tokens: Tensor) -> Tensor:
        """Compute raw logits [B, K] from tokens [B, n, d]."""
        return self.linear_head(self.transformer(tokens).mean(dim=1))  # type: ignore[no-any-return]
