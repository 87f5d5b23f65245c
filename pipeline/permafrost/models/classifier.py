"""The interface of every model, independent of its provider: a trunk, the explained layer's features and a head.

The split is explicit and replaces hooks: `forward_head` can be differentiated separately.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from permafrost.config.models import CENTER_CROP_FRACTION
from permafrost.core.errors import ConfigError, UserError
from permafrost.models.output import (
    NO_INTERMEDIATES,
    GapLinear,
    Head,
    Intermediates,
    ModelOutput,
    Stage,
    to_float32,
)


class WeightsError(UserError, ValueError):
    """Error for weights that are not available, or do not fit the network."""


class PretrainedInfo(NamedTuple):
    """Facts about the weights that a provider publishes for a network."""

    name: str
    """Name of these weights at the provider, unique for the network, such as IMAGENET1K_V1 or a1_in1k."""
    classes: int
    input_size: int
    """Side in pixels of the images used in the provider's evaluation."""
    fixed_size: bool
    """True if the network takes images of one size only."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_fraction: float | None = CENTER_CROP_FRACTION
    """Side of the center crop as a fraction of the shorter side, None for the whole image as a square."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"


class Classifier(nn.Module, ABC):
    """Network from images in [0, 1], f32 [B, 3, H, W], via features [B, C, h, w] to logits [B, K]."""

    explainer: ClassVar[str] = "gradcam"
    """Name of the explainer of the network."""

    if TYPE_CHECKING:

        def __call__(
            self, images: Tensor, intermediates: Intermediates = NO_INTERMEDIATES
        ) -> ModelOutput: ...

    @property
    @abstractmethod
    def network(self) -> nn.Module:
        """Network of the provider, whose state dict has the published names."""

    @property
    @abstractmethod
    def head(self) -> Head | None:
        """Closed form of the head in the model's current mode, None if it must be differentiated by autograd."""

    @abstractmethod
    def forward_trunk(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute features [B, C, h, w] of images in [0, 1], and the head's context [B, T, C] if it needs one."""

    @abstractmethod
    def forward_head(self, features: Tensor, context: Tensor | None) -> Tensor:
        """Compute logits [B, K] from the output of `forward_trunk`, without modifying the features."""

    def forward_stages(self, images: Tensor) -> tuple[tuple[Stage, ...], Tensor, Tensor | None]:
        """Compute the stages and the output of `forward_trunk` in one pass."""
        raise ConfigError(
            f"{type(self.network).__name__} has no known stages, which method=at, method=review_kd and the payload "
            "attention need; choose a ResNet, RegNet, ConvNeXt or DenseNet (of kind cifar, torchvision, timm or "
            "bcos), a VGG of torchvision, or another method"
        )

    def class_maps(self, features: Tensor) -> Tensor:
        """Apply the classifier without its bias at each position of the features: [B, K, h, w], float32 or wider.

        The spatial average is the logits without the bias (Zhou et al. 2016; CAT-KD, Guo et al. 2023).
        """
        match self.head:
            case GapLinear(linear):
                with torch.autocast(features.device.type, enabled=False):
                    return torch.einsum("kc,bchw->bkhw", linear.weight, to_float32(features))
        raise ConfigError(
            f"{type(self.network).__name__} has no class maps, which method=cat_kd and the payload class_maps need, "
            "because its classifier is not linear on the average of its features (or has an active dropout in "
            "training); choose a ResNet, DenseNet or RegNet, or another method"
        )

    @property
    def pools_by_average(self) -> bool:
        """True if the head is a linear layer on the spatial average, up to a norm and dropouts in between."""
        return self.head is not None

    def forward_pooled(self, features: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute the output of `forward_head` and the pooled features [B, d] (`ModelOutput.pooled`) in one pass."""
        if not self.pools_by_average:
            raise ConfigError(
                f"{type(self.network).__name__} has no pooled features, which the payload pooled and methods on "
                "them need; choose a network whose classifier is applied to the average of its features (a ResNet, "
                "DenseNet, RegNet or ConvNeXt), or another method or payload"
            )
        return self.forward_head(features, context), to_float32(features).mean(dim=(2, 3))

    def forward_extras(
        self, features: Tensor, context: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the output of `forward_head` and `ModelOutput.extras` in one pass."""
        return self.forward_head(features, context), {}

    def rename_keys(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the entries of a published file to the current names of the network."""
        return state

    def forward(
        self, images: Tensor, intermediates: Intermediates = NO_INTERMEDIATES
    ) -> ModelOutput:
        """Compute logits, features and the requested intermediates in one pass."""
        stages: tuple[Stage, ...] = ()
        if intermediates.stages:
            stages, features, context = self.forward_stages(images)
        else:
            features, context = self.forward_trunk(images)
        class_maps = self.class_maps(features) if intermediates.class_maps else None
        if intermediates.pooled:
            logits, pooled = self.forward_pooled(features, context)
            return ModelOutput(logits, features, context, stages, class_maps, pooled)
        logits, extras = self.forward_extras(features, context)
        return ModelOutput(logits, features, context, stages, class_maps, extras=extras)


def require_size(name: str, images: Tensor, size: tuple[int, int]) -> None:
    """Raise ConfigError unless the images [B, 3, H, W] have the network's only (height, width)."""
    found = (images.shape[-2], images.shape[-1])
    if found != size:
        raise ConfigError(
            f"{name} takes images of {size[0]}x{size[1]} pixels, got {found[0]}x{found[1]}; set "
            "teacher.input_size or augment.size to its size, or input_size of the model to build it for another size"
        )


@dataclass(frozen=True)
class Provider:
    """A source of networks, defined in the module of each provider."""

    build: Callable[[Any, int], Classifier]
    """Function from config and number of outputs to the network, published or newly initialized."""
    published: Callable[[Any], PretrainedInfo | None]
    """Function from a config to the facts about published weights, or None if nothing is published."""
