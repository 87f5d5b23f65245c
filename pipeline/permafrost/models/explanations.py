"""Differentiable explanations of a model's logits, with the same code for teacher and student.

The target classes of a record depend on that record only: its logits, its labels and its key.

GradCAM:

    alpha_k = mean_ij dz_c / dA_k,    map = relu(sum_k alpha_k A_k)

If the head depends on A only through its average g, dz_c / dA is h_c(g) / (h w) at every position, and

    map = relu(sum_k h_k A_k) / (h w)

needs no second backward pass: h is W[c] for a linear head, and a function of g if a layer norm precedes it. Every
other head is differentiated by autograd. Only the head is differentiated, so the trunk's graph is used only for the
gradients of a student.

Explainers that read the images run passes of their own (permafrost_explainers). Not here: explanations of B-cos
networks (permafrost_papers/bcos).
"""

from __future__ import annotations

import logging
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from permafrost.config.explainers import EXPLAINERS, ExplainerConfig, explainer_of_line
from permafrost.config.options import resolve_implementation
from permafrost.config.store import PassOptions
from permafrost.core.digests import derive_seed
from permafrost.core.errors import ConfigError, require
from permafrost.core.label_forms import multi_hot
from permafrost.core.records import NO_CLASS
from permafrost.models.classifier import (
    NO_INTERMEDIATES,
    Classifier,
    GapLinear,
    GapNormLinear,
    Intermediates,
    ModelOutput,
    eval_mode,
    to_float32,
)
from permafrost.models.compute import ComputeSettings, exact_float32
from permafrost.store.reader import Store

logger = logging.getLogger("permafrost.explainers")

ClassChoice = Callable[[Any, Tensor, Tensor, Sequence[str]], Tensor]
"""(explainer config, logits [B, K], labels in the form of Batch, keys) -> i64 [B, E], NO_CLASS after the last one."""


def target_classes(
    config: ExplainerConfig, logits: Tensor, labels: Tensor, keys: Sequence[str]
) -> Tensor:
    """Select the classes that a teacher with these logits [B, K] explains: i64 [B, E], NO_CLASS after the last one.

    Several classes are ordered by descending logit. For a record without labels, choices by label select none. The
    function does not synchronize with the device.
    """
    return CLASS_CHOICES[config.target_classes](config, logits.detach(), labels, keys)


def _all_gt(config: ExplainerConfig, logits: Tensor, labels: Tensor, keys: Sequence[str]) -> Tensor:
    scores = logits.masked_fill(multi_hot(labels, logits.shape[1]) <= 0, -torch.inf)
    highest, classes = scores.sort(dim=1, descending=True, stable=True)
    return classes.masked_fill(highest == -torch.inf, NO_CLASS)[:, : config.max_classes]


def _sample_gt(
    config: ExplainerConfig, logits: Tensor, labels: Tensor, keys: Sequence[str]
) -> Tensor:
    is_label = multi_hot(labels, logits.shape[1]) > 0
    count = is_label.sum(dim=1)
    seeds = torch.tensor([derive_seed(config.seed, "explained class", key) for key in keys])
    if logits.is_cuda:
        seeds = seeds.pin_memory()  # a copy from pageable memory would synchronize with the device
    drawn = seeds.to(logits.device, non_blocking=True) % count.clamp(min=1)
    chosen = is_label & (is_label.cumsum(dim=1) == drawn[:, None] + 1)
    return torch.where(count > 0, chosen.byte().argmax(dim=1), NO_CLASS)[:, None]


CLASS_CHOICES: dict[str, ClassChoice] = {
    "top1": lambda config, logits, labels, keys: logits.argmax(dim=1, keepdim=True),
    "topk": lambda config, logits, labels, keys: logits.sort(
        dim=1, descending=True, stable=True
    ).indices[:, : config.max_classes],
    "all_gt": _all_gt,
    "sample_gt": _sample_gt,
}


def resolve_explainer(
    config: ExplainerConfig, store: Store, num_classes: int, data_classes: int | None = None
) -> ExplainerConfig:
    """Return the options with E filled in, for a teacher with `num_classes` outputs on a store's records.

    The data have as many `data_classes`, by default those of the store.

    Raises ConfigError if the store lacks the labels that the choice needs.
    """
    chosen = f"explainer.target_classes={config.target_classes}"
    if config.target_classes in ("all_gt", "sample_gt"):
        classes = data_classes or len(store.manifest.classes)
        require(
            num_classes == classes,
            f"{chosen} needs labels, but the teacher's {num_classes} classes are not the {classes} of the data; "
            "set explainer.target_classes=top1",
        )
        most = store.index.most_labels()
        require(
            most > 0,
            f"{chosen} needs labels, but {store.path} has none; set explainer.target_classes=top1",
        )
        if config.target_classes == "all_gt" and config.max_classes is None:
            return replace(config, max_classes=min(most, num_classes))
    require(
        config.max_classes is None or config.max_classes <= num_classes,
        f"explainer.max_classes={config.max_classes} must be <= {num_classes}, the number of the teacher's classes",
    )
    return config


