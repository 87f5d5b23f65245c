"""Windows: the part of an image that a view shows, before operations move it, and how it is cut from decoded pixels.

A view is a window, a crop and flips of the image, and the moves of what the window shows (rotations, shears, shifts),
with black outside of the window. A window is four numbers: scales and shifts in x and y from its coordinates to those
of the image, -1 and 1 at the edges of either. A negative scale is a flip.

Cut from an original image, a window is one of whole pixels, as in torchvision, and becomes a view in one step, with
antialiasing where it has more pixels than the view. Nothing else of the image is resized.

Not here: windows of stored frames, which the warp of geometry.py samples with the moves in one step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from permafrost.config.models import Picture
from permafrost.core.batches import Batch, Border, Moves, Rendering
from permafrost.core.records import MOVE_FIELD, PIXEL_FIELD, VIEW_FIELD, WINDOW_FIELD
from permafrost.loading.geometry import center_crop
from permafrost.loading.recipes import Recipe
from permafrost.loading.transfer import copy_to, move_values
from permafrost.store.entries import StoreMismatchError
from permafrost.store.record_form import decode_original, resize_pixels

MAX_WINDOW = 8.0
"""Largest side of a window in units of the image's."""
_DIVISORS = (8, 4, 2)
"""Divisors of the size to which a JPEG may be decoded."""

PixelBox = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels, the latter two exclusive."""


@dataclass(frozen=True)
class Views:
    """Views of records, with any leading axes [...]."""

    canonical_from_view: Tensor
    """Matrices of the views, f32 [..., 3, 3]: the product of window and moves."""
    windows: Tensor | None = None
    """Windows, f32 [..., 4]; None for views that are one matrix, which shows the image wherever it reaches."""
    steps: Tensor | None = None
    """Matrices input_from_output of the operations that move what the windows show, f32 [..., S, 3, 3], in the order in
    which they apply; None if nothing moves."""

    @classmethod
    def of(cls, windows: Tensor, steps: Tensor | None) -> Views:
        """Return the views of windows f32 [..., 4] and steps f32 [..., S, 3, 3], with the same bits wherever.

        The last rows of the steps must be 0, 0, 1.
        """
        matrices = torch.zeros(*windows.shape[:-1], 3, 3, dtype=torch.float64)
        matrices[..., 0, 0], matrices[..., 1, 1] = (
            windows[..., 0].double(),
            windows[..., 1].double(),
        )
        matrices[..., :2, 2], matrices[..., 2, 2] = windows[..., 2:].double(), 1
        for step in () if steps is None else steps.double().unbind(dim=-3):
            matrices = _product(matrices, step)
        return cls(matrices.float(), windows, steps)

    def select(self, index: object) -> Views:
        """Return the views of these places of the leading axes."""
        parts = (self.canonical_from_view, self.windows, self.steps)
        return Views(*(None if part is None else part[index] for part in parts))  # type: ignore[index,arg-type]

    @property
    def moves(self) -> Moves | None:
        """Moves of views [n], of those that are moved."""
        if self.steps is None:
            return None
        is_moving = (self.steps != torch.eye(3)).flatten(2).any(dim=2).flip(1)
        numbers = is_moving.sum(dim=1)
        rows = numbers.argsort(descending=True, stable=True)[: int((numbers > 0).sum())]
        if not len(rows):
            return None
        steps = reversed(self.steps[rows].double().unbind(dim=1))
        products = accumulate(steps, lambda product, step: _product(step, product))
        after = torch.stack(list(products), dim=1).float()
        counted = is_moving[rows].cumsum(dim=1)
        between = []
        for number in range(1, int(numbers.max())):
            first = (counted >= number).to(torch.uint8).argmax(dim=1)
            has_more = int((numbers > number).sum())
            between.append(after[torch.arange(has_more), first[:has_more]])
        return Moves(rows=rows, window_from_view=after[:, -1], between=tuple(between))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply matrices [..., 3, 3], each with the same bits whatever the others are."""
    return sum(left[..., :, k, None] * right[..., None, k, :] for k in range(3))  # type: ignore[return-value]


