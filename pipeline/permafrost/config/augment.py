"""Augmentation of the student's view (`augment=`), and the views that a teacher pass covers (`views=`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from annotated_types import Ge, Gt, Le, Lt

from permafrost.config.options import (
    Options,
    Role,
    class_of_kind,
    identifying_values,
    options_of,
    to_plain,
)
from permafrost.config.plugins import Family
from permafrost.core.errors import require


@dataclass(frozen=True, kw_only=True)
class _Operation(Options):
    """Base class of the random operations of a view."""

    section: ClassVar[str] = "augment.operations"

    @property
    def is_drawn(self) -> bool:
        """True if any view differs by it."""
        return True

    @property
    def shifts(self) -> bool:
        """True if it draws a shift in units of the image."""
        return False


@dataclass(frozen=True, kw_only=True)
class OperationConfig(_Operation):
    """Random geometric operation. Its kind decides which options it reads."""

    kind: Literal[
        "pad_crop", "resized_crop", "horizontal_flip", "vertical_flip", "rotation", "affine"
    ]
    p: Annotated[float, Ge(0), Le(1)] = 0.5
    """Probability of a flip, a rotation or an affine map, drawn separately for each record."""
    padding_mode: Annotated[Literal["constant", "edge"], Role.IF_SET] = "constant"
    """pad_crop: what the padding shows. constant: black. edge: the edge of the image, continued. Maps have nothing
    there."""
    padding: Annotated[int, Ge(0)] = 4
    """pad_crop: width in pixels of the padding on each side, and so the largest shift. The pixels are those of the
    canonical frame, or of its side if it is square and images are not: an image's shorter side then has that many
    pixels, and the padding is as wide on all sides, so that a photograph turned by 90 degrees is treated alike."""
    scale: tuple[float, float] | None = None
    """resized_crop: range of the crop's fraction of the area (null: (0.08, 1)). affine: range of the zoom factor."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """resized_crop: range of the aspect ratio, width / height."""
    degrees: Annotated[float, Ge(0), Le(180)] = 0.0
    """rotation, affine: largest angle in degrees, in either direction."""
    translate: tuple[float, float] | None = None
    """affine: largest translation in either direction, as fractions of the width and the height of each image."""
    shear: Annotated[float | None, Ge(0), Lt(90)] = None
    """affine: largest shear angle in degrees, in either direction."""

    @property
    def crop_scale(self) -> tuple[float, float]:
        """Range of a resized crop's fraction of the area."""
        return self.scale or (0.08, 1.0)

    @property
    def is_drawn(self) -> bool:
        """True if any view differs by it."""
        if self.kind == "pad_crop":
            return self.padding > 0
        return self.kind == "resized_crop" or (
            self.p > 0 and (self.kind != "rotation" or self.degrees > 0)
        )

    @property
    def shifts(self) -> bool:
        """True if it draws a shift in units of the image."""
        translated = max(self.translate or (0.0,)) * self.p
        return (self.kind == "pad_crop" and self.padding > 0) or (
            self.kind == "affine" and translated > 0
        )

    def _check_together(self) -> None:
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


MAX_SIDE = 4096
"""Largest side of a view in pixels."""
MAX_FACTOR = 100.0
_MIN_SIGMA = 1e-4
"""Stored views have these values in float16."""


