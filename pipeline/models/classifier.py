"""What every model is, whatever its provider: a trunk, the explained layer's features, a head.

The split is explicit and takes the place of hooks: `forward_head` can be differentiated alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.core.errors import ConfigError, UserError
from pipeline.models.output import (
    NO_INTERMEDIATES,
    GapLinear,
    Head,
    Intermediates,
    ModelOutput,
    Stage,
    Superfeatures,
    to_float32,
)


class WeightsError(UserError, ValueError):
    """Weights that cannot be had, or do not fit the network."""


class PretrainedInfo(NamedTuple):
    """What a provider says about the weights that it publishes for a network."""

    name: str
    """The provider's own name of these weights among those of the network: IMAGENET1K_V1, a1_in1k."""
    classes: int
    input_size: int
    """Side in pixels of the images they were tested with."""
    fixed_size: bool
    """Whether the network takes images of one size only."""
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Classifier(nn.Module, ABC):
    """Images in [0, 1], f32 [B, 3, H, W] -> logits [B, K], by way of features [B, C, h, w]."""

    explainer: ClassVar[str] = "gradcam"
    """Which of the explainers explains it."""

    if TYPE_CHECKING:

        def __call__(
            self, images: Tensor, intermediates: Intermediates = NO_INTERMEDIATES
        ) -> ModelOutput: ...

    @property
    @abstractmethod
    def network(self) -> nn.Module:
        """The provider's own network: its state dict has the published names."""

    @property
    @abstractmethod
    def head(self) -> Head | None:
        """How logits follow from features as the model stands; None where only autograd knows."""

    @abstractmethod
    def forward_trunk(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images in [0, 1] -> features [B, C, h, w], and the head's context [B, T, C] if it needs one."""

    @abstractmethod
    def forward_head(self, features: Tensor, context: Tensor | None) -> Tensor:
        """Logits [B, K] of what `forward_trunk` gives; leaves the features as they are."""

    def forward_stages(self, images: Tensor) -> tuple[tuple[Stage, ...], Tensor, Tensor | None]:
        """The stages that the images pass, then what `forward_trunk` gives, in one pass."""
        raise ConfigError(
            f"{type(self.network).__name__} has no stages that are known here, which method=at, "
            "method=review_kd and the payload at compare; choose a ResNet, RegNet, ConvNeXt or DenseNet "
            "(of kind cifar, torchvision, timm or bcos), or another method"
        )

    def class_maps(self, features: Tensor) -> Tensor:
        """The classifier at each place of the features, without its bias: [B, K, h, w], float32 or wider.

        Their average is the logits without the bias (Zhou et al. 2016; CAT-KD, Guo et al. 2023).
        """
        match self.head:
            case GapLinear(linear):
                with torch.autocast(features.device.type, enabled=False):
                    return torch.einsum("kc,bchw->bkhw", linear.weight, to_float32(features))
        raise ConfigError(
            f"{type(self.network).__name__} has no class maps, which method=cat_kd and the payload cat compare: "
            "its classifier is not linear on the average of its features (or a dropout lies between, in "
            "training); choose a ResNet, DenseNet or RegNet, or another method"
        )

    @property
    def pools_by_average(self) -> bool:
        """Whether the head begins with the average over places, up to a norm and dropouts before its linear layer."""
        return self.head is not None

    def forward_pooled(self, features: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """What `forward_head` gives, and the pooled features [B, d] (`ModelOutput.pooled`), in one pass."""
        if not self.pools_by_average:
            raise ConfigError(
                f"{type(self.network).__name__} has no pooled features that are known here, which method=crd, "
                "method=sskd and the payload feature compare: choose a network whose classifier follows the average "
                "of its features (a ResNet, DenseNet, RegNet or ConvNeXt), or another method or payload"
            )
        return self.forward_head(features, context), to_float32(features).mean(dim=(2, 3))

    def forward_superfeatures(self, features: Tensor) -> Superfeatures:
        """What each superfeature says, of the features that `forward_trunk` gives."""
        raise ConfigError(
            f"{type(self.network).__name__} has no superfeatures, which method=ked and the payload superfeature_logits compare: set "
            "teacher=additive and student=additive, or choose another method or payload"
        )

    def rename_keys(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A published file's entries under the names that the network gives them today."""
        return state

    def forward(
        self, images: Tensor, intermediates: Intermediates = NO_INTERMEDIATES
    ) -> ModelOutput:
        """One pass for logits, features and what is asked of the inner of the network."""
        stages: tuple[Stage, ...] = ()
        if intermediates.stages:
            stages, features, context = self.forward_stages(images)
        else:
            features, context = self.forward_trunk(images)
        class_maps = self.class_maps(features) if intermediates.class_maps else None
        if not intermediates.superfeatures:
            pooled = None
            if intermediates.pooled:
                logits, pooled = self.forward_pooled(features, context)
            else:
                logits = self.forward_head(features, context)
            return ModelOutput(logits, features, context, stages, class_maps, pooled=pooled)
        each = self.forward_superfeatures(features)
        return ModelOutput(
            each.logits.sum(dim=1), features, context, stages, class_maps, each.logits, each.hidden
        )


def require_size(name: str, images: Tensor, size: tuple[int, int]) -> None:
    """Raise ConfigError unless the images [B, 3, H, W] have the network's only (height, width)."""
    found = (images.shape[-2], images.shape[-1])
    if found != size:
        raise ConfigError(
            f"{name} takes images of {size[0]}x{size[1]} pixels, got {found[0]}x{found[1]}: set "
            "teacher.input_size or augment.size to its size, or the model's input_size to build it for yours"
        )


@dataclass(frozen=True)
class Provider:
    """A source of networks, as the module of each provider defines one."""

    build: Callable[[Any, int], Classifier]
    """Config and number of outputs -> the network, published or freshly initialized."""
    published: Callable[[Any], PretrainedInfo | None]
    """What is published for the network that a config names; None where nothing is."""
