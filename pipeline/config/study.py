"""Options of the judges that ask how interpretable a student is (`evaluate.<judge>`; Han et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.config.errors import require


@dataclass(frozen=True, kw_only=True)
class ClassSimilarityOptions:
    """Of judges=class_similarity."""

    tau: float = 1.0
    """Temperature of the probabilities."""
    similarity: str | None = None
    """What else to compare with than the teacher's own class means: a file with a matrix [K, K] (.npy), or of text
    with the superclass of each class in a line, in label order, as the 20 coarse classes of CIFAR-100."""

    def __post_init__(self) -> None:
        require(self.tau > 0, f"evaluate.class_similarity.tau must be > 0, got {self.tau}")


@dataclass(frozen=True, kw_only=True)
class FiveBandOptions:
    """Of judges=five_band."""

    grid: Literal["legacy", "v2"] = "legacy"
    """Of the soft score: how far thresholds move towards 0. legacy: 11 steps of 0.02, from (0.3, 0.7) to (0.1, 0.5);
    v2: 56 steps of 0.005, to (0.025, 0.425)."""
