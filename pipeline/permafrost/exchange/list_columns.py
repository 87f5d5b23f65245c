"""Reader of Parquet files with columns of lists, as data sets of Hugging Face have them.

Parquet has no access to single rows, and the records of a shard are spread over the file. The lists of a column are
therefore copied once, in one pass, to an .npy file in format.cache, whose rows are mapped.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from permafrost.core.errors import require
from permafrost.exchange.npy_files import PartedReader, map_npy, write_npy
from permafrost.exchange.target_reader import (
    NAMES_AT_ONCE,
    ListedTargets,
    TargetError,
    reading,
    walk,
)

_KINDS = ("logits", "probabilities", "pooled")
_ROWS_AT_ONCE = 8192


class ListColumnReader(PartedReader):
    """Lists of equal length, of one or several Parquet files."""

    def files(self) -> Iterator[Path]:
        yield from [self.path] if self.path.is_file() else walk(self.path, ".parquet")

    def listing(self) -> Iterator[ListedTargets]:
        assert self._columns  # which checks all names of columns
        for path, file in self._opened.items():
            for batch in file.iter_batches(
                NAMES_AT_ONCE, columns=[self.config.column], use_threads=False
            ):
                if batch.column(0).null_count:
                    raise TargetError(f"{path}: column {self.config.column} has empty cells")
                names = batch.column(0).cast(pa.large_string()).to_pylist()
                yield ListedTargets(names, names)

    def open_parts(self) -> dict[str, list[NDArray[Any]]]:
        parts = {}
        for kind, column in self._columns.items():
            parts[kind] = [self._copied(path, column) for path in self._opened]
            self.require_alike(kind, parts[kind])
        return parts

    def _copied(self, path: Path, column: str) -> NDArray[Any]:
        """Map the copy of a column, which is written if it is missing."""
        stat = path.stat()
        name = f"{path.stem}-{column}-{stat.st_size:x}-{stat.st_mtime_ns:x}.npy"
        copy = Path(self.config.cache).absolute() / name
        if not copy.exists():
            where = f"{path}: column {column}"
            write_npy(
                copy,
                self._opened[path].metadata.num_rows,
                self._rows_of(path, column, where),
                where,
            )
        return map_npy(copy)

    def _rows_of(self, path: Path, column: str, where: str) -> Iterator[NDArray[Any]]:
        """Iterate over the lists of a column, [rows, length]; errors are those of reading, although it is copied."""
        with reading(where):
            for batch in self._opened[path].iter_batches(
                _ROWS_AT_ONCE, columns=[column], use_threads=False
            ):
                yield _lists(batch.column(0), where)

    @cached_property
    def _opened(self) -> dict[Path, pq.ParquetFile]:
        opened = {}
        for path in self.files():
            try:
                opened[path] = pq.ParquetFile(path, pre_buffer=False)
            except (OSError, pa.ArrowException) as error:
                raise TargetError(f"{path} cannot be read as Parquet: {error}") from error
        return opened

    @cached_property
    def _columns(self) -> dict[str, str]:
        """Column of each kind of target."""
        known = next(iter(self._opened.values())).schema_arrow.names
        columns = self.config.fields or {kind: kind for kind in _KINDS if kind in known}
        odd = [kind for kind in columns if kind not in _KINDS]
        require(not odd, f"format.fields names {', '.join(odd)}; Parquet has {', '.join(_KINDS)}")
        absent = [n for n in (self.config.column, *columns.values()) if n not in known]
        require(
            bool(columns) and not absent,
            f"{self.path} has no column {', '.join(absent) or ' or '.join(_KINDS)}, but {', '.join(known)}; set "
            "format.column= and format.fields={logits: a_column}",
        )
        return dict(columns)


def _lists(column: pa.Array, where: str) -> NDArray[Any]:
    """Return lists of numbers as [rows, length]."""
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    is_list = any(is_kind(column.type) for is_kind in kinds)
    values = column.flatten() if is_list else column
    is_number = pa.types.is_floating(values.type) or pa.types.is_integer(values.type)
    if not is_list or not is_number or column.null_count or values.null_count:
        raise TargetError(f"{where} is {column.type} in place of a list of numbers in each row")
    if not pa.types.is_fixed_size_list(column.type):
        lengths = np.diff(column.offsets.to_numpy())
        if len(lengths) and lengths.min() != lengths.max():
            raise TargetError(f"{where} has lists of {lengths.min()} to {lengths.max()} numbers")
    numbers: NDArray[Any] = values.to_numpy(zero_copy_only=False)
    if numbers.dtype.kind != "f":
        numbers = numbers.astype(np.float32)
    return numbers.reshape(len(column), -1)
