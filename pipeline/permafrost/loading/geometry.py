"""One matrix for the image and the maps of a record: views, warps, stored values, and the regions of objects.

Coordinates are normalized: -1 and 1 are the outer edges of the pixel grid (align_corners=False), so one matrix is valid
at every resolution. A view is stored as `canonical_from_view`, the direction in which pixels are sampled, so it is
never inverted and a replayed view is identical bit for bit. Homographies compose from right to left:
map_from_view = map_from_canonical @ canonical_from_view.

Values of a pass are decoded to float32 on their own device, just before they are warped. Until then they keep the size
that they have on disk: in queues of loader processes, in pinned memory and on the bus.

Operations on pixels are in pixel_changes.py. They come after the warp, and the encoding of the input (Normalize,
add_inverse) comes last, because it does not commute with the zeros outside the frame.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from permafrost.core.batches import (
    Batch,
    GridPlacement,
    MapTargets,
    Moves,
    Rendering,
    StoredTargets,
    Targets,
)
from permafrost.core.errors import ConfigError
from permafrost.core.records import FEATURES, FieldSpec
from permafrost.loading.mixtures import mix_images, mixture_of_targets, own_weights
from permafrost.loading.pixel_changes import blank_maps, change_rows
from permafrost.store.codecs import decode_tensor

Interpolation = Literal["bilinear", "bicubic", "nearest"]
"""Interpolation between the cells of a source."""


def decode_maps(stored: StoredTargets) -> Tensor:
    """Decode maps to f32 [B, E, A, h, w] with max-abs 1 (or all zero)."""
    return decode_tensor(stored.require_maps()[1])


def decode_intermediates(stored: StoredTargets) -> dict[str, Tensor]:
    """Decode intermediates to f32 in their units."""
    return {
        name: decode_tensor(values, stored.scales[name])
        if name in stored.scales
        else values.float()
        for name, values in stored.intermediates.items()
    }


# ---- geometry --------------------------------------------------------------------------------------


_FINE_GRID = 56
"""Minimum resolution for measuring coverage, because cells of a 7x7 grid may be partly outside."""


# ---- warping -------------------------------------------------------------------------------------


def fetch_points(source_from_view: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Compute the position in the source of each cell center of a view of (height, width) `size`.

    Args:
        source_from_view: [B, 3, 3].
        size: (height, width) of the view.

    Returns:
        The coordinates x and y, each [B, height, width], normalized.
    """
    x, y = _axis_points(source_from_view, size)
    return x.expand(-1, *size), y.expand(-1, *size)


