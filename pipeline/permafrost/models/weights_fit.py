"""Fit of the tensors of a file to a network: which of its sets of tensors it is, and what does not fit.

A file has its tensors by dotted path: the keys of the dictionaries that it nests, then the name of the tensor. A set is
all that is below one prefix, in which a key (`state_dict`) and a wrapper of the network (`module`) are the same.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from permafrost.models.classifier import Classifier

_COMPUTED = (
    *("num_batches_tracked", "total_ops", "total_params", "n_averaged", "position_ids"),
    *("relative_position_index", "relative_coords_table", "attn_mask"),
)
"""Last parts of the names of counters, and of tables that a network computes from its options."""
_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Parts that torch.compile, FSDP and activation checkpointing put before the names of any module."""
_TRAINING_STATE = re.compile(r"(^|\.)(\w*optim\w*|grads?|exp_avg(_sq)?|momentum_buffer)\.")
_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Parts that torch.compile, FSDP and activation checkpointing put before the names of any module."""
_AVERAGED = re.compile(r"(^|[._])(ema|swa|averaged?|avg|teacher)([._]|$)")
_FIRST_KEYS = ("state_dict", "model")
"""Keys that are preferred among sets that are not averaged."""


class Fit(NamedTuple):
    """A set of tensors next to a network."""

    key: str
    """Prefix of the set, without its last dot; empty for the top of the file."""
    state: dict[str, Tensor]
    """Tensors by the names of the network."""
    head: dict[str, Tensor | None]
    """Tensors of the set by the names of the last layer, if it lacks them or has another number of outputs."""
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: tuple[str, ...]
    moved_head: tuple[str, str] | tuple[()] = ()
    """Name of the last layer in the set and in the network, if it stands at another place, as in a Sequential."""
    below_head: tuple[str, ...] = ()
    """Tensors of the set below the name of the network's last layer, where the set has several layers."""

    @property
    def is_complete(self) -> bool:
        """True if nothing but the last layer is missing."""
        return not (self.missing or self.unexpected or self.misshapen)

    @property
    def is_exact(self) -> bool:
        """True if the set and the network are the same."""
        return self.is_complete and not self.head

    @property
    def distance(self) -> tuple[int, int]:
        """Number of tensors that do not fit, without and within the last layer."""
        return len(self.missing) + len(self.unexpected) + len(self.misshapen), len(self.head)


def rank_fits(tensors: dict[str, Tensor], model: Classifier, outputs: int | None) -> list[Fit]:
    """Return the sets that complete the network, the preferred one first, or the closest one if none does.

    Sets with the network's number of outputs come before all others. Then averaged weights are preferred (ema, swa,
    average, teacher), then `state_dict`, then `model`, then the first in the file.

    Args:
        tensors: Tensors of the file by dotted path.
        model: The network.
        outputs: Its number of outputs, or None to have the last layer fit as all others do.
    """
    expected = model.network.state_dict()
    if (whole := _compare("", tensors, expected, outputs)).is_exact:
        return [whole]
    weights = {name: tensor for name, tensor in tensors.items() if not _TRAINING_STATE.search(name)}
    sizes = Counter(name[: dot.end()] for name in weights for dot in re.finditer(r"^|\.", name))
    fits: list[Fit] = []
    large = [prefix for prefix, size in sizes.items() if 2 * size >= len(expected)]
    for prefix in sorted(large, key=len, reverse=True):
        inside = tuple(f"{fit.key}." for fit in fits if fit.is_complete)
        below = {
            name: tensor
            for name, tensor in weights.items()
            if name.startswith(prefix) and not name.startswith(inside)
        }
        if 2 * len(below) >= len(expected):
            names = {name.removeprefix(prefix): tensor for name, tensor in below.items()}
            fits.append(_fit(prefix.removesuffix("."), names, model, expected, outputs))
    if not (complete := [fit for fit in fits if fit.is_complete]):
        return [min([*fits, whole], key=lambda fit: fit.distance)]
    best = [fit for fit in complete if not fit.head] or complete
    return sorted(best, key=lambda fit: (*_preference(fit), large.index(_prefix_of(fit))))


