"""Reader of embeddings as clip-retrieval writes them.

img_emb/img_emb_<n>.npy             [rows, d]
metadata/metadata_<n>.parquet       a row for each, with the image's path
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from permafrost.core.errors import first_line, require
from permafrost.exchange.npy_files import PartedReader, map_npy
from permafrost.exchange.target_reader import ListedTargets, TargetError


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
                    f"{table} has no column {self.config.column} that can be read ({first_line(error)}); set "
                    "format.column="
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
