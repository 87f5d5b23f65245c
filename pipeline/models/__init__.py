"""Networks by provider. Every model takes images in [0, 1] and gives (logits, features)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import nn

from pipeline.config import ConfigError
from pipeline.errors import UserError
from pipeline.models.cifar import CifarResNet

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from pipeline.config import ModelConfig

PROVIDERS: dict[str, Callable[[Any, int], nn.Module]] = {"cifar": CifarResNet}


class WeightsError(UserError, ValueError):
    """A weights file that is missing or does not fit the network."""


def build_model(config: ModelConfig, num_classes: int) -> nn.Module:
    """The network, with its weights where `weights` names a file and freshly initialised otherwise."""
    model = PROVIDERS[config.kind](config, num_classes)
    if config.weights is not None:
        load_weights(model, Path(config.weights))
    return model


def teacher_input_size(config: ModelConfig) -> int | None:
    """Side in pixels of a teacher's input; None takes the store's frame."""
    return config.input_size


def freeze(model: nn.Module) -> nn.Module:
    """The model in eval mode, with no parameter that could be trained."""
    return model.eval().requires_grad_(False)


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict from .safetensors, or from a torch file without running any of its code.

    Published files may nest it under `state_dict` and prefix names with `module.`.
    """
    state = read_state_dict(path)
    expected = model.state_dict()
    missing = sorted(set(expected) - set(state))
    unexpected = sorted(set(state) - set(expected))
    misshapen = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in sorted(set(state) & set(expected))
        if state[name].shape != expected[name].shape
    ]
    problems = [
        f"{title}: {', '.join(names[:8])}{f' (+{len(names) - 8} more)' if len(names) > 8 else ''}"
        for title, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("wrong shape", misshapen),
        )
        if names
    ]
    if problems:
        raise WeightsError(f"{path} does not fit {type(model).__name__}; " + "; ".join(problems))
    model.load_state_dict(state)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file by name, on the CPU."""
    if not path.is_file():
        raise ConfigError(
            f"weights file {path} does not exist; train it with stages.teach or correct the path"
        )
    if path.suffix == ".safetensors":
        return load_file(path)
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    state = loaded.get("state_dict", loaded)
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}
