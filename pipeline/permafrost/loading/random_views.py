"""Random views of a record, drawn from its position and epoch alone, and quarter turns of them.

Operations are drawn by Kornia, which supports one canvas size per call. If the originals differ in aspect ratio,
resized crops are drawn here instead, for all records at once. Other operations before a crop are drawn for a square
and applied in each original's aspect ratio: with a = width / height they are conjugated with diag(a, 1, 1), in which
the unit of a shift is the height. `pad_crop` shifts in units of the shorter side, by the same number of pixels in both
directions, and `affine` in units of the width and the height. After a crop the view is square, and no conjugation is
needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import kornia.augmentation as K
import torch
from kornia.geometry.conversions import normalize_homography
from torch import Tensor

from permafrost.config.augment import AugmentOptions, OperationConfig, PolicyConfig
from permafrost.config.models import CENTER_CROP_FRACTION, Picture
from permafrost.core.batches import Rendering
from permafrost.core.digests import derive_seed
from permafrost.core.errors import require
from permafrost.core.generators import SeededDraws
from permafrost.loading.method_cache import MethodCache
from permafrost.loading.recipes import (
    BLOCK_SIZE,
    KEPT_BLOCKS,
    Positions,
    draw_policy,
    policy_matrices,
    rows_of_blocks,
)
from permafrost.loading.selected_records import SelectedRecords
from permafrost.loading.windows import Views, pixel_boxes, windows_of_boxes
from permafrost.store.reader import Store

VIEW_BLOCK = BLOCK_SIZE
"""Number of consecutive positions of an epoch's order drawn together, because Kornia's cost is per call."""

_CROP_TRIES = 10
"""Number of tries, as in torchvision, before the largest centered crop with an allowed ratio is used."""


# ---- one aspect ratio: Kornia draws all operations -----------------------------------------------


def build_operations(config: AugmentOptions, size: tuple[int, int]) -> list[Any]:
    """Build Kornia generators of `augment.operations` for a canonical (height, width) `size`."""
    return [
        _build_operation(operation, size)
        for operation in config.moving
        if isinstance(operation, OperationConfig)
    ]


def _build_operation(operation: OperationConfig, size: tuple[int, int]) -> Any:
    generator = _OPERATIONS[operation.kind](operation, size)
    # Its draws would otherwise have the default dtype of the process.
    generator.set_rng_device_and_dtype(torch.device("cpu"), torch.float32)
    return generator


_OPERATIONS: dict[str, Callable[[OperationConfig, tuple[int, int]], Any]] = {
    "pad_crop": lambda operation, size: K.RandomCrop(size, padding=operation.padding),
    "resized_crop": lambda operation, size: K.RandomResizedCrop(
        size, scale=operation.crop_scale, ratio=operation.ratio, align_corners=False
    ),
    "horizontal_flip": lambda operation, size: K.RandomHorizontalFlip(p=operation.p),
    "vertical_flip": lambda operation, size: K.RandomVerticalFlip(p=operation.p),
    "rotation": lambda operation, size: K.RandomRotation(
        operation.degrees, p=operation.p, align_corners=False
    ),
    "affine": lambda operation, size: K.RandomAffine(
        operation.degrees,
        translate=operation.translate,
        scale=operation.scale,
        shear=operation.shear,
        p=operation.p,
        align_corners=False,
    ),
}
"""Kornia's generator of an operation for a canonical (height, width), by its kind."""


def draw_in_parts(
    parts: Sequence[Sequence[Any]], count: int, size: tuple[int, int], seed: int
) -> list[Tensor]:
    """Draw views, and return a matrix input_from_output, [count, 3, 3] float64, for each part of their operations.

    The global generator is not changed.

    Args:
        parts: Operations of each part, in the order in which they apply: generators of `build_operations`, or drawn
            steps output_from_input, [count, 3, 3] float64.
        count: Number of views.
        size: (height, width) of the canonical frame.
        seed: 32 bits. Equal seeds result in equal draws for equal operations and counts, but the draws of a smaller
            count are not a prefix of those of a larger one.

    Raises:
        ConfigError: If an operation draws per batch instead of per record.
    """
    matrices = []
    with SeededDraws(seed):  # as Kornia takes no generator
        for operations in parts:
            output_from_input = torch.eye(3, dtype=torch.float64).expand(count, 3, 3)
            for operation in operations:
                if isinstance(operation, Tensor):
                    step = operation
                else:
                    step, size = _draw_step(operation, count, size)
                output_from_input = step @ output_from_input
            matrices.append(torch.linalg.inv(output_from_input))
    return matrices