# ---- grids -----------------------------------------------------------------------------------------


Grid = tuple[int, int]
"""(rows, columns)."""

_MAX_TIMES_COARSER = 4


@torch.no_grad()
def map_grid(model: Classifier, input_size: Grid, explain: Explainer) -> Grid:
    """Return the grid of a network's explanations for images of (height, width) `input_size`."""
    with eval_mode(model):
        output = forward_to_explain(model, torch.zeros(1, 3, *input_size, device=model.device))
        maps = explain(model, output, torch.zeros(1, 1, dtype=torch.int64, device=model.device))
    return maps.shape[-2], maps.shape[-1]


def require_places(grid: Grid, input_size: Grid, whose: str, recovery_hint: str) -> None:
    """Raise ConfigError for a grid of one cell, which cannot localize.

    Args:
        whose, recovery_hint: Parts of the message.
    """
    require(
        max(grid) > 1,
        f"{whose} have a grid of 1x1 cells on images of {input_size[0]}x{input_size[1]} pixels, which cannot localize "
        f"anything; {recovery_hint}, or set method.lambda_map=0",
    )


def require_image_places(model: Classifier, what: str) -> None:
    """Raise ConfigError if the cells of a network's grids are not those of the image that it is given.

    Args:
        model: The network, which has run once.
        what: What would lie in another place, for the message.
    """
    require(
        not model.no_grid,
        f"{type(model.network).__name__} has no features for {what}: {model.no_grid}",
    )
    require(
        not model.misplacement,
        f"{type(model.network).__name__}: {what} would not match the image, because {model.misplacement}; remove this "
        "from the network and set teacher.frame, teacher.crop_fraction and teacher.input_size, which crop and resize "
        "before it",
    )


def warn_of_coarse_grid(student: Grid, teacher: Grid) -> None:
    """Log a warning if one grid is more than four times coarser than the other."""
    ratios = [
        length / teacher_length for length, teacher_length in zip(student, teacher, strict=True)
    ]
    if max(*ratios, *(1 / ratio for ratio in ratios)) > _MAX_TIMES_COARSER:
        logger.warning(
            "explanations of the student have a grid of %dx%d cells, those of the teacher %dx%d; the coarser grid "
            "limits how much the student can learn from them, see augment.size and the networks' strides",
            *student,
            *teacher,
        )


# ---- explain ---------------------------------------------------------------------------------------


Explainer = Callable[[Any, Any, Tensor], Tensor]
"""(model, its output, target_class [B, E]) -> maps [B, E, A, h, w] on the model's own grid."""

DEFAULT_EXPLAINER = "gradcam"
"""Explainer of a student that is trained on labels only and not compared with a teacher."""


def explainer_named(line: str) -> Explainer:
    """Return the explainer of a line such as `integrated_gradients steps=8` (config.explainers.explainer_of_line).

    Raises:
        ConfigError: If the explainer or an option is unknown.
    """
    options = explainer_of_line(line)
    function = partial(resolve_implementation(type(options)), **options.own_options)
    return function if options.reads == "output" else partial(_explain_images, function, line)


def attribution_named(kind: str) -> Explainer:
    """Return an explainer's maps [B, E, 1, h, w] of contributions to a class, which are comparable with a region."""
    name = EXPLAINERS[kind].attribution
    return pkgutil.resolve_name(name) if name else explainer_named(kind)


def other(model: Classifier, output: ModelOutput, target_class: Tensor) -> Tensor:
    """Raise ConfigError, as no network makes these maps."""
    raise ConfigError(
        "explainer=other: only the teacher can make these maps; name the explainer of the student with "
        "method.explainer=, such as method.explainer=gradcam"
    )


# ---- gradients at the images -----------------------------------------------------------------------


