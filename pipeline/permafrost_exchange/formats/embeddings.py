"""Reader of embeddings as clip-retrieval writes them.

img_emb/img_emb_<n>.npy             [rows, d]
metadata/metadata_<n>.parquet       a row for each, with the image's path
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
from numpy.typing import NDArray

from permafrost.core.errors import first_line, require
from permafrost.storage.untrusted import MAX_NAMES_BYTES, iter_column
from permafrost_exchange.formats.npy_files import map_npy
from permafrost_exchange.target_reader import (
    NAMES_AT_ONCE,
    Arrays,
    ListedTargets,
    ReadRequest,
    TargetError,
    TargetForm,
    TargetReader,
    rows_of_parts,
)


class EmbeddingReader(TargetReader):
    """Parts of embeddings [n, d], each next to a Parquet file whose column names the rows."""

    turns_photographs = False

    def files(self) -> Iterator[Path]:
        yield from chain.from_iterable(self._pairs)

    @cached_property
    def _pairs(self) -> list[tuple[Path, Path]]:
        arrays = {_number(path): path for path in self.path.glob("img_emb/img_emb_*.npy")}
        tables = {_number(path): path for path in self.path.glob("metadata/metadata_*.parquet")}
        require(
            bool(arrays),
            f"path={self.path} has no img_emb/img_emb_<n>.npy; name the folder that clip-retrieval inference wrote",
        )
        if odd := sorted(arrays.keys() ^ tables.keys()):
            raise TargetError(
                f"{self.path}: part {odd[0]} has embeddings or metadata, but not both; {len(odd)} parts are so"
            )
        return [(arrays[number], tables[number]) for number in sorted(arrays)]

    @cached_property
    def _arrays(self) -> list[NDArray[Any]]:
        """Mapped embeddings of each part."""
        arrays = [map_npy(path) for path, _ in self._pairs]
        forms = {(array.ndim, array.shape[1:], array.dtype.str) for array in arrays}
        require(
            len(forms) == 1 and arrays[0].ndim == 2,
            f"{self.path}: img_emb has rows of several forms: {', '.join(sorted(map(str, forms)))}",
            TargetError,
        )
        return arrays

    def form(self) -> TargetForm:
        return TargetForm()

    def read(self, request: ReadRequest) -> Arrays:
        return {"pooled": rows_of_parts(self._arrays, request.numbers)}

    def listing(self) -> Iterator[ListedTargets]:
        for (_, table), array in zip(self._pairs, self._arrays, strict=True):
            count = 0
            for names in self._names(table):
                count += len(names) - names.null_count
                texts = names.cast(pa.large_string()).to_pylist()
                yield ListedTargets(texts, texts)
            require(
                count == len(array),
                f"{table} has {count:,} names for {len(array):,} embeddings",
                TargetError,
            )

    def _names(self, table: Path) -> Iterator[pa.Array]:
        column = self.config.column
        try:
            yield from iter_column(table, column, NAMES_AT_ONCE, MAX_NAMES_BYTES)
        except (OSError, ValueError, pa.ArrowException, LookupError) as error:
            raise TargetError(
                f"{table} has no column {column} that can be read ({first_line(error)}); set format.column="
            ) from error


def _number(path: Path) -> int:
    digits = path.stem.rpartition("_")[2]
    return int(digits) if digits.isdigit() else -1
