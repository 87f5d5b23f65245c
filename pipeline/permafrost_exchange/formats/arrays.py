"""Reader of NumPy arrays with a row per record: .npz files, or .npy files with a list of names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from permafrost.core.errors import ConfigError, require
from permafrost.storage.files import iter_lines
from permafrost_exchange.formats.npy_files import map_npy, member_names, open_member
from permafrost_exchange.formats.row_reader import RowReader
from permafrost_exchange.target_reader import (
    NAMES_AT_ONCE,
    Arrays,
    ListedTargets,
    ReadRequest,
    TargetError,
)

_KINDS = re.compile(
    r"logits|probabilities|pooled|map|target_class|class_maps|attention_\d+|features_\d+|features_pooled"
)
_KEYS = "keys"


class ArrayReader(RowReader):
    """Arrays of an .npz file, or of an .npy file with a list of names."""

    def files(self) -> Iterator[Path]:
        require(self.path.is_file(), f"path={self.path} is not a file; name an .npz or .npy file")
        yield self.path
        if self.config.names is not None:
            yield Path(self.config.names)

    def listing(self) -> Iterator[ListedTargets]:
        names = self._names()
        for start in range(0, len(names), NAMES_AT_ONCE):
            part = names[start : start + NAMES_AT_ONCE].astype(str).tolist()
            yield ListedTargets(part, part)

    def _names(self) -> NDArray[Any]:
        """Return the name of each row, once it is sure that all arrays have as many rows."""
        listed = self.config.names
        names = (
            self._keys()
            if listed is None
            else np.array(list(iter_lines(Path(listed), f"format.names={listed}")))
        )
        odd = [
            f"{name} has {len(array):,} rows"
            for name, array in self._arrays.items()
            if len(array) != len(names)
        ]
        require(
            not odd,
            f"{self.path}: {', '.join(odd)}, and there are {len(names):,} names",
            TargetError,
        )
        return names

    def _keys(self) -> NDArray[Any]:
        """Return the array of names, without unpickling it."""
        if self.path.suffix != ".npz" or f"{_KEYS}.npy" not in member_names(self.path):
            if self.config.join == "position":
                return np.arange(len(next(iter(self._arrays.values()))))
            raise ConfigError(
                f"format.names is not set, and {self.path} has no array {_KEYS}; name a text file with the name of "
                "each row, or set format.join=position if rows are in the order of sorted records"
            )
        keys = open_member(self.path, _KEYS)
        require(
            keys.ndim == 1 and keys.dtype.kind in "SUiu",
            f"{self.path}: {_KEYS} has values of type {keys.dtype}; save them as texts, as in numpy.array(names)",
            TargetError,
        )
        return keys

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {kind: array.shape[1:] for kind, array in self._arrays.items()}

    def checks(self) -> list[Callable[[], Any]]:
        return [*super().checks(), self._names]

    def describe(self) -> str:
        fields = self.config.fields or {kind: kind for kind in self._arrays}
        shapes = [f"{fields[kind]} {list(array.shape)}" for kind, array in self._arrays.items()]
        others = {Path(name).stem for name in member_names(self.path)} - {*fields.values()}
        return f"{self.path} is format=npz, {', '.join([*shapes, *sorted(others)])}. "

    def rows(self, request: ReadRequest) -> Arrays:
        order = np.argsort(request.numbers)
        arrays = {}
        for name, array in self._arrays.items():
            rows = np.empty((len(order), *array.shape[1:]), array.dtype)
            rows[order] = array[request.numbers[order]]
            arrays[name] = rows[:, None]
        return arrays

    @cached_property
    def _arrays(self) -> dict[str, NDArray[Any]]:
        """Arrays of the fields, mapped from their file."""
        if self.path.suffix == ".npy":
            return {next(iter(self.config.fields), "pooled"): map_npy(self.path)}
        members = {Path(name).stem for name in member_names(self.path)}
        fields = self.config.fields or {
            name: name for name in sorted(members) if _KINDS.fullmatch(name)
        }
        if (absent := [name for name in fields.values() if name not in members]) or not fields:
            raise TargetError(
                f"{self.path} has no array {', '.join(absent) or 'of targets'}, but {', '.join(sorted(members))}; "
                "name one with format.fields={logits: its_name}"
            )
        return {kind: open_member(self.path, name) for kind, name in fields.items()}
