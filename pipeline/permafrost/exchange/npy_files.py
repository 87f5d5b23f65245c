"""Arrays of NumPy's files, mapped into memory once their headers were compared with their bytes.

Arrays of compressed .npz members are copied to a temporary file first.
"""

from __future__ import annotations

import math
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from permafrost.exchange.target_reader import (
    Arrays,
    ReadRequest,
    TargetError,
    TargetForm,
    TargetReader,
)
from permafrost.storage.files import open_atomically
from permafrost.storage.untrusted import FormatError, NpyHeader, read_npy_header

_HEADER = 2**16


def open_member(path: Path, name: str) -> NDArray[Any]:
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
            _checked_header(head, info.file_size, where)  # before anything of that size is written
            copy.write(head)
            while part := member.read(2**20):
                copy.write(part)
            copy.flush()
            return _map_npy(copy, 0, info.file_size, where)


def _checked_header(head: bytes, size: int, where: str) -> NpyHeader:
    """Read the header of a file of `size` bytes, which must be those that it promises."""
    try:
        header = read_npy_header(head, size)
    except FormatError as error:
        raise TargetError(f"{where} is no array of NumPy: {error}") from error
    if header.dtype.hasobject:
        raise TargetError(
            f"{where} holds Python objects, which are not unpickled; save numbers or texts"
        )
    expected = header.end + header.dtype.itemsize * math.prod(header.shape)
    if expected != size or not header.shape:
        raise TargetError(f"{where} has {size:,} bytes, and its header promises {expected:,}")
    return header


def _map_npy(file: IO[bytes], offset: int, size: int, where: str) -> NDArray[Any]:
    """Map the array of an .npy file that begins at an offset."""
    file.seek(offset)
    head = file.read(min(size, _HEADER))
    header = _checked_header(head, size, where)
    if 0 in header.shape:
        raise TargetError(f"{where} is empty")
    order = "F" if header.is_fortran else "C"
    start = offset + header.end
    return np.memmap(file, header.dtype, "r", start, header.shape, order)  # type: ignore[call-overload,no-any-return]


def map_npy(path: Path) -> NDArray[Any]:
    """Map the array of an .npy file, whose header is checked.

    Raises:
        TargetError: If it is another file.
    """
    with path.open("rb") as file:
        return _map_npy(file, 0, path.stat().st_size, str(path))


def write_npy(path: Path, count: int, parts: Iterator[NDArray[Any]], where: str) -> None:
    """Write an .npy file of rows that come in parts.

    Args:
        path: The file, whose folder is made.
        count: Number of all rows.
        parts: Rows [n, length] of the dtype of the first ones.
        where: Origin of the rows, for messages.

    Raises:
        TargetError: If the rows have several lengths.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    first: NDArray[Any] | None = None
    with open_atomically(path) as file:
        for rows in parts:
            if first is None:
                first = rows
                shape = (count, rows.shape[1])
                header = {"descr": rows.dtype.str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
            if rows.shape[1] != first.shape[1]:
                raise TargetError(
                    f"{where} has rows of {first.shape[1]} and of {rows.shape[1]} numbers"
                )
            file.write(rows.astype(first.dtype).tobytes())


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
