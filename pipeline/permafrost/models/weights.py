"""Weights files: state dicts read without running code, and loaded with an error that names every mismatch."""

from __future__ import annotations

import logging
import pickle
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from permafrost.core.errors import ConfigError
from permafrost.core.files import sha256_file
from permafrost.models.classifier import Classifier, WeightsError

logger = logging.getLogger("permafrost.models")


def require_digest(path: Path, expected: str) -> None:
    found = sha256_file(path) if path.is_file() else None  # load_weights reports a missing file
    if found not in (None, expected.lower()):
        raise WeightsError(
            f"{path} has sha256 {found}, but the option sha256 is {expected}; fetch the file again or correct "
            "the option"
        )


def load_weights(model: Classifier, path: Path, *, new_outputs: int | None = None) -> None:
    """Load a state dict from .safetensors, or from a torch file without running any of its code.

    Published files may nest it under `state_dict` or `model` and prefix names with `module.`.

    new_outputs  number of outputs of the network, which keeps its last layer if the one in the file differs only in
                 that number, or if the file has none
    """
    expected = model.network.state_dict()
    state = model.rename_keys(read_state_dict(path))
    if new_outputs is not None:
        head = _other_head(state, expected, new_outputs)
        if head:
            logger.info("%s has no such classes; newly initialized: %s", path, ", ".join(head))
        state |= {name: expected[name] for name in head}
    missing = sorted(
        # Files written before PyTorch 0.4.1 lack these counters, which no network in this package uses.
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
        raise WeightsError(
            f"{path} does not fit {name}; "
            + "; ".join(problems)
            + ". Correct weights=, or name= and the other "
            "options of the network (a model.json beside the weights lists them)"
        )
    _require_values(path, state)
    # Updating keeps the layout versions in the metadata of the network's own state dict.
    expected.update(state)
    model.network.load_state_dict(expected)


def _require_values(path: Path, state: dict[str, Tensor]) -> None:
    """Raise WeightsError if a tensor is not finite or all of them are zero, because such weights are not trained."""
    floating = {n: t for n, t in state.items() if t.is_floating_point()}
    broken = sorted(name for name, tensor in floating.items() if not tensor.isfinite().all())
    if broken:
        raise WeightsError(
            f"{path} contains values that are not finite, in {', '.join(broken[:3])}; the training that wrote it "
            "diverged or the file is damaged, so use another file"
        )
    if floating and not any(tensor.any() for tensor in floating.values()):
        raise WeightsError(f"{path} contains only zeros; use the weights of a trained network")


def _other_head(state: dict[str, Tensor], expected: dict[str, Tensor], outputs: int) -> list[str]:
    """Names of tensors that differ only in the number of outputs, their first dimension, or of a missing layer's."""
    missing = [name for name in expected if name not in state]
    layers = {name.rpartition(".")[0] for name in missing}
    if len(layers) == 1 and all(expected[name].shape[:1] == (outputs,) for name in missing):
        return missing
    return [
        name
        for name, tensor in expected.items()
        if name in state
        and tensor.shape[:1] == (outputs,)
        and tensor.shape != state[name].shape
        and tensor.shape[1:] == state[name].shape[1:]
    ]


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a weights file by name, on the CPU."""
    if not path.is_file():
        raise ConfigError(
            f"weights file {path} does not exist; train a network with permafrost teach or correct the path"
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # warnings about TorchScript archives, which are rejected below
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} is not a torch file or contains more than tensors, and its code is not run; if you trust "
            "it, load it yourself and save its state_dict() as .safetensors"
        ) from error
    except Exception as error:  # parsers raise many kinds of errors on damaged bytes
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise WeightsError(
            f"{path} cannot be read as weights ({reason}); it is damaged, truncated or not a file of tensors, so "
            "fetch or write it again"
        ) from error
    for name in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(name), dict):
            loaded = loaded[name]
    named = isinstance(loaded, dict) and all(isinstance(name, str) for name in loaded)
    if not named or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise WeightsError(f"{path} contains no state dict; save the network's state_dict() in it")
    return {name.removeprefix("module."): tensor for name, tensor in loaded.items()}