@dataclass(frozen=True, kw_only=True)
class PixelOperationConfig(_Operation):
    """Random operation on the pixels of a view. Its kind decides which options it reads."""

    kind: Literal[
        "color_jitter",
        "grayscale",
        "gaussian_blur",
        "random_erasing",
        "solarize",
        "posterize",
        "equalize",
        "autocontrast",
        "sharpness",
    ]
    p: Annotated[float, Ge(0), Le(1)] = 0.5
    """Probability, drawn separately for each record."""
    brightness: Annotated[float, Ge(0), Le(MAX_FACTOR)] = 0.4
    """color_jitter: largest deviation of the factor of brightness from 1; 0 leaves the brightness as it is."""
    contrast: Annotated[float, Ge(0), Le(MAX_FACTOR)] = 0.4
    """color_jitter: the same for contrast, the distance from the mean gray."""
    saturation: Annotated[float, Ge(0), Le(MAX_FACTOR)] = 0.4
    """color_jitter: the same for saturation, the distance from each pixel's gray."""
    hue: Annotated[float, Ge(0), Le(0.5)] = 0.1
    """color_jitter: largest shift of the hue in either direction, as a fraction of the color circle."""
    sigma: tuple[float, float] = (0.0005, 0.01)
    """gaussian_blur: range of the standard deviation, as fractions of the shorter side (0.01 is 2.2 of 224 pixels)."""
    scale: tuple[float, float] = (0.02, 0.33)
    """random_erasing: range of the rectangle's fraction of the area."""
    ratio: tuple[float, float] = (0.3, 3.3)
    """random_erasing: range of the rectangle's aspect ratio, width / height. torchvision's RandomErasing counts
    height / width, so its ratio (1, 3) is 0.33 to 1 here."""
    value: Annotated[float, Ge(0), Le(1)] = 0.0
    """random_erasing: value of the erased pixels in all channels, from 0 (black) to 1 (white)."""
    maps: Annotated[Literal["keep", "blank"], Role.IF_SET] = "keep"
    """random_erasing: the teacher's maps in the rectangle. keep: they stay. blank: they are 0, for targets of all
    modes; the teacher's class, logits and features stay."""
    threshold: Annotated[float, Ge(0), Le(1), Role.IF_SET] = 0.5
    """solarize: values from this one on are inverted, from 0 (black) to 1 (white)."""
    bits: Annotated[int, Ge(1), Le(8), Role.IF_SET] = 4
    """posterize: number of bits that are left of each value."""
    factor: Annotated[float, Ge(0), Le(MAX_FACTOR), Role.IF_SET] = 2.0
    """sharpness: 0 is a smoothed image, 1 the image, 2 doubles its details."""

    @property
    def is_drawn(self) -> bool:
        return self.p > 0

    def _check_together(self) -> None:
        for name, top in (("sigma", 0.1), ("scale", 1.0), ("ratio", float("inf"))):
            low, high = getattr(self, name)
            limit = "" if top == float("inf") else f" <= {top:g}"
            require(
                0 < low <= high <= top,
                f"augment {self.kind}: {name} must be 0 < low <= high{limit}, got {(low, high)}",
            )
        require(
            self.sigma[0] >= _MIN_SIGMA,
            f"augment {self.kind}: sigma must be >= {_MIN_SIGMA:g}, got {self.sigma}; for no blur leave it out",
        )


MAX_MAGNITUDE = 30
"""Magnitude of the strongest form of each operation of a policy."""


@dataclass(frozen=True, kw_only=True)
class PolicyConfig(_Operation):
    """Policy that draws operations of geometry and color for each record.

    randaugment draws `count` operations of one magnitude (Cubuk et al. 2020), trivialaugment one operation of a random
    magnitude and wider ranges (Mueller and Hutter 2021). Both draw from the same 14 operations.
    """

    kind: Literal["randaugment", "trivialaugment"]
    count: Annotated[int, Ge(1), Le(4)] = 2
    """randaugment: number of operations per record, drawn with replacement."""
    magnitude: Annotated[float, Ge(0), Le(MAX_MAGNITUDE)] = 9.0
    """randaugment: strength of all operations, from 0 to 30, in the units of torchvision's 31 bins."""
    spread: Annotated[float, Ge(0), Le(MAX_MAGNITUDE)] = 0.0
    """randaugment: standard deviation of the magnitude, drawn for each operation and cut to [0, 30]."""
    p: Annotated[float, Ge(0), Le(1)] = 1.0
    """Probability of each drawn operation. Without it, the record keeps what the other operations make of it."""

    @property
    def num_operations(self) -> int:
        """Number of operations per record."""
        return self.count if self.kind == "randaugment" else 1

    @property
    def is_drawn(self) -> bool:
        return self.p > 0


