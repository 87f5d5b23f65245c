"""Weights files: tensors read without running code, and loaded with an error that names every mismatch."""

from __future__ import annotations

import argparse
import logging
import pathlib
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core import multiarray
from torch import Tensor

from permafrost.core.errors import require, shorten
from permafrost.core.progress import log_once
from permafrost.models.classifier import Classifier, WeightsError
from permafrost.models.file_kinds import describe_foreign_file, describe_part, is_safetensors
from permafrost.models.weights_fit import Fit, rank_fits, unexpected_layers, unused_tensors
from permafrost.storage.files import file_at
from permafrost.storage.untrusted import load_tensors

logger = logging.getLogger("permafrost.models")

_MAX_DEPTH = 8
"""Nested dictionaries that are looked into."""
_OPTIONS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *(getattr(np.dtypes, f"{kind}DType") for kind in ("Float64", "Float32", "Int64", "Bool")),
    *((multiarray.scalar, f"numpy.{core}.multiarray.scalar") for core in ("_core", "core")),
    *((pathlib.PosixPath, f"pathlib.{module}PosixPath") for module in ("", "_local.")),
]
"""Plain values that trainings write in addition to tensors; constructing them runs no other code."""


# ---- loading -------------------------------------------------------------------------------------


def load_weights(
    model: Classifier,
    path: Path,
    *,
    outputs: int | None = None,
    may_replace_head: bool = False,
    known_outputs: Mapping[int, int] | None = None,
    key: str | None = None,
) -> None:
    """Load the weights in a .safetensors file, or in a torch file without running any of its code.

    Args:
        model: The network.
        path: The file. It may have other tensors besides the weights, and nest them at any key.
        outputs: Number of outputs of the network, None if its last layer is loaded as all others are.
        may_replace_head: Whether the network keeps its last layer if that of the file differs in the number of outputs
            only, or is missing.
        known_outputs: Outputs of the file by those of the network, whose rows of the last layer are then kept.
        key: Value of weights_key.

    Raises:
        ConfigError: If there is no such file.
        WeightsError: If the file cannot be read, does not complete the network, or has weights that are not finite or
            all zero.
    """
    tensors = read_state_dict(path)
    fit, *others = choose_fit(model, path, tensors, outputs, key)
    expected = model.network.state_dict()
    if not fit.is_complete or (fit.head and not may_replace_head):
        raise WeightsError(_explain_misfit(model, path, fit, expected))
    _require_values(path, fit.state)
    # Layers before or after the network change what it computes.
    if outputs is not None and (names := unexpected_layers(tensors, [fit, *others], outputs)):
        name = type(model.network).__name__
        raise WeightsError(
            f"{path} has {name} at {_name_of(fit)} and layers before or after it, {shorten(names, 3)}, so {name} "
            "alone computes something else; name the whole network (kind=module, factory=)"
        )
    _announce(model, path, tensors, fit, others, key)
    # Updating keeps the layout versions in the metadata of the network's own state dict.
    expected.update({name: _dense(tensor) for name, tensor in fit.state.items()})
    known = known_outputs or {}
    new, old = (torch.tensor(list(each), dtype=torch.long) for each in (known, known.values()))
    expected |= {
        name: expected[name].index_copy(0, new, _dense(tensor)[old].to(expected[name].dtype))
        for name, tensor in fit.head.items()
        if tensor is not None
    }
    model.network.load_state_dict(expected)


def choose_fit(
    model: Classifier, path: Path, tensors: dict[str, Tensor], outputs: int | None, key: str | None
) -> list[Fit]:
    """Return the sets of tensors of a file that complete a network, that of weights_key or the preferred one first.

    If none completes it, the closest one is returned.

    Args:
        model: The network.
        path: The file, for messages.
        tensors: Tensors of the file by dotted path.
        outputs: Number of outputs of the network, None to have its last layer fit as all others do.
        key: Value of weights_key.

    Raises:
        WeightsError: If no set has the key.
    """
    fits = rank_fits(tensors, model, outputs)
    if key is None or not fits[0].is_complete:
        return fits
    if not (named := [fit for fit in fits if f"{_name_of(fit)}.".startswith(f"{key}.")]):
        raise WeightsError(
            f"weights_key={key} names no weights of {type(model.network).__name__} in {path}; those that it has are "
            + shorten([_name_of(fit) for fit in fits])
        )
    return [named[0], *(fit for fit in fits if fit is not named[0])]


def _name_of(fit: Fit) -> str:
    """Return the key of a set as weights_key takes it."""
    return fit.key or "."


