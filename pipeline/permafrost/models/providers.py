"""Networks by provider, built with their weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from permafrost.config.models import (
    MODELS,
    PRETRAINED,
    RANDOM,
    ModelConfig,
    is_published,
    is_weights_file,
)
from permafrost.config.options import resolve_implementation
from permafrost.core.digests import derive_seed
from permafrost.core.errors import ConfigError, require
from permafrost.core.generators import SeededDraws
from permafrost.core.progress import log_once
from permafrost.models.build_limit import limited_construction
from permafrost.models.classifier import AnyModule, Classifier, PretrainedInfo, Provider
from permafrost.models.trained_weights import (
    DataClasses,
    WeightsFile,
    count_classes,
)
from permafrost.models.weights import load_weights

logger = logging.getLogger("permafrost.models")


AnyConfig = TypeVar("AnyConfig", bound="ModelConfig")


def provider_of(config: ModelConfig) -> Provider:
    """Return the provider of a network, imported on first use because torchvision and timm take seconds to import."""
    provider: Provider = resolve_implementation(type(config))
    return provider


def names_of_kind(kind: str) -> list[str]:
    """Return the names of the networks of a kind, none of one whose networks are options or files."""
    provider = resolve_implementation(MODELS[kind])
    return list(provider.names()) if isinstance(provider, Provider) else []


def build_model(
    config: ModelConfig, classes: DataClasses, *, may_replace_head: bool = False
) -> Classifier:
    """Build the network with the weights that the config names, on the CPU.

    Args:
        config: Options of the network.
        classes: Classes of the data, as many as the outputs unless the config sets `classes`; none give one output.
        may_replace_head: For a network that will be trained, or whose logits are not read: if the last layer of a
            weights file has other classes or is missing, the network keeps its newly initialized one.

    Raises:
        ConfigError: If the provider does not have the network, an option does not fit it, or a run has trained the
            weights on other classes.
        WeightsError: If the weights are not available, or do not fit the network.
    """
    require(
        config.weights_key is None or config.weights is None or is_weights_file(config.weights),
        f"weights_key={config.weights_key} names weights in a file, but weights={config.weights} names none; leave it "
        "null",
    )
    build = provider_of(config).build
    outputs = config.classes or count_classes(classes) or 1
    if config.weights == RANDOM:
        return build_untrained(config, outputs, 0)
    if (file := WeightsFile.of(config)) is not None:
        file.check_classes(config, classes, is_start=may_replace_head)
    is_described = file is not None and file.description is not None
    with ExitStack() as stack:
        if file is not None and is_described:
            stack.enter_context(limited_construction(file.path))
        if config.weights is not None and not may_replace_head:
            stack.enter_context(SeededDraws(0))  # initial weights that are not used
        model = build(config, outputs)
    if file is not None:
        if file.path.is_file() and (is_described or config.sha256 is not None):
            file.sha256(config.sha256)
        load_weights(
            model,
            file.path,
            outputs=outputs,
            may_replace_head=may_replace_head,
            known_outputs=file.outputs_of(classes) if config.classes is None else None,
            key=None if is_described else config.weights_key,
        )
        if not is_described and config.kind != "module":
            log_once(
                logger,
                logging.INFO,
                f"{file.path} has tensors only: strides, dilations, pooling, activations and normalization are assumed "
                f"to be those of {config.kind} {config.name} (as where a network for small images has no pooling after "
                "its first layer); the accuracy on labeled records tells",
            )
    return model


def build_untrained(config: ModelConfig, outputs: int, number: int) -> Classifier:
    """Build one of a network's untrained forms, on the CPU; number 0 is weights=random."""
    seed = derive_seed(number, "random weights", config.name)
    with SeededDraws(seed):
        return _without_blank_layers(provider_of(config).build(config, outputs))


def _without_blank_layers(model: Classifier) -> Classifier:
    """Initialize layers that start at zero (torchvision's ViT head), because they would make all maps zero."""
    for module in model.network.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.trunc_normal_(module.weight, std=0.02)
    return model