def _draw_step(operation: Any, count: int, size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """Draw one operation's normalized output_from_input, [count, 3, 3] float64, and return it with the output size."""
    require(
        operation.p_batch == 1 and not operation.same_on_batch,
        f"augment.operations: {type(operation).__name__} must draw per record, not per batch",
    )
    canvas = torch.empty((), dtype=torch.float64).expand(count, 1, *size)  # needs no memory
    parameters = operation.forward_parameters(canvas.shape)
    pixels: Tensor = operation.generate_transformation_matrix(canvas, parameters, operation.flags)
    new_size = operation.flags.get("size", size)
    return normalize_homography(pixels.double(), size, new_size, align_corners=False), new_size


# ---- different aspect ratios ---------------------------------------------------------------------


def draw_crop_numbers(operation: OperationConfig, count: int, generator: torch.Generator) -> Tensor:
    """Draw the random numbers of a block of resized crops, independent of the records.

    Returns:
        [count, tries, 4] float64. The numbers of a try are its fraction of the area, its ratio width / height, and its
        horizontal and vertical position in [0, 1] of the remaining room.
    """
    low, high = operation.crop_scale
    numbers = torch.rand(count, _CROP_TRIES, 4, generator=generator, dtype=torch.float64)
    shares = low + (high - low) * numbers[..., 0]
    logs = [math.log(ratio) for ratio in operation.ratio]
    ratios = torch.exp(logs[0] + (logs[1] - logs[0]) * numbers[..., 1])
    return torch.stack([shares, ratios, numbers[..., 2], numbers[..., 3]], dim=-1)


def place_crops(numbers: Tensor, aspects: Tensor, ratio: tuple[float, float]) -> Tensor:
    """Compute `canonical_from_crop` [n, 3, 3] float64 of crops drawn in the originals' aspect ratios.

    With area fraction s, ratio r and aspect a, the crop's half-sizes in the normalized frame are sqrt(s r / a) by
    sqrt(s a / r). The first try that fits is used, or the largest centered crop with an allowed ratio if none fits (as
    in torchvision's RandomResizedCrop).

    Args:
        numbers: [n, tries, 4] of `draw_crop_numbers`.
        aspects: [n], width / height of each original.
        ratio: Range of allowed aspect ratios of crops.
    """
    shares, ratios, across, down = numbers.unbind(-1)
    aspects = aspects.double()[:, None]
    half_widths = (shares * ratios / aspects).sqrt()
    half_heights = (shares * aspects / ratios).sqrt()
    fits = (half_widths <= 1) & (half_heights <= 1)
    first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)
    picked = [values.gather(1, first)[:, 0] for values in (half_widths, half_heights, across, down)]
    allowed = aspects[:, 0].clamp(*ratio)
    centered = [
        (allowed / aspects[:, 0]).clamp(max=1),
        (aspects[:, 0] / allowed).clamp(max=1),
        torch.full_like(allowed, 0.5),
        torch.full_like(allowed, 0.5),
    ]
    any_fits = fits.any(dim=1)
    x, y, u, v = (torch.where(any_fits, *pair) for pair in zip(picked, centered, strict=True))
    matrix = torch.diag_embed(torch.stack([x, y, torch.ones_like(x)], dim=-1))
    matrix[:, 0, 2] = (2 * u - 1) * (1 - x)
    matrix[:, 1, 2] = (2 * v - 1) * (1 - y)
    return matrix


def _shift_by_sides(operation: OperationConfig, step: Tensor, aspects: Tensor) -> Tensor:
    """Convert the shift of a step [n, 3, 3] from fractions of a square's side to the units of the operation.

    Args:
        operation: Operation that drew the step.
        step: f64 [n, 3, 3].
        aspects: f64 [n], width / height of each original.

    Returns:
        The step with shifts in units of the original's height.
    """
    if not operation.shifts:
        return step
    ones = torch.ones_like(aspects)
    shorter = aspects.clamp(max=1)
    sides = (shorter, shorter) if operation.kind == "pad_crop" else (aspects, ones)
    units = torch.stack(sides, dim=-1)[..., None]
    linear, offset = step[:, :2, :2], step[:, :2, 2:]
    shift = torch.linalg.solve(linear, offset)  # the view samples linear @ (x + shift)
    # A difference is added, so that steps of a unit of 1 keep their bits.
    moved = offset + linear @ ((units - 1) * shift)
    return torch.cat([torch.cat([linear, moved], dim=2), step[:, 2:]], dim=1)


