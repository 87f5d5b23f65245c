"""Synthetic cells (`data=cells`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.core.errors import require


@dataclass(frozen=True, kw_only=True)
class CellsDataConfig:
    """Drawn cells of ten classes, with masks that say which part makes the class (pipeline/sources/cells.py)."""

    kind: Literal["cells"] = "cells"
    seed: int = 0
    image_size: int = 64
    """Pixels a side."""
    train_records: int = 2000
    """Of split train, the classes in turn; of split test `test_records`."""
    test_records: int = 500

    def __post_init__(self) -> None:
        require(self.seed >= 0, f"data.seed must be >= 0, got {self.seed}")
        require(
            24 <= self.image_size <= 512,
            f"data.image_size must be in [24, 512], where a cell's parts are pixels, got {self.image_size}",
        )
        for name in ("train_records", "test_records"):
            require(
                getattr(self, name) >= 1, f"data.{name} must be >= 1, got {getattr(self, name)}"
            )