READ_BY: dict[str, tuple[str, ...]] = {
    "pad_crop": ("padding", "padding_mode"),
    "resized_crop": ("scale", "ratio"),
    "horizontal_flip": ("p",),
    "vertical_flip": ("p",),
    "rotation": ("p", "degrees"),
    "affine": ("p", "degrees", "translate", "scale", "shear"),
    "color_jitter": ("p", "brightness", "contrast", "saturation", "hue"),
    "grayscale": ("p",),
    "gaussian_blur": ("p", "sigma"),
    "random_erasing": ("p", "scale", "ratio", "value", "maps"),
    "solarize": ("p", "threshold"),
    "posterize": ("p", "bits"),
    "equalize": ("p",),
    "autocontrast": ("p",),
    "sharpness": ("p", "factor"),
    "randaugment": ("count", "magnitude", "spread", "p"),
    "trivialaugment": ("p",),
    "mixup": ("alpha", "p"),
    "cutmix": ("alpha", "p"),
}
"""Options of an operation or a mixture that its kind reads."""


AnyOperation: TypeAlias = OperationConfig | PixelOperationConfig | PolicyConfig
"""Operation of `augment.operations`, by its kind."""


def moving_operations(
    operations: Sequence[AnyOperation],
) -> tuple[OperationConfig | PolicyConfig, ...]:
    """Return the operations that move pixels."""
    return tuple(
        operation for operation in operations if not isinstance(operation, PixelOperationConfig)
    )


def count_window_operations(moving: Sequence[OperationConfig | PolicyConfig]) -> int:
    """Count the first moving operations that choose a window: flips, a padded crop, and a resized crop after it."""
    crops: list[str] = []
    for number, operation in enumerate(moving):
        if operation.kind in ("pad_crop", "resized_crop"):
            if operation.kind in crops or "resized_crop" in crops:
                return number
            crops.append(operation.kind)
        elif operation.kind not in ("horizontal_flip", "vertical_flip"):
            return number
    return len(moving)


def describe_mix(mix: Sequence[MixConfig]) -> list[dict[str, Any]]:
    """Return what determines mixtures, as a pass records it."""
    return [identifying_values(mixture) for mixture in mix if mixture.p > 0]


def describe_operations(operations: Sequence[AnyOperation]) -> list[dict[str, Any]]:
    """Return what determines the views of operations, as a pass records it.

    Operations that move pixels come before those that only change them, as they apply. `maps` of an erasing is left
    out, since it is an option of the student.
    """
    ordered: list[AnyOperation] = []
    for operation in operations:
        place = len(ordered)
        if isinstance(operation, OperationConfig):
            while place and isinstance(ordered[place - 1], PixelOperationConfig):
                place -= 1
        ordered.insert(place, operation)
    described = []
    for operation in ordered:
        names = READ_BY[operation.kind] if not isinstance(operation, OperationConfig) else None
        values = identifying_values(operation)
        described.append(
            {
                name: to_plain(getattr(operation, name))
                for name in (values if names is None else ("kind", *names))
                if name != "maps"
            }
        )
    return described


def operation_from(values: dict[str, Any]) -> AnyOperation:
    """Return the operation of saved values.

    Raises:
        ConfigError: If there is no operation of this kind, or it has no such option or value.
    """
    cls = class_of_kind(AnyOperation, values.get("kind"), "augment.operations.kind")
    unknown = sorted(values.keys() - {option.name for option in options_of(cls)})
    require(not unknown, f"augment.operations of kind {values['kind']} have no {unknown}")
    operation: AnyOperation = cls(**values)
    return operation


