"""Networks (`teacher=`, `student=`, `black_box=`)."""

from __future__ import annotations

import math
import pkgutil
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal, NoReturn, TypeVar

from annotated_types import Ge, Gt, Le

from permafrost.config.options import Options, Role
from permafrost.config.plugins import Family
from permafrost.core.errors import ConfigError, require
from permafrost.core.json_entries import require_entry

CENTER_CROP_FRACTION = 0.875
"""Fraction of the shorter side in the usual evaluation crop of classifiers, 224 of 256 pixels."""
RANDOM = "random"
"""Value of `weights` for an untrained network, which is the same in every process."""
MEMORY = "memory"
"""Beginning of `weights` for a network in memory, before a colon and the digest of its state."""
PRETRAINED = "pretrained"
"""Value of `weights` for the provider's published default weights; `pretrained:<name>` selects named ones."""


NetworkReturns = Literal["logits", "probabilities", "log_probabilities"]


def is_published(weights: str | None) -> bool:
    """Return whether the option names weights published by the provider rather than a file."""
    return weights is not None and weights.partition(":")[0] == PRETRAINED


def is_weights_file(weights: str | None) -> bool:
    """Return whether the option names a file or folder, rather than published, random or no weights, or a state."""
    return weights is not None and weights.partition(":")[0] not in (PRETRAINED, RANDOM, MEMORY)


@dataclass(frozen=True, kw_only=True)
class NoModelConfig(Options):
    """No network: a store without a teacher pass, or a student trained on labels."""

    kind: Literal["none"] = "none"
    name: ClassVar[str] = "none"
    frame: ClassVar[str] = "full"


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Options):
    """Options that all networks share."""

    section: ClassVar[str] = "network"

    table_options: ClassVar[tuple[str, ...]] = ()
    """Options that choose a network of this kind for rows of a table, empty if all of them take images."""
    pass_outputs: ClassVar[tuple[str, ...]] = ("logits",)
    """Outputs of a pass over a table. If there are several, also those of the pass that `teach` suggests for images."""

    suits_channels_last: ClassVar[bool] = False
    """True if channels_last=null of passes and trainings is channels-last for networks of this kind, which all accept
    it."""

    largest_side: ClassVar[float] = math.inf
    """Longest side in pixels of images that a network of this kind is meant for; larger ones must be asked for."""

    digests: ClassVar[str] = ""
    """`module:name` of a function (config) -> SHA-256 by option of the files that a network is built from besides its
    weights."""

    digests_in_passes: ClassVar[bool] = False
    """True if these digests are part of what a teacher's pass is, unless its weights contain the files."""

    kind: str = ""
    name: str = ""
    """Name of the network."""
    weights: Annotated[str | None, Role.FILE, Role.OUTSIDE_IDENTITY] = None
    """Weights of the network: a file, `pretrained` or `random`; null starts a training from random weights. File:
    .safetensors, or .pt/.pth/.th loaded with weights_only. `pretrained`: the provider's published default
    weights, whose exact name is recorded; `pretrained:IMAGENET1K_V1` selects others. `random`: weights of a
    network that is deliberately left untrained."""
    weights_key: Annotated[str | None, Role.BY_FINGERPRINT] = None
    """Key of the weights in a file that has several, as in state_dict_ema; null takes averaged ones first (ema, swa,
    teacher), then state_dict, then model. It is read with teaching.start, too."""
    sha256: Annotated[str | None, Role.OUTSIDE_IDENTITY] = None
    """SHA-256 that the weights file must have; null accepts any file."""
    classes: Annotated[int | None, Ge(1)] = None
    """Number of outputs; null takes the number of classes of the data."""
    mean: tuple[float, ...] | None = (0.485, 0.456, 0.406)
    """Mean of each channel in [0, 1]; normalization is part of the network."""
    std: tuple[float, ...] | None = (0.229, 0.224, 0.225)
    """Standard deviation of each channel in [0, 1]."""
    input_size: Annotated[int | None, Ge(8), Le(4096)] = None
    """Side in pixels of the network's input outside of random views, which have the size of their augmentation. null
    takes the provider's value for its published weights, and the store's frame otherwise."""
    frame: Literal["auto", "center_crop", "full"] = "auto"
    """Part of the canonical frame that the network receives outside of random views. full: all of it, resized
    to a square. center_crop: a square in the middle, in the original's proportions. auto: the provider's own
    preprocessing (input size, crop, interpolation) for its published weights, and for a file with as many
    classes as these that no run has trained; full otherwise, and wherever the views are random."""
    crop_fraction: Annotated[float | None, Gt(0), Le(1)] = None
    """Side of the center crop as a fraction of the shorter side; null is the provider's with frame=auto, and 7/8
    with frame=center_crop."""
    interpolation: Literal["bilinear", "bicubic"] | None = None
    """Interpolation of the network's input; null is the provider's with frame=auto, and bilinear otherwise."""

    def _check_together(self) -> None:
        require(
            self.crop_fraction is None or self.frame != "full",
            f"crop_fraction={self.crop_fraction} is an option of frame=center_crop; set that, or leave it at null",
        )
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

    def input_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """Return the shape of one record's input, for a network whose input size is (height, width) `size`."""
        return 3, *size

    @property
    def learns_moments(self) -> bool:
        """True if the moments of its inputs are learned from the data, and stored with its weights."""
        return False

    @property
    def label(self) -> str:
        """Name of the network and of its provider for log lines."""
        return f"{self.kind} {self.name}"

    def resolve(self, option: str, store: str, columns: int | None) -> ModelConfig:
        """Return the options for the records of a store.

        Args:
            option: Option of the network, for messages: teacher, black_box or student.
            store: Path of the store, for messages.
            columns: Number of columns of a table, None for images.

        Raises:
            ConfigError: If the network does not take such records.
        """
        if columns is not None:
            self.refuse_rows(option, store, columns)
        return self

    def refuse_rows(self, option: str, store: str, columns: int) -> NoReturn:
        """Refuse a store of a table, because the network takes images.

        Args:
            option: Option of the network, for the message: teacher, black_box or student.
            store: Path of the store, for the message.
            columns: Number of columns of the table.

        Raises:
            ConfigError: Always.
        """
        arguments = " ".join(table_arguments(option))
        raise ConfigError(
            f"{option}={self.kind} {option}.name={self.name} takes images, but {rows_of_table(store, columns)}; "
            + (f"set {arguments}" if arguments else "choose a store of images")
        )

    def fingerprint_files(self) -> dict[str, str]:
        """Return the SHA-256 of each file that the network is built from besides its weights, by option."""
        if not self.digests:
            return {}
        digests: dict[str, str] = pkgutil.resolve_name(self.digests)(self)
        return digests


