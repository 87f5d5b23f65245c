"""B-cos networks by name, as classifiers whose explained layer is the six-channel input."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from permafrost.core.errors import ConfigError
from permafrost.models.classifier import (
    NO_INTERMEDIATES,
    Classifier,
    Intermediates,
    ModelOutput,
    PretrainedInfo,
    Provider,
    Stage,
    to_float32,
)
from permafrost_papers.bcos.architectures import (
    BcosBasicBlock,
    BcosDenseNet,
    BcosResNet,
    BcosSimpleVit,
    Bottleneck,
    DenseNetShape,
    ResNetShape,
    VitShape,
)
from permafrost_papers.bcos.layers import BcosSettings, ExplanationMode, LogitLayer, add_inverse
from permafrost_papers.bcos.options import BcosModelConfig

_RESNETS: dict[str, tuple[type[BcosBasicBlock | Bottleneck], tuple[int, ...]]] = {
    "resnet18": (BcosBasicBlock, (2, 2, 2, 2)),
    "resnet34": (BcosBasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}
_DENSENETS = {"densenet121": (6, 12, 24, 16), "densenet169": (6, 12, 32, 32)}
_VITS = {
    "simple_vit_ti": VitShape(width=192, depth=12, patch=16),
    "simple_vit_s": VitShape(width=384, depth=12, patch=16),
    "vitc_ti": VitShape(width=192, depth=11, patch=1, stem=(24, 48, 96, 192)),
    "vitc_s": VitShape(width=384, depth=11, patch=1, stem=(48, 96, 192, 384)),
}
_WIDTH, _SMALL_WIDTH = 64, 16


class BcosClassifier(Classifier):
    """A B-cos network, whose features [B, 6, H, W] are the pixels and their inverse and whose head is all of it.

    The state dict of its network has the names of the published B-cos v2 checkpoints.
    """

    explainer = "bcos_weights"
    head = None
    """None, because the head must be differentiated by autograd."""

    def __init__(self, network: nn.Module, mode: ExplanationMode) -> None:
        """Wrap a network.

        Args:
            network: [B, 6, H, W] -> logits [B, K].
            mode: The explanation mode that all its layers share.
        """
        super().__init__()
        self.inner = network
        self.explanation_mode: ExplanationMode = mode
        mode.guard(network)

    def forward_trunk(self, images: Tensor) -> tuple[Tensor, None]:
        """Compute the explained input, which requires a gradient if gradients are enabled."""
        encoded = add_inverse(images)
        if torch.is_grad_enabled() and not encoded.requires_grad:
            encoded.requires_grad_()
        return encoded, None

    def forward_head(self, features: Tensor, context: Tensor | None) -> Tensor:
        return self.inner(features)  # type: ignore[no-any-return]

    def forward(
        self, images: Tensor, intermediates: Intermediates = NO_INTERMEDIATES
    ) -> ModelOutput:
        """Compute logits, features and requested intermediates, which come after the explained layer, in one pass."""
        if intermediates == NO_INTERMEDIATES:
            return super().forward(images)
        if not isinstance(self.inner, (BcosResNet, BcosDenseNet)):
            raise ConfigError(
                "a B-cos ViT has neither stages nor class maps, which methods on features (method=at, cat_kd, "
                "review_kd) and the outputs attention, class_maps and pooled need; choose another method or output, "
                "or a B-cos ResNet or DenseNet"
            )
        features, _ = self.forward_trunk(images)
        inside = self.inner.forward_intermediates(features)
        return ModelOutput(
            inside.logits,
            features,
            stages=tuple(Stage(output, output) for output in inside.stages),
            class_maps=inside.class_maps,
            pooled=to_float32(inside.stages[-1]).mean(dim=(2, 3)),
        )


def build_bcos(config: BcosModelConfig, outputs: int) -> BcosClassifier:
    """Build the named network, newly initialized."""
    mode = ExplanationMode()
    return BcosClassifier(_build_network(config, outputs, BcosSettings(mode, config.b)), mode)


def _build_network(config: BcosModelConfig, outputs: int, shared: BcosSettings) -> nn.Module:
    bias = config.logit_bias
    if bias is None:
        bias = -math.log(outputs - 1) if outputs > 1 else 0.0
    logit_layer = LogitLayer(config.logit_temperature, bias)
    if config.is_vit:
        # In the published names the network has the prefix "0.", and the logit layer has no parameters.
        usual = _VITS[config.name]
        width = config.width or usual.width
        vit = VitShape(
            width=width,
            depth=config.depth or usual.depth,
            patch=config.patch or usual.patch,
            stem=tuple(channels * width // usual.width for channels in usual.stem),
        )
        return nn.Sequential(BcosSimpleVit(shared, vit, outputs), logit_layer)
    small_stem = config.is_cifar_resnet if config.stem is None else config.stem == "small"
    if config.name in _DENSENETS:
        dense = DenseNetShape(_DENSENETS[config.name], (config.width or _WIDTH) // 2, small_stem)
        return BcosDenseNet(shared, dense, outputs, logit_layer)
    if config.is_cifar_resnet:
        blocks = (int(config.name.removeprefix("resnet")) - 2) // 6
        shape = ResNetShape(BcosBasicBlock, (blocks,) * 3, config.width or _SMALL_WIDTH, small_stem)
    else:
        block, stages = _RESNETS[config.name]
        shape = ResNetShape(block, stages, config.width or _WIDTH, small_stem)
    return BcosResNet(shared, shape, outputs, logit_layer)


_PUBLISHED = PretrainedInfo(
    name="v2",
    classes=1000,
    input_size=224,
    fixed_size=False,
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
)
"""Facts about the published B-cos v2 networks, which users download. Pixels are not normalized."""

PROVIDER = Provider(build_bcos, lambda config: _PUBLISHED)