def _announce(
    model: Classifier,
    path: Path,
    tensors: dict[str, Tensor],
    fit: Fit,
    alternatives: list[Fit],
    key: str | None,
) -> None:
    """Log which tensors of the file became the network, and which did not."""
    if alternatives:
        names = ", ".join(_name_of(one) for one in (fit, *alternatives))
        remedy = "" if key else ", and weights_key= chooses another"
        log_once(
            logger,
            logging.INFO if key else logging.WARNING,
            f"{path} has several sets of weights: {names}; {_name_of(fit)} is read{remedy}",
        )
    elif fit.key:
        log_once(logger, logging.INFO, f"{path}: the weights are those named {fit.key}.*")
    if left := unused_tensors(tensors, fit, alternatives):
        name = type(model.network).__name__
        log_once(
            logger, logging.WARNING, f"{path}: passed over {shorten(left, 5)}, no part of {name}"
        )
    if resized := [
        f"{name} {tuple(raw.shape)} to {tuple(fit.state[name].shape)}"
        for name, raw in (
            (entry, tensors.get(f"{fit.key}.{entry}" if fit.key else entry)) for entry in fit.state
        )
        if raw is not None and raw.shape != fit.state[name].shape
    ]:
        log_once(
            logger,
            logging.WARNING,
            f"{path} is for another input size; resampled as timm does: {', '.join(resized[:3])}. With the "
            "input_size= that it was trained with, nothing is resampled",
        )
    if fit.moved_head:
        old, new = fit.moved_head
        log_once(
            logger,
            logging.WARNING,
            f"{path}: {old} is taken for the last layer, {new}; what else its last layer had without tensors (a "
            "dropout, an activation, a softmax) is not in the file",
        )
    if fit.head:
        logger.info("%s has other classes; not taken as it is: %s", path, ", ".join(fit.head))


