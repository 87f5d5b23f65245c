"""Untrusted files: sizes in their headers are compared with limits before anything is allocated.

Parquet, Blosc, npy and safetensors. The libraries that read them trust these headers. An error says what is
wrong, and the reader of the file adds its name.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from tokenize import TokenError
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from permafrost.core.errors import require
from permafrost.storage.files import file_at

if TYPE_CHECKING:
    from torch import Tensor


class FormatError(ValueError):
    """File that is not what its format, or its reader, allows."""


MAX_NAMES_BYTES = 2**26
"""Bytes that the names of any file may take when they are decompressed."""
_ANY_BYTES = 2**28
"""Bytes that any other data may take."""
_PART_BYTES = 2**26
"""Bytes that are decompressed at once."""
_MAX_COMPRESSION = 100
"""Maximum ratio of uncompressed to stored bytes of larger data. Names and one-hot rows compress by 10 to 50."""


def require_plausible(size: int, stored: int, noun: str, any_bytes: int = _ANY_BYTES) -> None:
    """Check that compressed data do not take far more room than any real ones, before they are decompressed.

    Args:
        size: Bytes that they promise, or have taken so far.
        stored: Bytes in the file.
        noun: Name of the data, for the message.
        any_bytes: Bytes that any data may take.

    Raises:
        FormatError: If they do.
    """
    require(
        size <= max(any_bytes, _MAX_COMPRESSION * stored),
        f"{noun} would take {size:,} bytes or more, from {stored:,} compressed ones; if that is right, save it "
        "without compression, in Parquet also with use_dictionary=False",
        FormatError,
    )


# ---- Parquet -------------------------------------------------------------------------------------


MAX_TABLE_BYTES = 2**26
"""Largest size of a table of a store, as a file and in memory. Commit markers of 100,000 records and tables of 50,000
shards are smaller."""
_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "FLOAT": 4, "DOUBLE": 8} | {
    "FIXED_LEN_BYTE_ARRAY": 32  # digests
}
"""Bytes of a value by its type in the file."""
_MAX_PARTS = 10_000
"""Largest number of any list in the footer of a table."""


def open_parquet(data: bytes, texts: list[str] | None = None) -> pq.ParquetFile:
    """Open a Parquet file in memory.

    Args:
        data: The whole file.
        texts: Columns that are read as they are stored, each different value once; None for no column.
    """
    return pq.ParquetFile(
        pa.BufferReader(data),
        pre_buffer=False,
        read_dictionary=texts,
        thrift_container_size_limit=_MAX_PARTS,
    )


def table_bytes(metadata: pq.FileMetaData, data: bytes, limit: int = MAX_TABLE_BYTES) -> int:
    """Return an upper bound of the bytes of a table's values in memory, from its footer.

    A text that is repeated is stored once, so the bound of texts is their number times the bytes of all different ones.
    If that is more than a sixteenth of the limit, their lengths are added up, without the texts.

    Args:
        metadata: Footer of the file.
        data: The whole file.
        limit: Number of bytes that the bound will be compared with.

    Raises:
        FormatError: If a column has no physical type.
    """
    stored = total = 0
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        stored += row_group.total_byte_size
        for number in range(row_group.num_columns):
            column = row_group.column(number)
            is_text = column.physical_type == "BYTE_ARRAY"
            size = column.total_uncompressed_size if is_text else _WIDTHS.get(column.physical_type)
            if size is None:
                raise FormatError(f"column {column.path_in_schema} has no physical type")
            most = column.num_values * size
            if is_text and most > limit // 16 and column.num_values <= MAX_TABLE_BYTES:
                most = _text_bytes(data, group, column.path_in_schema)
            total += most
    return max(stored, total)


def iter_column(
    path: Path, column: str, most_rows: int, any_bytes: int = _ANY_BYTES
) -> Iterator[pa.Array]:
    """Iterate over parts of a column of a Parquet file whose values take a plausible room.

    A text that is repeated is stored once, so texts are read as their different values, and counted before they are
    written out.

    Args:
        path: The file.
        column: Name of a column of texts, or of lists of numbers.
        most_rows: Largest number of rows of a part; fewer if lists or texts are long.
        any_bytes: Bytes that the column of any file may take.

    Raises:
        FormatError: If they take far more than the file.
        pa.ArrowException: If the file cannot be read.
        OSError: If it cannot be opened, or is not a regular file.
    """
    stored, noun = path.stat().st_size, f"column {column}"
    with open_parquet_file(path) as file:
        schema = file.metadata.schema
        leaves = [schema.column(place) for place in range(file.metadata.num_columns)]
        is_text = any(leaf.path == column and leaf.physical_type == "BYTE_ARRAY" for leaf in leaves)
    with open_parquet_file(path, [column] if is_text else None) as file:
        promised = _bytes_of_column(file.metadata, column)
        require_plausible(promised, stored, noun, any_bytes)
        row_bytes = promised // max(file.metadata.num_rows, 1)
        rows = max(1, min(most_rows, _PART_BYTES // max(row_bytes, 1)))
        total = 0
        for batch in file.iter_batches(rows, columns=[column], use_threads=False):
            array = batch.column(0)
            total += _written_out(array)
            require_plausible(total, stored, noun, any_bytes)
            yield from _parts_of(array)


def iter_cells(path: Path, column: str) -> Iterator[pa.Array]:
    """Iterate over a column of bytes, such as images, in parts of a few rows.

    Args:
        path: The Parquet file.
        column: Name of a column of bytes, or of a structure with some.

    Raises:
        FormatError: If the cells take far more room than the file.
        pa.ArrowException: If the file cannot be read.
        OSError: If it cannot be opened, or is not a regular file.
    """
    stored = path.stat().st_size
    with open_parquet_file(path) as file:
        groups = range(file.metadata.num_row_groups)
        largest = max(
            (file.metadata.row_group(group).total_byte_size for group in groups), default=1
        )
        rows = max(1, min(64, _PART_BYTES // 4 // max(largest, 1)))
        total = 0
        for batch in file.iter_batches(rows, columns=[column], use_threads=False):
            total += batch.nbytes
            require_plausible(total, stored, f"column {column}")
            yield batch.column(0)


def _written_out(array: pa.Array) -> int:
    """Return the bytes of an array whose texts may be stored once each."""
    if not pa.types.is_dictionary(array.type):
        return int(array.nbytes)
    lengths = pc.binary_length(array.dictionary).cast(pa.int64()).take(array.indices)
    return (pc.sum(lengths).as_py() or 0) + 8 * len(array)


def _parts_of(array: pa.Array) -> Iterator[pa.Array]:
    """Iterate over parts of an array, with texts written out."""
    if not pa.types.is_dictionary(array.type):
        yield array
        return
    parts = 1 + _written_out(array) // _PART_BYTES
    rows = -(-len(array) // parts)
    yield from (
        array.slice(start, rows).dictionary_decode() for start in range(0, len(array), max(rows, 1))
    )


def open_parquet_file(path: Path, texts: list[str] | None = None) -> pq.ParquetFile:
    """Open a Parquet file by its path; a pipe or a device is refused.

    Args:
        path: The file.
        texts: Columns that are read as they are stored, each different value once; None for no column.

    Raises:
        pa.ArrowException: If it is another file.
        OSError: If it cannot be opened, or is not a regular file.
    """
    file_at(path).open().close()
    return pq.ParquetFile(path, pre_buffer=False, read_dictionary=texts)


def _bytes_of_column(metadata: pq.FileMetaData, column: str) -> int:
    """Return the bytes of a column's numbers; a text counts as one byte."""
    total = 0
    for place in range(metadata.num_columns):
        leaf = metadata.schema.column(place)
        if leaf.path == column or leaf.path.startswith(f"{column}."):
            width = leaf.length if leaf.length > 0 else _WIDTHS.get(leaf.physical_type, 1)
            groups = range(metadata.num_row_groups)
            total += width * sum(
                metadata.row_group(group).column(place).num_values for group in groups
            )
    return total