def unused_tensors(tensors: dict[str, Tensor], fit: Fit, alternatives: list[Fit]) -> list[str]:
    """Return where a file has tensors outside of all sets, which a training leaves next to weights, such as a loss.

    Args:
        tensors: Tensors of the file by dotted path.
        fit: Set that is read.
        alternatives: Other sets that complete the network.

    Returns:
        The shortest prefixes that no set has, each once, in the order of the file.
    """
    sets = tuple(map(_prefix_of, (fit, *alternatives)))
    return list(
        dict.fromkeys(
            max((_branch(name, prefix) for prefix in sets), key=len)
            for name in tensors
            if not (name.startswith(sets) or _is_computed(name) or _TRAINING_STATE.search(name))
        )
    )


_NOT_OF_NETWORKS = re.compile(
    r"(^|[._])(criterion\w*|loss\w*|metrics?|\w*acc\w*|\w*auroc\w*|objective)([._]|$)"
)
"""Modules of a training that are not part of what the network computes."""
_CALIBRATION = re.compile(
    r"(^|[._])(temperature|temp|log_temp\w*|calibrat\w*|platt\w*|logit_(scale|bias)|T)([._]|$)"
)


def unexpected_layers(tensors: dict[str, Tensor], fits: list[Fit], outputs: int) -> list[str]:
    """Return the tensors of a file that belong to layers before or after the network.

    These are the members of a Sequential that has the network as one of them, convolutions from images to images,
    matrices that take its outputs, and the parameters of a calibration.

    Args:
        tensors: Tensors of the file by dotted path.
        fits: Sets that complete the network, that which is read first.
        outputs: Number of outputs of the network.
    """
    sets = tuple(map(_prefix_of, fits))
    parent, _, place = fits[0].key.rpartition(".")
    before = f"{parent}." if parent else ""
    names = []
    for name, tensor in tensors.items():
        is_expected = name.startswith(sets) or _is_computed(name) or _NOT_OF_NETWORKS.search(name)
        if is_expected or _TRAINING_STATE.search(f"{name}.") or not tensor.is_floating_point():
            continue
        sibling = name.removeprefix(before).partition(".")[0] if name.startswith(before) else ""
        is_member = place.isdigit() and sibling.isdigit() and tensor.numel() > 1
        takes_images = tensor.ndim == 4 and tensor.shape[:2] == (3, 3)
        takes_outputs = tensor.ndim == 2 and tensor.shape[1] == outputs
        calibrates = _CALIBRATION.search(name) and tensor.numel() in (1, outputs)
        if is_member or takes_images or takes_outputs or calibrates:
            names.append(name)
    return names


def _prefix_of(fit: Fit) -> str:
    return f"{fit.key}." if fit.key else ""


def _branch(name: str, prefix: str) -> str:
    """Return the shortest part of a name, from its start to a dot, that is not one of the prefix."""
    parts, prefix_parts = name.split("."), prefix.split(".")
    same = next(
        (
            position
            for position, part in enumerate(parts)
            if part not in prefix_parts[position : position + 1]
        ),
        len(parts) - 1,
    )
    return ".".join(parts[: same + 1])


def _is_computed(name: str) -> bool:
    return name.rpartition(".")[2] in _COMPUTED


def _preference(fit: Fit) -> tuple[bool, int]:
    first = fit.key.partition(".")[0]
    order = _FIRST_KEYS.index(first) if first in _FIRST_KEYS else len(_FIRST_KEYS)
    return not _AVERAGED.search(fit.key), order


def _fit(
    key: str,
    tensors: dict[str, Tensor],
    model: Classifier,
    expected: dict[str, Tensor],
    outputs: int | None,
) -> Fit:
    """Fit a set of tensors by its own names or, if they are not the network's, by the best of others."""
    best = _compare(key, tensors, expected, outputs)
    for renamed in _renamings(tensors, model, expected):
        if best.is_exact:
            break
        fit = _compare(key, renamed, expected, outputs)
        best = min(best, fit, key=lambda fit: fit.distance)
    return best