def stack_views(views: list[Views]) -> Views:
    """Return views of several numbers of each record, [n, V, ...], from those of each number, [n, ...]."""
    parts = zip(
        *((each.canonical_from_view, each.windows, each.steps) for each in views),
        strict=True,
    )
    return Views(*(None if part[0] is None else torch.stack(part, dim=1) for part in parts))  # type: ignore[arg-type]


def views_of_picture(picture: Picture, sizes: Tensor) -> Views | None:
    """Return the view of each image in a network's picture; None for whole frames.

    Args:
        picture: The picture.
        sizes: (height, width) of the images, [n, 2].
    """
    if picture.frames is not None:
        if picture.crop is None:
            return None
        heights, widths = sizes.unbind(dim=1)
        return Views(center_crop(heights, widths, picture.crop))
    shorter = sizes.min(dim=1, keepdim=True).values
    sides = sizes if picture.crop is None else (picture.crop * shorter + 0.5).floor().expand(-1, 2)
    starts = ((sizes - sides) / 2).floor()
    boxes = torch.cat([starts.flip(1), (starts + sides).flip(1)], dim=1).long().numpy()
    return Views.of(windows_of_boxes(boxes, torch.ones(len(sizes), 2), sizes), None)


def in_views(batch: Batch, views: Views | None, rendering: Rendering) -> Batch:
    """Return a batch of whole frames in views.

    Args:
        batch: The batch, on any device.
        views: Views of its records; None for the frames themselves.
        rendering: Rules by which the views show the images.
    """
    if views is None:
        return batch
    device = batch.inputs.device
    moves = views.moves
    return replace(
        batch,
        canonical_from_view=copy_to(views.canonical_from_view, device),
        moves=None if moves is None else move_values(moves, device),
        rendering=rendering,
    )


def complete_matrices(stored: Tensor) -> Tensor:
    """Return stored matrices [..., 3, 3] or their first two rows [..., 2, 3] as matrices [..., 3, 3]."""
    if stored.shape[-2] == 3:
        return stored
    last = stored.new_tensor([0.0, 0.0, 1.0]).expand(*stored.shape[:-2], 1, 3)
    return torch.cat([stored, last], dim=-2)


def stored_views_of(
    values: Mapping[str, NDArray[Any]],
    recipe: Recipe | None,
    sizes: Tensor,
    frame_size: tuple[int, int],
    where: str,
    keys: Sequence[str] = (),
) -> Views:
    """Return the views of stored values, checked.

    Args:
        values: Fields of the views of n records, [n, ...] or [n, V, ...].
        recipe: Recipe of the views, None for views without one.
        sizes: (height, width) of the original images, [n, 2].
        frame_size: (height, width) of the canonical frame.
        where: Folder of the pass, for messages.
        keys: Keys of the records; empty where they are not known.

    Raises:
        StoreMismatchError: If a window is not one of its image.
    """
    if VIEW_FIELD.name in values:
        return Views(complete_matrices(torch.from_numpy(values[VIEW_FIELD.name])))
    windows, moves = values[WINDOW_FIELD.name], values.get(MOVE_FIELD.name)
    if describe_wrong_windows(windows.reshape(-1, 4)):
        problems = [describe_wrong_windows(window.reshape(-1, 4)) for window in windows]
        row = next(row for row, problem in enumerate(problems) if problem)
        record = f", record {keys[row]}" if keys else ""
        raise StoreMismatchError(f"{where}{record}: its window {problems[row]}")
    pixels = values.get(PIXEL_FIELD)
    steps = (
        None
        if recipe is None
        else recipe.steps(
            windows.shape[:-1],
            None if pixels is None else torch.from_numpy(pixels),
            None if moves is None else complete_matrices(torch.from_numpy(moves)),
            sizes,
            frame_size,
        )
    )
    return Views.of(torch.from_numpy(windows), steps)


