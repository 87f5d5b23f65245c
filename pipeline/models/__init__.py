"""Networks by provider. Every model takes images in [0, 1] and gives (logits, features)."""

from __future__ import annotations

import logging
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.config import PRETRAINED, ConfigError, is_published
from pipeline.models.additive import AdditiveClassifier, build_additive
from pipeline.models.bcos import BcosClassifier, build_bcos
from pipeline.models.cifar import CifarResNet
from pipeline.models.classifier import Classifier, Published, WeightsError
from pipeline.seeds import derive_seed
from pipeline.store.files import sha256_file

if TYPE_CHECKING:
    from pipeline.config import (
        AdditiveModelConfig,
        BcosModelConfig,
        CifarModelConfig,
        ModelConfig,
        TimmModelConfig,
        TorchvisionModelConfig,
    )

logger = logging.getLogger("permafrost.models")

RANDOM = "random"
"""As weights: an untrained network, the same one in every process."""

AnyModule = TypeVar("AnyModule", bound=nn.Module)
AnyConfig = TypeVar("AnyConfig", bound="ModelConfig")


@dataclass(frozen=True)
class Provider:
    """Where networks come from."""

    build: Callable[[Any, int], Classifier]
    """Config and number of outputs -> the network, published or freshly initialised."""
    published: Callable[[Any], Published | None]
    """What is published for the network that a config names; None where nothing is."""


# ---- providers -----------------------------------------------------------------------------------


def _cifar(config: CifarModelConfig, outputs: int) -> Classifier:
    if is_published(config.weights):
        raise ConfigError(
            f"weights={config.weights}: nothing is published for kind cifar; give a file, for example one of "
            "akamaster/pytorch_resnet_cifar10"
        )
    return CifarResNet(config, outputs)


# torchvision and timm take seconds to import, so each is imported by its own networks only.


def _torchvision(config: TorchvisionModelConfig, outputs: int) -> Classifier:
    from pipeline.models.torchvision import build_torchvision

    return build_torchvision(config, outputs)


def _published_torchvision(config: TorchvisionModelConfig) -> Published:
    from pipeline.models.torchvision import published_torchvision

    return published_torchvision(config)


def _timm(config: TimmModelConfig, outputs: int) -> Classifier:
    from pipeline.models.timm import build_timm

    return build_timm(config, outputs)


def _published_timm(config: TimmModelConfig) -> Published:
    from pipeline.models.timm import published_timm

    return published_timm(config)


def _bcos(config: BcosModelConfig, outputs: int) -> BcosClassifier:
    return build_bcos(config, outputs)


def _published_bcos(config: BcosModelConfig) -> Published:
    """Those of B-cos v2, which a user fetches; pixels enter as they are."""
    return Published(
        name="v2",
        classes=1000,
        input_size=224,
        fixed_size=False,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )


def _additive(config: AdditiveModelConfig, outputs: int) -> AdditiveClassifier:
    return build_additive(config, outputs)


PROVIDERS: dict[str, Provider] = {
    "cifar": Provider(_cifar, lambda config: None),
    "torchvision": Provider(_torchvision, _published_torchvision),
    "timm": Provider(_timm, _published_timm),
    "bcos": Provider(_bcos, _published_bcos),
    "additive": Provider(_additive, lambda config: None),
}


# ---- building ------------------------------------------------------------------------------------


def build_model(
    config: ModelConfig, num_classes: int, *, may_replace_head: bool = False
) -> Classifier:
    """The network with the weights that the config names, on the CPU.

    num_classes       outputs, unless the config sets its own `classes`
    may_replace_head  of a network that will be trained: where a file's last layer has another number of
                      outputs, the network's own stays as it was drawn
    """
    build = PROVIDERS[config.kind].build
    outputs = config.classes or num_classes
    if config.weights == RANDOM:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(0, "random weights", config.name))
            return _without_blank_layers(build(config, outputs))
    model = build(config, outputs)
    if config.weights is not None and not is_published(config.weights):
        path = Path(config.weights)
        if config.sha256 is not None:
            _require_digest(path, config.sha256)
        load_weights(model, path, new_outputs=outputs if may_replace_head else None)
    return model