def _renamings(
    tensors: dict[str, Tensor], model: Classifier, expected: dict[str, Tensor]
) -> Iterator[dict[str, Tensor]]:
    plain = {_WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    yield plain
    yield model.rename_keys(plain)
    first, *more = {name.partition(".")[0] for name in expected}
    if not more:
        yield {f"{first}.{name}": tensor for name, tensor in plain.items()}


def _compare(
    key: str, state: dict[str, Tensor], expected: dict[str, Tensor], outputs: int | None
) -> Fit:
    """Compare a set of tensors with those of the network, name by name."""
    moved_head = () if outputs is None else _find_head(state, expected, outputs)
    if moved_head:
        old, new = (f"{name}." for name in moved_head)
        state = {
            new + name.removeprefix(old) if name.startswith(old) else name: tensor
            for name, tensor in state.items()
        }
    state = {
        name: tensor
        for name, tensor in _with_shared(state, expected).items()
        if not _is_computed(name) or (name in expected and _mismatch(tensor, expected[name]) == "")
    }
    head = {} if outputs is None else _other_head(state, expected, outputs)
    replaced = "|".join({re.escape(name.rpartition(".")[0]) for name in head}) or "$."
    below_head = re.compile(rf"({replaced})\.(?!parametrizations).*\.")
    extra = [name for name in state if name not in expected and not below_head.match(name)]
    return Fit(
        key=key,
        state={name: state[name] for name in expected if name in state and name not in head},
        head=head,
        missing=tuple(
            name
            for name in sorted(expected)
            if name not in state and name not in head and not _is_computed(name)
        ),
        unexpected=tuple(sorted(extra)),
        misshapen=tuple(
            f"{name} {_mismatch(state[name], expected[name])}"
            for name in sorted(state)
            if name in expected and name not in head and _mismatch(state[name], expected[name])
        ),
        moved_head=moved_head,
        below_head=tuple(name for name in state if name not in expected and below_head.match(name)),
    )


def _find_head(
    state: dict[str, Tensor], expected: dict[str, Tensor], outputs: int
) -> tuple[str, str] | tuple[()]:
    """Return the last layer's name in a set and in the network, if the set has it at another place, else ().

    It is the only layer that the network does not have, and of the shape of the only one that the set does not have.
    Outside of a Sequential in its place it must also have the number of outputs.
    """
    missing = {
        name.rpartition(".")[0] for name in expected.keys() - state.keys() if not _is_computed(name)
    }
    extra = {
        name.rpartition(".")[0] for name in state.keys() - expected.keys() if not _is_computed(name)
    }
    if len(missing) != 1 or len(extra) != 1:
        return ()
    (new,), (old,) = missing, extra
    weight, head = state.get(f"{old}.weight"), expected.get(f"{new}.weight")
    parts = (
        {name.removeprefix(f"{layer}.") for name in names if name.startswith(f"{layer}.")}
        for layer, names in ((old, state), (new, expected))
    )
    if weight is None or head is None or len(set(map(frozenset, parts))) != 1:
        return ()
    is_head = (
        head.shape[:1] == (outputs,) and weight.shape[1:] == head.shape[1:] and weight.ndim > 1
    )
    return (
        (old, new) if is_head and (old.startswith(f"{new}.") or weight.shape == head.shape) else ()
    )


def _mismatch(tensor: Tensor, expected: Tensor) -> str:
    """Say how a tensor differs from the network's in its shape or its kind of numbers, empty if it does not."""
    if tensor.shape != expected.shape:
        return f"{tuple(tensor.shape)} instead of {tuple(expected.shape)}"
    if expected.is_floating_point() and not tensor.is_floating_point():
        return f"of {tensor.dtype} instead of {expected.dtype}"
    return ""


def _with_shared(state: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add parameters that the network has under several names, of which safetensors keeps one."""
    places: dict[tuple[int, torch.Size], Tensor] = {
        (parameter.data_ptr(), parameter.shape): state[name]
        for name, parameter in expected.items()
        if name in state
    }
    return state | {
        name: places[parameter.data_ptr(), parameter.shape]
        for name, parameter in expected.items()
        if name not in state
        and parameter.numel()
        and (parameter.data_ptr(), parameter.shape) in places
    }


def _other_head(
    state: dict[str, Tensor], expected: dict[str, Tensor], outputs: int
) -> dict[str, Tensor | None]:
    """Return the tensors that differ only in the number of outputs, their first dimension, or a missing layer's."""
    other = {
        name: state[name]
        for name, tensor in expected.items()
        if name in state
        and tensor.shape[:1] == (outputs,)
        and tensor.shape != state[name].shape
        and tensor.shape[1:] == state[name].shape[1:]
        and state[name].numel()
    }
    missing = [name for name in expected if name not in state and not _is_computed(name)]
    layers = {name.rpartition(".")[0] for name in missing}
    is_head = len(layers) == 1 and all(expected[name].shape[:1] == (outputs,) for name in missing)
    return other | dict.fromkeys(missing if is_head else ())
