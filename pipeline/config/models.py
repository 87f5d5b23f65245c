"""Networks (`teacher=`, `student=`, `black_box=`)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt

from pipeline.config.options import Options, Role
from pipeline.core.errors import require

PRETRAINED = "pretrained"
"""As weights: those that the provider publishes, its default ones; `pretrained:<name>` are those of that name."""


def is_published(weights: str | None) -> bool:
    """Whether the option names weights that the provider publishes, rather than a file."""
    return weights is not None and weights.partition(":")[0] == PRETRAINED


@dataclass(frozen=True, kw_only=True)
class NoModelConfig(Options):
    """No network: a store that is only packed, a student that trains on labels."""

    kind: Literal["none"] = "none"
    name: ClassVar[str] = "none"
    frame: ClassVar[str] = "full"


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Options):
    """Options of every network."""

    kind: str = ""
    name: str = ""
    weights: Annotated[str | None, Role.FILE, Role.OUTSIDE_IDENTITY] = None
    """A file (.safetensors, or .pt/.pth/.th loaded with weights_only), `pretrained` for the provider's
    published weights (its default ones, whose exact name is recorded, or `pretrained:IMAGENET1K_V1`), `random`
    for a teacher that is meant to be untrained; null starts a student at random."""
    sha256: Annotated[str | None, Role.OUTSIDE_IDENTITY] = None
    """Of the weights' file, which must have it; null takes the file as it is."""
    classes: Annotated[int | None, Ge(1)] = None
    """Outputs; null takes as many as the data has classes."""
    mean: tuple[float, ...] | None = (0.485, 0.456, 0.406)
    std: tuple[float, ...] | None = (0.229, 0.224, 0.225)
    """Of each channel in [0, 1]: normalization is part of the network."""
    input_size: Annotated[int | None, Ge(8)] = None
    """Side in pixels of a teacher's input; null takes the provider's own for its published weights, and
    the store's frame otherwise. A student's input is augment.size."""
    frame: Literal["full", "center_crop"] = "full"
    """What part of the canonical frame a teacher sees: all of it, resized, or the field's center crop of
    7/8 of the shorter side, in the original's proportions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.sha256 is None or re.fullmatch(r"[0-9a-fA-F]{64}", self.sha256) is not None,
            f"sha256 must be 64 hexadecimal digits or null, got {self.sha256!r}",
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
class CifarModelConfig(ModelConfig):
    """A ResNet for small images (He et al. 2016, section 4.2): resnet8, resnet20, ... of depth 6n + 2."""

    implementation: ClassVar[str] = "pipeline.models.cifar:PROVIDER"

    kind: Literal["cifar"] = "cifar"
    name: str = "resnet20"
    width: Annotated[int, Ge(1)] = 16
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
        require(self.stem_stride in (1, 2), f"stem_stride must be 1 or 2, got {self.stem_stride}")


@dataclass(frozen=True, kw_only=True)
class TorchvisionModelConfig(ModelConfig):
    """Any classifier of torchvision by its name: resnet50, convnext_tiny, vit_b_16, ..."""

    implementation: ClassVar[str] = "pipeline.models.torchvision:PROVIDER"

    kind: Literal["torchvision"] = "torchvision"
    name: str = "resnet18"


@dataclass(frozen=True, kw_only=True)
class TimmModelConfig(ModelConfig):
    """Any image classifier of timm by its name, hf-hub:<owner>/<model> or local-dir:<folder>."""

    implementation: ClassVar[str] = "pipeline.models.timm:PROVIDER"

    kind: Literal["timm"] = "timm"
    name: str = "resnet18"
    mean: tuple[float, ...] | None = None
    """null takes the model's own."""
    std: tuple[float, ...] | None = None
    license: Annotated[str | None, Role.OUTSIDE_IDENTITY] = None
    """Of a trained student, as its export names it (an SPDX name); null names none."""


BCOS_NAMES = (
    *("resnet18", "resnet34", "resnet50", "densenet121", "densenet169"),
    *("simple_vit_ti", "simple_vit_s", "vitc_ti", "vitc_s"),
)
"""B-cos networks of which weights are published."""


@dataclass(frozen=True, kw_only=True)
class BcosModelConfig(ModelConfig):
    """A B-cos network (Boehle et al. 2022, 2024), which explains itself with explainer=bcos_weights.

    resnet18, resnet34, resnet50, resnet8, resnet20, ... (three stages, depth 6n + 2), densenet121,
    densenet169, simple_vit_ti, simple_vit_s (patches of 16 pixels), vitc_ti, vitc_s (convolutional stem).
    """

    implementation: ClassVar[str] = "pipeline.models.bcos.classifier:PROVIDER"

    kind: Literal["bcos"] = "bcos"
    name: str = "resnet18"
    width: Annotated[int | None, Ge(1)] = None
    """Channels of the first stage (of a ViT's tokens, a multiple of 64); null is the published network's,
    and 16 for three stages."""
    stem: Literal["large", "small"] | None = None
    """large: 7x7 with stride 2, then a pool; small: 3x3 at full resolution, for images of about 32 pixels.
    null: small for three stages, large otherwise. A ViT has none."""
    patch: int | None = None
    """Of a ViT: side in pixels of its patches (of the stem's output, for vitc); null is the published
    network's. 4 suits images of 32 pixels."""
    depth: int | None = None
    """Of a ViT: blocks; null is the published network's 12, or 11."""
    logit_temperature: Annotated[float, Gt(0)] = 1.0
    """Divides the logits; > 0."""
    logit_bias: float | None = None
    """Added to all logits; null is -log(classes - 1), for which a fresh network's sigmoids are 1 / classes."""
    b: Annotated[float, Ge(1)] = 2.0
    """The exponent of every layer, >= 1; 1 is a linear network."""
    mean: tuple[float, ...] | None = None
    """null: a B-cos network takes [x, 1 - x] of pixels in [0, 1], not normalized."""
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.name in BCOS_NAMES or self.is_cifar_resnet,
            f"B-cos networks are named {', '.join(BCOS_NAMES)}, or resnet8, resnet14, resnet20, ... (depth "
            f"6n + 2, for small images); got {self.name!r}",
        )
        require(
            not is_published(self.weights),
            "weights=pretrained: nothing is downloaded for kind bcos; give a file of the published B-cos v2 "
            "checkpoints as weights=",
        )
        require(
            self.mean is None,
            f"mean and std must stay null for kind bcos, whose input is [x, 1 - x] of the pixels; got {self.mean}",
        )
        if self.is_vit:
            require(
                self.stem is None,
                f"{self.name} has no choice of stem, got {self.stem}; leave it null",
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
                f"width of {self.name} must be even, as a layer adds half of it; got {self.width}",
            )

    @property
    def is_vit(self) -> bool:
        """Whether it is a transformer."""
        return "vit" in self.name

    @property
    def is_cifar_resnet(self) -> bool:
        """Whether it is a ResNet of three stages, for small images."""
        depth = self.name.removeprefix("resnet")
        return (
            self.name not in BCOS_NAMES
            and self.name.startswith("resnet")
            and depth.isdigit()
            and int(depth) >= 8
            and int(depth) % 6 == 2
        )