def name_weights(config: AnyConfig) -> AnyConfig:
    """Return the config with the exact name of published weights, because a provider's default may change.

    `pretrained` becomes `pretrained:<name>` with the provider's current default, such as IMAGENET1K_V2.
    """
    if config.weights is None or config.weights.rstrip(":") != PRETRAINED:
        return config
    source = published(config)
    if (
        source is None or ":" in config.name
    ):  # the name of a hub model or folder identifies its weights
        return config
    return config if not source.name else replace(config, weights=f"{PRETRAINED}:{source.name}")


def with_recorded_layer(config: AnyConfig, made_with: Mapping[str, str]) -> AnyConfig:
    """Return the options with the layer and the layout that a pass records, so that they are not measured again.

    Args:
        config: Options of the teacher, which keep a layer of their own.
        made_with: Entry of the manifest of its pass.
    """
    recorded: dict[str, Any] = {
        name: made_with[name] for name in ("layer", "layout") if name in made_with
    }
    fits = getattr(config, "layer", None) in ("", recorded.get("layer"))
    return replace(config, **recorded) if fits and not getattr(config, "layout", "") else config


def freeze(model: AnyModule) -> AnyModule:
    """Set the model to eval mode, and disable gradients of all parameters."""
    return model.eval().requires_grad_(False)


def published(config: ModelConfig) -> PretrainedInfo | None:
    """Return the facts about the provider's weights for this network, or None if it has none."""
    return provider_of(config).published(config)


def with_preprocessing(config: AnyConfig, num_classes: int) -> AnyConfig:
    """Return a teacher's options with frame=auto replaced by what it means: input size, crop and interpolation.

    Args:
        config: Options of the teacher.
        num_classes: Number of outputs, unless the config sets `classes`.

    Raises:
        ConfigError: If the provider states something that has no equivalent here, and no option replaces it.
    """
    if config.frame != "auto":
        return config
    file = WeightsFile.of(config)
    may_be_published = (
        config.weights not in (None, RANDOM) if file is None else file.description is None
    )
    source = published(config) if may_be_published else None
    if source is None or not (
        is_published(config.weights) or source.classes == (config.classes or num_classes)
    ):
        return replace(config, frame="full")  # refuses the options of a crop
    _refuse_unsupported(source, config, "frame", "interpolation", "input_size")
    return replace(  # refuses the options of a crop where the whole image is shown
        config,
        frame="full" if source.crop_fraction is None else "center_crop",
        input_size=config.input_size or source.input_size,
        crop_fraction=config.crop_fraction or source.crop_fraction,
        interpolation=config.interpolation or source.interpolation,
    )


def _refuse_unsupported(source: PretrainedInfo, config: ModelConfig, *options: str) -> None:
    """Raise ConfigError if an option is left to the provider, whose value for it has no equivalent here."""
    for option, value, remedy in source.unsupported:
        require(
            option not in options or getattr(config, option) not in ("auto", None),
            f"{config.kind} {config.name} was published with {value}, which is not supported; set {remedy}",
        )


def teacher_input_size(config: ModelConfig) -> int | None:
    """Return the side in pixels of a teacher's input images, or None for the frame of the store.

    Published weights use their published size, and networks with a fixed size use that size.

    Raises:
        ConfigError: If that size is not a square's.
    """
    if config.input_size is not None:
        return config.input_size
    source = published(config)
    if source is not None and (is_published(config.weights) or source.fixed_size):
        _refuse_unsupported(source, config, "input_size")
        return source.input_size
    return None


def model_normalization(config: ModelConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation by channel, from the config or, if it has none, from the provider.

    Raises:
        ConfigError: If neither has them.
    """
    if config.mean is not None and config.std is not None:
        return config.mean, config.std
    if (source := published(config)) is None:
        raise ConfigError(
            f"{config.kind} {config.name} has no default mean and std; set both, as in mean=[0.485,0.456,0.406] "
            "std=[0.229,0.224,0.225] in its section"
        )
    return source.mean, source.std