def _require_digest(path: Path, expected: str) -> None:
    found = sha256_file(path) if path.is_file() else None  # of a missing file load_weights says so
    if found not in (None, expected.lower()):
        raise WeightsError(
            f"{path} has sha256 {found}, and the option sha256 says {expected}; fetch the file anew, or correct "
            "the option"
        )


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


def published(config: ModelConfig) -> Published | None:
    """What the provider says about its own weights for this network; None where it has none."""
    return PROVIDERS[config.kind].published(config)


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


def model_normalisation(config: ModelConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation by channel: the config's, or the model's own where it has none."""
    if config.mean is not None and config.std is not None:
        return config.mean, config.std
    source = published(config)
    if source is None:
        raise ConfigError(f"mean and std of kind {config.kind} have no default; set both")
    return source.mean, source.std


# ---- weights -------------------------------------------------------------------------------------


def load_weights(model: Classifier, path: Path, *, new_outputs: int | None = None) -> None:
    """Load a state dict from .safetensors, or from a torch file without running any of its code.

    Published files may nest it under `state_dict` or `model` and prefix names with `module.`.

    new_outputs  of the network, whose last layer stays as it is where the file's differs in their number alone
    """
    expected = model.network.state_dict()
    state = model.own_names(read_state_dict(path))
    if new_outputs is not None:
        head = _other_head(state, expected, new_outputs)
        if head:
            logger.info("%s has other classes: %s start anew", path, ", ".join(head))
        state |= {name: expected[name] for name in head}
    missing = sorted(
        # Files older than PyTorch 0.4.1 lack these counters, which no network here reads.
        name
        for name in set(expected) - set(state)
        if not name.endswith(".num_batches_tracked")
    )
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
        name = type(model.network).__name__
        raise WeightsError(f"{path} does not fit {name}; " + "; ".join(problems))
    _require_values(path, state)
    # Updating keeps the versions of its layouts that the network's own state dict names.
    expected.update(state)
    model.network.load_state_dict(expected)


def _require_values(path: Path, state: dict[str, Tensor]) -> None:
    """WeightsError where a tensor is not finite, or all of them are zero: nobody trained that."""
    floating = {n: t for n, t in state.items() if t.is_floating_point()}
    broken = sorted(name for name, tensor in floating.items() if not tensor.isfinite().all())
    if broken:
        raise WeightsError(
            f"{path} holds values that are not finite, in {', '.join(broken[:3])}; the training that wrote it "
            "diverged, or the file is damaged"
        )
    if floating and not any(tensor.any() for tensor in floating.values()):
        raise WeightsError(f"{path} holds zeros only; it is no trained network")


def _other_head(state: dict[str, Tensor], expected: dict[str, Tensor], outputs: int) -> list[str]:
    """Names of tensors that differ in the number of outputs, their first dimension, alone."""
    return [
        name
        for name, tensor in expected.items()
        if name in state
        and tensor.shape[:1] == (outputs,)
        and tensor.shape != state[name].shape
        and tensor.shape[1:] == state[name].shape[1:]
    ]


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file by name, on the CPU."""
    if not path.is_file():
        raise ConfigError(
            f"weights file {path} does not exist; train it with stages.teach or correct the path"
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TorchScript archives, which are refused below
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} holds more than tensors, or is no torch file, and its code is not run; where you trust "
            "it, load it yourself and save its state_dict() as .safetensors"
        ) from error
    except Exception as error:  # parsers raise whatever damaged bytes lead them to
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise WeightsError(
            f"{path} cannot be read as weights ({reason}); it is damaged, cut off, or no file of tensors: "
            "fetch or write it anew"
        ) from error
    for name in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(name), dict):
            loaded = loaded[name]
    named = isinstance(loaded, dict) and all(isinstance(name, str) for name in loaded)
    if not named or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise WeightsError(f"{path} holds no state dict; save the network's state_dict() there")
    return {name.removeprefix("module."): tensor for name, tensor in loaded.items()}