# ---- a schedule ----------------------------------------------------------------------------------


class ViewSchedule:
    """Random views of the positions in an epoch's order, as a pure function of (seed, epoch, position).

    Each block of VIEW_BLOCK consecutive positions is drawn at once, so a view does not depend on batch size, rank or
    process.
    """

    def __init__(
        self,
        config: AugmentOptions,
        size: tuple[int, int],
        seed: int,
        *,
        one_aspect: bool = True,
        whole_pixels: bool = False,
        kept_blocks: int = KEPT_BLOCKS,
    ) -> None:
        """Configure the schedule.

        Args:
            config: Options with the operations.
            size: (height, width) of the canonical frame.
            seed: Seed of all draws.
            one_aspect: True if every original has the aspect ratio of the canonical frame.
            whole_pixels: True if windows are rounded to whole pixels of the originals, as they are cut from them.
            kept_blocks: Number of blocks that are kept in memory.
        """
        self.config, self.size, self.seed = config, size, seed
        self.one_aspect, self.whole_pixels = one_aspect, whole_pixels
        self.rendering = Rendering(config.border, config.interpolation)
        self._block = MethodCache(self._draw_block, kept_blocks)

    def views(self, epoch: int, positions: Positions, sizes: Tensor) -> Views | None:
        """Draw the views of positions in an epoch's order.

        Args:
            epoch: Number of the epoch.
            positions: First position, or each of them.
            sizes: (height, width) of the original at each position, [n, 2].

        Returns:
            Views [n], or None without operations.
        """
        if not self.config.moving:
            return None
        steps = rows_of_blocks(self._block, epoch, positions, len(sizes))
        if not self.one_aspect:
            height, width = sizes.double().unbind(dim=1)
            steps = self._compose(steps, width / height)
        if self.config.edges == "image":
            return Views(steps[0].float())
        windows = steps[0][:, [0, 1, 0, 1], [0, 1, 2, 2]]  # numbers of upright matrices
        moves = torch.stack(steps[1:], dim=1).float() if len(steps) > 1 else None
        if self.whole_pixels:
            boxes = pixel_boxes(windows, sizes)
            return Views.of(windows_of_boxes(boxes, windows[:, :2], sizes), moves)
        return Views.of(windows.float(), moves)

    def _draw_block(self, epoch: int, block: int) -> list[Tensor]:
        """Draw the part of a block that is independent of the records.

        Returns:
            Windows and moves as matrices, or one tensor per operation if the originals differ in aspect ratio.
        """
        seed = derive_seed(self.seed, "views", epoch, block)
        policies = self._draw_policies(epoch, block)
        if self.one_aspect:
            generators = iter(build_operations(self.config, self.size))
            height, width = self.size
            aspects = torch.full((VIEW_BLOCK,), width / height, dtype=torch.float64)
            steps: list[Any] = []
            for operation in self.config.moving:
                if isinstance(operation, PolicyConfig):
                    turns = _policy_steps(next(policies), aspects)
                    steps.append([torch.linalg.inv(turn) for turn in turns])
                else:
                    steps.append([next(generators)])
            return draw_in_parts(self._divide(steps), VIEW_BLOCK, self.size, seed)
        generator = torch.Generator().manual_seed(seed)
        with SeededDraws(seed):
            return [
                next(policies)
                if isinstance(operation, PolicyConfig)
                else self._draw_operation(operation, generator)
                for operation in self.config.moving
            ]

    def _divide(self, steps: list[list[Any]]) -> list[list[Any]]:
        """Divide the steps of all moving operations into those of the windows, and each of the others."""
        number = self.config.num_window_operations
        if self.config.edges == "image":
            return [[step for part in steps for step in part]]
        window = [step for part in steps[:number] for step in part]
        return [window, *([step] for part in steps[number:] for step in part)]

    def _draw_operation(self, operation: OperationConfig, generator: torch.Generator) -> Tensor:
        """Draw the numbers of a block of crops, or a step input_from_output in a square, [VIEW_BLOCK, 3, 3]."""
        if operation.kind == "resized_crop":
            return draw_crop_numbers(operation, VIEW_BLOCK, generator)
        side = min(self.size)
        step, _ = _draw_step(_build_operation(operation, (side, side)), VIEW_BLOCK, (side, side))
        drawn: Tensor = torch.linalg.inv(step)
        return drawn

    def _draw_policies(self, epoch: int, block: int) -> Iterator[Tensor]:
        """Iterate over what each policy draws for a block: kinds and strengths, f64 [VIEW_BLOCK, n, 2]."""
        policies = [
            operation for operation in self.config.moving if isinstance(operation, PolicyConfig)
        ]
        for number, operation in enumerate(policies):
            side = self.config.side_of(self.size)
            kinds, strengths = draw_policy(operation, number, self.seed, epoch, block, side)
            yield torch.stack([kinds.double(), strengths], dim=2)

    def _compose(self, draws: list[Tensor], aspects: Tensor) -> list[Tensor]:
        """Compute the matrices input_from_output of windows and of each move, from what was drawn for squares."""
        steps = []
        for operation, numbers in zip(self.config.moving, draws, strict=True):
            if isinstance(operation, PolicyConfig):
                steps.append(_policy_steps(numbers, aspects))
            elif operation.kind == "resized_crop":
                steps.append([place_crops(numbers, aspects, operation.ratio)])
                aspects = torch.ones_like(aspects)
            else:
                ones = torch.ones_like(aspects)
                step = _shift_by_sides(operation, numbers, aspects)
                true = torch.diag_embed(torch.stack([aspects, ones, ones], dim=-1))
                steps.append([torch.linalg.inv(true) @ step @ true])
        parts = []
        for part in self._divide(steps):
            input_from_output = torch.eye(3, dtype=torch.float64).expand(len(aspects), 3, 3)
            for step in part:
                input_from_output = input_from_output @ step
            parts.append(input_from_output)
        return parts


