"""Ways in which others run the same teacher: another part of the image, size, direction, order or scale of its values.

Each is a change of what the teacher receives. The change that reproduces the targets is the cause of their
difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from permafrost.annotation.annotator import TeacherAnnotator
from permafrost.models.classifier import Normalize

CROP_FRACTIONS = (1.0, 0.95, 0.9, 0.875, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
"""Fractions of the shorter side at which center crops are tried, before the best is refined."""
_INTERPOLATIONS = ("bilinear", "bicubic")
_SIDES = (8, 16, 24, 28, 32, 48, 64, 96, 112, 128, 160, 192, 224, 240, 256, 288, 299, 320, 384)
"""Sizes in pixels to which others resize images."""
_Statistics = tuple[Sequence[float], Sequence[float]]
"""Mean and standard deviation of each channel."""
_NORMALIZATIONS: dict[str, _Statistics] = {
    "ImageNet's": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "0.5 and 0.5": ((0.5,) * 3, (0.5,) * 3),
    "0 and 1": ((0.0,) * 3, (1.0,) * 3),
    "CIFAR-10's": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "CIFAR-10's of some codes": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "CIFAR-100's": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "CLIP's": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}
_CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "images in the order BGR": lambda images: images.flip(1),
    "mirrored images": lambda images: images.flip(-1),
    "images upside down": lambda images: images.flip(-2),
    "transposed images": lambda images: images.mT,
}


class OtherInput(NamedTuple):
    """Another way to run a teacher."""

    annotator: TeacherAnnotator
    text: str = ""
    advice: str = "make the targets of images as the teacher was trained on"
    change: Callable[[Tensor], Tensor] = lambda images: images
    """Function of the inputs f32 [n, 3, h, w] in [0, 1]."""


def center_cropped(annotator: TeacherAnnotator, fraction: float | None) -> OtherInput:
    """Return the teacher with the center crop of a fraction, None for the whole image."""
    option = (
        "format.frame=full"
        if fraction is None
        else f"format.frame=center_crop format.crop_fraction={fraction:g}"
    )
    text = f"they are those of another part of the image, {option}"
    return OtherInput(annotator.with_changes(crop_fraction=fraction), text, "set these options")


def other_sizes(annotator: TeacherAnnotator) -> Iterator[OtherInput]:
    """Iterate over sizes of the teacher's input, with both interpolations."""
    height = annotator.input_size[0]
    sides = [side for side in {height, *_SIDES} if height / 2 <= side <= 2 * height]
    yield from (
        OtherInput(
            annotator.with_changes(input_size=(side, side), interpolation=interpolation),
            f"they are those of inputs of {side} pixels, {interpolation}",
            f"set teacher.input_size={side} teacher.interpolation={interpolation}",
        )
        for side, interpolation in product(sorted(sides), _INTERPOLATIONS)
    )


def other_values(annotator: TeacherAnnotator) -> Iterator[OtherInput]:
    """Iterate over directions, channels, scales and resolutions of the same images."""
    yield from (
        OtherInput(annotator, f"they are those of {text}", change=change)
        for text, change in _CHANGES.items()
    )
    stated: _Statistics = next(  # of the teacher's own normalization
        (
            (module.mean.flatten().tolist(), module.std.flatten().tolist())
            for module in annotator.model.modules()
            if isinstance(module, Normalize)
        ),
        _NORMALIZATIONS["0 and 1"],
    )
    normalizations = {"the teacher's": stated, **_NORMALIZATIONS}
    for name, largest in product(normalizations, (1, 255)):
        mean, std = ([value / largest for value in each] for each in normalizations[name])
        yield OtherInput(
            annotator,
            f"they are those of images with values from 0 to {largest}, normalized by mean and standard deviation "
            f"{name}",
            f"set teacher.mean={_numbers(mean)} teacher.std={_numbers(std)}",
            partial(_renormalized, stated=stated, other=(mean, std)),
        )
    height = annotator.input_size[0]
    sides = [side for side in _SIDES if side != height and height / 4 <= side <= 8 * height]
    yield from (
        OtherInput(
            annotator,
            f"they are those of images that were resized to {side} pixels before ({mode}"
            f"{', with' if antialias else ', without'} antialiasing)",
            change=partial(_resized, side=side, mode=mode, antialias=antialias),
        )
        for side, mode, antialias in product(sides, _INTERPOLATIONS, (True, False))
    )


def _numbers(values: Sequence[float]) -> str:
    return f"[{','.join(f'{value:.6g}' for value in values)}]"


def _renormalized(images: Tensor, *, stated: _Statistics, other: _Statistics) -> Tensor:
    """Return images of which the teacher's own normalization makes those of another one."""
    mean, std, other_mean, other_std = (
        images.new_tensor(values).view(-1, 1, 1) for values in (*stated, *other)
    )
    return (images - other_mean) / other_std * std + mean


def _resized(images: Tensor, *, side: int, mode: str, antialias: bool) -> Tensor:
    small = F.interpolate(images, (side, side), mode=mode, antialias=antialias)
    return F.interpolate(small, images.shape[-2:], mode=mode, antialias=antialias).clamp(0, 1)
