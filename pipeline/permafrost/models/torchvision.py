"""Classifiers of torchvision by name.

The trunk ends with the last stage's output, after its activation and before any pooling. GoogLeNet and Inception v3 are
built without auxiliary heads and with transform_input, as torchvision builds them for the published weights.

The explained layer of a ViT is the input of the last block's attention, after its norm, because the patch tokens at the
block's output have no gradient.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision import models
from torchvision.models.regnet import ResBottleneckBlock
from torchvision.models.resnet import BasicBlock, Bottleneck

from permafrost.config.models import ModelConfig, TorchvisionModelConfig, is_published
from permafrost.core.errors import ConfigError, require
from permafrost.models.classifier import (
    Classifier,
    Head,
    Normalize,
    PretrainedInfo,
    Provider,
    Stage,
    WeightsError,
    match_head,
    require_size,
    to_float32,
)
from permafrost.models.providers import model_normalization


class Split(NamedTuple):
    """Trunk and head of a family of networks."""

    trunk: Callable[[Any, Tensor], Tensor]
    """Function from a network and normalized images [B, 3, H, W] to features [B, C, h, w]."""
    head_layers: Callable[[Any], list[nn.Module]]
    """Function that returns the layers from features to logits, in order."""
    stages: Callable[[Any, Tensor], list[Stage]] | None = None
    """The trunk as stages, None if the family's stages are unknown."""
    after_stages: Callable[[Any, Tensor], Tensor] | None = None
    """Function from a network and its last stage's output to the features, None if they are the same."""


# ---- building ------------------------------------------------------------------------------------


def build_torchvision(config: TorchvisionModelConfig, outputs: int) -> Classifier:
    """Build the named network with published weights for `weights: pretrained`, otherwise with new ones.

    If the published head has another number of outputs, the layer that computes the logits is newly initialized.

    Raises:
        ConfigError: If torchvision does not have the network or the weights.
        WeightsError: If the weights cannot be fetched, or are for another image size.
    """
    network = _build_network(config, outputs)
    if is_published(config.weights):
        _load_published(network, config)
    return _wrap(config, network)


def _wrap(config: ModelConfig, network: nn.Module) -> Classifier:
    if isinstance(network, models.VisionTransformer):
        return TorchvisionVit(config, network)
    return TorchvisionClassifier(config, network)


def published_torchvision(config: TorchvisionModelConfig) -> PretrainedInfo:
    """Return torchvision's facts about the weights that the config names, or about its default ones."""
    weights = _published_weights(config)
    preset = weights.transforms()
    return PretrainedInfo(
        name=weights.name,
        classes=len(weights.meta["categories"]),
        input_size=preset.crop_size[0],
        fixed_size=config.name.startswith(("vit_", "maxvit_")),
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        crop_fraction=preset.crop_size[0] / preset.resize_size[0],
        interpolation="bicubic" if preset.interpolation.value == "bicubic" else "bilinear",
        labels=tuple(weights.meta["categories"]),
    )


def _build_network(config: TorchvisionModelConfig, outputs: int) -> nn.Module:
    size = config.input_size or published_torchvision(config).input_size
    options: dict[str, Any] = {}
    if config.name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "transform_input": True, "init_weights": True}
    elif config.name.startswith("vit_"):
        options = {"image_size": size}
    elif config.name.startswith("maxvit_"):
        options = {"input_size": (size, size)}
    network: nn.Module = models.get_model(config.name, weights=None, num_classes=outputs, **options)
    return network


def _require_known(name: str) -> None:
    known = models.list_models(module=torchvision.models)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
        raise ConfigError(
            f"torchvision has no classifier {name!r}; similar names: {', '.join(close) or 'none'}"
        )


