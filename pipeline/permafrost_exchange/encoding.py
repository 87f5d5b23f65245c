"""Stored form of targets that were read from another tool's files: checks, dtypes and the fields of a pass."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from permafrost.core.errors import require
from permafrost.core.records import (
    MOVE_FIELD,
    NO_CLASS,
    PIXEL_FIELD,
    REST_LOGITS,
    TOP_CLASS,
    TOP_LOGITS,
    WINDOW_FIELD,
    FieldSpec,
    WhenMoved,
)
from permafrost.store.codecs import decode_unit, encode_unit, lowest_cosine_of_arrays
from permafrost_exchange.format_options import TargetFormatConfig
from permafrost_exchange.target_reader import Arrays, TargetError, TargetForm, log_probabilities

_MAX_UINT16 = 2**16 - 1


class _StoredArray(NamedTuple):
    """Form of one kind of targets."""

    pattern: str
    axes: tuple[str, ...]
    scale_axes: int = 0
    """Number of leading axes with separate scales, 0 for values that are stored as they are. 0 axes of a
    single map are written as -1."""
    when_moved: WhenMoved = "keep"


_STORED_ARRAYS = (
    _StoredArray("logits|probabilities", ("class",)),
    _StoredArray(TOP_LOGITS, ("rank",)),
    _StoredArray(TOP_CLASS, ("rank",)),
    _StoredArray(REST_LOGITS, ("temperature",)),
    _StoredArray("pooled", ("feature",)),
    _StoredArray("features_pooled", ("channel",)),
    _StoredArray("target_class", ("target",)),
    _StoredArray("map", ("target", "channel", "y", "x"), 1, "warp"),
    _StoredArray("class_maps", ("class", "y", "x"), 1, "warp"),
    _StoredArray(r"attention_\d+", ("y", "x"), -1, "warp"),
    _StoredArray(r"features_\d+", ("channel", "y", "x"), 1, "warp_covered"),
    _StoredArray(WINDOW_FIELD.name, ("value",)),
    _StoredArray(MOVE_FIELD.name, ("move", "row", "column")),
    _StoredArray(PIXEL_FIELD, ("value",)),
)


_PLACES = (WINDOW_FIELD.name, MOVE_FIELD.name)


def has_places(name: str) -> bool:
    """Return whether targets of a name lie in the image, as maps and dense features do."""
    return any(re.fullmatch(kind.pattern, name) and kind.axes[-1] == "x" for kind in _STORED_ARRAYS)


class EncodedTargets(NamedTuple):
    """Stored form of the targets of some records."""

    fields: tuple[FieldSpec, ...]
    values: dict[str, NDArray[np.generic]]
    """Values of each field, [n, V, *shape]."""
    fidelity: dict[str, float]
    """Lowest cosine between a record's values and their stored form, for each lossy field."""


def encode_targets(
    arrays: Arrays, names: Sequence[str], form: TargetForm, config: TargetFormatConfig, where: str
) -> EncodedTargets:
    """Check the targets of some records, and return their stored form.

    Args:
        arrays: Decoded values, [n, V, ...] each.
        names: Names of the n records, for messages.
        form: Facts about the format.
        config: Options of the format.
        where: Path of the targets, for messages.

    Raises:
        TargetError: If a value is not finite or out of range, or an array has another number of axes.
    """
    arrays = dict(arrays)
    if "probabilities" in arrays:
        arrays["logits"] = _logits_of(arrays.pop("probabilities"), names, where)
    elif "logits" in arrays:
        _require_logits(arrays["logits"], names, where)
    classes = form.classes or (arrays["logits"].shape[-1] if "logits" in arrays else 0)
    specs: list[FieldSpec] = []
    values: dict[str, NDArray[np.generic]] = {}
    fidelity: dict[str, float] = {}
    kinds = require_axes({name: array.shape[2:] for name, array in arrays.items()}, where)
    for name, array in arrays.items():
        kind = kinds[name]
        _require_finite(name, array, names, where)
        if name in (TOP_CLASS, "target_class"):
            _require_classes(name, array, classes, names, where)
        if kind.scale_axes:
            specs += _scaled_specs(name, kind, array, config)
            stored, scale = _scaled(array, kind, config.dtype)
            values |= {name: stored, f"{name}_scale": scale}
            fidelity[name] = _cosine(array, stored, scale, kind)
        else:
            values[name] = array.astype(_plain_dtype(name, array, classes))
            specs.append(
                FieldSpec(
                    name=name,
                    shape=array.shape[2:],
                    dtype=values[name].dtype.name,  # type: ignore[arg-type]
                    axes=kind.axes,
                )
            )
    return EncodedTargets(tuple(specs), values, fidelity)


def require_axes(shapes: Mapping[str, tuple[int, ...]], where: str) -> dict[str, _StoredArray]:
    """Check the number of axes of a record's targets, all of them at once, and return the form of each.

    Args:
        shapes: Shape of a record's targets by what they are.
        where: Path of the targets, for messages.

    Raises:
        TargetError: If one has another number of axes, or there is no such kind of target.
    """
    kinds = {
        name: kind for name in shapes for kind in _STORED_ARRAYS if re.fullmatch(kind.pattern, name)
    }
    odd = [f"there is no kind of target called {name!r}" for name in shapes.keys() - kinds.keys()]
    odd += [
        f"{name} has shape {list(shapes[name])} per record, in place of [{', '.join(kind.axes)}]"
        for name, kind in kinds.items()
        if len(shapes[name]) != len(kind.axes)
    ]
    require(not odd, f"{where}: {'; '.join(odd)}", TargetError)
    return kinds


