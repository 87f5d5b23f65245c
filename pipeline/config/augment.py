"""How a view is drawn (`augment=`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.core.errors import require


@dataclass(frozen=True, kw_only=True)
class OperationConfig:
    """One random geometric operation; which options it reads depends on its kind."""

    kind: Literal[
        "pad_crop", "resized_crop", "horizontal_flip", "vertical_flip", "rotation", "affine"
    ]
    p: float = 0.5
    """Probability, of flips, rotations and affine maps; drawn for each record."""
    padding: int = 4
    """pad_crop: pixels of zeros on each side."""
    scale: tuple[float, float] | None = None
    """resized_crop: range of the crop's share of the area, null is (0.08, 1). affine: range of the zoom."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """resized_crop: range of width / height."""
    degrees: float = 0.0
    """rotation, affine: up to this angle either way."""
    translate: tuple[float, float] | None = None
    """affine: up to this fraction of width and height either way."""
    shear: float | None = None
    """affine: up to this angle in degrees either way."""

    def __post_init__(self) -> None:
        require(0 <= self.p <= 1, f"augment {self.kind}: p must be in [0, 1], got {self.p}")
        require(self.padding >= 0, f"augment {self.kind}: padding must be >= 0, got {self.padding}")
        if self.scale is not None:
            low, high = self.scale
            top = 1.0 if self.kind == "resized_crop" else float("inf")
            require(
                0 < low <= high <= top,
                f"augment {self.kind}: scale must be 0 < low <= high{' <= 1' if top == 1 else ''}, got {self.scale}",
            )
        require(self.degrees >= 0, f"augment {self.kind}: degrees must be >= 0, got {self.degrees}")
        require(
            self.degrees <= 180, f"augment {self.kind}: degrees must be <= 180, got {self.degrees}"
        )
        require(
            self.shear is None or 0 <= self.shear < 90,
            f"augment {self.kind}: shear must be in [0, 90) or null, got {self.shear}",
        )
        require(
            self.translate is None or 0 <= min(self.translate) <= max(self.translate) <= 1,
            f"augment {self.kind}: translate must be two fractions in [0, 1] or null, got {self.translate}",
        )
        require(
            0 < self.ratio[0] <= self.ratio[1],
            f"augment {self.kind}: ratio must be 0 < low <= high, got {self.ratio}",
        )


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How the student's view is drawn; the same matrix moves the image and its maps."""

    operations: tuple[OperationConfig, ...] = ()
    """Applied in this order, all in one warp."""
    size: int | None = None
    """Side of the student's input in pixels; null takes the canonical frame's."""
    mixup_alpha: float | None = None
    """Mix each image with the one before it in the batch (Zhang et al. 2018), in shares of one draw from
    Beta(alpha, alpha) a step; null mixes nothing. A rank mixes within its own slice of the batch."""
    randaugment: int | None = None
    """Magnitude, 0 to 30, of torchvision's RandAugment with its two operations an image, after the warp and
    before mixup; null leaves it out."""

    def __post_init__(self) -> None:
        require(
            self.size is None or self.size >= 8,
            f"augment.size must be >= 8 or null, got {self.size}",
        )
        require(
            self.mixup_alpha is None or self.mixup_alpha > 0,
            f"augment.mixup_alpha must be > 0 or null, got {self.mixup_alpha}",
        )
        require(
            self.randaugment is None or 0 <= self.randaugment <= 30,
            f"augment.randaugment must be in 0..30 or null, got {self.randaugment}",
        )

    @property
    def pixel_options(self) -> dict[str, float]:
        """The options that change pixels after the warp, and their values; empty where none does."""
        options = {"mixup_alpha": self.mixup_alpha, "randaugment": self.randaugment}
        return {name: value for name, value in options.items() if value is not None}

    def refuse_pixel_options(self, why: str, section: str = "augment") -> None:
        """ConfigError unless pixels stay as they are after the warp.

        why  ends in a way out; the other one, to switch the options off, is added
        """
        options = self.pixel_options
        asked = " ".join(f"{section}.{name}={value}" for name, value in options.items())
        off = " ".join(f"{section}.{name}=null" for name in options)
        require(not options, f"{asked}: {why}, or {off}")
