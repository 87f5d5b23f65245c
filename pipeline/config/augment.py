"""How a view is drawn (`augment=`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt

from pipeline.config.options import Options
from pipeline.core.errors import require


@dataclass(frozen=True, kw_only=True)
class OperationConfig(Options):
    """One random geometric operation; which options it reads depends on its kind."""

    section: ClassVar[str] = "augment.operations"

    kind: Literal[
        "pad_crop", "resized_crop", "horizontal_flip", "vertical_flip", "rotation", "affine"
    ]
    p: Annotated[float, Ge(0), Le(1)] = 0.5
    """Probability, of flips, rotations and affine maps; drawn for each record."""
    padding: Annotated[int, Ge(0)] = 4
    """pad_crop: pixels of zeros on each side."""
    scale: tuple[float, float] | None = None
    """resized_crop: range of the crop's share of the area, null is (0.08, 1). affine: range of the zoom."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """resized_crop: range of width / height."""
    degrees: Annotated[float, Ge(0), Le(180)] = 0.0
    """rotation, affine: up to this angle either way."""
    translate: tuple[float, float] | None = None
    """affine: up to this fraction of width and height either way."""
    shear: Annotated[float | None, Ge(0), Lt(90)] = None
    """affine: up to this angle in degrees either way."""

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
    """How the student's view is drawn; the same matrix moves the image and its maps."""

    section: ClassVar[str] = "augment"

    operations: tuple[OperationConfig, ...] = ()
    """Applied in this order, all in one warp."""
    size: Annotated[int | None, Ge(8)] = None
    """Side of the student's input in pixels; null takes the canonical frame's."""
    mixup_alpha: Annotated[float | None, Gt(0)] = None
    """Mix each image with the one before it in the batch (Zhang et al. 2018), in shares of one draw from
    Beta(alpha, alpha) a step; null mixes nothing. A rank mixes within its own slice of the batch."""
    randaugment: Annotated[int | None, Ge(0), Le(30)] = None
    """Magnitude, 0 to 30, of torchvision's RandAugment with its two operations an image, after the warp and
    before mixup; null leaves it out."""

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