def _logits_of(
    probabilities: NDArray[Any], names: Sequence[str], where: str
) -> NDArray[np.float32]:
    """Return logits with this softmax."""
    _require_finite("probabilities", probabilities, names, where)
    values = probabilities.astype(np.float64)
    totals = values.sum(axis=-1)
    odd = (np.abs(totals - 1) > 0.02) | (values.min(axis=-1) < -1e-3)
    if odd.any():
        row = int(odd.reshape(len(odd), -1).any(axis=1).argmax())
        raise TargetError(
            f"{where}: the probabilities of {names[row]} have the sum {totals[row].ravel()[0]:.3g}; if they are "
            "logits, name them logits"
        )
    return log_probabilities(values).astype(np.float32)


def _require_logits(logits: NDArray[Any], names: Sequence[str], where: str) -> None:
    """Raise TargetError if logits are the outputs of a softmax."""
    totals = logits.astype(np.float64).sum(axis=-1)
    if logits.size and logits.min() >= 0 and np.abs(totals - 1).max() < 1e-2:
        raise TargetError(
            f"{where}: the logits of {names[0]} and of those near it are at least 0 with the sum 1; name them "
            "'format.fields={probabilities: <the array>}'"
        )


def _require_finite(name: str, array: NDArray[Any], names: Sequence[str], where: str) -> None:
    require(
        array.dtype.kind in ("fiu" if name != TOP_CLASS else "iu"),
        f"{where}: {name} has values of type {array.dtype}",
        TargetError,
    )
    finite = np.isfinite(array.reshape(len(array), -1)).all(axis=1)
    if not finite.all():
        row = int((~finite).argmax())
        raise TargetError(
            f"{where}: {name} of {names[row]} has values that are not finite; leave the record out of the files, or "
            "make its targets again"
        )


def _require_classes(
    name: str, array: NDArray[Any], classes: int, names: Sequence[str], where: str
) -> None:
    lowest = NO_CLASS if name == "target_class" else 0
    odd = ((array < lowest) | (array >= classes)).reshape(len(array), -1).any(axis=1)
    if odd.any():
        row = int(odd.argmax())
        raise TargetError(
            f"{where}: {name} of {names[row]} is {int(array[row].max())}, and the teacher has {classes} classes"
        )


def _plain_dtype(name: str, array: NDArray[Any], classes: int) -> str:
    """Return the storage dtype of values that are stored as they are."""
    if name == TOP_CLASS:
        return "uint16" if classes <= _MAX_UINT16 else "int32"
    if name == "target_class":
        return "int32"
    if name == PIXEL_FIELD:
        return "float16"
    is_half = array.dtype == np.float16 and name not in (*_PLACES, REST_LOGITS)
    return "float16" if is_half else "float32"


def _scaled(
    array: NDArray[Any], kind: _StoredArray, dtype: str
) -> tuple[NDArray[np.generic], NDArray[np.float32]]:
    values = torch.from_numpy(array.astype(np.float32, order="C"))
    axes_of_a_scale = range(2 + max(0, kind.scale_axes), array.ndim)
    stored, scale = encode_unit(values, dtype, tuple(axes_of_a_scale))
    return stored.numpy(), (scale[..., None] if kind.scale_axes < 0 else scale).numpy()


def _cosine(
    array: NDArray[Any], stored: NDArray[np.generic], scale: NDArray[np.float32], kind: _StoredArray
) -> float:
    """Return the lowest cosine: of each map, or of all channels of a record's features."""
    original, decoded = array.astype(np.float32), decode_unit(stored)
    if kind.when_moved == "warp_covered":
        decoded = decoded * scale[..., None, None]
        count = array.shape[0] * array.shape[1]
    else:
        count = int(np.prod(array.shape[: 2 + max(0, kind.scale_axes)]))
    return lowest_cosine_of_arrays(original.reshape(count, -1), decoded.reshape(count, -1))


def _scaled_specs(
    name: str, kind: _StoredArray, array: NDArray[Any], config: TargetFormatConfig
) -> list[FieldSpec]:
    cropped = config.frame == "center_crop"
    frame: Literal["full", "center_crop"] = "center_crop" if cropped else "full"
    leading = max(0, kind.scale_axes)
    shape = array.shape[2:]
    return [
        FieldSpec(
            name=name,
            shape=shape,
            dtype=config.dtype,
            codec="maxabs",
            when_moved=kind.when_moved,
            frame=frame,
            crop_fraction=config.crop_fraction if cropped else None,
            axes=kind.axes,
        ),
        FieldSpec(
            name=f"{name}_scale",
            shape=shape[:leading] or (1,),
            dtype="float32",
            axes=kind.axes[:leading] or ("map",),
        ),
    ]