def _text_bytes(data: bytes, group: int, column: str) -> int:
    """Return the bytes of all texts of a column in a group of rows."""
    file = open_parquet(data, [column])
    arrays = file.read_row_group(group, columns=[column], use_threads=False).columns[0].chunks
    leaves = [leaf for array in arrays for leaf in _leaves(array)]
    lengths = (pc.binary_length(leaf.dictionary).take(leaf.indices) for leaf in leaves)
    return sum(pc.sum(column.cast(pa.int64())).as_py() or 0 for column in lengths)


def _leaves(array: pa.Array) -> list[pa.Array]:
    """Return the arrays of values in an array of lists and structures."""
    if not pa.types.is_nested(array.type):
        return [array]
    parts = array.flatten()
    return [
        leaf for part in (parts if isinstance(parts, list) else [parts]) for leaf in _leaves(part)
    ]


# ---- Blosc ---------------------------------------------------------------------------------------


def decompress_blosc(data: bytes, size: int) -> NDArray[np.uint8]:
    """Return `size` bytes from Blosc data.

    Blosc itself trusts its header, and reads and writes beyond its buffers if the header is wrong.

    Raises:
        FormatError: If the data are damaged, or have another size.
    """
    import numcodecs

    # Places in Blosc's header of the numbers of bytes before and after compression.
    sizes = [int.from_bytes(data[part], "little") for part in (slice(4, 8), slice(12, 16))]
    require(sizes == [size, len(data)], "is damaged: its chunk has another size", FormatError)
    out = np.empty(size, np.uint8)
    try:
        numcodecs.Blosc().decode(data, out=out)
    except (RuntimeError, ValueError) as error:
        raise FormatError(f"cannot be decompressed ({error})") from error
    return out