@dataclass(frozen=True, kw_only=True)
class CifarModelConfig(ModelConfig):
    """ResNet for small images (He et al. 2016, section 4.2): resnet8, resnet20, ... of depth 6n + 2."""

    implementation: ClassVar[str] = "permafrost.models.cifar:PROVIDER"
    largest_side: ClassVar[float] = 64

    kind: Literal["cifar"] = "cifar"
    name: str = "resnet20"
    width: Annotated[int, Ge(1)] = 16
    """Channels of the first of the three stages."""
    stem_stride: int = 1
    """Stride of the first convolution; 2 halves the resolution, for a quarter of the cost and half the map's
    grid."""

    def _check_together(self) -> None:
        super()._check_together()
        depth = self.name.removeprefix("resnet")
        require(
            self.name.startswith("resnet")
            and depth.isdecimal()
            and len(depth) <= 4
            and int(depth) % 6 == 2
            and int(depth) >= 8,
            f"cifar models are named resnet8, resnet14, resnet20, ... (depth 6n + 2, at most 9998), got {self.name!r}; "
            "others have another provider, as in student=torchvision student.name=resnet18",
        )
        require(self.stem_stride in (1, 2), f"stem_stride must be 1 or 2, got {self.stem_stride}")


@dataclass(frozen=True, kw_only=True)
class TorchvisionModelConfig(ModelConfig):
    """Classifier of torchvision by its name: resnet50, convnext_tiny, vit_b_16, ..."""

    implementation: ClassVar[str] = "permafrost.models.torchvision:PROVIDER"
    suits_channels_last: ClassVar[bool] = True

    kind: Literal["torchvision"] = "torchvision"
    name: str = "resnet18"