@dataclass(frozen=True, kw_only=True)
class MixConfig(Options):
    """Mixture of a view with that of a second record.

    mixup is the sum of both images with weights lambda and 1 - lambda (Zhang et al. 2018). cutmix shows the second one
    in a box, and lambda is the fraction of the image outside of it (Yun et al. 2019).
    """

    section: ClassVar[str] = "augment.mix"

    kind: Literal["mixup", "cutmix"]
    alpha: Annotated[float, Gt(0), Le(MAX_FACTOR)] = 1.0
    """lambda is drawn from Beta(alpha, alpha), that of cutmix before its box is cut at the edges of the image."""
    p: Annotated[float, Ge(0), Le(1)] = 1.0
    """Probability, drawn separately for each record."""


@dataclass(frozen=True, kw_only=True)
class AugmentOptions(Options):
    """Recipe of the student's views, and of those that views=random stores.

    The crop and flips at its beginning choose a window of the image. What moves the window's pixels follows, then what
    changes them. Maps are sampled once, by the product of both matrices.
    """

    section: ClassVar[str] = "augment"

    operations: tuple[AnyOperation, ...] = ()
    """Operations in the order in which they apply, those that move pixels before those that change them. randaugment
    and trivialaugment do both. Logits of mode=frozen are those of the undisturbed image; a teacher of stored views
    (mode=replay) and a live one receive the pixels of the student."""
    edges: Literal["window", "image"] = "window"
    """Content of a view where a rotation, shear or shift reaches beyond its crop. window: black, as in torchvision.
    image: the image around the crop, sampled from the frame; black beyond the image."""
    interpolation: Literal["bilinear", "nearest"] = "bilinear"
    """Interpolation of what a rotation, shear or shift moves in its window. nearest takes the nearest pixel, which is
    the default of torchvision's RandAugment."""
    size: Annotated[int | None, Ge(8), Le(MAX_SIDE)] = None
    """Side of the student's input in pixels; null takes that of the canonical frame."""
    scaled_decoding: bool = False
    """Decode a JPEG to 1/2, 1/4 or 1/8 of its size, of its low frequencies, where the window is at least as many times
    as large as the view. It saves most of the time of large photographs, and changes pixels
    (docs/concepts/one-geometry.md). It is an option of trainings with new views."""
    mix: Annotated[tuple[MixConfig, ...], Role.IF_SET] = ()
    """Mixtures of each view with that of a second record of the batch, after all operations. A record has at most one:
    a later one of the list that is drawn takes the place of an earlier one. Stored targets are mixed by rules
    (docs/concepts/one-geometry.md), and a live teacher sees the mixture. It is an option of trainings: views.mix mixes
    the views that a pass stores."""

    @property
    def moving(self) -> tuple[OperationConfig | PolicyConfig, ...]:
        """Operations that move pixels."""
        return moving_operations(self.operations)

    def side_of(self, frame_size: tuple[int, int]) -> int:
        """Return the shorter side of views in pixels, of records with this (height, width) of the frame."""
        return self.size or min(frame_size)

    @property
    def num_window_operations(self) -> int:
        """Number of the first moving operations that choose the window."""
        return 0 if self.edges == "image" else count_window_operations(self.moving)

    @property
    def border(self) -> Literal["black", "edge"]:
        """Content of a view beyond the image."""
        continued = any(operation.padding_mode == "edge" for operation in self._padded_crops())
        return "edge" if continued else "black"

    def _padded_crops(self, first: int = 0) -> list[OperationConfig]:
        """Return the padded crops among the moving operations from a number on."""
        return [
            operation
            for operation in self.moving[first:]
            if isinstance(operation, OperationConfig) and operation.kind == "pad_crop"
        ]

    @property
    def shows_windows(self) -> bool:
        """True if the windows of views may be cut from the files.

        A crop after a rotation or a shift enlarges a part of its window, so a window of the size of the view would not
        have the pixels for it. Views of such recipes are sampled from frames.
        """
        moves = self.moving[self.num_window_operations :]
        is_late = any(operation.kind in ("pad_crop", "resized_crop") for operation in moves)
        return self.edges == "window" and not is_late

    @property
    def on_pixels(self) -> tuple[PixelOperationConfig | PolicyConfig, ...]:
        """Operations that change the pixels of a view."""
        return tuple(
            operation for operation in self.operations if not isinstance(operation, OperationConfig)
        )

    @property
    def blanks_maps(self) -> bool:
        """True if an erasing sets the maps of targets to 0."""
        return any(
            isinstance(operation, PixelOperationConfig)
            and (operation.kind, operation.maps) == ("random_erasing", "blank")
            for operation in self.operations
        )

    def _check_together(self) -> None:
        require(
            not self.mixes or not self.blanks_maps,
            "augment.mix shows two images where random_erasing has erased one, and maps: blank would blank both; set "
            "maps: keep, or augment.mix=[]",
        )
        require(
            self.edges == "image"
            or all(
                operation.padding_mode == "constant"
                for operation in self._padded_crops(self.num_window_operations)
            ),
            "augment pad_crop: padding_mode: edge continues the image, and this crop follows an operation whose "
            "outside is black; put it first, or set padding_mode: constant",
        )

    @property
    def mixes(self) -> bool:
        """True if any record may be mixed with another."""
        return any(mixture.p > 0 for mixture in self.mix)

    def refuse_mix(self, why: str, section: str = "augment") -> None:
        """Refuse mixtures of records.

        Args:
            why: Reason and one fix; the other fix, leaving them out, is appended.
            section: Section of these options, for the message.

        Raises:
            ConfigError: If there are any.
        """
        kinds = ", ".join(mixture.kind for mixture in self.mix)
        require(not self.mixes, f"{section}.mix ({kinds}): {why}, or {section}.mix=[]")