# ---- npy -----------------------------------------------------------------------------------------


class NpyHeader(NamedTuple):
    """Header of an npy file."""

    shape: tuple[int, ...]
    is_fortran: bool
    dtype: np.dtype[Any]
    end: int


def read_npy_header(data: bytes, size: int | None = None) -> NpyHeader:
    """Read the header of an npy file.

    Args:
        data: Beginning of the file.
        size: Bytes of the whole file; None if `data` is all of it.

    Raises:
        FormatError: If it is not an npy file, or its shape is larger than the file.
    """
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, is_fortran, dtype = read(file)
    except _HEADER_ERRORS as error:
        kind = "it holds several arrays" if data.startswith(b"PK") else "it is not an npy file"
        raise FormatError(kind) from error
    most = len(data) if size is None else size
    require(
        all(0 <= length <= most for length in shape), f"its shape is {tuple(shape)}", FormatError
    )
    return NpyHeader(tuple(shape), is_fortran, dtype, file.tell())


_HEADER_ERRORS = (
    *(ValueError, KeyError, TypeError, SyntaxError, TokenError),
    *(RecursionError, MemoryError, OverflowError),
)


def parse_npy(data: bytes, kinds: str, shape: tuple[int | None, ...]) -> NDArray[Any]:
    """Return the array of an npy file that someone else may have written, with finite values, read-only.

    Nothing of the size that the header declares is allocated before it is compared with the bytes.

    Args:
        data: Bytes of the file.
        kinds: Kinds of values that are accepted, as `numpy.dtype.kind` names them.
        shape: Length of each axis, None for any.

    Raises:
        FormatError: If it is another file, kind or shape, or if a value is not finite.
    """
    if (header := read_npy_header(data)).dtype.kind not in kinds:
        raise FormatError(f"its values are of type {header.dtype}")
    if len(header.shape) != len(shape) or any(
        wanted not in (None, length) for wanted, length in zip(shape, header.shape, strict=True)
    ):
        raise FormatError(f"its shape is {header.shape}")
    size, body = header.dtype.itemsize * math.prod(header.shape), memoryview(data)[header.end :]
    require(
        len(body) == size, f"it has {len(body):,} bytes of values in place of {size:,}", FormatError
    )
    order: Literal["F", "C"] = "F" if header.is_fortran else "C"
    values: NDArray[Any] = np.frombuffer(body, header.dtype).reshape(header.shape, order=order)
    require(np.isfinite(values).all(), "some of its values are not finite numbers", FormatError)
    return values


# ---- safetensors ---------------------------------------------------------------------------------


_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 2**22
"""Bytes of the header of some 20,000 tensors with long names, which are parsed in seconds."""
_METADATA = "__metadata__"


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a safetensors file by its name.

    Raises:
        OSError: If the file cannot be read.
        FormatError: If it is not a safetensors file.
    """
    header = _parse_tensor_header(path)
    try:
        return {
            name: tuple(int(length) for length in entry["shape"])
            for name, entry in header.items()
            if name != _METADATA
        }
    except (ValueError, TypeError, KeyError) as error:
        raise FormatError("its header is not that of safetensors") from error


def tensor_metadata(path: Path) -> dict[str, str]:
    """Return the metadata texts of a safetensors file.

    Raises:
        OSError: If the file cannot be read.
        FormatError: If it is not a safetensors file.
    """
    texts = _parse_tensor_header(path).get(_METADATA, {})
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise FormatError("its header is not that of safetensors")
    return texts


def _parse_tensor_header(path: Path) -> dict[str, Any]:
    text = _tensor_header(path)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError("its header is not that of safetensors") from error
    if not isinstance(header, dict):
        raise FormatError("its header is not that of safetensors")
    return header


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file by their names, on the CPU.

    Raises:
        OSError: If the file cannot be read.
        FormatError: If it is not a safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _tensor_header(path)
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise FormatError(str(error)) from error
    return tensors


def _tensor_header(path: Path) -> bytes:
    """Return the header of a file. Raises OSError or FormatError."""
    with file_at(path).open() as file:
        if (size := int.from_bytes(file.read(_LENGTH_BYTES), "little")) > _MAX_HEADER_BYTES:
            raise FormatError(
                f"its header has {size:,} bytes, more than the {_MAX_HEADER_BYTES:,} of any network"
            )
        return file.read(size)
