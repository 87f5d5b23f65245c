"""Places of a layer's cells in the image, and changes that a network makes to its images before it looks at them.

Two measurements, with eight images in total. Quarters of an image are replaced, one corner at a time, and the cells
that change most show where its pixels went. And constants and ramps of coordinates are followed to the first
convolution, whose input then tells how the network has scaled, cropped, padded or turned its images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_SHARPNESS = 4
"""Exponent of the changes when places are averaged, so that a wide receptive field does not center them."""
_CLEAR_DISTANCE = 0.25
"""Minimum distance of the places of opposite corners, in sides, for a grid to clearly have an order."""
_MIN_CELLS = 4
"""Minimum cells per side for the places of corners to be checked."""
_SAME_PLACE = 0.02
"""Largest error of a place in sides: a layer whose strides do not divide the image has as much."""
_SAME_PIXELS = 1.8
"""Largest error of a place in pixels: padding to an even size, or to that of a stride, has one."""
_SAME_VALUE = 0.01
"""Tolerance of factors and summands; the conversion to bytes changes values by half of it."""
_RIM = 32
"""Widths of the rim in a side."""
_LOW, _HIGH = 64.1 / 255, 192.1 / 255
"""Values of the probes; a network that converts to bytes keeps their difference."""

CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))


def replaced_parts(images: Tensor) -> Tensor:
    """Return [6, 3, H, W]: the first image, and it with a part of the second: each corner, row by row, and the rim."""
    image, other = images[:2]
    corners: Tensor = image.repeat(6, 1, 1, 1)
    rows, columns = (max(1, side // 4) for side in images.shape[2:])
    for number, (bottom, right) in enumerate(CORNERS, start=1):
        down = slice(-rows, None) if bottom else slice(rows)
        across = slice(-columns, None) if right else slice(columns)
        corners[number, :, down, across] = other[:, down, across]
    top, left = (max(1, side // _RIM) for side in images.shape[2:])
    corners[5] = other
    corners[5, :, top:-top, left:-left] = image[:, top:-top, left:-left]
    return corners


def corner_places(output: Tensor) -> Tensor:
    """Return where the changes of the four corners lie in a grid, f64 [4, 2] of (row, column) in [0, 1].

    Args:
        output: Grids [6, C, h, w] of `replaced_parts`. Without a change the place is nan.
    """
    changes = (output[1:5] - output[:1]).detach().double().abs().sum(dim=1)
    shares = (changes / changes.amax(dim=(1, 2), keepdim=True)) ** _SHARPNESS
    places = []
    for along in (shares.sum(dim=2), shares.sum(dim=1)):
        cells = (torch.arange(along.shape[1], device=along.device) + 0.5) / along.shape[1]
        places.append((along * cells).sum(dim=1) / along.sum(dim=1))
    return torch.stack(places, dim=1).cpu()


def order_of_axes(output: Tensor) -> float:
    """Return how clearly both axes of grids [6, C, h, w] of `replaced_parts` are sides of the image.

    It is the smaller distance of the places along an axis, 0 for a grid of one cell, and -1 for axes of which only one
    has an order.
    """
    places = corner_places(output).nan_to_num(0.5)
    distances = [
        float(places[:, axis].max() - places[:, axis].min())
        for axis in (0, 1)
        if output.shape[2 + axis] > 1
    ]
    low, high = (min(distances), max(distances)) if distances else (0.0, 0.0)
    return -1.0 if high > _CLEAR_DISTANCE and low < high / 4 else low


def describe_wrong_places(output: Tensor) -> str:
    """Say which part of the image has no place in the grid, or clearly another one than its own; empty if none.

    Args:
        output: Grids [6, C, h, w] of `replaced_parts`.
    """
    places = corner_places(output)
    if min(output.shape[2:]) < 2:
        return ""
    if torch.equal(output[5], output[0]):
        return "it does not depend on the rim of the image, so it crops it"
    if min(output.shape[2:]) < _MIN_CELLS:  # a wide receptive field decides
        return ""
    if places.isnan().any():
        corner = CORNERS[int(places.isnan().any(dim=1).nonzero()[0])]
        return f"it does not depend on {_name_corner(corner)} quarter of the image"
    if order_of_axes(output) < _CLEAR_DISTANCE:
        return ""
    for corner, place in zip(CORNERS, places.tolist(), strict=True):
        actual = (int(place[0] > 0.5), int(place[1] > 0.5))
        if all(abs(side - 0.5) > _CLEAR_DISTANCE / 2 for side in place) and actual != corner:
            return f"{_name_corner(corner)} quarter of the image is in {_name_corner(actual)} quarter of it"
    return ""


def _name_corner(corner: Sequence[int]) -> str:
    return f"the {('upper', 'lower')[corner[0]]} {('left', 'right')[corner[1]]}"


# ---- the input of the first convolution ------------------------------------------------------------


class InputReading(NamedTuple):
    """Changes of images before the first convolution of a network, as far as they are linear."""

    scale: list[float]
    """Factor of each channel."""
    shift: list[float]
    """Summand of each channel."""
    origin: tuple[float, float]
    """Place (row, column) of the image at the upper left corner of what is convolved, in sides."""
    down: tuple[float, float]
    """Change of that place from the top to the bottom of what is convolved."""
    across: tuple[float, float]
    """Change of that place from the left to the right."""
    size: tuple[int, int]
    """(height, width) of the images in pixels."""

    def describe_scaling(self) -> str:
        """Say how the images are scaled and shifted, empty if they are not."""
        factors = [abs(value - 1) for value in self.scale] + [abs(value) for value in self.shift]
        if max(factors) <= _SAME_VALUE:
            return ""
        mean = [-shift / scale for scale, shift in zip(self.scale, self.shift, strict=True)]
        return (
            f"(x - mean) / std with mean [{_numbers(mean)}] and std "
            f"[{_numbers([1 / scale for scale in self.scale])}]"
        )

    def describe_geometry(self) -> str:
        """Say how the images are cropped, padded or turned, empty if they are not."""
        (top, left), corner = self.origin, zip(self.origin, self.down, self.across, strict=True)
        end = [sum(parts) for parts in corner]
        # Of two opposite corners, and of a turn.
        errors = map(abs, (top, left, end[0] - 1, end[1] - 1, self.down[1], self.across[0]))
        if max(errors) <= max(_SAME_PLACE, _SAME_PIXELS / min(self.size)):
            return ""
        crossed = max(abs(self.down[1]), abs(self.across[0]))
        if crossed > _SAME_PLACE or min(self.down[0], self.across[1]) < 0:
            return "it turns or mirrors its images"
        words = "crops" if self.down[0] < 1 and self.across[1] < 1 else "pads or moves"
        return (
            f"it {words} its images: what it looks at goes from {top:.1%} to {end[0]:.1%} of their height and from "
            f"{left:.1%} to {end[1]:.1%} of their width"
        )


def read_input(run: Callable[[Tensor], object], images: Tensor) -> InputReading | None:
    """Follow constants and ramps to the first convolution.

    Args:
        run: Function that runs the network.
        images: [n, 3, H, W]; only shape, dtype and device are used.

    Returns:
        None if there is no convolution of three channels, if one image is not one there, or if what happens is not
        linear in values and places.
    """
    height, width = images.shape[2:]
    down, across = ((torch.arange(side).to(images) + 0.5) / side for side in (height, width))
    probes = images.new_empty(4, 3, height, width)
    probes[0], probes[1] = _LOW, _HIGH
    probes[2] = _LOW + (_HIGH - _LOW) * down[:, None]
    probes[3] = _LOW + (_HIGH - _LOW) * across
    with suppress(_ConvolutionReached), _FirstConvolution() as first:
        run(probes)
    if first.images is None or len(first.images) != 4 or min(first.images.shape[2:]) < 8:
        return None
    low, high, *ramps = first.images.double().cpu()
    # Anything outside of the image, such as zero padding, does not change with the images.
    changes = (high - low).flatten(1) / (_HIGH - _LOW)
    most = changes.abs().argmax(dim=1, keepdim=True)
    scale = changes.gather(1, most)[:, 0]
    shift = low.flatten(1).gather(1, most)[:, 0] - scale * _LOW
    if not (scale.abs() > 0).all():
        return None
    of_images = (high - low) / (_HIGH - _LOW) / scale[:, None, None]
    is_image = ((of_images - 1).abs() < _SAME_VALUE).all(dim=0)
    rows, columns = is_image.shape
    inside = torch.zeros(rows, columns, dtype=torch.bool)
    inside[rows // 4 : -(rows // 4), columns // 4 : -(columns // 4)] = True
    # Pixels at the border may be mirrored.
    inside = inside & is_image if int((inside & is_image).sum()) >= 9 else is_image
    if int(inside.sum()) < 9:
        return None
    grid = torch.stack(
        [
            torch.ones(rows, columns, dtype=torch.float64),
            ((torch.arange(rows).double() + 0.5) / rows)[:, None].expand(rows, columns),
            ((torch.arange(columns).double() + 0.5) / columns).expand(rows, columns),
        ],
        dim=-1,
    )[inside]
    fits = []
    for ramp in ramps:
        values = (ramp - shift[:, None, None]) / scale[:, None, None]
        places = ((values - _LOW) / (_HIGH - _LOW)).mean(dim=0)[inside]
        fit = torch.linalg.lstsq(grid, places[:, None]).solution[:, 0]
        if float((grid @ fit - places).abs().max()) > _SAME_PLACE:
            return None
        fits.append(fit.tolist())
    (top, bottom), (left, right) = first.extents
    (row, column), (row_below, column_below), (row_right, column_right) = [
        [fit[0] + fit[1] * down + fit[2] * across for fit in fits]
        for down, across in ((top, left), (bottom, left), (top, right))
    ]
    is_scaled = len(scale) == 3 and not first.is_learned
    return InputReading(
        scale.tolist() if is_scaled else [1.0] * 3,
        shift.tolist() if is_scaled else [0.0] * 3,
        (row, column),
        (row_below - row, column_below - column),
        (row_right - row, column_right - column),
        (height, width),
    )


class _ConvolutionReached(BaseException):
    """Signal that ends a forward pass at its first convolution, past what handles errors in the network."""


class _FirstConvolution(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Mode that keeps the input of the first convolution, and whether a batch norm comes before it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.images: Tensor | None = None
        self.is_learned = False
        self.extents = ((0.0, 1.0), (0.0, 1.0))
        """(start, stop) of what the outputs of the convolution cover, by axis, in sides of its input."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if self.images is None:
            self.is_learned = self.is_learned or "batch_norm" in name
            if "convolution" in name and args[0].ndim == 4:
                self.images = args[0].detach().clone()
                self.extents = _extents(args) or self.extents
                raise _ConvolutionReached
        return func(*args, **(kwargs or {}))


def _extents(args: Any) -> tuple[tuple[float, float], tuple[float, float]] | None:
    """Return what the outputs of a convolution cover, None for a transposed one.

    An output covers a stride around the center of its kernel, so that padding by the convolution, or before it by as
    much, makes no difference.
    """
    images, weight, _, strides, paddings, dilations, is_transposed = args[:7]
    if is_transposed:
        return None
    extents = []
    for axis in (0, 1):
        side, kernel = images.shape[2 + axis], weight.shape[2 + axis]
        stride, padding, dilation = (
            sizes[axis % len(sizes)] for sizes in (strides, paddings, dilations)
        )
        reach = dilation * (kernel - 1)
        count = (side + 2 * padding - reach - 1) // stride + 1
        center = (reach + 1) / 2 - padding
        extents.append(((center - stride / 2) / side, (center + (count - 0.5) * stride) / side))
    return extents[0], extents[1]


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)