def _axis_points(source_from_view: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Compute the coordinates of `fetch_points`, for upright views as [B, 1, width] and [B, height, 1]."""
    y, x = (
        (2 * torch.arange(length, device=source_from_view.device).to(source_from_view) + 1) / length
        - 1
        for length in size
    )
    h = source_from_view[:, :, :, None, None]
    kind = _kind_of(source_from_view)
    if kind == "upright":
        return h[:, 0, 0] * x + h[:, 0, 2], h[:, 1, 1] * y[:, None] + h[:, 1, 2]
    # Elementwise instead of a matrix product, so that the result does not depend on the rest of the batch.
    xs, ys, *ws = (
        (h[:, row, 0] * x + h[:, row, 1] * y[:, None]).add_(h[:, row, 2])
        for row in range(2 if kind == "affine" else 3)
    )
    return (xs / ws[0], ys / ws[0]) if ws else (xs, ys)


def _kind_of(source_from_view: Tensor) -> Literal["upright", "affine", "any"]:
    """Return "upright" for views that are shifted, scaled and flipped only, and "affine" for those without perspective.

    "any" on a GPU, which would have to be waited for, and in a compiled program, which does not depend on values.
    """
    if source_from_view.device.type != "cpu" or torch.compiler.is_compiling():
        return "any"
    # NumPy's operations on few numbers take a tenth of the time.
    entries = source_from_view.detach().numpy()
    if entries[:, 2, :2].any() or (entries[:, 2, 2] != 1).any():
        return "any"
    return "affine" if entries[:, 0, 1].any() or entries[:, 1, 0].any() else "upright"


def warp(
    source: Tensor,
    source_from_view: Tensor,
    size: tuple[int, int],
    interpolation: Interpolation = "bilinear",
    moves: Moves | None = None,
) -> Tensor:
    """Sample `source` into views, where the part of a cell outside the source or a moved window counts as 0.

    The same rule applies to images and maps: for crops it equals clamping at the border, for rotations zero fill.

    Args:
        source: [B, C, h, w], any dtype; integers and half precision are promoted to float32.
        source_from_view: [B, 3, 3].
        size: (height, width) of the views.
        interpolation: Interpolation between the cells of the source.
        moves: Moves of the views' windows.

    Returns:
        [B, C, height, width] float32 or float64.
    """
    fetched, coverage = warp_covered(source, source_from_view, size, interpolation, moves)
    return fetched.mul_(coverage)  # in place, as fresh memory takes longer than the product


def warp_covered(
    source: Tensor,
    source_from_view: Tensor,
    size: tuple[int, int],
    interpolation: Interpolation = "bilinear",
    moves: Moves | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample `source` into views as `warp` does, but continued at its border, and the fraction of each cell inside.

    Args:
        source: [B, C, h, w], any dtype; integers and half precision are promoted to float32.
        source_from_view: [B, 3, 3].
        size: (height, width) of the views.
        interpolation: Interpolation between the cells of the source.
        moves: Moves of the views' windows.

    Returns:
        [B, C, height, width] and its coverage [B, 1, height, width] in [0, 1], float32 or float64.
    """
    # In half precision the grid coordinates would be off by up to half a pixel.
    source = source.to(torch.promote_types(source.dtype, torch.float32))
    source_from_view = source_from_view.to(source.dtype)
    fetched = _sample(source, source_from_view, size, interpolation)
    return fetched, covered_share(source_from_view, size, moves)


def _sample(
    source: Tensor, source_from_view: Tensor, size: tuple[int, int], interpolation: Interpolation
) -> Tensor:
    """Sample a source [B, C, h, w] into views, continued at its border: [B, C, height, width]."""
    grid = torch.stack(fetch_points(source_from_view, size), dim=-1)
    return F.grid_sample(
        source, grid, mode=interpolation, padding_mode="border", align_corners=False
    )


def covered_share(
    source_from_view: Tensor, size: tuple[int, int], moves: Moves | None = None
) -> Tensor:
    """Compute the fraction of each cell of a view that is inside the source and its window, [B, 1, height, width].

    Args:
        source_from_view: [B, 3, 3].
        size: (height, width) of the views.
        moves: Moves of the views' windows.
    """
    finer = max(1, _FINE_GRID // min(size))
    inside = _inside(source_from_view, (size[0] * finer, size[1] * finer))
    if moves is not None:
        inside = _clip(inside, moves)
    return F.avg_pool2d(inside, finer) if finer > 1 else inside


def _clip(values: Tensor, moves: Moves) -> Tensor:
    """Set values of views [B, C, height, width] to 0 where a move has brought in what was outside."""
    return values.index_copy(0, moves.rows, _clip_rows(values.index_select(0, moves.rows), moves))


def _clip_rows(values: Tensor, moves: Moves) -> Tensor:
    """Set values of the views that are moved, alone, to 0 where a point was outside, in place."""
    matrices = torch.cat([moves.window_from_view, *moves.between])
    inside = _inside(matrices, (values.shape[-2], values.shape[-1]))
    for part in torch.split(inside, [len(values), *map(len, moves.between)]):
        values[: len(part)].mul_(part)
    return values


def _inside(source_from_view: Tensor, size: tuple[int, int]) -> Tensor:
    """Return 1 for points of a view that are inside the source and 0 for others, [B, 1, height, width]."""
    x, y = _axis_points(source_from_view, size)
    # Rounding may move an edge point slightly outside, and such a point belongs to the frame.
    return (torch.maximum(x.abs_(), y.abs_()) <= 1 + 1e-6).to(source_from_view.dtype)[:, None]


def coverage_on(targets: Targets, name: str, grid: tuple[int, int]) -> Tensor:
    """Compute the coverage of a field of targets on another grid, [B, 1, height, width].

    Args:
        targets: Targets with a placement of the field.
        name: Name of the field.
        grid: (height, width).
    """
    placement = targets.placements[name]
    covered = covered_share(placement.source_from_view, grid, placement.moves)
    mixture = targets.mixture
    if mixture is None:
        return covered
    return torch.lerp(covered[mixture.partners], covered, own_weights(mixture, grid).to(covered))


def center_crop(heights: Tensor, widths: Tensor, fraction: float) -> Tensor:
    """Compute `canonical_from_crop` of the usual center crop, a square with `fraction` of the shorter side.

    Args:
        heights: [B], heights H0 of the original images, whose aspect ratio the canonical frame does not have.
        widths: [B], widths W0 of the original images.
        fraction: Side f of the square relative to the shorter side of the original.

    Returns:
        f32 [B, 3, 3]: diag(f m / W0, f m / H0, 1) with m = min(H0, W0).
    """
    side = fraction * torch.minimum(heights, widths)
    scales = torch.stack([side / widths, side / heights, torch.ones_like(side)], dim=-1)
    return torch.diag_embed(scales.float())


def downscale(
    source_from_view: Tensor, source_size: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """Compute the number of source pixels per view pixel along the worse axis, [B].

    Bilinear sampling aliases above about 1.2. Only the affine part of the matrix is used.

    Args:
        source_from_view: [B, 3, 3].
        source_size: (height, width) of the source in pixels.
        size: (height, width) of the view in pixels.
    """
    source_pixels = source_from_view.new_tensor([source_size[1], source_size[0]])[:, None]
    view_pixels = source_from_view.new_tensor([size[1], size[0]])
    scaled = source_from_view[:, :2, :2] * source_pixels / view_pixels
    norms: Tensor = torch.linalg.matrix_norm(scaled, ord=2)
    return norms


# ---- a batch in its view -------------------------------------------------------------------------


def view_images(batch: Batch, size: tuple[int, int]) -> Tensor:
    """Render the batch's frames in its view: f32 [B, 3, height, width] in [0, 1], or unchanged rows of a table.

    The batch's `pixel_augment` is applied, so networks with different input sizes receive the same images.

    Args:
        batch: Batch in its view.
        size: (height, width) of the images.
    """
    if not batch.has_places:
        return batch.inputs
    if batch.rendered is not None and batch.rendered.shape[-2:] == size:
        return batch.rendered
    if batch.has_windows:
        images = render_windows(batch.inputs, batch.moves, size, batch.rendering)
    elif batch.canonical_from_view is None and batch.inputs.shape[-2:] == size:
        images = _to_floats(batch.inputs)
    else:
        matrices = canonical_from_view(batch)
        images = render_frames(batch.inputs, matrices, batch.moves, batch.rendering, size)
    augment = batch.pixel_augment
    if augment is None:
        return images
    images = change_rows(images, augment.changes)
    if augment.mixture is None:
        return images
    seconds = None if batch.second is None else view_images(batch.second, size)
    return mix_images(images, augment.mixture, seconds)


def render_frames(
    frames: Tensor,
    canonical_from_view: Tensor,
    moves: Moves | None,
    rendering: Rendering,
    size: tuple[int, int],
) -> Tensor:
    """Sample whole frames into views: f32 [n, 3, height, width] in [0, 1].

    It is one sampling, except that windows whose nearest pixels are moved are sampled first.

    Args:
        frames: u8 [n, 3, H, W].
        canonical_from_view: [n, 3, 3].
        moves: Moves of the views' windows, outside of which views are black.
        rendering: Rules by which views show images.
        size: (height, width) of the views.
    """
    if moves is not None and rendering.interpolation == "nearest":
        windows = canonical_from_view.index_select(0, moves.rows)
        windows = windows @ torch.linalg.inv(moves.window_from_view)
        whole = canonical_from_view.index_copy(0, moves.rows, windows)
        return _move_windows(
            render_frames(frames, whole, None, rendering, size), moves, size, rendering
        )
    if rendering.border == "black":
        images = warp(frames, canonical_from_view, size, rendering.resize, moves)
        if rendering.resize == "bicubic":  # which overshoots
            images.clamp_(0, 255)
        return images.div_(255)
    images, _ = warp_covered(frames, canonical_from_view, size)
    return (images if moves is None else _clip(images, moves)).div_(255)


def render_windows(
    windows: Tensor, moves: Moves | None, size: tuple[int, int], rendering: Rendering
) -> Tensor:
    """Return windows at a size, and sample those that are moved: f32 [n, 3, height, width] in [0, 1].

    Args:
        windows: Windows of original images, u8 [n, 3, h, w].
        moves: Moves of what they show, black outside of them.
        size: (height, width) of the views.
        rendering: Rules by which views show images.
    """
    images = _to_floats(windows)
    if images.shape[-2:] != size:
        images = F.interpolate(images, size, mode="bilinear", antialias=True)
    return images if moves is None else _move_windows(images, moves, size, rendering)


def _move_windows(
    images: Tensor, moves: Moves, size: tuple[int, int], rendering: Rendering
) -> Tensor:
    """Move what some windows show, in place: f32 [n, 3, height, width]."""
    windows = images.index_select(0, moves.rows)
    views = _sample(windows, moves.window_from_view, size, rendering.interpolation)
    return images.index_copy_(0, moves.rows, _clip_rows(views, moves))


def _to_floats(images: Tensor) -> Tensor:
    """Return bytes as f32 in [0, 1].

    Contiguous whatever the images' layout, on which the kernels of a network and so its last bits depend.
    """
    return images.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


@dataclass(frozen=True)
class TargetRequest:
    """Request of a step for the teachers' targets of its batch."""

    grid: tuple[int, int]
    """(h, w) of the maps, the same as the student's."""
    map_control: str = "none"
    """Negative control: "shuffled" assigns to each record the map of its neighbor in the batch, "unaugmented" does not
    transform a stored map with the image. Features are treated alike, and class maps and attention are not changed."""
    with_maps: bool = True
    """False omits the maps if the loss does not need them."""
    scaled: bool = False
    """True for maps in the explainer's units, False for maps relative to the maximum of each."""


def view_targets(batch: Batch, request: TargetRequest) -> tuple[Targets, ...]:
    """Return every teacher's stored targets, with maps warped directly to the grid that is requested.

    Intermediates are warped on their own grids, because the loss pools the finer side of each pair. Targets of mixtures
    are those of the record itself, and `mix_targets` adds those of its partner.

    Returns:
        The targets of each teacher: maps f32 [B, E, A, h, w] and their validity bool [B, E], False for padding and for
        maps that are zero everywhere in the view.
    """
    viewed = []
    for stored in batch.targets:
        intermediates, coverage, placements = _view_intermediates(
            batch, stored, request.map_control
        )
        targets = Targets(
            teacher=stored.teacher,
            logits=stored.logits,
            intermediates=intermediates,
            coverage=coverage,
            placements=placements,
            mixture=mixture_of_targets(batch),
            specs=stored.specs,
        )
        if request.with_maps and stored.maps is not None and stored.target_class is not None:
            targets = _with_maps(targets, batch, stored, stored.target_class, request)
        viewed.append(targets)
    return tuple(viewed)


def _with_maps(
    targets: Targets,
    batch: Batch,
    stored: StoredTargets,
    target_class: Tensor,
    request: TargetRequest,
) -> MapTargets:
    is_warped = request.map_control != "unaugmented"
    maps = view_maps(batch, stored, request.grid, is_warped=is_warped)
    if request.scaled:
        if stored.map_scale is None:
            raise ConfigError(
                f"{stored.teacher} stores no scale of its maps, which method.map_distance=absolute compares; set "
                "method.map_distance=cosine, or make the pass again"
            )
        maps = maps * stored.map_scale[:, :, None, None, None]
    if is_warped:
        maps = blank_maps(maps, batch.pixel_augment)
    if request.map_control == "shuffled":
        maps = neighbor_maps(maps, target_class)
    return MapTargets.of(targets, target_class, maps)


def _view_intermediates(
    batch: Batch, stored: StoredTargets, map_control: str
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, GridPlacement]]:
    """Move a teacher's intermediates to the batch's view, each on its own grid.

    Returns them with `Targets.coverage` and `Targets.placements`.
    """
    viewed = decode_intermediates(stored)
    coverage: dict[str, Tensor] = {}
    placements: dict[str, GridPlacement] = {}
    if stored.map_from_canonical is not None:
        for name in viewed:
            is_still = name.startswith(f"{FEATURES}_") and map_control == "unaugmented"
            view, moves = (None, None) if is_still else (batch.canonical_from_view, batch.moves)
            viewed[name], covered, placement = _view_field(
                viewed[name], stored.specs[name], view, stored.map_from_canonical, moves
            )
            if covered is not None and placement is not None:
                coverage[name], placements[name] = covered, placement
    if map_control == "shuffled":
        viewed, coverage = neighbor_features(viewed), neighbor_features(coverage)
        placements = {
            name: _neighbor_placement(placement) if name.startswith(f"{FEATURES}_") else placement
            for name, placement in placements.items()
        }
    return viewed, coverage, placements


def _view_field(
    values: Tensor,
    spec: FieldSpec,
    canonical_from_view: Tensor | None,
    map_from_canonical: Tensor,
    moves: Moves | None,
) -> tuple[Tensor, Tensor | None, GridPlacement | None]:
    """Move one field to a view (None for the canonical one).

    Returns it with its coverage [B, 1, h, w] and its placement, both None where all of it is inside or zeros stand for
    what is outside.
    """
    identity = torch.eye(3, device=values.device, dtype=torch.float32).expand(len(values), 3, 3)
    view = identity if canonical_from_view is None else canonical_from_view
    if spec.mirrored:
        sides = shows_mirror_image(view).long()
        values = values[torch.arange(len(values), device=values.device), sides]
        mirrored_view = torch.cat([-view[:, :1], view[:, 1:]], dim=1)  # a horizontal flip negates x
        view = torch.where(sides[:, None, None] == 1, mirrored_view, view)
    if spec.when_moved not in ("warp", "warp_covered"):
        return values, None, None
    is_whole = spec.frame == "full" and spec.margin == 0 and canonical_from_view is None
    if is_whole and spec.when_moved == "warp_covered":
        return values, None, None
    shrink = 1 + 2 * spec.margin
    source_from_view = map_from_canonical @ view
    if spec.margin:  # the border takes its part of the grid
        source_from_view = torch.cat(
            [source_from_view[:, :2] / shrink, source_from_view[:, 2:]], dim=1
        )
    stored_size = (values.shape[-2], values.shape[-1])
    size = (round(stored_size[0] / shrink), round(stored_size[1] / shrink))
    flat = values.reshape(len(values), -1, *stored_size)
    if spec.when_moved == "warp":
        moved = warp(flat, source_from_view, size, moves=moves)
        return moved.view(*values.shape[:-2], *size), None, None
    moved, covered = warp_covered(flat, source_from_view, size, moves=moves)
    placement = GridPlacement(source_from_view=source_from_view, moves=moves)
    return moved.view(*values.shape[:-2], *size), covered, placement


def _neighbor_placement(placement: GridPlacement) -> GridPlacement:
    """Return the placement of the previous record in the batch for each record."""
    count, moves = len(placement.source_from_view), placement.moves
    if moves is not None:
        moves = replace(moves, rows=(moves.rows + 1) % count)
    return GridPlacement(source_from_view=placement.source_from_view.roll(1, dims=0), moves=moves)


def shows_mirror_image(canonical_from_view: Tensor) -> Tensor:
    """Return whether each view [B, 3, 3] mirrors the image, as a flip does, bool [B]."""
    (a, b), (c, d) = (row.unbind(dim=1)[:2] for row in canonical_from_view.unbind(dim=1)[:2])
    return a * d < b * c


def view_maps(
    batch: Batch, stored: StoredTargets, grid: tuple[int, int], *, is_warped: bool = True
) -> Tensor:
    """Warp a teacher's maps to the batch's view: f32 [B, E, A, h, w].

    Args:
        batch: Batch in its view.
        stored: Targets of the teacher, with maps.
        grid: (h, w) of the result.
        is_warped: False leaves the maps in the canonical frame in any view.
    """
    maps = decode_maps(stored)
    if stored.map_from_canonical is None:
        return place_on_grid(maps, grid)
    map_from_view, moves = stored.map_from_canonical, None
    if is_warped:
        map_from_view, moves = map_from_view @ canonical_from_view(batch), batch.moves
    return warp(maps.flatten(1, 2), map_from_view, grid, moves=moves).view(*maps.shape[:3], *grid)


def neighbor_maps(maps: Tensor, target_class: Tensor) -> Tensor:
    """Assign to each record the maps of the previous record in the batch, repeated if that record has fewer.

    Args:
        maps: [B, E, A, h, w].
        target_class: i64 [B, E], NO_CLASS after the last one.

    Returns:
        [B, E, A, h, w].
    """
    count = (target_class >= 0).sum(dim=1).roll(1).clamp(min=1)
    place = torch.arange(maps.shape[1], device=maps.device) % count[:, None]
    return maps.roll(1, dims=0).take_along_dim(place[:, :, None, None, None], dim=1)


def neighbor_features(fields: dict[str, Tensor]) -> dict[str, Tensor]:
    """Assign to each record the features of the previous record in the batch. Other fields are not changed."""
    return {
        name: values.roll(1, dims=0) if name.startswith(f"{FEATURES}_") else values
        for name, values in fields.items()
    }


def place_on_grid(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Sample maps [B, E, A, h, w] at the cell centers of another (h, w) grid of the same view."""
    if maps.shape[-2:] == grid:
        return maps
    whole = torch.eye(3, device=maps.device, dtype=torch.float32).expand(len(maps), 3, 3)
    return warp(maps.flatten(1, 2), whole, grid).view(*maps.shape[:3], *grid)


def canonical_from_view(batch: Batch) -> Tensor:
    """Return the batch's matrices, f32 [B, 3, 3], or the identity if it has none."""
    if batch.canonical_from_view is not None:
        return batch.canonical_from_view
    identity = torch.eye(3, device=batch.inputs.device, dtype=torch.float32)
    return identity.expand(len(batch.inputs), 3, 3)
