"""Networks by provider. Every model takes images in [0, 1] and gives (logits, features)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from pipeline.config.models import PRETRAINED, ModelConfig, is_published
from pipeline.config.options import resolve_implementation
from pipeline.core.errors import ConfigError
from pipeline.core.seeds import derive_seed
from pipeline.models.classifier import Classifier, PretrainedInfo, Provider
from pipeline.models.weights import load_weights, require_digest

RANDOM = "random"
"""As weights: an untrained network, the same one in every process."""

AnyModule = TypeVar("AnyModule", bound=nn.Module)
AnyConfig = TypeVar("AnyConfig", bound="ModelConfig")


def provider_of(config: ModelConfig) -> Provider:
    """The provider of a network; torchvision and timm take seconds to import, so each is imported when it is asked."""
    provider: Provider = resolve_implementation(type(config))
    return provider


def build_model(
    config: ModelConfig, num_classes: int, *, may_replace_head: bool = False
) -> Classifier:
    """The network with the weights that the config names, on the CPU.

    num_classes       outputs, unless the config sets its own `classes`
    may_replace_head  of a network that will be trained: where a file's last layer has another number of
                      outputs, the network's own stays as it was drawn
    """
    build = provider_of(config).build
    outputs = config.classes or num_classes
    if config.weights == RANDOM:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(0, "random weights", config.name))
            return _without_blank_layers(build(config, outputs))
    model = build(config, outputs)
    if config.weights is not None and not is_published(config.weights):
        path = Path(config.weights)
        if config.sha256 is not None:
            require_digest(path, config.sha256)
        load_weights(model, path, new_outputs=outputs if may_replace_head else None)
    return model


def _without_blank_layers(model: Classifier) -> Classifier:
    """Draw the layers that start at zero (torchvision's ViT head): through them nothing is explained."""
    for module in model.network.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.trunc_normal_(module.weight, std=0.02)
    return model


def name_weights(config: AnyConfig) -> AnyConfig:
    """The config with the exact name of published weights, which a provider's default may change.

    `pretrained` becomes `pretrained:IMAGENET1K_V2`, or whatever the provider's default is called today.
    """
    if config.weights is None or config.weights.rstrip(":") != PRETRAINED:
        return config
    source = published(config)
    if source is None or ":" in config.name:  # a hub's name, or a folder's, says which
        return config
    return config if not source.name else replace(config, weights=f"{PRETRAINED}:{source.name}")


def freeze(model: AnyModule) -> AnyModule:
    """The model in eval mode, with no parameter that could be trained."""
    return model.eval().requires_grad_(False)


def published(config: ModelConfig) -> PretrainedInfo | None:
    """What the provider says about its own weights for this network; None where it has none."""
    return provider_of(config).published(config)


def teacher_input_size(config: ModelConfig) -> int | None:
    """Side in pixels of the images that a teacher takes; None for the store's frame as it is.

    That of the published weights where they are used, and the only one that a network takes.
    """
    if config.input_size is not None:
        return config.input_size
    source = published(config)
    if source is not None and (is_published(config.weights) or source.fixed_size):
        return source.input_size
    return None


def model_normalization(config: ModelConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation by channel: the config's, or the model's own where it has none."""
    if config.mean is not None and config.std is not None:
        return config.mean, config.std
    source = published(config)
    if source is None:
        raise ConfigError(f"mean and std of kind {config.kind} have no default; set both")
    return source.mean, source.std