def _explain_images(
    function: Callable[[Classifier, Tensor, Tensor], Tensor],
    line: str,
    model: Classifier,
    output: ModelOutput,
    target_class: Tensor,
) -> Tensor:
    """Explain the images of a forward pass with a function (network, images, classes) that runs passes of its own.

    They are in float32 and in eval mode, so that a map does not depend on the other records of its batch, and a student
    is explained in training as it is evaluated.
    """
    images = output.images
    if images is None or images.ndim != 4:
        raise ConfigError(
            f"explainer={line} explains the pixels of images, and {type(model.network).__name__} receives rows of "
            "numbers; choose another explainer"
        )
    _require_logits(model)
    require(
        not torch.is_inference_mode_enabled(),
        f"explainer={line} computes a gradient, which inference_mode forbids; use torch.no_grad()",
        RuntimeError,
    )
    # The fused kernels of attention have no second derivative.
    with eval_mode(model), exact_float32(images.device), sdpa_kernel(SDPBackend.MATH):
        maps = function(model, images, target_class.clamp(min=0))
    return maps * (target_class >= 0)[:, :, None, None, None] if maps.ndim == 5 else maps


def input_gradients(model: Classifier, images: Tensor, target_class: Tensor) -> Tensor:
    """Compute dz_c / dx at the pixels, differentiable in the parameters where a graph is recorded.

    Args:
        model: The network, run once for all classes.
        images: x, f32 [B, 3, H, W] in [0, 1].
        target_class: c, i64 [B, E], >= 0.

    Returns:
        [B, E, 3, H, W].
    """
    is_trained = torch.is_grad_enabled() and any(
        parameter.requires_grad for parameter in model.parameters()
    )
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        logits = model(images).logits
        gradients = class_gradients(logits, images, target_class, create_graph=is_trained)
        return torch.stack([*gradients], dim=1)


def class_gradients(
    logits: Tensor, inputs: Tensor, target_class: Tensor, *, create_graph: bool
) -> Iterator[Tensor]:
    """Iterate over dz_c / d(inputs) of the E target classes, one backward pass each.

    Args:
        logits: z [B, K], whose graph is kept.
        inputs: Tensor that they depend on, [B, ...].
        target_class: c, i64 [B, E], of which negative entries count as class 0.
        create_graph: Whether the gradients have a graph of their own.
    """
    for classes in target_class.clamp(min=0).T:
        score = logits.gather(1, classes[:, None]).sum()
        yield torch.autograd.grad(score, inputs, create_graph=create_graph, retain_graph=True)[0]


def explainer_of_maps(maps: Tensor) -> type[ExplainerConfig]:
    """Return the options class of the explainer of maps [B, E, A, h, w], by their channels."""
    channels = maps.shape[2]
    return next((cls for cls in EXPLAINERS.values() if cls.channels == channels), ExplainerConfig)


def contributions_of(maps: Tensor, images: Callable[[], Tensor]) -> Tensor:
    """Compute the signed contribution of each position to the class, [B, E, 1, h, w].

    Args:
        maps: Maps of any explainer, [B, E, A, h, w].
        images: Function that renders the images on the grid of the maps, f32 [B, 3, h, w] in [0, 1].

    Returns:
        What the explainer's `contribution` says, else the sum over the channels of the maps.
    """
    name = explainer_of_maps(maps).contribution
    return pkgutil.resolve_name(name)(maps, images) if name else maps.sum(dim=2, keepdim=True)


def picture_of(maps: Tensor, images: Callable[[], Tensor]) -> Tensor | None:
    """Render maps as pictures RGBA u8 [B, h, w, 4] of the first class, None if a heat map shows them.

    Args:
        maps: Maps of any explainer, [B, E, A, h, w].
        images: As for `contributions_of`.
    """
    if not (name := explainer_of_maps(maps).picture):
        return None
    colors: Tensor = pkgutil.resolve_name(name)(maps, images)[:, 0]
    return (colors * 255).round().to(torch.uint8)


def needs_graph(model: Classifier) -> bool:
    """Return whether the model's maps are gradients through the whole network, which need the graph of its pass."""
    return EXPLAINERS[model.explainer].needs_graph


def pass_precision(config: PassOptions, explainer: ExplainerConfig) -> str:
    """Return the precision of the forward passes of a pass with these options.

    Maps are computed in float32. If they are gradients through the whole network, that takes a float32 pass of it,
    which then is the only one.
    """
    return "float32" if "maps" in config.outputs and explainer.needs_graph else config.precision


def forward_to_explain(
    model: Classifier,
    images: Tensor,
    intermediates: Intermediates = NO_INTERMEDIATES,
    settings: ComputeSettings = ComputeSettings(),  # noqa: B008, frozen
) -> ModelOutput:
    """Run one forward pass of a model for both its logits and its maps, also inside no_grad.

    If maps are gradients through the whole network, its graph is recorded, because they would otherwise need a second
    pass, and the pass is in float32. The logits then hold the graph, so detach the tensors that are kept. Other maps
    are computed in float32 from the features, whatever the precision of the pass.

    Args:
        images: f32 [B, 3, H, W] in [0, 1].
        intermediates: Additional outputs of the pass.
        settings: Settings of the pass.
    """
    if needs_graph(model):
        settings = settings.with_precision("float32")
    with torch.set_grad_enabled(torch.is_grad_enabled() or needs_graph(model)):
        return settings.run(model, images, intermediates)


