"""Networks (`teacher=`, `student=`) and how they explain themselves (`explainer=`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pipeline.config.errors import require


@dataclass(frozen=True, kw_only=True)
class NoModelConfig:
    """No network: a store that is only packed, a student that trains on labels."""

    kind: Literal["none"] = "none"
    name: ClassVar[str] = "none"
    frame: ClassVar[str] = "full"


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Options of every network."""

    name: str = ""
    weights: str | None = None
    """A file (.safetensors, or .pt/.pth/.th loaded with weights_only), `pretrained` for the provider's
    published weights, `random` for a teacher that is meant to be untrained; null starts a student at random."""
    classes: int | None = None
    """Outputs; null takes as many as the data has classes."""
    mean: tuple[float, ...] | None = (0.485, 0.456, 0.406)
    std: tuple[float, ...] | None = (0.229, 0.224, 0.225)
    """Of each channel in [0, 1]: normalisation is part of the network."""
    input_size: int | None = None
    """Side in pixels of a teacher's input; null takes the provider's own for its published weights, and
    the store's frame otherwise. A student's input is augment.size."""
    frame: Literal["full", "center_crop"] = "full"
    """What part of the canonical frame a teacher sees: all of it, resized, or the field's centre crop of
    7/8 of the shorter side, in the original's proportions."""

    def __post_init__(self) -> None:
        require(
            self.classes is None or self.classes >= 1,
            f"classes must be >= 1 or null, got {self.classes}",
        )
        require(
            self.input_size is None or self.input_size >= 8,
            f"input_size must be >= 8 or null, got {self.input_size}",
        )
        if self.mean is not None and self.std is not None:
            require(
                len(self.mean) == len(self.std) == 3 and min(self.std) > 0,
                f"mean and std need three values, std > 0; got {self.mean} and {self.std}",
            )
        require(
            (self.mean is None) == (self.std is None),
            f"mean and std belong together; got {self.mean} and {self.std}",
        )


@dataclass(frozen=True, kw_only=True)
class CifarModelConfig(NetworkConfig):
    """A ResNet for small images (He et al. 2016, section 4.2): resnet8, resnet20, ... of depth 6n + 2."""

    kind: Literal["cifar"] = "cifar"
    name: str = "resnet20"
    width: int = 16
    """Channels of the first of three stages."""
    stem_stride: int = 1
    """2 halves the resolution at once: a quarter of the cost, half the map's grid."""

    def __post_init__(self) -> None:
        super().__post_init__()
        depth = self.name.removeprefix("resnet")
        require(
            self.name.startswith("resnet")
            and depth.isdigit()
            and int(depth) % 6 == 2
            and int(depth) >= 8,
            f"cifar models are named resnet8, resnet14, resnet20, ... (depth 6n + 2), got {self.name!r}",
        )
        require(self.width >= 1, f"width must be >= 1, got {self.width}")
        require(self.stem_stride in (1, 2), f"stem_stride must be 1 or 2, got {self.stem_stride}")


@dataclass(frozen=True, kw_only=True)
class TorchvisionModelConfig(NetworkConfig):
    """Any classifier of torchvision by its name: resnet50, convnext_tiny, vit_b_16, ..."""

    kind: Literal["torchvision"] = "torchvision"
    name: str = "resnet18"


@dataclass(frozen=True, kw_only=True)
class TimmModelConfig(NetworkConfig):
    """Any image classifier of timm by its name, hf-hub:<owner>/<model> or local-dir:<folder>."""

    kind: Literal["timm"] = "timm"
    name: str = "resnet18"
    mean: tuple[float, ...] | None = None
    """null takes the model's own."""
    std: tuple[float, ...] | None = None


ModelConfig = CifarModelConfig | TorchvisionModelConfig | TimmModelConfig


@dataclass(frozen=True, kw_only=True)
class GradCamConfig:
    """GradCAM at the model's last convolutional stage, on its own grid."""

    kind: Literal["gradcam"] = "gradcam"
    explained_classes: Literal["top1"] = "top1"
    """Which classes the teacher explains: its own highest logit."""


ExplainerConfig = GradCamConfig