def describe_wrong_windows(windows: NDArray[np.float32]) -> str:
    """Return what is wrong with the first unsound one of windows [n, 4], "" if all are sound."""
    sides, shifts = np.abs(windows[:, :2]), np.abs(windows[:, 2:])
    problems = {
        "has numbers that are not finite": ~np.isfinite(windows),
        "is empty": sides == 0,
        f"is more than {MAX_WINDOW:g} times as large as the image": sides > MAX_WINDOW,
        "is wholly outside of the image": shifts >= 1 + sides,
    }
    return next((problem for problem, is_wrong in problems.items() if is_wrong.any()), "")


def pixel_boxes(windows: Tensor, sizes: Tensor) -> NDArray[np.int64]:
    """Compute the whole pixels of windows, i64 [n, 4]: left, top, right and bottom, the latter two exclusive.

    Args:
        windows: [n, 4].
        sizes: (height, width) of the images, [n, 2].
    """
    numbers, lengths = windows.double().numpy(), sizes.double().numpy()[:, ::-1]
    sides = np.rint(np.abs(numbers[:, :2]) * lengths).clip(min=1)
    starts = np.rint((numbers[:, 2:] + 1) / 2 * lengths - sides / 2)
    return np.concatenate([starts, starts + sides], axis=1).astype(np.int64)


def windows_of_boxes(boxes: NDArray[np.int64], flips: Tensor, sizes: Tensor) -> Tensor:
    """Return windows of whole pixels, f32 [n, 4], of which `pixel_boxes` makes the same boxes.

    Args:
        boxes: i64 [n, 4] of `pixel_boxes`.
        flips: Signs of the scales in x and y, [n, 2].
        sizes: (height, width) of the images, [n, 2].
    """
    lengths = sizes.double().flip(1)
    pixels = torch.from_numpy(boxes).double()
    starts, stops = pixels[:, :2], pixels[:, 2:]
    scales = flips.sign() * (stops - starts) / lengths
    return torch.cat([scales, (starts + stops) / lengths - 1], dim=1).float()


def cut_window(
    pixels: NDArray[np.uint8],
    box: PixelBox,
    flips: tuple[bool, bool],
    border: Border,
    memory: NDArray[np.uint8],
) -> None:
    """Write a window of an image at the size of the view: bilinear with antialiasing, as bytes.

    Args:
        pixels: Decoded image, u8 [H, W, 3].
        box: Left, top, right and bottom of the window in pixels, which may be outside of the image.
        flips: True where the window is flipped in x and in y.
        border: Content of the window beyond the image.
        memory: u8 [h, w, 3] to write to.
    """
    left, top, right, bottom = box
    height, width = pixels.shape[:2]
    x0, y0 = min(max(left, 0), width), min(max(top, 0), height)
    x1, y1 = min(max(right, x0), width), min(max(bottom, y0), height)
    part = pixels[y0:y1, x0:x1]
    if (x0, y0, x1, y1) != box:
        if border == "edge":
            rows = np.arange(top, bottom).clip(0, height - 1)
            part = pixels[rows[:, None], np.arange(left, right).clip(0, width - 1)]
        else:
            whole = np.zeros((bottom - top, right - left, 3), np.uint8)
            whole[y0 - top : y1 - top, x0 - left : x1 - left] = part
            part = whole
    view = torch.from_numpy(resize_pixels(part, (memory.shape[0], memory.shape[1])))
    # NumPy takes twenty times as long to copy a row's pixels in the other direction.
    torch.from_numpy(memory).copy_(view.flip([axis for axis in (0, 1) if flips[1 - axis]]))


