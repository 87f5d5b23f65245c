"""ResNets for small images (He et al. 2016, section 4.2), with parameter-free shortcuts (option A).

Parameter names are those of the weights published for CIFAR-10 by akamaster/pytorch_resnet_cifar10.
The explained layer is the output of the last stage, after its ReLU.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from permafrost.config.models import CifarModelConfig, is_published
from permafrost.core.errors import require
from permafrost.models.classifier import Classifier, GapLinear, Normalize, Provider, Stage
from permafrost.models.providers import model_normalization


class BasicBlock(nn.Module):
    """Two 3x3 convolutions. If the shape changes, the shortcut drops pixels and pads channels."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.new_channels = channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.residual_sum(x), inplace=True)

    def residual_sum(self, x: Tensor) -> Tensor:
        """Compute the input of the last ReLU."""
        inner = F.relu(self.bn1(self.conv1(x)), inplace=True)
        residual: Tensor = self.bn2(self.conv2(inner))
        residual += self._shortcut(x)
        return residual

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.stride == 1 and self.new_channels == 0:
            return x
        before = self.new_channels // 2
        after = self.new_channels - before
        # Pooling of single pixels, as the gradient of a slice is not channels-last, which costs a tenth of a step.
        kept = F.avg_pool2d(x, kernel_size=1, stride=self.stride)
        return F.pad(kept, (0, 0, 0, 0, before, after))


class CifarResNet(Classifier):
    """Images in [0, 1], f32 [B, 3, H, W] -> logits [B, K] and the last stage's output [B, 4 * width, h, w]."""

    def __init__(self, config: CifarModelConfig, num_classes: int) -> None:
        super().__init__()
        blocks = (int(config.name.removeprefix("resnet")) - 2) // 6
        widths = [config.width * factor for factor in (1, 2, 4)]
        self.normalize = Normalize(*model_normalization(config))
        self.conv1 = nn.Conv2d(3, config.width, 3, config.stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(config.width)
        self.layer1 = _stage(widths[0], widths[0], blocks, stride=1)
        self.layer2 = _stage(widths[0], widths[1], blocks, stride=2)
        self.layer3 = _stage(widths[1], widths[2], blocks, stride=2)
        self.linear = nn.Linear(widths[2], num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    @property
    def network(self) -> CifarResNet:
        """The network itself, which has the published names."""
        return self

    @property
    def head(self) -> GapLinear:
        """Linear layer on the spatial average of the features."""
        return GapLinear(self.linear)

    def forward_trunk(self, images: Tensor) -> tuple[Tensor, None]:
        features: Tensor = self.layer3(self.layer2(self.layer1(self._stem(images))))
        return features, None

    def forward_stages(self, images: Tensor) -> tuple[tuple[Stage, ...], Tensor, None]:
        """Run the trunk, and return its three stages with their last residual sums, and the features."""
        x, stages = self._stem(images), []
        for *blocks, last in (self.layer1, self.layer2, self.layer3):
            for block in blocks:
                x = block(x)
            assert isinstance(last, BasicBlock)
            residual_sum = last.residual_sum(x)
            x = F.relu(residual_sum)
            stages.append(Stage(x, residual_sum))
        return tuple(stages), x, None

    def forward_head(self, features: Tensor, context: Tensor | None) -> Tensor:
        logits: Tensor = self.linear(features.mean(dim=(2, 3)))
        return logits

    def _stem(self, images: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(self.normalize(images))), inplace=True)


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))


def _build(config: CifarModelConfig, outputs: int) -> Classifier:
    require(
        not is_published(config.weights),
        f"weights={config.weights}: nothing is published for kind cifar; name a file, for example one of "
        "akamaster/pytorch_resnet_cifar10",
    )
    return CifarResNet(config, outputs)


PROVIDER = Provider(
    _build,
    lambda config: None,
    names=lambda: [f"resnet{6 * n + 2}" for n in (1, 2, 3, 5, 7, 9, 18)],
)
