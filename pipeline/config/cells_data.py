"""Synthetic cells (`data=cells`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Le

from pipeline.config.file_data import DataConfig


@dataclass(frozen=True, kw_only=True)
class CellsDataConfig(DataConfig):
    """Drawn cells of ten classes, with masks that say which part makes the class (pipeline/sources/cells.py)."""

    implementation: ClassVar[str] = "pipeline.sources.cells:CellsSource"

    kind: Literal["cells"] = "cells"
    seed: Annotated[int, Ge(0)] = 0
    image_size: Annotated[int, Ge(24), Le(512)] = 64
    """Pixels a side."""
    train_records: Annotated[int, Ge(1)] = 2000
    """Of split train, the classes in turn; of split test `test_records`."""
    test_records: Annotated[int, Ge(1)] = 500
