"""One homography per record, applied to its image and to each of its maps in one warp each.

Coordinates are normalised: -1 and 1 are the outer edges of the pixel grid (align_corners=False), so
one matrix serves every resolution. A view is stored as `canonical_from_view`, the direction in which
pixels are fetched: nothing is inverted later, and a replayed view is the same bit for bit.
Homographies compose right to left: map_from_view = map_from_canonical @ canonical_from_view.

Photometric operations do not belong here; encoding (Normalize, AddInverse) comes after the warp,
because the zeros outside the frame do not commute with it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import kornia.augmentation as K
import torch
import torch.nn.functional as F
from kornia.geometry.conversions import normalize_homography
from torch import Tensor

from pipeline.config import ConfigError
from pipeline.records import Targets
from pipeline.seeds import derive_seed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.config import AugmentConfig, OperationConfig
    from pipeline.records import Batch, StoredTargets

BLOCK_SIZE = 1024
"""Consecutive positions of an epoch's order that are drawn together: Kornia's cost is per call."""

_DEFAULT_CROP_SCALE = (0.08, 1.0)

_FINE_GRID = 56
"""Coverage is measured on a grid at least this fine; a 7x7 cell may lie partly outside."""


# ---- drawing -------------------------------------------------------------------------------------


def build_operations(config: AugmentConfig, size: tuple[int, int]) -> list[Any]:
    """Kornia generators for `augment.operations`, to be drawn on a canonical (height, width) `size`."""
    return [_OPERATIONS[operation.kind](operation, size) for operation in config.operations]


def _pad_crop(operation: OperationConfig, size: tuple[int, int]) -> Any:
    return K.RandomCrop(size, padding=operation.padding)


def _resized_crop(operation: OperationConfig, size: tuple[int, int]) -> Any:
    return K.RandomResizedCrop(
        size,
        scale=operation.scale or _DEFAULT_CROP_SCALE,
        ratio=operation.ratio,
        align_corners=False,
    )


def _horizontal_flip(operation: OperationConfig, size: tuple[int, int]) -> Any:
    return K.RandomHorizontalFlip(p=operation.p)


def _vertical_flip(operation: OperationConfig, size: tuple[int, int]) -> Any:
    return K.RandomVerticalFlip(p=operation.p)


def _rotation(operation: OperationConfig, size: tuple[int, int]) -> Any:
    return K.RandomRotation(operation.degrees, p=operation.p, align_corners=False)


def _affine(operation: OperationConfig, size: tuple[int, int]) -> Any:
    return K.RandomAffine(
        operation.degrees,
        translate=operation.translate,
        scale=operation.scale,
        shear=operation.shear,
        p=operation.p,
        align_corners=False,
    )


_OPERATIONS = {
    "pad_crop": _pad_crop,
    "resized_crop": _resized_crop,
    "horizontal_flip": _horizontal_flip,
    "vertical_flip": _vertical_flip,
    "rotation": _rotation,
    "affine": _affine,
}


def _draw_pixels(operation: Any, count: int, size: tuple[int, int]) -> Tensor:
    canvas = torch.empty((), dtype=torch.float64).expand(count, 1, *size)  # no memory behind it
    parameters = operation.forward_parameters(canvas.shape)
    pixels: Tensor = operation.generate_transformation_matrix(canvas, parameters, operation.flags)
    return pixels


def draw_views(operations: Sequence[Any], count: int, size: tuple[int, int], seed: int) -> Tensor:
    """Draw `canonical_from_view`, [count, 3, 3] float64, from Kornia `operations`.

    size  (height, width) of the canonical frame
    seed  32 bits; equal seeds give equal draws for equal operations and counts, and the draws of
          a smaller count are not a prefix of those of a larger one. The global generator is left
          as it was.
    """
    view_from_canonical = torch.eye(3, dtype=torch.float64).expand(count, 3, 3)
    with torch.random.fork_rng(devices=[]):  # Kornia draws from the global generator
        torch.manual_seed(seed)
        for operation in operations:
            if operation.p_batch != 1 or operation.same_on_batch:
                raise ConfigError(
                    f"augment: {type(operation).__name__} draws once per batch, not once per record"
                )
            pixels = _draw_pixels(operation, count, size)
            new_size = operation.flags.get("size", size)
            step = normalize_homography(pixels.double(), size, new_size, align_corners=False)
            view_from_canonical = step @ view_from_canonical
            size = new_size
    canonical_from_view: Tensor = torch.linalg.inv(view_from_canonical)
    return canonical_from_view


class ViewSchedule:
    """Fresh views for the positions of an epoch's order: a pure function of (seed, epoch, position).

    Each block of BLOCK_SIZE consecutive positions is drawn at once, so a view does not depend on the
    batch size, the rank or the process that asks for it.
    """

    def __init__(self, config: AugmentConfig, size: tuple[int, int], seed: int) -> None:
        self.operations = build_operations(config, size)
        self.size = size
        self.seed = seed
        self._block = lru_cache(maxsize=4)(self._draw_block)

    def views(self, epoch: int, start: int, count: int) -> Tensor | None:
        """`canonical_from_view` of positions start .. start + count, f32 [count, 3, 3].

        None where nothing moves.
        """
        if not self.operations:
            return None
        first, last = start // BLOCK_SIZE, (start + count - 1) // BLOCK_SIZE
        blocks = torch.cat([self._block(epoch, block) for block in range(first, last + 1)])
        return blocks[start - first * BLOCK_SIZE :][:count]

    def _draw_block(self, epoch: int, block: int) -> Tensor:
        seed = derive_seed(self.seed, "views", epoch, block)
        return draw_views(self.operations, BLOCK_SIZE, self.size, seed).float()


# ---- warping -------------------------------------------------------------------------------------


def fetch_points(source_from_view: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Where each cell centre of a view of (height, width) `size` lies in the source.

    source_from_view  [B, 3, 3]
    returns x and y, each [B, height, width], normalised
    """
    y, x = (
        (2 * torch.arange(n, device=source_from_view.device).to(source_from_view) + 1) / n - 1
        for n in size
    )
    h = source_from_view[:, :, :, None, None]
    # Elementwise, not a matrix product: the result must not depend on the rest of the batch.
    xs, ys, ws = (h[:, row, 0] * x + h[:, row, 1] * y[:, None] + h[:, row, 2] for row in range(3))
    return xs / ws, ys / ws


