"""Arrays of NumPy's files, mapped into memory once their headers were compared with their bytes.

Arrays of compressed .npz members are copied to a temporary file first.
"""

from __future__ import annotations

import io
import math
import tempfile
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from permafrost.core.errors import require
from permafrost.storage.files import file_at, open_size
from permafrost.storage.untrusted import (
    FormatError,
    NpyHeader,
    read_npy_header,
    require_plausible,
)
from permafrost_exchange.target_reader import TargetError

_HEADER = 2**16


def open_member(path: Path, name: str) -> NDArray[Any]:
    """Map an array of an .npz file into memory, from a temporary copy if it is compressed."""
    where = f"{path}: {name}"
    with file_at(path).open() as file, zipfile.ZipFile(file) as archive:
        if (info := archive.getinfo(f"{name}.npy")).compress_type == zipfile.ZIP_STORED:
            file.seek(info.header_offset + 26)
            sizes = file.read(4)
            start = 30 + int.from_bytes(sizes[:2], "little") + int.from_bytes(sizes[2:], "little")
            return _map_npy(file, info.header_offset + start, info.file_size, where)
        try:
            require_plausible(info.file_size, info.compress_size, f"array {name}")
        except FormatError as error:
            raise TargetError(f"{path}: {error}") from error
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
        raise TargetError(f"{where} is not a NumPy array: {error}") from error
    require(
        not header.dtype.hasobject,
        f"{where} holds Python objects, which are not unpickled; save numbers or texts",
        TargetError,
    )
    expected = header.end + header.dtype.itemsize * math.prod(header.shape)
    require(
        expected == size and header.shape != (),
        f"{where} has {size:,} bytes, and its header promises {expected:,}",
        TargetError,
    )
    return header


def member_names(path: Path) -> list[str]:
    """Return the names of the members of an .npz file.

    Raises:
        TargetError: If it is another file.
    """
    try:
        with file_at(path).open() as file, zipfile.ZipFile(file) as archive:
            return archive.namelist()
    except (OSError, zipfile.BadZipFile) as error:
        raise TargetError(f"{path} cannot be read as .npz: {error}") from error


def _map_npy(file: IO[bytes] | io.FileIO, offset: int, size: int, where: str) -> NDArray[Any]:
    """Map the array of an .npy file that begins at an offset."""
    file.seek(offset)
    header = _checked_header(file.read(min(size, _HEADER)), size, where)
    require(0 not in header.shape, f"{where} is empty", TargetError)
    order = "F" if header.is_fortran else "C"
    return np.memmap(file, header.dtype, "r", offset + header.end, header.shape, order)  # type: ignore[call-overload,no-any-return]


def map_npy(path: Path) -> NDArray[Any]:
    """Map the array of an .npy file, whose header is checked.

    Raises:
        TargetError: If it is another file.
    """
    with file_at(path).open() as file:
        return _map_npy(file, 0, open_size(file), str(path))