def _published_weights(config: TorchvisionModelConfig) -> Any:
    """Return torchvision's weights named in `pretrained:<name>`, or its default ones."""
    _require_known(config.name)
    known = models.get_model_weights(config.name)
    name = (config.weights or "").partition(":")[2]
    if not is_published(config.weights) or not name:
        return known.DEFAULT
    require(
        name in known.__members__,
        f"torchvision has no weights {name} for {config.name}; choose one of: "
        + ", ".join(f"pretrained:{known_name}" for known_name in known.__members__),
    )
    return known[name]


def _load_published(network: nn.Module, config: TorchvisionModelConfig) -> None:
    name, wanted = config.name, _published_weights(config)
    try:
        weights = models.get_model(name, weights=wanted).state_dict()
    except (OSError, RuntimeError) as error:
        raise WeightsError(
            f"torchvision's published weights of {name} could not be fetched ({error}); "
            "set weights= to a local file"
        ) from error
    state = network.state_dict()
    classes = len(wanted.meta["categories"])
    misfits = [key for key, tensor in state.items() if weights[key].shape != tensor.shape]
    require(
        all(len(weights[key]) == classes for key in misfits),
        f"torchvision's published weights of {name} are for another image size; set input_size to null",
        WeightsError,
    )
    state.update(
        {key: tensor for key, tensor in weights.items() if key in state and key not in misfits}
    )
    network.load_state_dict(state)


# ---- one grid of features, then a list of layers -------------------------------------------------


class TorchvisionClassifier(Classifier):
    """A network whose head is a sequence of layers on its last stage."""

    def __init__(self, config: ModelConfig, network: nn.Module) -> None:
        super().__init__()
        self.normalize = Normalize(*model_normalization(config))
        self.inner = network
        self.split = NETWORK_SPLITS[type(network)]

    @property
    def head(self) -> Head | None:
        """Closed form of the head's layers, None if a dropout is active."""
        return match_head(self.split.head_layers(self.inner))

    def forward_trunk(self, images: Tensor) -> tuple[Tensor, None]:
        return self.split.trunk(self.inner, self.normalize(images)), None

    def forward_stages(self, images: Tensor) -> tuple[tuple[Stage, ...], Tensor, Tensor | None]:
        if self.split.stages is None:
            return super().forward_stages(images)
        stages = self.split.stages(self.inner, self.normalize(images))
        features = stages[-1].output
        if self.split.after_stages is not None:
            features = self.split.after_stages(self.inner, features)
        return tuple(stages), features, None

    def forward_head(self, features: Tensor, context: Tensor | None) -> Tensor:
        return _run(self.split.head_layers(self.inner), features)

    @property
    def pools_by_average(self) -> bool:
        layers = self.split.head_layers(self.inner)
        return (
            match_head([layer for layer in layers if not isinstance(layer, nn.Dropout)]) is not None
        )

    def forward_pooled(self, features: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute logits and pooled features.

        For a head with hidden layers (VGG, MobileNetV3), the pooled features are the input of its last linear layer.
        """
        *layers, last = self.split.head_layers(self.inner)
        if self.pools_by_average or not isinstance(last, nn.Linear):
            return super().forward_pooled(features, context)
        x = _run(layers, features)
        return last(x), to_float32(x)

    def rename_keys(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Remove auxiliary heads, and rename layers of published DenseNets (norm.1 to norm1, conv.2 to conv2)."""
        return {
            re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)", r"\1\2", name): tensor
            for name, tensor in state.items()
            if not name.startswith(("aux1.", "aux2.", "AuxLogits."))
        }


