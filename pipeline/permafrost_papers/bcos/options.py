"""Options of B-cos networks, and of the explanation that they have of themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt

from permafrost.config.explainers import EXPLAINERS, ExplainerConfig
from permafrost.config.models import MODELS, ModelConfig, is_published
from permafrost.core.errors import require

BCOS_NAMES = (
    *("resnet18", "resnet34", "resnet50", "densenet121", "densenet169"),
    *("simple_vit_ti", "simple_vit_s", "vitc_ti", "vitc_s"),
)
"""B-cos networks with published weights."""


@dataclass(frozen=True, kw_only=True)
class BcosModelConfig(ModelConfig):
    """B-cos network (Boehle et al. 2022, 2024), which explains itself with explainer=bcos_weights.

    resnet18, resnet34, resnet50, resnet8, resnet20, ... (three stages, depth 6n + 2), densenet121,
    densenet169, simple_vit_ti, simple_vit_s (patches of 16 pixels), vitc_ti, vitc_s (convolutional stem).
    """

    implementation: ClassVar[str] = "permafrost_papers.bcos.provider:PROVIDER"

    kind: Literal["bcos"] = "bcos"
    name: str = "resnet18"
    width: Annotated[int | None, Ge(1)] = None
    """Channels of the first stage, or of a ViT's tokens (a multiple of 64). null takes the published network's,
    or 16 for networks of three stages."""
    stem: Literal["large", "small"] | None = None
    """First layers. large: 7x7 with stride 2, followed by a pool. small: 3x3 at full resolution, for images of
    about 32 pixels. null: small for networks of three stages, large otherwise. ViTs have no stem option."""
    patch: int | None = None
    """Side in pixels of a ViT's patches (for vitc, of patches of the stem's output); null takes the published
    network's. 4 suits images of 32 pixels."""
    depth: int | None = None
    """Number of a ViT's blocks; null takes the published network's, 12 or 11."""
    logit_temperature: Annotated[float, Gt(0)] = 1.0
    """Divisor of the logits."""
    logit_bias: float | None = None
    """Constant added to all logits; null is -log(classes - 1), so that an untrained network's sigmoids are 1 /
    classes."""
    b: Annotated[float, Ge(1)] = 2.0
    """Exponent of every layer; 1 is a linear network."""
    mean: tuple[float, ...] | None = None
    """Always null: a B-cos network takes [x, 1 - x] of pixels in [0, 1], not normalized."""
    std: tuple[float, ...] | None = None

    def _check_together(self) -> None:
        super()._check_together()
        require(
            self.name in BCOS_NAMES or self.is_cifar_resnet,
            f"B-cos networks are named {', '.join(BCOS_NAMES)}, or resnet8, resnet14, resnet20, ... (depth "
            f"6n + 2, for small images); got {self.name!r}",
        )
        require(
            not is_published(self.weights),
            "weights=pretrained: nothing is downloaded for kind bcos; name a file of the published B-cos v2 "
            "checkpoints as weights=",
        )
        require(
            self.mean is None,
            f"mean and std must stay null for kind bcos, whose input is [x, 1 - x] of the pixels; got {self.mean}",
        )
        if self.is_vit:
            require(
                self.stem is None,
                f"{self.name} has no stem option, got stem={self.stem}; leave it null",
            )
            require(
                self.width is None or self.width % 64 == 0,
                f"width of {self.name} must be a multiple of 64, got {self.width}",
            )
        for option in ("patch", "depth"):
            value = getattr(self, option)
            require(
                value is None or (self.is_vit and value >= 1),
                f"{option}={value} is an option of B-cos ViTs, >= 1; leave it null for {self.name}"
                if not self.is_vit
                else f"{option} must be >= 1 or null, got {value}",
            )
        if self.name.startswith("densenet"):
            require(
                self.width is None or self.width % 2 == 0,
                f"width of {self.name} must be even, because a layer adds half of it; got {self.width}",
            )

    @property
    def is_vit(self) -> bool:
        """True if the network is a transformer."""
        return "vit" in self.name

    @property
    def is_cifar_resnet(self) -> bool:
        """True if the network is a ResNet of three stages, for small images."""
        depth = self.name.removeprefix("resnet")
        return (
            self.name not in BCOS_NAMES
            and self.name.startswith("resnet")
            and depth.isdecimal()
            and 8 <= int(depth[:5]) <= 9998
            and int(depth) % 6 == 2
        )


@dataclass(frozen=True, kw_only=True)
class BcosWeightsConfig(ExplainerConfig):
    """B-cos network's own explanation, the weights W of its input: six channels at the input's resolution."""

    implementation: ClassVar[str] = "permafrost_papers.bcos.weight_maps:bcos_weights"
    attribution: ClassVar[str] = "permafrost_papers.bcos.weight_maps:bcos_contributions"
    contribution: ClassVar[str] = "permafrost_papers.bcos.weight_maps:image_contributions"
    picture: ClassVar[str] = "permafrost_papers.bcos.weight_maps:image_picture"
    channels: ClassVar[int] = 6
    student_arguments: ClassVar[tuple[str, ...]] = ("student=bcos", "student.name=resnet8")
    needs_graph: ClassVar[bool] = True

    kind: Literal["bcos_weights"] = "bcos_weights"


MODELS["bcos"] = BcosModelConfig
EXPLAINERS["bcos_weights"] = BcosWeightsConfig
