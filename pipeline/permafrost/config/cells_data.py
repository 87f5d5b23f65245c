"""Options of synthetic cell images (`data=cells`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Le

from permafrost.config.file_data import DataConfig


@dataclass(frozen=True, kw_only=True)
class CellsDataConfig(DataConfig):
    """Drawn cells of ten classes, with masks that mark the class-defining part (sources/cells.py)."""

    implementation: ClassVar[str] = "permafrost.sources.cells:CellsSource"

    kind: Literal["cells"] = "cells"
    seed: Annotated[int, Ge(0)] = 0
    """Seed of the drawn images."""
    image_size: Annotated[int, Ge(24), Le(512)] = 64
    """Side of an image in pixels."""
    train_records: Annotated[int, Ge(1)] = 2000
    """Records in split train, with the classes taking turns."""
    test_records: Annotated[int, Ge(1)] = 500
    """Records in split test, with the classes taking turns."""
