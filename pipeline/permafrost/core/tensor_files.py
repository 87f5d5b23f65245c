"""Files of tensors (safetensors), whose header is bounded and read before anything that it describes is allocated.

8 bytes with the length of the header, the header as JSON: {name: {dtype, shape, data_offsets}}, the values
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

_LENGTH_BYTES = 8
_MOST_HEADER_BYTES = 2**22
"""Bytes of the header of some 20,000 tensors with long names, which are parsed in seconds."""
_METADATA = "__metadata__"


class TensorFileError(ValueError):
    """File that has no tensors that can be read. The message says why, and the reader of the file adds its name."""


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a file by its name. Raises OSError or TensorFileError."""
    header = _parse_header(path)
    try:
        return {
            name: tuple(int(length) for length in entry["shape"])
            for name, entry in header.items()
            if name != _METADATA
        }
    except (ValueError, TypeError, KeyError) as error:
        raise TensorFileError("its header is not that of safetensors") from error


def read_metadata(path: Path) -> dict[str, str]:
    """Return the texts of a file beside its tensors. Raises OSError or TensorFileError."""
    texts = _parse_header(path).get(_METADATA, {})
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise TensorFileError("its header is not that of safetensors")
    return texts


def _parse_header(path: Path) -> dict[str, Any]:
    try:
        header = json.loads(_read_header(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, TensorFileError):
            raise
        raise TensorFileError("its header is not that of safetensors") from error
    if not isinstance(header, dict):
        raise TensorFileError("its header is not that of safetensors")
    return header


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by their names, on the CPU. Raises OSError or TensorFileError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _read_header(path)
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise TensorFileError(str(error)) from error
    return tensors


def _read_header(path: Path) -> bytes:
    """Return the header of a file. Raises OSError or TensorFileError."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if size > _MOST_HEADER_BYTES:
            raise TensorFileError(
                f"its header has {size:,} bytes, more than the {_MOST_HEADER_BYTES:,} of any network"
            )
        return file.read(size)
