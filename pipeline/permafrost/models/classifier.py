"""The interface of every model: a trunk, the explained layer's features, a head, and the output of a forward pass.

The split is explicit and replaces hooks: `forward_head` can be differentiated separately.
"""

from __future__ import annotations

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from permafrost.config.models import CENTER_CROP_FRACTION, NetworkReturns, Picture
from permafrost.core.errors import ConfigError, UserError, require
from permafrost.core.records import FEATURES


class Intermediates(NamedTuple):
    """Intermediates that a forward pass is requested to return in addition. The default requests none."""

    stages: bool = False
    class_maps: bool = False
    pooled: bool = False


NO_INTERMEDIATES = Intermediates()
"""Request of nothing but logits and features."""


class Stage(NamedTuple):
    """End of one stage, that is, of the layers that share a resolution, or of a quarter of a transformer's blocks."""

    output: Tensor
    """Output [B, C, h, w], after the stage's last activation if it has one."""
    preactivation: Tensor
    """Values [B, C, h, w] before the stage's last ReLU if it is known to end with one (after a residual sum or a
    convolution), otherwise the output."""


POOLED_STAGE = f"{FEATURES}_pooled"
"""Field of the average of the last stage's output."""


def stage_index(number: int, count: int) -> int:
    """Convert the number of a stage, from 1 at the finest or -1 at the deepest, to its place among `count`.

    The place counts from 0 at the finest.
    """
    return number - 1 if number > 0 else count + number


def stage_number(name: str) -> int:
    """Return the number of the stage whose field has this name."""
    return int(name.removeprefix(f"{FEATURES}_"))


def attention_map(features: Tensor) -> Tensor:
    """Compute Q = mean over channels of A^2, float32 or wider: [B, C, h, w] -> [B, h, w] (section 3.1 of AT)."""
    return to_float32(features).square().mean(dim=1)


AnyModule = TypeVar("AnyModule", bound=nn.Module)

_NONE: Mapping[str, Tensor] = {}


class ModelOutput(NamedTuple):
    """Output of a forward pass. Intermediates that were not requested are None or empty."""

    logits: Tensor
    """Logits [B, K], before any softmax."""
    features: Tensor
    """Features [B, C, h, w] at the explained layer."""
    context: Tensor | None = None
    """Input of the head in addition to the features, [B, T, C], such as the other tokens of a transformer."""
    stages: tuple[Stage, ...] = ()
    """Stages from the finest grid to the coarsest, or from the first block to the last."""
    class_maps: Tensor | None = None
    """Class maps [B, K, h, w], whose spatial average is the logits without their bias."""
    pooled: Tensor | None = None
    """Pooled features [B, d] before the classifier, float32 or wider: the spatial average of the features if the head
    starts with it, otherwise the input of its last linear layer."""
    extras: Mapping[str, Tensor] = _NONE
    """Tensors by name that only this kind of network computes."""
    images: Tensor | None = None
    """Images [B, 3, H, W] or rows of a table that the network received, if ComputeSettings ran it."""

    def require(self, name: Literal["class_maps", "pooled"]) -> Tensor:
        """Return an intermediate that the forward pass was asked for.

        Raises:
            ValueError: If it was not.
        """
        tensor: Tensor | None = getattr(self, name)
        if tensor is None:
            raise ValueError(f"this forward pass was not asked for {name} (Intermediates)")
        return tensor

    def first(self, count: int) -> ModelOutput:
        """Return the output for the first images of the batch."""

        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[:count]

        return ModelOutput(
            self.logits[:count],
            self.features[:count],
            cut(self.context),
            tuple(Stage(*(tensor[:count] for tensor in stage)) for stage in self.stages),
            cut(self.class_maps),
            cut(self.pooled),
            {name: tensor[:count] for name, tensor in self.extras.items()},
            cut(self.images),
        )


@dataclass(frozen=True)
class GapLinear:
    """Head with logits = linear(g), g the spatial average of the features."""

    linear: nn.Linear


@dataclass(frozen=True)
class GapNormLinear:
    """Head with logits = linear(norm(g)), g the spatial average of the features."""

    norm: nn.LayerNorm
    linear: nn.Linear


Head = GapLinear | GapNormLinear
"""Closed form of what follows the explained layer."""


