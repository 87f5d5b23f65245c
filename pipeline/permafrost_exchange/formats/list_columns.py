"""Reader of Parquet files with columns of lists, as data sets of Hugging Face have them.

The lists of a column are copied once to format.cache, where single rows can be read (sources/column_copies.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from permafrost.core.errors import require
from permafrost.sources.column_copies import ColumnCopy
from permafrost.storage.files import file_at
from permafrost.storage.untrusted import MAX_NAMES_BYTES, iter_column, open_parquet_file
from permafrost_exchange.formats.row_reader import RowReader
from permafrost_exchange.target_reader import (
    NAMES_AT_ONCE,
    Arrays,
    ListedTargets,
    ReadRequest,
    TargetError,
    reading,
    rows_of_parts,
    walk,
)

_KINDS = ("logits", "probabilities", "pooled", "map", "target_class")
_OF_MAPS = ("map", "target_class")
_ROWS_AT_ONCE = 8192


class _Lists:
    """Lists of equal length of one file, as rows."""

    def __init__(self, copy: ColumnCopy, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        self._copy = copy
        self.dtype = dtype
        self.shape = (copy.num_rows, *shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Return rows [n, *shape]."""
        data = b"".join(self._copy.read(row) or b"" for row in rows.tolist())
        return np.frombuffer(data, self.dtype).reshape(len(rows), *self.shape[1:])


class ListColumnReader(RowReader):
    """Lists of equal length, of one or several Parquet files."""

    def files(self) -> Iterator[Path]:
        yield from [self.path] if self.path.is_file() else walk(self.path, ".parquet")

    def sha256_of(self, path: Path) -> str:
        copies = next(iter(self._copies.values()))
        return copies[path].sha256 if path in copies else file_at(path).sha256()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {kind: parts[0].shape[1:] for kind, parts in self._parts.items()}

    def listing(self) -> Iterator[ListedTargets]:
        for path in self._opened:
            for names in iter_column(path, self.config.column, NAMES_AT_ONCE, MAX_NAMES_BYTES):
                require(
                    not names.null_count,
                    f"{path}: column {self.config.column} has empty cells",
                    TargetError,
                )
                texts = names.cast(pa.large_string()).to_pylist()
                yield ListedTargets(texts, texts)
            next(iter(self._copies.values()))[path].require_unchanged()

    def rows(self, request: ReadRequest) -> Arrays:
        return {kind: rows_of_parts(parts, request.numbers) for kind, parts in self._parts.items()}

    @cached_property
    def _parts(self) -> dict[str, list[_Lists]]:
        """Rows of each kind of target, in the order of the files."""
        parts = {}
        for kind, copies in self._copies.items():
            parts[kind] = [
                _Lists(
                    copy, _dtype_of(self._opened[path], copy.column), _shape_of(path, copy.column)
                )
                for path, copy in copies.items()
            ]
            forms = {(part.shape[1:], part.dtype.str) for part in parts[kind]}
            require(
                len(forms) == 1,
                f"{self.path}: {kind} has rows of several forms: {', '.join(sorted(map(str, forms)))}",
                TargetError,
            )
        return parts

    @cached_property
    def _copies(self) -> dict[str, dict[Path, ColumnCopy]]:
        """Copy of the column of each kind of target, by file."""
        cache = Path(self.config.cache)
        return {
            kind: {path: ColumnCopy(path, column, cache, _rows_of) for path in self._opened}
            for kind, column in self._columns.items()
        }

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_copies": self._copies}

    @cached_property
    def _opened(self) -> dict[Path, pq.FileMetaData]:
        """Footer of each file that has rows."""
        opened = {}
        for path in self.files():
            try:
                with open_parquet_file(path) as file:
                    opened[path] = file.metadata
            except (OSError, pa.ArrowException) as error:
                raise TargetError(f"{path} cannot be read as Parquet: {error}") from error
        nonempty = {path: metadata for path, metadata in opened.items() if metadata.num_rows}
        require(bool(nonempty), f"{self.path} has no rows; correct path=", TargetError)
        return nonempty

    def _fields(self) -> dict[str, str]:
        """Return the column of each kind of target: those of the options, or those of the first file.

        Maps are nested lists. Flat ones, as in a share of form=huggingface, have lost their shape and are left out.
        """
        types = {
            field.name: field.type
            for field in next(iter(self._opened.values())).schema.to_arrow_schema()
        }
        has_maps = _is_list(getattr(types.get("map"), "value_type", pa.null()))
        kinds = (kind for kind in _KINDS if kind in types and (has_maps or kind not in _OF_MAPS))
        return self.config.fields or {kind: kind for kind in kinds}

    @cached_property
    def _columns(self) -> dict[str, str]:
        """Column of each kind of target."""
        known = next(iter(self._opened.values())).schema.to_arrow_schema().names
        for path, metadata in self._opened.items():
            names = metadata.schema.to_arrow_schema().names
            for name in known:
                if names.count(name) != 1 and name in (
                    self.config.column,
                    *self._fields().values(),
                ):
                    raise TargetError(
                        f"{path} has {names.count(name)} columns {name}; all files have one"
                    )
        columns = self._fields()
        odd = [kind for kind in columns if kind not in _KINDS]
        require(not odd, f"format.fields names {', '.join(odd)}; Parquet has {', '.join(_KINDS)}")
        absent = [
            column for column in (self.config.column, *columns.values()) if column not in known
        ]
        require(
            bool(columns) and not absent,
            f"{self.path} has no column {', '.join(absent) or ' or '.join(_KINDS)}, but {', '.join(known)}; set "
            "format.column= and format.fields={logits: a_column}",
        )
        return dict(columns)