# ---- gradcam ---------------------------------------------------------------------------------------


def gradcam(
    model: Classifier, output: ModelOutput, target_class: Tensor, *, sign: str = "rectified"
) -> Tensor:
    """Compute maps of the given classes on the features' grid, in float32 or wider.

    Args:
        output: Output of `model`, with or without its graph.
        target_class: i64 [B, E], where a negative entry results in a zero map.
        sign: Option of that name (GradCamConfig).

    Returns:
        [B, E, 1, h, w], >= 0 if rectified.
    """
    require(
        model.explainer == "gradcam",
        f"explainer=gradcam explains the features of a layer, but those of {type(model.network).__name__} are its "
        f"input; set explainer={model.explainer}",
    )
    _require_logits(model)
    require_image_places(model, "its maps")
    with exact_float32(output.features.device):
        features = to_float32(output.features)
        match model.head:
            case GapLinear(linear):
                return gradcam_from_head(features, to_float32(linear.weight), target_class, sign)
            case GapNormLinear(norm, linear):
                class_weight = norm_class_weight(features, norm, linear, target_class)
            case _:
                class_weight = _autograd_class_weight(model, output, target_class)
        return _weighted_maps(features, class_weight, target_class, sign)


def _require_logits(model: Classifier) -> None:
    require(
        model.returns == "logits",
        f"the gradient of a logarithm of probabilities is not that of a logit, so {type(model.network).__name__} has "
        "no maps; remove the softmax at its end",
    )


def gradcam_from_head(
    features: Tensor, weight: Tensor, target_class: Tensor, sign: str = "rectified"
) -> Tensor:
    """Compute the closed form for a linear head from features [B, C, h, w], weight [K, C] and classes [B, E]."""
    return _weighted_maps(features, weight[target_class.clamp(min=0)], target_class, sign)


def norm_class_weight(
    features: Tensor, norm: nn.LayerNorm, linear: nn.Linear, target_class: Tensor
) -> Tensor:
    """Compute dz_c / dg [B, E, C] of z = linear(norm(g)), g the features' average, differentiable in all inputs."""
    average = features.mean(dim=(2, 3))[:, None]  # [B, 1, C]
    scale = (average.var(dim=2, keepdim=True, correction=0) + norm.eps).sqrt()
    normalized = (average - average.mean(dim=2, keepdim=True)) / scale
    weight = to_float32(linear.weight)[target_class.clamp(min=0)]  # [B, E, C]
    if norm.weight is not None:
        weight = weight * to_float32(norm.weight)
    along = (weight * normalized).mean(dim=2, keepdim=True)
    return (weight - weight.mean(dim=2, keepdim=True) - normalized * along) / scale


def _autograd_class_weight(model: Classifier, output: ModelOutput, target_class: Tensor) -> Tensor:
    """Compute h w times alpha, [B, E, C], by differentiating the head.

    If no gradients are recorded (a frozen teacher, an evaluation), the head runs again on detached features.
    """
    require(
        not torch.is_inference_mode_enabled() and not output.features.is_inference(),
        "GradCAM differentiates this head, which inference_mode forbids; use torch.no_grad()",
        RuntimeError,
    )
    create_graph = torch.is_grad_enabled() and output.logits.requires_grad
    features, logits = output.features, output.logits
    with torch.enable_grad():
        if not features.requires_grad:
            dtype = next(model.parameters()).dtype
            features = features.to(dtype).detach().requires_grad_()
            context = None if output.context is None else output.context.to(dtype)
            logits = model.forward_head(features, context)
        gradients = class_gradients(logits, features, target_class, create_graph=create_graph)
        weights = [to_float32(gradient).sum(dim=(2, 3)) for gradient in gradients]
    return torch.stack(weights, dim=1)


def _weighted_maps(
    features: Tensor, class_weight: Tensor, target_class: Tensor, sign: str
) -> Tensor:
    """Compute relu(sum_k class_weight_k features_k) / (h w) [B, E, 1, h, w], zero where a class is negative."""
    h, w = features.shape[-2:]
    maps = torch.einsum("bec,bchw->behw", class_weight, features)
    maps = (maps if sign == "signed" else maps.relu()) / (h * w)
    return (maps * (target_class >= 0)[:, :, None, None]).unsqueeze(2)
