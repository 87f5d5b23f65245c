"""Readers of NumPy arrays with a row per record: .npz and .npy files, and the embeddings of clip-retrieval."""

from __future__ import annotations

import io
import re
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from permafrost.config.explainers import EXPLAINERS
from permafrost.core.errors import ConfigError, require
from permafrost.exchange.target_reader import (
    NAMES_AT_ONCE,
    Arrays,
    ListedTargets,
    ReadRequest,
    TargetError,
    TargetForm,
    TargetReader,
)

_KINDS = re.compile(
    r"logits|probabilities|pooled|map|explained_class|class_maps|attention_\d+|features_\d+|features_pooled"
)
_KEYS = "keys"
_HEADER = 2**16


class ArrayReader(TargetReader):
    """Arrays of an .npz file, or of an .npy file with a list of names."""

    def files(self) -> Iterator[Path]:
        require(self.path.is_file(), f"path={self.path} is no file; name an .npz or .npy file")
        yield self.path
        if self.config.names is not None:
            yield Path(self.config.names)

    def listing(self) -> Iterator[ListedTargets]:
        if self.config.names is not None:
            lines = Path(self.config.names).read_text(encoding="utf-8").splitlines()
            parts = [lines[i : i + NAMES_AT_ONCE] for i in range(0, len(lines), NAMES_AT_ONCE)]
            count = len(lines)
        else:
            keys = self._keys()
            count = len(keys)
            starts = range(0, count, NAMES_AT_ONCE)
            parts = [keys[i : i + NAMES_AT_ONCE].astype(str).tolist() for i in starts]
        for name, array in self._arrays.items():
            if len(array) != count:
                raise TargetError(
                    f"{self.path}: {name} has {len(array):,} rows, and there are {count:,} names"
                )
        for part in parts:
            yield ListedTargets(part, part)

    def _keys(self) -> NDArray[Any]:
        """Return the array of names, without unpickling it."""
        if (
            self.path.suffix != ".npz"
            or f"{_KEYS}.npy" not in zipfile.ZipFile(self.path).namelist()
        ):
            if self.config.join == "position":
                return np.arange(len(next(iter(self._arrays.values()))))
            raise ConfigError(
                f"format.names is not set, and {self.path} has no array {_KEYS}; name a text file with the name of "
                "each row, or set format.join=position if rows are in the order of sorted records"
            )
        keys = _open_member(self.path, _KEYS)
        if keys.ndim != 1 or keys.dtype.kind not in "SUiu":
            raise TargetError(
                f"{self.path}: {_KEYS} has values of type {keys.dtype}; save them as texts, as in numpy.array(names)"
            )
        return keys

    def form(self) -> TargetForm:
        has_map, kind = "map" in self._arrays, self.config.explainer
        require(
            not has_map or kind in EXPLAINERS,
            f"format.explainer={kind} must say what made the array map, among {', '.join(EXPLAINERS)}: students are "
            "explained in the same way",
        )
        if not has_map:
            return TargetForm()
        classes = "explained_class" in self._arrays
        require(
            classes or "logits" in self._arrays or "probabilities" in self._arrays,
            f"{self.path} has maps, and neither explained_class nor logits, which say what they explain",
        )
        return TargetForm(explainer={"kind": kind, "explained_classes": "top1"})

    def read(self, request: ReadRequest) -> Arrays:
        order = np.argsort(request.numbers)
        arrays = {}
        for name, array in self._arrays.items():
            rows = np.empty((len(order), *array.shape[1:]), array.dtype)
            rows[order] = array[request.numbers[order]]
            arrays[name] = rows[:, None]
        if "map" in arrays and "explained_class" not in arrays:
            scores = arrays.get("logits", arrays.get("probabilities"))
            assert scores is not None
            arrays["explained_class"] = scores.argmax(axis=2)[..., None].astype(np.int32)
        return arrays

    @cached_property
    def _arrays(self) -> dict[str, NDArray[Any]]:
        """Arrays of the fields, mapped from their file."""
        if self.path.suffix == ".npy":
            return {next(iter(self.config.fields), "pooled"): map_npy(self.path)}
        try:
            members = {Path(n).stem for n in zipfile.ZipFile(self.path).namelist()}
        except (OSError, zipfile.BadZipFile) as error:
            raise TargetError(f"{self.path} cannot be read as .npz: {error}") from error
        fields = self.config.fields or {n: n for n in sorted(members) if _KINDS.fullmatch(n)}
        absent = [name for name in fields.values() if name not in members]
        if absent or not fields:
            raise TargetError(
                f"{self.path} has no array {', '.join(absent) or 'of targets'}, but {', '.join(sorted(members))}; "
                "name one with format.fields={logits: its_name}"
            )
        return {kind: _open_member(self.path, name) for kind, name in fields.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config, "path": self.path}


def _open_member(path: Path, name: str) -> NDArray[Any]:
    """Map an array of an .npz file into memory, from a temporary copy if it is compressed."""
    where = f"{path}: {name}"
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f"{name}.npy")
        if info.compress_type == zipfile.ZIP_STORED:
            with path.open("rb") as file:
                file.seek(info.header_offset + 26)
                sizes = file.read(4)
                start = (
                    30 + int.from_bytes(sizes[:2], "little") + int.from_bytes(sizes[2:], "little")
                )
                return _map_npy(file, info.header_offset + start, info.file_size, where)
        with archive.open(info) as member, tempfile.TemporaryFile() as copy:
            head = member.read(_HEADER)
            _check_size(head, info.file_size, where)  # before anything of that size is written
            copy.write(head)
            while part := member.read(2**20):
                copy.write(part)
            copy.flush()
            return _map_npy(copy, 0, info.file_size, where)