# ---- views -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ViewsConfig(Options):
    """Stored views of a teacher pass, in addition to the canonical view, which always exists.

    The implementation of a kind is a function (its options, `augment`, store, shard) -> `loading.windows.Views` of all
    records of a shard, [n, V].
    """

    section: ClassVar[str] = "views"
    expansion: ClassVar[str] = ""
    """`module:name` of a function (batch without targets) -> batch with `per_step` views of each record, made of the
    student's view, for methods that name this kind as their `live_views`."""

    center_crop: ClassVar[float | None] = None
    """Side of the center crop, relative to the image's shorter side, on which students of these views are evaluated;
    None for the whole image. Views of `augment.operations` have the usual one if they have resized_crop."""

    count: Annotated[int, Ge(1)] = 1
    """Stored views per record."""
    seed: int = 0
    """Seed of the views' random draws."""
    per_step: Annotated[int, Ge(1)] = 1
    """Views of each record in a batch, from one decoded image; read by distill with mode=replay.
    trainer.batch_size counts views."""
    kind: str = ""


@dataclass(frozen=True, kw_only=True)
class CanonicalViewsConfig(ViewsConfig):
    """Whole frame only."""

    kind: Literal["canonical"] = "canonical"

    def _check_together(self) -> None:
        require(
            self.count == 1,
            f"views.count={self.count} requires other views than the canonical one; choose "
            f"{' or '.join(f'views={kind}' for kind in VIEWS if kind != self.kind)}",
        )


@dataclass(frozen=True, kw_only=True)
class RandomViewsConfig(ViewsConfig):
    """Random views drawn from `augment.operations`."""

    implementation: ClassVar[str] = "permafrost.annotation.stored_views:draw_random"

    kind: Literal["random"] = "random"
    count: int = 4
    mix: Annotated[tuple[MixConfig, ...], Role.IF_SET] = ()
    """Mixtures of stored views, as in augment.mix: the teacher's answers are those to the mixtures. Second images are
    drawn within blocks of annotate.batch_size records of a shard."""

    @property
    def mixes(self) -> bool:
        """True if any view may be a mixture."""
        return any(mixture.p > 0 for mixture in self.mix)


VIEWS: Family[type[ViewsConfig]] = Family(
    {"canonical": CanonicalViewsConfig, "random": RandomViewsConfig}
)
"""Kinds of `views=` by name."""
