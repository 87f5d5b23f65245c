"""Options of the judges that ask how interpretable a student is (`evaluate.<judge>`; Han et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.core.errors import require


@dataclass(frozen=True, kw_only=True)
class GradientAlignmentOptions:
    """Of judges=gradient_alignment."""

    records: int = 2048
    """Of each split, balanced over classes; two backward passes each."""

    def __post_init__(self) -> None:
        require(
            self.records >= 1,
            f"evaluate.gradient_alignment.records must be >= 1, got {self.records}",
        )


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


@dataclass(frozen=True, kw_only=True)
class DissectionOptions:
    """Of judges=dissection."""

    path: str | None = None
    """Folder of an unpacked Broden (broden1_224); null is a small set that is drawn (pipeline/dissection/drawn.py)."""
    images: int | None = None
    """The first of the set; null takes all of Broden, and draws 400."""
    stage: int | None = None
    """Whose channels are the units, from 1; null is the deepest."""
    quantile: float = 0.005
    """Of a unit's activations, over all images and places, the part above its threshold."""
    iou: float = 0.05
    """From which on a unit detects its concept."""
    cat_presence: Literal["mask", "image"] = "mask"
    """Which images count for a concept's category: where pixels at which the unit fires carry it (the published code),
    or where any do (the paper's text)."""
    legacy_norm: bool = False
    """Normalise as the published code does, by one standard deviation for all channels, and not as the network was
    trained."""
    top_units: int = 8
    """Of the highest IoU: named, and shown with `top_images` images that excite them most."""
    top_images: int = 4

    def __post_init__(self) -> None:
        section = "evaluate.dissection"
        require(0 < self.quantile < 1, f"{section}.quantile must be in (0, 1), got {self.quantile}")
        require(0 < self.iou <= 1, f"{section}.iou must be in (0, 1], got {self.iou}")
        for name in ("images", "stage"):
            value = getattr(self, name)
            require(
                value is None or value >= 1, f"{section}.{name} must be >= 1 or null, got {value}"
            )
        require(self.top_units >= 0, f"{section}.top_units must be >= 0, got {self.top_units}")
        require(self.top_images >= 1, f"{section}.top_images must be >= 1, got {self.top_images}")


@dataclass(frozen=True, kw_only=True)
class DiffroarOptions:
    """Of judges=diffroar. It trains len(keep) * (2 len(seeds) + 1) + 1 probes and holds all records in memory, 15 bytes
    a pixel (7 with unit=pixel)."""

    keep: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
    """Fractions of the coordinates that a probe sees."""
    unit: Literal["coord", "pixel"] = "coord"
    """What is ranked and kept: each channel of a pixel for itself, or the pixel."""
    train_split: str = "train"
    """Of the store: what probes learn from, without the records that are judged."""
    train_records: int = 500
    test_records: int = 500
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the probes."""
    epochs: int = 8
    batch_size: int = 32
    lr: float = 0.01
    """Of Adam; falls to 0 linearly, from epoch to epoch."""
    width: int = 16
    """Channels of a probe's first convolution."""

    def __post_init__(self) -> None:
        section = "evaluate.diffroar"
        require(
            len(self.keep) > 0 and all(0 <= fraction <= 1 for fraction in self.keep),
            f"{section}.keep are fractions in [0, 1], at least one, got {list(self.keep)}",
        )
        for name in ("keep", "seeds"):
            values = getattr(self, name)
            require(
                0 < len(values) == len(set(values)),
                f"{section}.{name} needs at least one value, each once, got {list(values)}",
            )
        for name in ("epochs", "width", "test_records"):
            require(
                getattr(self, name) >= 1,
                f"{section}.{name} must be >= 1, got {getattr(self, name)}",
            )
        for name in ("train_records", "batch_size"):
            require(
                getattr(self, name) >= 2,
                f"{section}.{name} must be >= 2, got {getattr(self, name)}",
            )
        require(self.lr > 0, f"{section}.lr must be > 0, got {self.lr}")