def _dtype_of(metadata: pq.FileMetaData, column: str) -> np.dtype[Any]:
    """Return the type in which the numbers of a column are copied: their own if they are floats, else float32."""
    kind = metadata.schema.to_arrow_schema().field(column).type
    while _is_list(kind):
        kind = kind.value_type
    return np.dtype(kind.to_pandas_dtype() if pa.types.is_floating(kind) else np.float32)


def _rows_of(path: Path, column: str) -> Iterator[pa.Array]:
    """Iterate over the lists of a column as bytes; errors are those of reading, although it is copied."""
    where, shape = f"{path}: column {column}", None
    with reading(where):
        for cells in iter_column(path, column, _ROWS_AT_ONCE):
            rows = _lists(cells, where)
            shape = rows.shape[1:] if shape is None else shape
            require(0 not in shape, f"{where} has lists without a number", TargetError)
            if rows.shape[1:] != shape:
                rows_of = " and of ".join(
                    " x ".join(map(str, each)) for each in (shape, rows.shape[1:])
                )
                raise TargetError(f"{where} has rows of {rows_of} numbers")
            width = prod(shape) * rows.dtype.itemsize
            yield pa.FixedSizeBinaryArray.from_buffers(
                pa.binary(width), len(rows), [None, pa.py_buffer(np.ascontiguousarray(rows))]
            ).cast(pa.large_binary())


def _shape_of(path: Path, column: str) -> tuple[int, ...]:
    """Return the shape of a row of a column."""
    where = f"{path}: column {column}"
    with reading(where):
        return _lists(next(iter_column(path, column, 1)), where).shape[1:]


def _is_list(kind: pa.DataType) -> bool:
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(is_kind(kind) for is_kind in kinds)


def _lists(column: pa.Array, where: str) -> NDArray[Any]:
    """Return numbers, or lists of them which may be nested, as [rows, *shape]."""
    values, shape, has_nulls = column, [len(column)], bool(column.null_count)
    while _is_list(values.type):
        if not pa.types.is_fixed_size_list(values.type):
            lengths = np.diff(values.offsets.to_numpy())
            if len(lengths) and lengths.min() != lengths.max():
                raise TargetError(
                    f"{where} has lists of {lengths.min()} to {lengths.max()} numbers"
                )
        count, values = len(values), values.flatten()
        shape.append(len(values) // max(count, 1))
        has_nulls = has_nulls or bool(values.null_count)
    is_list = pa.types.is_floating(values.type) and len(shape) > 1
    require(
        not has_nulls and (is_list or pa.types.is_integer(values.type)),
        f"{where} is {column.type} in place of a list of numbers in each row",
        TargetError,
    )
    numbers: NDArray[Any] = values.to_numpy(zero_copy_only=False)
    if numbers.dtype.kind != "f":
        numbers = numbers.astype(np.float32)
    return numbers.reshape(shape)