@dataclass(frozen=True, kw_only=True)
class NormalizedModelConfig(ModelConfig):
    """Options of networks that have a normalization of their own."""

    mean: tuple[float, ...] | None = None
    """Mean of each channel in [0, 1]; null takes the network's own."""
    std: tuple[float, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class SavedModelConfig(NormalizedModelConfig):
    """Network of a finished run, with all options that the run had. Others that are set take precedence."""

    implementation: ClassVar[str] = "permafrost.models.saved:SavedNetwork"

    kind: Literal["saved"] = "saved"
    weights: Annotated[str | None, Role.FILE, Role.OUTSIDE_IDENTITY] = None
    """Folder of the network, such as runs/my-teacher/teach, or its model.safetensors."""

    def resolve(self, option: str, store: str, columns: int | None) -> NoReturn:
        raise ConfigError(
            f"{option}=saved needs {option}.weights=, the folder of a network that teach or distill has finished, "
            "such as runs/my-teacher/teach"
        )


@dataclass(frozen=True, kw_only=True)
class FoldsModelConfig(NormalizedModelConfig):
    """Networks that permafrost teach has trained with teaching.folds, one for each record of a pass.

    A record's targets are of the network that was trained without it. One that no network was trained on gets the
    network of its key's digest modulo the number of folds.
    """

    implementation: ClassVar[str] = "permafrost.models.fold_networks:PROVIDER"

    kind: Literal["folds"] = "folds"
    weights: Annotated[str | None, Role.FILE, Role.OUTSIDE_IDENTITY] = None
    """Folder of the networks, such as runs/my-teachers/teach. All other options are taken from it."""
    network: ModelConfig | None = None
    """Options of each network."""
    folds: int = 0
    """Number of networks."""
    records: int = 0
    """Number of records that they were trained on."""

    def input_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        return super().input_shape(size) if self.network is None else self.network.input_shape(size)

    def resolve(self, option: str, store: str, columns: int | None) -> ModelConfig:
        require(
            self.network is not None and option == "teacher",
            f"{option}=folds is a teacher of precompute; set teacher.weights= to the folder that permafrost teach "
            "teaching.folds=5 has written, such as runs/my-teachers/teach",
        )
        return self


@dataclass(frozen=True, kw_only=True)
class ModuleConfig(ModelConfig):
    """Any network of your own: a function that builds a torch.nn.Module, and the layer that is explained."""

    @property
    def label(self) -> str:
        return self.factory

    implementation: ClassVar[str] = "permafrost.models.module:PROVIDER"

    kind: Literal["module"] = "module"
    name: str = "module"
    """Name of the network in tables and of its passes."""
    factory: str = ""
    """Function (number of classes, **arguments) -> torch.nn.Module, which returns logits [B, K] for normalized images:
    my_package.networks:build, or my_networks.py:build."""
    layer: str = ""
    """Name of the module whose output is explained, a grid or tokens, as in network.named_modules(): features.7.
    Empty takes the last one that the logits depend on, and logs its name; a network without any has logits and no
    maps."""
    layout: Annotated[str, Role.IF_SET] = ""
    """Layout of its output, as a pass records it: `b c h w`, `b h w c`, or of tokens `b 1+hw c` for patches after a
    class token, `hw b c`, `0: b hw c` in a tuple. Empty measures it: a corner of an image is replaced, and the cells
    that change most are those of the corner."""
    returns: Annotated[NetworkReturns, Role.IF_SET] = "logits"
    """Values that the network returns. Of probabilities the logarithm is stored, which is -65504 for 0, and of
    log-probabilities the values themselves: both are logits up to a constant. A pass with maps needs logits, because
    their gradient is another one."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Other arguments of the function."""

    def resolve(self, option: str, store: str, columns: int | None) -> ModelConfig:
        require(
            bool(self.factory),
            f"{option}=module needs {option}.factory=my_networks.py:build, a function (number of classes) -> "
            "torch.nn.Module",
        )
        return super().resolve(option, store, columns)


@dataclass(frozen=True, kw_only=True)
class LayerModelConfig(NormalizedModelConfig):
    """Options of networks that are built elsewhere, and explained at any of their layers."""

    layer: str = ""
    """Name of the module that is explained, as with kind=module."""
    layout: Annotated[str, Role.IF_SET] = ""
    """Layout of its output, as with kind=module."""


@dataclass(frozen=True, kw_only=True)
class MemoryModelConfig(LayerModelConfig):
    """Network of a Python program, as it is in memory: `permafrost.precompute(teacher=network)`."""

    implementation: ClassVar[str] = "permafrost.models.memory_network:PROVIDER"

    kind: Literal["memory"] = "memory"
    name: str = "module"
    """Name of the network's class."""
    returns: Annotated[NetworkReturns, Role.IF_SET] = "logits"
    """Outputs of the network, as with kind=module."""
    code: Annotated[str | None, Role.IF_SET] = None
    """SHA-256 of the code of the network's classes and of what they call, without installed packages; null where the
    code cannot be read, as of a program that was typed. The network is then identified by its state alone."""
    network: Any = field(default=None, repr=False)

    def resolve(self, option: str, store: str, columns: int | None) -> ModelConfig:
        require(
            self.network is not None,
            f"{option}=memory: {self.name} is a network in the memory of a Python program, which no command can build; "
            f"pass it there, as {option}=network or by permafrost.load_student(run, network=...), or name a "
            f"function that builds it, {option}=module",
        )
        return super().resolve(option, store, columns)


def rows_of_table(store: str, columns: int) -> str:
    """Describe what a store of a table holds, for messages."""
    return f"{store} holds rows of a table with {columns} columns"


def table_arguments(option: str) -> list[str]:
    """Return overrides that choose a network for rows of a table, none if no kind takes them.

    Args:
        option: Option of the network: teacher, black_box or student.
    """
    fits = ((kind, cls.table_options) for kind, cls in MODELS.items() if cls.table_options)
    kind, texts = next(fits, ("", ()))
    return [f"{option}={kind}", *(f"{option}.{text}" for text in texts)] if kind else []


AnyModelConfig = TypeVar("AnyModelConfig", bound="ModelConfig | NoModelConfig")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """Part of an image that a network receives outside of random views, and how it is resized."""

    size: tuple[int, int]
    """(height, width) of the network's input."""
    crop: float | None = None
    """Side of a center crop relative to the image's shorter side, in the original's proportions; None for all of it."""
    resize: Literal["bilinear", "bicubic"] = "bilinear"
    """Interpolation between pixels."""
    frames: tuple[int, int] | None = None
    """(height, width) of the canonical frames that it is sampled from, without antialiasing. None if it is cut from
    original images and resized once with antialiasing, as windows of a training are."""

    def __post_init__(self) -> None:
        require_entry(
            all(
                isinstance(size, Sequence) and len(size) == 2 and min(size) >= 1
                for size in [self.size, self.frames or self.size]
            )
            and (self.crop is None or 0 < self.crop <= 1),
            f"Picture(size={self.size}, crop={self.crop}, frames={self.frames}): sizes are (height, width) in pixels, "
            "and a crop is a part of the shorter side, above 0 and at most 1",
        )

    @classmethod
    def from_manifest(cls, described: Mapping[str, Any], size: tuple[int, int]) -> Picture | None:
        """Return the picture of a teacher's canonical view, from its entry in the manifest of a pass.

        It is None for a table, and for a pass that was imported, which does not say how its images were resized.

        Args:
            described: The entry.
            size: (height, width) of the canonical frame.
        """
        entry = described.get("preprocessing", {})
        if "input_size" not in entry:
            return None
        side, fraction = entry["input_size"], entry.get("crop_fraction", CENTER_CROP_FRACTION)
        return cls(
            size=(side, side) if side else size,
            crop=fraction if described["frame"] == "center_crop" else None,
            resize=entry.get("interpolation", "bilinear"),
            frames=size,
        )

    def on(self, frame: str) -> Picture:
        """Return the picture that evaluate.frame, or an option like it, asks for; auto is this one."""
        if frame == "auto":
            return self
        return replace(self, crop=None if frame == "full" else CENTER_CROP_FRACTION)

    def __str__(self) -> str:
        part = "whole image" if self.crop is None else f"center crop of {self.crop:g}"
        text = f"{part} at {self.size[1]}x{self.size[0]}, {self.resize}"
        if self.frames is None:
            return f"{text}, antialiased"
        is_frame = self.crop is None and self.frames == self.size
        return text if is_frame else f"{text} from frames of {self.frames[1]}x{self.frames[0]}"


def frame_of(picture: str | None) -> str:
    """Return the value of evaluate.frame for the text of a picture."""
    return "center_crop" if (picture or "").startswith("center crop") else "full"


def usual_picture(size: tuple[int, int], frame_size: tuple[int, int]) -> Picture:
    """Return the picture of a network of which no training is known: whole frames of its size, or the usual crop.

    Args:
        size: (height, width) of its input.
        frame_size: (height, width) of the canonical frame.
    """
    crop = None if size == frame_size else CENTER_CROP_FRACTION
    return Picture(size=size, crop=crop, frames=frame_size)


def whole_frame(config: AnyModelConfig) -> AnyModelConfig:
    """Return the options of a network that receives whole frames, so that frame=auto means full."""
    if isinstance(config, NoModelConfig) or config.frame != "auto":
        return config
    return replace(config, frame="full")


MODELS: Family[type[ModelConfig]] = Family(
    {
        cls.kind: cls
        for cls in (
            CifarModelConfig,
            TorchvisionModelConfig,
            ModuleConfig,
            MemoryModelConfig,
            SavedModelConfig,
            FoldsModelConfig,
        )
    }
)
"""Networks (`teacher=`, `student=`, `black_box=`) by name."""