Read = Callable[[NDArray[np.int64], Callable[[int, bytes, str], None]], None]
"""Function of rows of a batch that reads the bytes of each, in any thread, and calls a function with the place among
the rows, the bytes, and the file and record for messages."""


class WindowCutter:
    """Cuts windows of original images at the size of the views. Each image of a batch is decoded once."""

    def __init__(self, size: tuple[int, int], border: Border, *, scaled: bool = False) -> None:
        """Configure the cutter.

        Args:
            size: (height, width) of the views.
            border: Content of windows beyond the image.
            scaled: True to decode JPEGs to less than their size for windows of at least twice the size of the views.
        """
        self.size, self.border, self.scaled = size, border, scaled
        self._kept: list[NDArray[np.uint8] | None] = []

    def keep(self, records: int) -> None:
        """Keep the decoded images of this number of records from now on, 0 for none."""
        self._kept = [None] * (0 if self.scaled else records)

    def cut(self, at: NDArray[np.int64], windows: Tensor, sizes: Tensor, read: Read) -> Tensor:
        """Cut the windows of a batch: u8 [n, 3, h, w].

        Args:
            at: Positions of the records, i64 [n].
            windows: f32 [n, 4].
            sizes: (height, width) of the images in the index, [n, 2].
            read: Function that reads the files.

        Raises:
            ManifestError: If a file cannot be decoded, or its image has another size than in the index.
        """
        boxes = [(a, b, c, d) for a, b, c, d in pixel_boxes(windows, sizes).tolist()]
        flips = [(x, y) for x, y in (windows[:, :2] < 0).tolist()]
        shapes = [(int(height), int(width)) for height, width in sizes.tolist()]
        divisors = [self._divisor(box) for box in boxes]
        memory = np.empty((len(at), *self.size, 3), np.uint8)
        images = at * (_DIVISORS[0] + 1) + np.array(divisors)
        order = np.argsort(images, kind="stable")
        starts = np.flatnonzero(np.diff(images[order], prepend=-1))
        groups = np.split(order, starts[1:])  # rows of each image, decoded to one size

        def cut_all(pixels: NDArray[np.uint8], rows: NDArray[np.int64]) -> None:
            divisor = round(shapes[rows[0]][1] / pixels.shape[1])
            for row in rows.tolist():
                box = boxes[row] if divisor == 1 else _divided(boxes[row], divisor)
                cut_window(pixels, box, flips[row], self.border, memory[row])

        missing = []
        for rows in groups:
            pixels = self._kept[at[rows[0]]] if self._kept else None
            if pixels is None:
                missing.append(rows)
            else:
                cut_all(pixels, rows)

        def decode(number: int, data: bytes, where: str) -> None:
            rows = missing[number]
            shape = shapes[rows[0]]
            lowest = max(boxes[row][3] for row in rows.tolist())
            needed = shape[0] if self._kept else min(lowest, shape[0])
            pixels = decode_original(data, shape, where, needed, divisors[rows[0]])
            if self._kept:
                self._kept[at[rows[0]]] = pixels
            cut_all(pixels, rows)

        read(np.array([rows[0] for rows in missing], np.int64), decode)
        return torch.from_numpy(memory).permute(0, 3, 1, 2)

    def _divisor(self, box: PixelBox) -> int:
        """Return the largest divisor of the image's size with which a window is at least as large as its view."""
        height, width = self.size
        ratio = min((box[3] - box[1]) / height, (box[2] - box[0]) / width) if self.scaled else 1
        return next((divisor for divisor in _DIVISORS if divisor <= ratio), 1)

    def __getstate__(self) -> dict[str, Any]:
        # A copy in another process keeps images of its own.
        return self.__dict__ | {"_kept": []}


def _divided(box: PixelBox, divisor: int) -> PixelBox:
    """Return a window in the nearest pixels of an image that is smaller by a divisor."""
    left, top, right, bottom = (round(edge / divisor) for edge in box)
    return left, top, max(right, left + 1), max(bottom, top + 1)