def to_float32(x: Tensor) -> Tensor:
    """Convert half precision to float32. Other tensors are returned as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def match_head(layers: Sequence[nn.Module]) -> Head | None:
    """Return the closed form of a head's layers in their current mode, or None if they have none.

    An active dropout has no closed form, because its mask is part of the gradient.
    """
    active = [
        layer
        for layer in layers
        if not isinstance(layer, nn.Flatten)
        and not (isinstance(layer, nn.Dropout) and (layer.p == 0 or not layer.training))
    ]
    match active:
        case [nn.AdaptiveAvgPool2d(output_size=1 | (1, 1)), nn.Linear() as linear]:
            return GapLinear(linear)
        case [
            nn.AdaptiveAvgPool2d(output_size=1 | (1, 1)),
            nn.LayerNorm() as norm,
            nn.Linear() as linear,
        ]:
            return GapNormLinear(norm, linear)
    return None


def apply_norm(norm: nn.LayerNorm, average: Tensor) -> Tensor:
    """Apply the norm to [B, C], independent of the layout that its own forward expects."""
    return F.layer_norm(average, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


@contextlib.contextmanager
def eval_mode(network: nn.Module) -> Iterator[None]:
    """Put a network into eval mode, and each of its modules back into its own mode afterwards."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def trial_copy(network: AnyModule) -> AnyModule:
    """Return a copy of a network for a trial run, because some initialize themselves by the first batch they receive.

    A network with tensors or objects that cannot be copied is returned itself.
    """
    try:
        return copy.deepcopy(network)
    except (RuntimeError, TypeError):
        return network


def nearly_equal(actual: Tensor, expected: Tensor, tolerance: float = 1e-6) -> bool:
    """Compare up to rounding, with a tolerance below the effect of an untrained batch norm (1 / sqrt(1 + eps)).

    Args:
        actual: Tensor to compare; one of another shape is not equal.
        expected: Tensor that it shall be.
        tolerance: Largest difference, in units of the largest expected value.
    """
    if actual.shape != expected.shape:
        return False
    return bool((actual - expected).abs().max() <= tolerance * expected.abs().max())


def has_proportions(grid: tuple[int, int], size: tuple[int, int]) -> bool:
    """Return whether a grid can be that of an image.

    Its proportions may differ by one cell, or by a tenth.

    Args:
        grid: (rows, columns).
        size: (height, width) of the image.
    """
    (rows, columns), (height, width) = grid, size
    is_smaller = rows <= height and columns <= width
    return is_smaller and abs(rows - columns * height / width) <= max(1.0, 0.1 * rows)


class Normalize(nn.Module):
    """Normalization (images - mean) / std by channel, part of the model so that callers pass pixels in [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        # Not persistent, because published checkpoints have no such entries and the config has the values.
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    @property
    def is_identity(self) -> bool:
        """True if it changes nothing."""
        return bool((self.mean == 0).all() and (self.std == 1).all())

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


# ---- classifier ------------------------------------------------------------------------------------


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
    labels: tuple[str, ...] = ()
    """Names of the outputs in their order, empty if the provider has none."""
    unsupported: tuple[tuple[str, str, str], ...] = ()
    """Parts of the provider's evaluation that a teacher's input cannot have: the option that replaces each (frame,
    interpolation or input_size), the provider's field with its value, and what to set instead."""
    prompts: tuple[str, ...] = ()
    """Texts of the outputs in their order, of a network that compares images with texts."""