def _dense(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()


def _require_values(path: Path, state: dict[str, Tensor]) -> None:
    """Raise WeightsError if a tensor is not finite or all of them are zero, because such weights are not trained."""
    require(
        not any(tensor.is_meta for tensor in state.values()),
        f"{path} contains shapes without values (meta tensors); save the network once it is on a device",
        WeightsError,
    )
    floating = {
        name: _dense(tensor).float() for name, tensor in state.items() if tensor.is_floating_point()
    }
    if broken := sorted(name for name, tensor in floating.items() if not tensor.isfinite().all()):
        raise WeightsError(
            f"{path} contains values that are not finite, in {', '.join(broken[:3])}; its training diverged or it is "
            "damaged, so use another file"
        )
    require(
        not floating or any(tensor.any() for tensor in floating.values()),
        f"{path} contains only zeros; use the weights of a trained network",
        WeightsError,
    )


# ---- errors --------------------------------------------------------------------------------------

_HINTS = (
    (
        r"lora_[AB]|lora_(up|down)|\.adapter",
        "it has adapters in addition to the weights; merge them into the network (merge_and_unload of peft) and save "
        "that",
    ),
    (
        r"\.parametrizations\.|(weight|bias)_(orig|mask|g|u|v)( |$)",
        "its weights are the factors of a parametrization (pruning, weight norm, spectral norm); remove that "
        "(torch.nn.utils.prune.remove, parametrize.remove_parametrizations, ...) and save the network again",
    ),
    (
        r"zero_point|_packed_params|absmax|qweight|torch\.q?u?int\d",
        "it is quantized, and a quantized network has no gradients; use the file from before the quantization",
    ),
    (r"torch\.complex", "its numbers are complex; use a file of real numbers"),
    (
        r"\.(kernel|gamma|moving_mean)( |$)",
        "these are names of Keras or Flax, whose layers have other axes; use a file of the PyTorch network",
    ),
    (
        r"flat_param",
        "it is a part of a network that FSDP has divided; save it with FULL_STATE_DICT",
    ),
    (
        r"(^|\.)0\.4\.0\.conv1\.",
        "it is a network of fastai, whose trunk is numbered and whose head has two linear layers; build it in a "
        "function of your own (kind=module, create_vision_model), or train a network with teaching.start=",
    ),
    (
        r"\(0,\) instead",
        "DeepSpeed keeps these weights elsewhere; join them with its zero_to_fp32.py",
    ),
)
"""Remedies by a pattern of the names that do not fit."""


def _explain_misfit(model: Classifier, path: Path, fit: Fit, expected: dict[str, Tensor]) -> str:
    """Say what of a file does not fit a network, and what to do about it."""
    missing = sorted([*fit.missing, *(name for name, tensor in fit.head.items() if tensor is None)])
    misshapen = [
        *fit.misshapen,
        *(
            f"{name} {tuple(tensor.shape)} instead of {tuple(expected[name].shape)}"
            for name, tensor in sorted(fit.head.items())
            if tensor is not None
        ),
    ]
    titles = ("missing", "unexpected", "wrong shape")
    problems = [
        f"{title}: {', '.join(names[:8])}{f' (+{len(names) - 8} more)' if len(names) > 8 else ''}"
        for title, names in zip(titles, (missing, fit.unexpected, misshapen), strict=True)
        if names
    ]
    advice = (
        _advise_on_head(path, fit, expected)
        if fit.is_complete
        else _advise(path, "\n".join([*fit.unexpected, *misshapen]), fit, expected)
    )
    where = f" at {fit.key}" if fit.key else ""
    return f"{path}{where} does not fit {type(model.network).__name__}; {'; '.join(problems)}. {advice}"


def _advise_on_head(path: Path, fit: Fit, expected: dict[str, Tensor]) -> str:
    """Say what to do with weights of other classes."""
    fine_tune = f"fine-tune it with permafrost teach ... teaching.start={path}"
    name, head = next(iter(fit.head.items()))
    if head is None and fit.below_head:
        layers = shorten(sorted({name.rpartition(".")[0] for name in fit.below_head}), 5)
        return f"It has several last layers, {layers}: name the whole network (kind=module, factory=) or {fine_tune}"
    if head is None:
        return f"It has no last layer: {fine_tune}, or set annotate.outputs=[pooled]"
    return (
        f"It has {head.shape[0]:,} classes, the data {expected[name].shape[0]:,}: {fine_tune}; set "
        f"classes={head.shape[0]} of the network if some were appended; or, if the folders are classes of the weights, "
        "name all of these in data.classes="
    )


def _advise(path: Path, misfits: str, fit: Fit, expected: dict[str, Tensor]) -> str:
    """Say what to do with weights of another network."""
    if part := describe_part(path):
        return f"{part[0].upper()}{part[1:]}"
    for pattern, remedy in _HINTS:
        if re.search(pattern, misfits, re.MULTILINE):
            return f"{remedy[0].upper()}{remedy[1:]}"
    if not (fit.missing or fit.unexpected):
        sizes = re.search(r"pos_embed\w* \(1, (\d+), (\d+)\) instead of \(1, (\d+),", misfits)
        patch = next((tensor.shape[-1] for tensor in expected.values() if tensor.ndim == 4), None)
        if sizes and patch:
            side = int(int(sizes[1]) ** 0.5) * patch
            return f"It is for images of {side} pixels; set input_size={side}"
        if channels := re.search(r"\((\d+), (\d), (\d+, \d+)\) instead of \(\1, 3, \3\)", misfits):
            return f"It takes images of {channels[2]} channels, and those of a store have 3"
    return "Correct weights=, or name= and the other options of the network (listed in a model.json next to the file)"


# ---- reading -------------------------------------------------------------------------------------


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a weights file by their dotted paths, on the CPU.

    Raises:
        ConfigError: If there is no such file.
        WeightsError: If it cannot be read, or has no tensors.
    """
    require(
        path.is_file(),
        f"weights file {path} does not exist; train a network with permafrost teach or correct the path",
    )
    if foreign := describe_foreign_file(path):
        raise WeightsError(f"{path} is {foreign}")
    try:
        loaded = load_tensors(path) if is_safetensors(path) else _load_torch_file(path)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} is not a torch file or contains more than tensors{_classes_in(path)}, and its code is not run; "
            "load it yourself and save its state_dict() as .safetensors"
        ) from error
    except Exception as error:  # parsers raise many kinds of errors on damaged bytes
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise WeightsError(
            f"{path} cannot be read as weights ({reason}); it is damaged, truncated or not a file of tensors, so "
            "fetch or write it again"
        ) from error
    tensors: dict[str, Tensor] = {}
    for name, tensor in _named_tensors(loaded, "", {}, 0):
        tensors.setdefault(name, tensor)
    if not tensors:
        entries = (
            f" (its entries are {shorten(list(map(str, loaded)))})"
            if isinstance(loaded, dict)
            else ""
        )
        raise WeightsError(
            f"{path} contains no state dict{entries}; save the network's state_dict() in it"
        )
    return tensors


def _load_torch_file(path: Path) -> Any:
    with warnings.catch_warnings(), torch.serialization.safe_globals(_OPTIONS):
        warnings.simplefilter("ignore")  # about the validation of sparse tensors
        with file_at(path).open() as file:  # and not its path, which torch reads by its suffix
            return torch.load(file, map_location="cpu", weights_only=True)


def _classes_in(path: Path) -> str:
    """Name the classes that a torch file needs, in parentheses, if they can be listed."""
    try:
        with torch.serialization.safe_globals(_OPTIONS):
            names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # of another format
        return ""
    return f" ({', '.join(sorted(names)[:5])})" if names else ""


def _named_tensors(
    value: Any, path: str, visited: dict[int, Any], depth: int
) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the tensors in nested dictionaries and lists, by dotted path.

    Args:
        visited: Containers that were looked into, by id, as a pickle may contain cycles.
    """
    if isinstance(value, Tensor):
        if path:
            yield path, value
    elif isinstance(value, (dict, list, tuple)) and depth < _MAX_DEPTH and id(value) not in visited:
        visited[id(value)] = value
        for key, member in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(key, (str, int)):
                name = f"{path}.{key}" if path else str(key)
                yield from _named_tensors(member, name, visited, depth + 1)
