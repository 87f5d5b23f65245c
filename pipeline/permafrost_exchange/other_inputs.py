"""Ways in which others run the same teacher: another part of the image, size, direction, order or scale of its values.

Each is a change of what the teacher receives. The change that reproduces the targets is the cause of their
difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from permafrost.annotation.annotator import TeacherAnnotator
from permafrost.models.classifier import Normalize

_FRACTIONS = (1.0, 0.95, 0.9, 0.875, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
"""Fractions of the shorter side at which center crops are tried, before the best is refined."""
_INTERPOLATIONS: tuple[Literal["bilinear", "bicubic"], ...] = ("bilinear", "bicubic")
_SIDES = (8, 16, 24, 28, 32, 48, 64, 96, 112, 128, 160, 192, 224, 240, 256, 288, 299, 320, 384)
"""Sizes in pixels to which others resize images."""
_NORMALIZATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "ImageNet's": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "0.5 and 0.5": ((0.5,) * 3, (0.5,) * 3),
    "0 and 1": ((0.0,) * 3, (1.0,) * 3),
    "CIFAR-10's": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "CIFAR-10's of some codes": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "CIFAR-100's": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "CLIP's": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}
"""Means and standard deviations by name."""


class OtherInput(NamedTuple):
    """Another way to run a teacher."""

    text: str
    advice: str
    annotator: TeacherAnnotator
    change: Callable[[Tensor], Tensor]
    """Function of the inputs f32 [n, 3, h, w] in [0, 1]."""


def as_they_are(images: Tensor) -> Tensor:
    """Return the images."""
    return images


def center_cropped(annotator: TeacherAnnotator, fraction: float | None) -> OtherInput:
    """Return the teacher with the center crop of a fraction, None for the whole image."""
    option = "format.frame=full"
    if fraction is not None:
        option = f"format.frame=center_crop format.crop_fraction={fraction:g}"
    return OtherInput(
        f"they are those of another part of the image, {option}",
        "set these options",
        annotator.with_changes(crop_fraction=fraction),
        as_they_are,
    )


def other_frames(annotator: TeacherAnnotator) -> Iterator[OtherInput]:
    """Iterate over other parts of the image."""
    for fraction in (None, *_FRACTIONS):
        if fraction != annotator.crop_fraction:
            yield center_cropped(annotator, fraction)


def other_sizes(annotator: TeacherAnnotator) -> Iterator[OtherInput]:
    """Iterate over other sizes of the teacher's input, and the other interpolation."""
    height, width = annotator.input_size
    for interpolation in _INTERPOLATIONS:
        for side in (height, *_SIDES):
            is_same = side == height == width and interpolation == annotator.interpolation
            if is_same or not height / 2 <= side <= 2 * height:
                continue
            yield OtherInput(
                f"they are those of inputs of {side} pixels, {interpolation}",
                f"set teacher.input_size={side} teacher.interpolation={interpolation}",
                annotator.with_changes(input_size=(side, side), interpolation=interpolation),
                as_they_are,
            )


def _flipped(images: Tensor, axis: int) -> Tensor:
    return images.flip(axis)


def _transposed(images: Tensor) -> Tensor:
    return images.mT


def _resized(images: Tensor, *, side: int, mode: str, antialias: bool) -> Tensor:
    size = images.shape[-2:]
    small = F.interpolate(images, (side, side), mode=mode, antialias=antialias)
    return F.interpolate(small, size, mode=mode, antialias=antialias).clamp(0, 1)


def _channels_reversed(images: Tensor) -> Tensor:
    return images.flip(1)


def other_values(annotator: TeacherAnnotator) -> Iterator[OtherInput]:
    """Iterate over other directions, channels, scales and resolutions of the same images."""
    wrong = "make the targets of images as the teacher was trained on"
    yield OtherInput(
        "they are those of images in the order BGR", wrong, annotator, _channels_reversed
    )
    for axis, text in ((-1, "mirrored images"), (-2, "images upside down")):
        yield OtherInput(
            f"they are those of {text}",
            wrong,
            annotator,
            partial(_flipped, axis=axis),
        )
    yield OtherInput("they are those of transposed images", wrong, annotator, _transposed)
    for text, mean, std in _normalizations(annotator):
        advice = f"set teacher.mean={_numbers(mean)} teacher.std={_numbers(std)}"
        yield OtherInput(
            f"they are those of images normalized by {text}",
            advice,
            annotator,
            _Normalized(annotator, mean, std),
        )
    height = annotator.input_size[0]
    for side in _SIDES:
        if side == height or not height / 4 <= side <= 8 * height:
            continue
        for mode in ("bilinear", "bicubic"):
            for antialias in (True, False):
                yield OtherInput(
                    f"they are those of images that were resized to {side} pixels before ({mode}"
                    f"{', with' if antialias else ', without'} antialiasing)",
                    wrong,
                    annotator,
                    partial(_resized, side=side, mode=mode, antialias=antialias),
                )


def _numbers(values: Sequence[float]) -> str:
    return f"[{','.join(f'{value:.6g}' for value in values)}]"


def _normalizations(
    annotator: TeacherAnnotator,
) -> Iterator[tuple[str, tuple[float, ...], tuple[float, ...]]]:
    """Iterate over the normalizations that are not the teacher's, of values in [0, 1] and in [0, 255]."""
    stated = _statistics_of(annotator)
    for name, (mean, std) in _NORMALIZATIONS.items():
        if stated != (mean, std):
            yield f"mean and standard deviation {name}", mean, std
    for name, (mean, std) in {"the teacher's": stated, **_NORMALIZATIONS}.items():
        scaled = tuple(value / 255 for value in mean), tuple(value / 255 for value in std)
        yield f"mean and standard deviation {name}, of values from 0 to 255", *scaled


def _statistics_of(annotator: TeacherAnnotator) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and the standard deviation of the teacher's own normalization."""
    for module in annotator.model.modules():
        if isinstance(module, Normalize):
            return tuple(module.mean.flatten().tolist()), tuple(module.std.flatten().tolist())
    return (0.0,) * 3, (1.0,) * 3


class _Normalized:
    """Change of images after which the teacher's own normalization gives another one."""

    def __init__(
        self, annotator: TeacherAnnotator, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        stated_mean, stated_std = map(torch.tensor, _statistics_of(annotator))
        self.factor = (stated_std / torch.tensor(std)).view(-1, 1, 1)
        self.offset = stated_mean.view(-1, 1, 1) - torch.tensor(mean).view(-1, 1, 1) * self.factor

    def __call__(self, images: Tensor) -> Tensor:
        return images * self.factor.to(images.device) + self.offset.to(images.device)