@dataclass(frozen=True, kw_only=True)
class AdditiveModelConfig(ModelConfig):
    """A superfeature-explaining network (KED): its logits are the sum of those of one subnet a superfeature.

    mlp: subnets on cells of the image, or on columns of a table; conv: grouped convolutions on masked copies of a
    small image; trunk: heads on the cells of one shared ResNet (teacher and student agree cell by cell).
    """

    implementation: ClassVar[str] = "pipeline.models.additive.network:PROVIDER"

    kind: Literal["additive"] = "additive"
    name: Literal["mlp", "conv", "trunk"] = "trunk"
    superfeatures: int = 8
    """M, of the finest level; every coarser one is kept with the weights."""
    partition: Annotated[str | None, Role.FILE, Role.OUTSIDE_IDENTITY] = None
    """Which cells or columns are one superfeature: the folder of a partition artifact, or its
    partition.safetensors; null takes contiguous blocks. A weights file holds its own, which then counts."""
    partition_control: Literal["none", "random", "contiguous"] = "none"
    """Negative controls: groups of the same sizes but of random members, or contiguous blocks in place of the
    partition."""
    partition_seed: int = 0
    """Of partition_control=random."""
    grid: tuple[int, int] = (8, 8)
    """(rows, columns) of cells that are grouped: of the image, or of the trunk's last stage, as many as it has."""
    columns: int | None = None
    """Of mlp on a table: how many, each a feature of its own; null takes those of a store of rows, and of a store of
    images its images."""
    width: int = 16
    """Of each subnet: units of a hidden layer, or channels of a convolution."""
    depth: int = 1
    """Of each subnet: layers before its last, the linear one."""
    trunk: str = "resnet20"
    """Of trunk: the network below the heads, resnet8, resnet14, resnet20, ..., as of kind cifar."""
    trunk_width: int = 16
    stem_stride: int = 1
    """Of trunk, as `width` and `stem_stride` of kind cifar."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("superfeatures", "width", "depth", *(["columns"] if self.columns else [])):
            value = getattr(self, option)
            require(value >= 1, f"{option} must be >= 1, got {value}")
        require(min(self.grid) >= 1, f"grid must be [rows, columns] >= 1, got {list(self.grid)}")
        require(
            self.columns is None or self.name == "mlp",
            f"columns={self.columns} is an option of name=mlp, for tables; leave it null for name={self.name}",
        )
        require(
            self.infers_columns_from_store or self.superfeatures <= self.features,
            f"superfeatures={self.superfeatures} of {self.features} features: each needs at least one; lower "
            f"it{'' if self.columns else ', or choose a finer grid'}",
        )
        require(
            self.partition_control != "random" or self.partition_seed >= 0,
            f"partition_seed must be >= 0, got {self.partition_seed}",
        )
        require(
            not is_published(self.weights),
            "weights=pretrained: nothing is published for kind additive; train one with stages.teach and give its "
            "model.safetensors as weights=",
        )
        if self.name == "mlp" and self.columns is None and self.input_size is not None:
            require(
                not any(self.input_size % side for side in self.grid),
                f"grid={list(self.grid)} does not divide input_size={self.input_size}; choose a divisor",
            )
        if self.name == "trunk":
            self.trunk_config  # noqa: B018, checks its name and width

    @property
    def infers_columns_from_store(self) -> bool:
        """Whether only a table says how many features there are (models/resolve.py)."""
        return self.name == "mlp" and self.columns is None and self.input_size is None

    @property
    def features(self) -> int:
        """d: what is grouped."""
        return self.columns or self.grid[0] * self.grid[1]

    @property
    def is_input_mode(self) -> bool:
        """Whether superfeatures are parts of the input itself, of which subnets see nothing else."""
        return self.name != "trunk"

    @property
    def trunk_config(self) -> CifarModelConfig:
        """The network below the heads."""
        return CifarModelConfig(
            name=self.trunk,
            width=self.trunk_width,
            stem_stride=self.stem_stride,
            mean=self.mean,
            std=self.std,
        )


MODELS: dict[str, type[ModelConfig]] = {
    cls.kind: cls
    for cls in (
        CifarModelConfig,
        TorchvisionModelConfig,
        TimmModelConfig,
        BcosModelConfig,
        AdditiveModelConfig,
    )
}