def _run(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    """Run layers in sequence."""
    for layer in layers:
        x = layer(x)
    return x


def _in_turn(*names: str) -> Callable[[Any, Tensor], Tensor]:
    """Build a trunk that runs these submodules in sequence."""

    def trunk(network: nn.Module, x: Tensor) -> Tensor:
        return _run([network.get_submodule(name) for name in names], x)

    return trunk


def _residual_stages(*names: str, stem: tuple[str, ...]) -> Callable[[Any, Tensor], list[Stage]]:
    """Build stages that are sequences of residual blocks, after the submodules `stem`."""
    before = _in_turn(*stem)

    def stages(network: nn.Module, x: Tensor) -> list[Stage]:
        x, passed = before(network, x), []
        for name in names:
            *blocks, last = network.get_submodule(name).children()
            x = _run(blocks, x)
            residual_sum = _residual_sum(last, x)
            x = F.relu(residual_sum)
            passed.append(Stage(x, residual_sum))
        return passed

    return stages


def _residual_sum(block: nn.Module, x: Tensor) -> Tensor:
    """Compute the input of a block's last ReLU, which the block itself overwrites."""
    match block:
        case ResBottleneckBlock():
            inner: Tensor = block.f(x)
            return inner + (x if block.proj is None else block.proj(x))
        case BasicBlock():
            inner = block.bn2(block.conv2(block.relu(block.bn1(block.conv1(x)))))
        case Bottleneck():
            inner = block.relu(block.bn2(block.conv2(block.relu(block.bn1(block.conv1(x))))))
            inner = block.bn3(block.conv3(inner))
        case _:
            raise TypeError(f"{type(block).__name__} is not a known residual block")
    return inner + (x if block.downsample is None else block.downsample(x))


def _convnext_stages(network: Any, x: Tensor) -> list[Stage]:
    """Run the stages, each of which is a layer that halves the resolution and a sequence of blocks."""
    layers, passed = list(network.features), []
    for halving, blocks in zip(layers[::2], layers[1::2], strict=True):
        x = blocks(halving(x))
        passed.append(Stage(x, x))
    return passed


def _densenet_stages(network: Any, x: Tensor) -> list[Stage]:
    """Run the dense blocks, and return their outputs before the transitions, the last one after norm and ReLU."""
    passed = []
    for name, layer in network.features.named_children():
        x = layer(x)
        if name.startswith("denseblock"):
            passed.append(Stage(x, x))
    passed[-1] = Stage(F.relu(x), x)
    return passed


def _vgg_stages(network: Any, x: Tensor) -> list[Stage]:
    """Run the convolutions, and return the last one before each pool, after its ReLU."""
    passed = []
    for layer, following in pairwise(network.features):
        if isinstance(following, nn.MaxPool2d):  # the layer is a ReLU, which overwrites its input
            passed.append(Stage(F.relu(x), x))
            x = passed[-1].output
        else:
            x = layer(x)
    return passed


_googlenet_layers = _in_turn(
    *("conv1", "maxpool1", "conv2", "conv3", "maxpool2"),
    *("inception3a", "inception3b", "maxpool3"),
    *("inception4a", "inception4b", "inception4c", "inception4d", "inception4e", "maxpool4"),
    *("inception5a", "inception5b"),
)
_inception_layers = _in_turn(
    *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "maxpool1"),
    *("Conv2d_3b_1x1", "Conv2d_4a_3x3", "maxpool2"),
    *("Mixed_5b", "Mixed_5c", "Mixed_5d"),
    *("Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
    *("Mixed_7a", "Mixed_7b", "Mixed_7c"),
)


def _pooled(*names: str) -> Callable[[Any], list[nn.Module]]:
    """Build a head of these submodules on the average of the features."""

    def head_layers(network: nn.Module) -> list[nn.Module]:
        layers: list[nn.Module] = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        for name in names:
            module = network.get_submodule(name)
            layers += [*module] if isinstance(module, nn.Sequential) else [module]
        return layers

    return head_layers


_features = _in_turn("features")

NETWORK_SPLITS: dict[type[nn.Module], Split] = {
    models.AlexNet: Split(_features, lambda net: [net.avgpool, nn.Flatten(), *net.classifier]),
    models.ConvNeXt: Split(_features, lambda net: [net.avgpool, *net.classifier], _convnext_stages),
    models.DenseNet: Split(
        lambda net, images: F.relu(net.features(images)), _pooled("classifier"), _densenet_stages
    ),
    models.EfficientNet: Split(_features, _pooled("classifier")),
    models.GoogLeNet: Split(
        lambda net, images: _googlenet_layers(net, net._transform_input(images)),
        _pooled("dropout", "fc"),
    ),
    models.Inception3: Split(
        lambda net, images: _inception_layers(net, net._transform_input(images)),
        _pooled("dropout", "fc"),
    ),
    models.MaxVit: Split(
        lambda net, images: _run(net.blocks, net.stem(images)), lambda net: [*net.classifier]
    ),
    models.MNASNet: Split(_in_turn("layers"), _pooled("classifier")),
    models.MobileNetV2: Split(_features, _pooled("classifier")),
    models.MobileNetV3: Split(_features, _pooled("classifier")),
    models.RegNet: Split(
        _in_turn("stem", "trunk_output"),
        _pooled("fc"),
        _residual_stages(
            *(f"trunk_output.block{number}" for number in range(1, 5)),
            stem=("stem",),
        ),
    ),
    models.ResNet: Split(
        _in_turn("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"),
        _pooled("fc"),
        _residual_stages(
            *("layer1", "layer2", "layer3", "layer4"), stem=("conv1", "bn1", "relu", "maxpool")
        ),
    ),
    models.ShuffleNetV2: Split(
        _in_turn("conv1", "maxpool", "stage2", "stage3", "stage4", "conv5"), _pooled("fc")
    ),
    models.SqueezeNet: Split(_features, lambda net: [*net.classifier, nn.Flatten()]),
    models.SwinTransformer: Split(_in_turn("features", "norm", "permute"), _pooled("head")),
    models.VGG: Split(
        _features,
        lambda net: [net.avgpool, nn.Flatten(), *net.classifier],
        _vgg_stages,
        after_stages=lambda net, last: net.features[-1](last),
    ),
}


PROVIDER = Provider(
    build_torchvision,
    published_torchvision,
    names=partial(models.list_models, module=torchvision.models),
    wrap=_wrap,
)


# ---- torchvision vit -------------------------------------------------------------------------------


class TorchvisionVit(Classifier):
    """A ViT, whose features are the patch tokens [B, C, h, w] that are the input of the last block's attention.

    The context [B, 1 + h * w, C] is the residual stream into that block, with the class token first.
    """

    def __init__(self, config: ModelConfig, network: models.VisionTransformer) -> None:
        super().__init__()
        self.name = config.name
        self.normalize = Normalize(*model_normalization(config))
        self.inner = network

    @property
    def head(self) -> None:
        """None, because the head includes the last block's attention."""
        return

    def forward_trunk(self, images: Tensor) -> tuple[Tensor, Tensor]:
        net: Any = self.inner
        require_size(self.name, images, (net.image_size, net.image_size))
        x = net._process_input(self.normalize(images))
        x = torch.cat([net.class_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = net.encoder.dropout(x + net.encoder.pos_embedding)
        residual: Tensor = net.encoder.layers[:-1](x)
        patches = net.encoder.layers[-1].ln_1(residual)[:, 1:]
        side = net.image_size // net.patch_size
        return patches.transpose(1, 2).unflatten(2, (side, side)), residual

    def forward_head(self, features: Tensor, context: Tensor | None) -> Tensor:
        assert context is not None
        net: Any = self.inner
        block = net.encoder.layers[-1]
        x = torch.cat([block.ln_1(context[:, :1]), features.flatten(2).transpose(1, 2)], dim=1)
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            x, _ = block.self_attention(x, x, x, need_weights=False)
        x = block.dropout(x) + context
        x = x + block.mlp(block.ln_2(x))
        logits: Tensor = net.heads(net.encoder.ln(x)[:, 0])
        return logits

    def rename_keys(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename linear_1 and linear_2, the names of the two MLP layers in published files."""
        for old, new in {".mlp.linear_1.": ".mlp.0.", ".mlp.linear_2.": ".mlp.3."}.items():
            state = {name.replace(old, new): tensor for name, tensor in state.items()}
        return state