class Classifier(nn.Module, ABC):
    """Network from images in [0, 1], f32 [B, 3, H, W], via features [B, C, h, w] to logits [B, K]."""

    explainer: ClassVar[str] = "gradcam"
    """Name of the explainer of the network."""
    explainer_of_training: str = ""
    """Explainer by which it was trained if it is not that of its teacher (method.explainer), else empty."""
    returns: NetworkReturns = "logits"
    """Values that the network itself returns. Others than logits are converted, and have no explanations."""
    inner: nn.Module
    """Network that this module wraps; one that is a network itself overrides `network`."""
    misplacement: str = ""
    """Why the cells of the features lie in other places of the images than those of a grid do, empty if they do not."""
    no_grid: str = ""
    """Why the network has no features, maps and stages, empty if it has them."""
    picture: Picture | None = None
    """Picture that a student receives outside of random views (`permafrost.load_student`)."""
    explanation_mode: Callable[[], AbstractContextManager[None]] | None = None
    """Context in which a gradient to the input is an explanation, of a network that explains itself (B-cos)."""

    if TYPE_CHECKING:

        def __call__(
            self, images: Tensor, intermediates: Intermediates = NO_INTERMEDIATES
        ) -> ModelOutput: ...

    @property
    def network(self) -> nn.Module:
        """Network of the provider, whose state dict has the published names."""
        return self.inner

    @property
    def one_network(self) -> Classifier:
        """Network that a record runs through, which is one of several only for those of folds."""
        return self

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.parameters()).device

    @property
    @abstractmethod
    def head(self) -> Head | None:
        """Closed form of the head in the model's current mode, None if it must be differentiated by autograd."""

    @abstractmethod
    def forward_trunk(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute features [B, C, h, w] of images in [0, 1], and the head's context [B, T, C] if it needs one.

        Args:
            images: f32 [B, 3, H, W], or rows of a table [B, d].
        """

    @abstractmethod
    def forward_head(self, features: Tensor, context: Tensor | None) -> Tensor:
        """Compute logits [B, K] from the output of `forward_trunk`, without modifying the features.

        Args:
            features: [B, C, h, w], through which gradients may flow.
            context: [B, T, C], None if the head needs none.
        """

    def forward_stages(self, images: Tensor) -> tuple[tuple[Stage, ...], Tensor, Tensor | None]:
        """Compute the stages and the output of `forward_trunk` in one pass.

        Raises:
            ConfigError: If the stages of the network are not known.
        """
        raise ConfigError(
            f"{type(self.network).__name__} has no known stages, which method=at, method=review_kd and the output "
            "attention need; choose a ResNet, RegNet, ConvNeXt or DenseNet (kind cifar, torchvision, timm or bcos), a "
            "torchvision VGG or a timm ViT"
        )

    def class_maps(self, features: Tensor) -> Tensor:
        """Apply the classifier without its bias at each position of the features: [B, K, h, w], float32 or wider.

        The spatial average is the logits without the bias (Zhou et al. 2016; CAT-KD, Guo et al. 2023).

        Raises:
            ConfigError: If the classifier is not linear on the average of the features.
        """
        match self.head:
            case GapLinear(linear):
                with torch.autocast(features.device.type, enabled=False):
                    return torch.einsum("kc,bchw->bkhw", linear.weight, to_float32(features))
        raise ConfigError(
            f"{type(self.network).__name__} has no class maps, which method=cat_kd and the output class_maps need, "
            "because its classifier is not linear on the average of its features (or has an active dropout in "
            "training); choose a ResNet, DenseNet or RegNet"
        )

    def learn_moments(self, frames: Callable[[], Iterator[Tensor]]) -> None:
        """Learn the moments of the inputs before a training, if the network stores any (ModelConfig.learns_moments).

        Args:
            frames: Function that reads the training split: u8 [n, 3, H, W], or rows of numbers f32 [n, d].
        """

    @property
    def pools_by_average(self) -> bool:
        """True if the head is a linear layer on the spatial average, up to a norm and dropouts in between."""
        return self.head is not None

    def forward_pooled(self, features: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute the output of `forward_head` and the pooled features [B, d] (`ModelOutput.pooled`) in one pass.

        Raises:
            ConfigError: If the network has no pooled features.
        """
        require(
            self.pools_by_average,
            f"{type(self.network).__name__} has no pooled features, which the output pooled and methods on them need; "
            "choose a network that classifies the average of its features (ResNet, DenseNet, RegNet or ConvNeXt)",
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
        """Compute logits, features and the requested intermediates in one pass.

        Args:
            images: f32 [B, 3, H, W] in [0, 1], or rows of a table [B, d].
            intermediates: Intermediates to return in addition.

        Raises:
            ConfigError: If the network does not have a requested intermediate.
        """
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


class ProbedClassifier(Classifier):
    """Network whose head is run on random features to find its closed form."""

    closed_form: Head | None = None
    """Closed form of the head without dropout, None if it has none or was not probed."""
    has_dropout = False

    @property
    def head(self) -> Head | None:
        """Probed closed form, None if a dropout is active."""
        return None if self.training and self.has_dropout else self.closed_form

    @property
    def pools_by_average(self) -> bool:
        return self.closed_form is not None


def require_size(name: str, images: Tensor, size: tuple[int, int]) -> None:
    """Check the size of images for a network that takes one size only.

    Args:
        name: Name of the network, for the message.
        images: [B, 3, H, W].
        size: (height, width) that it takes.

    Raises:
        ConfigError: If the images have another size.
    """
    actual = (images.shape[-2], images.shape[-1])
    if actual != size:
        raise ConfigError(
            f"{name} takes images of {size[0]}x{size[1]} pixels, got {actual[0]}x{actual[1]}; set teacher.input_size "
            "or augment.size to its size"
        )


@dataclass(frozen=True)
class Provider:
    """A source of networks, defined in the module of each provider."""

    build: Callable[[Any, int], Classifier]
    """Function from config and number of outputs to the network, published or newly initialized."""
    published: Callable[[Any], PretrainedInfo | None]
    """Function from a config to the facts about published weights, or None if nothing is published."""
    export: Callable[[Path, Classifier, Any], None] | None = None
    """Function from a folder, a network and its TrainedModel that writes it in the provider's own format, None if it
    has none."""
    names: Callable[[], Iterable[str]] = tuple
    """Function that returns the names of its networks."""
    wrap: Callable[[Any, Any], Classifier] | None = None
    """Function from a config and a network of its library, which a program has built, to the network. Raises KeyError
    or ConfigError for one that it does not know."""
