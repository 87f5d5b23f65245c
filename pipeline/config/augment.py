"""Augmentation of the student's view (`augment=`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt

from pipeline.config.options import Options
from pipeline.core.errors import require


@dataclass(frozen=True, kw_only=True)
class OperationConfig(Options):
    """Random geometric operation. Its kind decides which options it reads."""

    section: ClassVar[str] = "augment.operations"

    kind: Literal[
        "pad_crop", "resized_crop", "horizontal_flip", "vertical_flip", "rotation", "affine"
    ]
    p: Annotated[float, Ge(0), Le(1)] = 0.5
    """Probability of a flip, a rotation or an affine map, drawn separately for each record."""
    padding: Annotated[int, Ge(0)] = 4
    """pad_crop: width in pixels of the zero padding on each side."""
    scale: tuple[float, float] | None = None
    """resized_crop: range of the crop's share of the area (null: (0.08, 1)). affine: range of the zoom factor."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """resized_crop: range of the aspect ratio, width / height."""
    degrees: Annotated[float, Ge(0), Le(180)] = 0.0
    """rotation, affine: largest angle in degrees, in either direction."""
    translate: tuple[float, float] | None = None
    """affine: largest translation in either direction, as fractions of width and height."""
    shear: Annotated[float | None, Ge(0), Lt(90)] = None
    """affine: largest shear angle in degrees, in either direction."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale is not None:
            low, high = self.scale
            top = 1.0 if self.kind == "resized_crop" else float("inf")
            require(
                0 < low <= high <= top,
                f"augment {self.kind}: scale must be 0 < low <= high{' <= 1' if top == 1 else ''}, got {self.scale}",
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
class AugmentOptions(Options):
    """Augmentation of the student's view. One matrix per view transforms both the image and its maps."""

    section: ClassVar[str] = "augment"

    operations: tuple[OperationConfig, ...] = ()
    """Geometric operations, applied in this order in a single warp."""
    size: Annotated[int | None, Ge(8)] = None
    """Side of the student's input in pixels; null takes that of the canonical frame."""
    mixup_alpha: Annotated[float | None, Gt(0)] = None
    """Alpha of mixup (Zhang et al. 2018): each image is mixed with the previous one of the batch; null disables
    it. The coefficient is drawn from Beta(alpha, alpha) once per step. A rank mixes within its own slice of the
    batch."""
    randaugment: Annotated[int | None, Ge(0), Le(30)] = None
    """Magnitude, 0 to 30, of torchvision's RandAugment; null disables it. It applies two operations per image,
    after the warp and before mixup."""

    @property
    def pixel_options(self) -> dict[str, float]:
        """Name and value of each active option that changes pixels after the warp; empty if there is none."""
        options = {"mixup_alpha": self.mixup_alpha, "randaugment": self.randaugment}
        return {name: value for name, value in options.items() if value is not None}

    def refuse_pixel_options(self, why: str, section: str = "augment") -> None:
        """Raise ConfigError if an option that changes pixels after the warp is set.

        why  reason and one way out; the other way out, switching the options off, is appended
        """
        options = self.pixel_options
        asked = " ".join(f"{section}.{name}={value}" for name, value in options.items())
        off = " ".join(f"{section}.{name}=null" for name in options)
        require(not options, f"{asked}: {why}, or {off}")
