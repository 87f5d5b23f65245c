"""Reader of the logits that TinyViT's training saves for an epoch (microsoft/Cream).

    rank<r>-keys.txt     a name per line
    rank<r>-values.bin   a record per line: seed int32, k classes int16, k probabilities float16

The seed draws a view that only that code can draw again, so the views of these targets are not known.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from permafrost.core.errors import require
from permafrost.storage.files import file_at, iter_lines
from permafrost_exchange.target_reader import (
    Arrays,
    ListedTargets,
    ReadRequest,
    TargetError,
    TargetForm,
    TargetReader,
    parts_of,
    rows_of_parts,
    top_outcomes,
)

_SEED_BYTES, _OUTCOME_BYTES = 4, 4


class TinyViTReader(TargetReader):
    """The largest logits of one view of each record. The views are not recorded."""

    turns_photographs = False

    def files(self) -> Iterator[Path]:
        yield from chain.from_iterable(self._pairs)

    @cached_property
    def _pairs(self) -> list[tuple[Path, Path]]:
        keys = sorted(self.path.glob("rank*-keys.txt"))
        require(
            bool(keys),
            f"path={self.path} has no rank<r>-keys.txt; name the folder of one epoch, logits_top<k>_epoch<e>",
        )
        pairs = [
            (path, path.with_name(path.name.replace("-keys.txt", "-values.bin"))) for path in keys
        ]
        for _, values in pairs:
            require(values.is_file(), f"{values} is missing next to its keys", TargetError)
        return pairs

    def listing(self) -> Iterator[ListedTargets]:
        yield from (
            ListedTargets(part, part)
            for part in parts_of(name for keys, _ in self._pairs for name in iter_lines(keys))
        )

    def form(self) -> TargetForm:
        return TargetForm(
            frame="unknown",
            classes=self.config.classes,
            temperatures=(self.config.temperature,),
            repeats=True,  # the last batch of an epoch is filled up with other records
            remarks=(
                "each target is of a random view that only TinyViT's code can draw again; students are trained on "
                "them with store.unknown_views=true alone",
            ),
        )

    @cached_property
    def _values(self) -> list[NDArray[Any]]:
        """Records of each file, mapped."""
        arrays: list[NDArray[Any]] = []
        for keys, values in self._pairs:
            count, size = sum(1 for _ in iter_lines(keys)), values.stat().st_size
            outcomes, odd = divmod(size - _SEED_BYTES * count, _OUTCOME_BYTES * max(count, 1))
            require(
                not odd and outcomes >= 1,
                f"{values} has {size:,} bytes, which do not divide into {count:,} records of equal size",
                TargetError,
            )
            dtype = np.dtype(
                [("seed", "<i4"), ("classes", "<i2", (outcomes,)), ("values", "<f2", (outcomes,))]
            )
            with file_at(values).open() as file:
                arrays.append(np.memmap(file, dtype, "r"))
        require(
            len({array.dtype for array in arrays}) == 1,
            f"{self.path}: the ranks have saved different numbers of classes",
            TargetError,
        )
        return arrays

    def read(self, request: ReadRequest) -> Arrays:
        rows = rows_of_parts(self._values, request.numbers)
        try:
            top = top_outcomes(
                rows["values"],
                rows["classes"].astype(np.uint16),  # 21,841 classes fit
                self.config.classes,
                self.config.temperature,
            )
        except ValueError as error:
            raise TargetError(f"{self.path}, near {request.names[0]}: {error}") from error
        return top