def _read_header(head: bytes, where: str) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    file = io.BytesIO(head)
    try:
        version = np.lib.format.read_magic(file)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, is_fortran, dtype = read(file)
    except Exception as error:  # of a header that a stranger wrote
        raise TargetError(f"{where} is no array of NumPy: {error}") from error
    if dtype.hasobject:
        raise TargetError(
            f"{where} holds Python objects, which are not unpickled; save numbers or texts"
        )
    return shape, is_fortran, dtype, file.tell()


def _check_size(head: bytes, size: int, where: str) -> None:
    shape, _, dtype, end = _read_header(head, where)
    expected = end + dtype.itemsize * int(np.prod(shape, dtype=object))
    if expected != size or not shape:
        raise TargetError(f"{where} has {size:,} bytes, and its header promises {expected:,}")


def _map_npy(file: IO[bytes], offset: int, size: int, where: str) -> NDArray[Any]:
    """Map the array of an .npy file that begins at an offset."""
    file.seek(offset)
    head = file.read(min(size, _HEADER))
    _check_size(head, size, where)
    shape, is_fortran, dtype, end = _read_header(head, where)
    if 0 in shape:
        raise TargetError(f"{where} is empty")
    order = "F" if is_fortran else "C"
    return np.memmap(file, dtype, "r", offset + end, shape, order)  # type: ignore[call-overload,no-any-return]


def map_npy(path: Path) -> NDArray[Any]:
    """Map the array of an .npy file, whose header is checked.

    Raises:
        TargetError: If it is another file.
    """
    with path.open("rb") as file:
        return _map_npy(file, 0, path.stat().st_size, str(path))


# ---- clip-retrieval ------------------------------------------------------------------------------


class PartedReader(TargetReader):
    """Base of readers of arrays in several files, whose rows are counted through all of them."""

    @cached_property
    def parts(self) -> dict[str, list[NDArray[Any]]]:
        """Mapped arrays of each kind of target, in the order of the files."""
        return self.open_parts()

    def open_parts(self) -> dict[str, list[NDArray[Any]]]:
        """Map the arrays of each kind of target."""
        raise NotImplementedError

    def form(self) -> TargetForm:
        return TargetForm()

    def read(self, request: ReadRequest) -> Arrays:
        return {kind: self._rows(arrays, request.numbers) for kind, arrays in self.parts.items()}

    def _rows(self, arrays: Sequence[NDArray[Any]], numbers: NDArray[np.int64]) -> NDArray[Any]:
        starts = np.cumsum([0, *map(len, arrays)])
        files = np.searchsorted(starts, numbers, side="right") - 1
        rows = np.empty((len(numbers), 1, *arrays[0].shape[1:]), arrays[0].dtype)
        for file in np.unique(files).tolist():
            here = np.flatnonzero(files == file)
            rows[here, 0] = arrays[file][numbers[here] - starts[file]]
        return rows

    def require_alike(self, kind: str, arrays: Sequence[NDArray[Any]]) -> None:
        """Raise TargetError if the rows of some files differ from those of others."""
        forms = {(array.ndim, array.shape[1:], array.dtype.str) for array in arrays}
        if len(forms) > 1 or arrays[0].ndim != 2:
            raise TargetError(
                f"{self.path}: {kind} has rows of several forms: {', '.join(sorted(map(str, forms)))}"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config, "path": self.path}


class EmbeddingReader(PartedReader):
    """Parts of embeddings [n, d], each beside a Parquet file whose column names the rows."""

    def files(self) -> Iterator[Path]:
        for pair in self._pairs:
            yield from pair

    @cached_property
    def _pairs(self) -> list[tuple[Path, Path]]:
        arrays = {_number(path): path for path in self.path.glob("img_emb/img_emb_*.npy")}
        tables = {_number(path): path for path in self.path.glob("metadata/metadata_*.parquet")}
        require(
            bool(arrays),
            f"path={self.path} has no img_emb/img_emb_<n>.npy; name the folder that clip-retrieval inference wrote",
        )
        odd = sorted(arrays.keys() ^ tables.keys())
        if odd:
            raise TargetError(
                f"{self.path}: part {odd[0]} has embeddings or metadata, but not both; {len(odd)} parts are so"
            )
        return [(arrays[number], tables[number]) for number in sorted(arrays)]

    def open_parts(self) -> dict[str, list[NDArray[Any]]]:
        arrays = [map_npy(path) for path, _ in self._pairs]
        self.require_alike("img_emb", arrays)
        return {"pooled": arrays}

    def listing(self) -> Iterator[ListedTargets]:
        for (_, table), array in zip(self._pairs, self.parts["pooled"], strict=True):
            try:
                column = pq.read_table(table, columns=[self.config.column]).column(0)
            except (OSError, pa.ArrowException, IndexError) as error:
                raise TargetError(
                    f"{table} has no column {self.config.column} that can be read ({error}); set format.column="
                ) from error
            if len(column) != len(array) or column.null_count:
                raise TargetError(
                    f"{table} has {len(column) - column.null_count:,} names for {len(array):,} embeddings"
                )
            names = column.cast(pa.large_string()).to_pylist()
            yield ListedTargets(names, names)


def _number(path: Path) -> int:
    digits = path.stem.rpartition("_")[2]
    return int(digits) if digits.isdigit() else -1