def schedule_views(
    records: SelectedRecords,
    augment: AugmentOptions,
    seed: int,
    *,
    sampled: bool = False,
    kept_blocks: int = KEPT_BLOCKS,
) -> ViewSchedule:
    """Return the schedule of random views of records.

    Args:
        records: The records.
        augment: Options of the views.
        seed: Seed of all draws.
        sampled: True for views that are sampled from frames, although the store has the original images.
        kept_blocks: As for `ViewSchedule`.

    Raises:
        ConfigError: If augment.scaled_decoding has nothing to decode.
    """
    cuts = records.store.has_larger_images and augment.shows_windows
    require(
        cuts or not augment.scaled_decoding,
        "augment.scaled_decoding=true: these views are sampled from frames, as no image is larger than its frame, or "
        "by augment.operations or edges; leave it out",
    )
    return ViewSchedule(
        augment,
        records.store.size,
        seed,
        one_aspect=records.has_frame_aspect,
        whole_pixels=cuts and not sampled,
        kept_blocks=kept_blocks,
    )


def trained_picture(
    store: Store, augment: AugmentOptions, views: Mapping[str, Any] | None = None
) -> Picture | None:
    """Return what a network receives of an image outside of a training, as its views show images; None for tables.

    It is the usual center crop after crops of random sizes, and otherwise the whole image, resized as the views are.

    Args:
        store: Store of the training.
        augment: Options of its views.
        views: Entry of the stored views in the manifest of a pass, of a training that replays them.
    """
    if not store.form.has_places:
        return None
    if views is None:
        kinds = {operation.kind for operation in augment.moving}
        is_cut = bool(kinds) and augment.shows_windows
    else:
        kinds = {operation["kind"] for operation in views.get("operations", ())}
        is_cut = views.get("pixels") == "originals"
    picture = Picture(
        size=store.size if augment.size is None else (augment.size, augment.size),
        crop=CENTER_CROP_FRACTION
        if "resized_crop" in kinds
        else None
        if views is None
        else views.get("center_crop"),
        frames=None if is_cut else store.size,
    )
    return store.picture_of(picture)


def _policy_steps(draws: Tensor, aspects: Tensor) -> list[Tensor]:
    """Compute input_from_output [n, 3, 3] of each operation of a policy from kinds and strengths [n, turns, 2]."""
    return [
        policy_matrices(kinds.long(), strengths, aspects)
        for kinds, strengths in zip(
            *(part.unbind(dim=1) for part in draws.unbind(dim=2)), strict=True
        )
    ]