def warp(source: Tensor, source_from_view: Tensor, size: tuple[int, int]) -> Tensor:
    """Fetch `source` bilinearly into views; the share of a cell that lies outside counts as 0.

    source            [B, C, h, w], any dtype; integers and halves are promoted to float32
    source_from_view  [B, 3, 3]
    size              (height, width) of the views
    returns           [B, C, height, width] float32 or float64

    One rule for images and maps: on crops it equals clamping at the border, on rotations zero fill.
    """
    # In half precision the grid itself would be up to half a pixel wrong.
    source = source.to(torch.promote_types(source.dtype, torch.float32))
    source_from_view = source_from_view.to(source.dtype)
    x, y = fetch_points(source_from_view, size)
    grid = torch.stack([x, y], dim=-1)
    fetched = F.grid_sample(source, grid, padding_mode="border", align_corners=False)
    finer = max(1, _FINE_GRID // min(size))
    if finer > 1:
        x, y = fetch_points(source_from_view, (size[0] * finer, size[1] * finer))
    # Rounding may put an edge point a hair outside; such a point is on the frame.
    inside = (torch.maximum(x.abs(), y.abs()) <= 1 + 1e-6).to(source.dtype)[:, None]
    coverage = F.avg_pool2d(inside, finer) if finer > 1 else inside
    warped: Tensor = fetched * coverage
    return warped


def downscale(
    source_from_view: Tensor, source_size: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """Source pixels per view pixel along the worse axis, [B]; above about 1.2 a bilinear fetch aliases.

    Reads the affine part of the matrix only.
    """
    source_pixels = source_from_view.new_tensor([source_size[1], source_size[0]])[:, None]
    view_pixels = source_from_view.new_tensor([size[1], size[0]])
    scaled = source_from_view[:, :2, :2] * source_pixels / view_pixels
    norms: Tensor = torch.linalg.matrix_norm(scaled, ord=2)
    return norms


# ---- a batch as the student sees it --------------------------------------------------------------


def view_images(batch: Batch, size: tuple[int, int]) -> Tensor:
    """The batch's frames in the student's view: f32 [B, 3, height, width] in [0, 1]."""
    if batch.canonical_from_view is None and batch.inputs.shape[-2:] == size:
        return batch.inputs.float() / 255
    return warp(batch.inputs, canonical_from_view(batch), size) / 255


def view_targets(
    batch: Batch, grid: tuple[int, int], map_control: str = "none", *, with_maps: bool = True
) -> tuple[Targets, ...]:
    """Every teacher's stored targets, its maps warped straight to the student's (h, w) `grid`.

    map_control  "shuffled" gives each record the map of its neighbour in the batch, "unaugmented"
                 leaves the map where it was while the image moves: both must lose what maps teach
    with_maps    False leaves the maps out, where the loss does not need them
    """
    return tuple(
        _view_maps(batch, stored, grid, map_control)
        if with_maps and stored.maps is not None
        else Targets(
            teacher=stored.teacher, logits=stored.logits, explained_class=stored.explained_class
        )
        for stored in batch.targets
    )


def _view_maps(
    batch: Batch, stored: StoredTargets, grid: tuple[int, int], map_control: str
) -> Targets:
    assert stored.maps is not None
    assert stored.explained_class is not None
    assert stored.map_from_canonical is not None
    map_from_view = stored.map_from_canonical
    if map_control != "unaugmented":
        map_from_view = map_from_view @ canonical_from_view(batch)
    maps = warp(stored.maps.flatten(1, 2), map_from_view, grid).view(*stored.maps.shape[:3], *grid)
    if map_control == "shuffled":
        maps = maps.roll(1, dims=0)
    return Targets(
        teacher=stored.teacher,
        logits=stored.logits,
        explained_class=stored.explained_class,
        maps=maps,
        map_valid=maps.flatten(2).any(dim=2) & (stored.explained_class >= 0),
    )


def canonical_from_view(batch: Batch) -> Tensor:
    """The batch's matrices, f32 [B, 3, 3]; the identity where nothing moves."""
    if batch.canonical_from_view is not None:
        return batch.canonical_from_view
    identity = torch.eye(3, device=batch.inputs.device)
    return identity.expand(len(batch.inputs), 3, 3)
