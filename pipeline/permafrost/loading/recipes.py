"""Drawn values of the operations of `augment.operations` that change pixels: one row of numbers per view.

A row says what happens to the pixels of a view as values, so that a stored view needs no seed: for each operation
whether it was drawn, its strength and its place. `Recipe` says which column is which. The columns of an operation are:

    randaugment, trivialaugment   ceil(n / 2) codes of the n drawn kinds (two kinds in one: 14 * second + first), then n
                                  strengths; the shear, the translation and the angle are part of the view's matrix
    color_jitter                  number of the order of its four steps (of 24), then the factors of brightness,
                                  contrast and saturation, and the shift of the hue in radians
    random_erasing                x0, y0, x1, y1 in [0, 1]
    gaussian_blur, sharpness, solarize, posterize
                                  its standard deviation, factor, threshold or number of bits
    grayscale, equalize, autocontrast
                                  1

All columns of an operation that was not drawn are -1, and those of a policy 0, which is its identity. Strengths of a
policy are: shear, tangent of the angle; translation, fraction of the side; rotation, degrees; color, deviation of the
factor from 1; posterize, bits; solarize, threshold. With two operations of a policy, color jitter and an erasing, a row
has 12 numbers, 24 bytes in float16.

Draws are pure functions of (seed, epoch, position in the epoch's order). Each block of positions is drawn at once.

Not here: operations that move pixels, which are part of the view's matrix (random_views.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise, permutations
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from permafrost.config.augment import (
    MAX_MAGNITUDE,
    AnyOperation,
    AugmentOptions,
    PixelOperationConfig,
    PolicyConfig,
    count_window_operations,
    moving_operations,
    operation_from,
)
from permafrost.core.batches import PixelAugment, PixelChange, PixelChangeName
from permafrost.core.digests import derive_seed
from permafrost.core.errors import ConfigError, require
from permafrost.core.records import PIXEL_FIELD
from permafrost.loading.method_cache import MethodCache
from permafrost.loading.mixtures import UNMIXED, draw_mixtures, mixture_of, paired_rows
from permafrost.store.entries import ManifestError
from permafrost.store.manifest import MANIFEST_NAME
from permafrost.store.reader import TeacherPass

BLOCK_SIZE = 1024
"""Number of consecutive positions of an epoch's order drawn together."""
KEPT_BLOCKS = 4
"""Number of blocks that are kept where the places of an epoch are visited in their order."""

_NOT_DRAWN = -1.0
_NUMBERS = 9
"""Random numbers per record and pixel operation: the probability's, then up to 8 of the operation's own."""


# ---- policies ------------------------------------------------------------------------------------


SPACE = (
    *("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate"),
    *("brightness", "saturation", "contrast", "sharpness"),
    *("posterize", "solarize", "autocontrast", "equalize"),
)
"""Kinds of operations of a policy, in the order of torchvision's."""
MOVING = range(SPACE.index("shear_x"), SPACE.index("rotate") + 1)
"""Numbers of the kinds that move pixels."""
_SIGNED = range(SPACE.index("shear_x"), SPACE.index("sharpness") + 1)
_COLOR_KINDS = range(SPACE.index("brightness"), len(SPACE))

_STRONGEST: dict[str, dict[str, float]] = {
    "randaugment": {
        **dict.fromkeys(("shear_x", "shear_y"), 0.3),
        **dict.fromkeys(("translate_x", "translate_y"), 150 / 331),
        "rotate": 30.0,
        **dict.fromkeys(("brightness", "saturation", "contrast", "sharpness"), 0.9),
        "posterize": 4.0,
    },
    "trivialaugment": {
        **dict.fromkeys(("shear_x", "shear_y"), 0.99),
        # Up to 32 pixels in the paper, of an ImageNet view of 224.
        **dict.fromkeys(("translate_x", "translate_y"), 32 / 224),
        "rotate": 135.0,
        **dict.fromkeys(("brightness", "saturation", "contrast", "sharpness"), 0.99),
        "posterize": 6.0,
    },
}
"""Strength of each kind at the largest magnitude. posterize: number of bits that are taken away."""


def draw_policy(
    operation: PolicyConfig, number: int, seed: int, epoch: int, block: int, side: int | None = None
) -> tuple[Tensor, Tensor]:
    """Draw the operations of a policy for a block of positions.

    Args:
        operation: The policy, of n operations per record.
        number: Its place among the policies of a recipe.
        seed: Seed of all draws.
        epoch: Number of the epoch.
        block: Number of the block.
        side: Side of the view in pixels, of which translations are whole numbers, as in torchvision; None leaves them
            fractions.

    Returns:
        Kinds i64 [BLOCK_SIZE, n] and strengths f64 [BLOCK_SIZE, n]. An operation that is not drawn is identity.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "policy", number, epoch, block))
    chosen, negative, drawn, first, second = torch.rand(
        (BLOCK_SIZE, operation.num_operations, 5), generator=generator, dtype=torch.float64
    ).unbind(dim=2)
    kinds = (chosen * len(SPACE)).long()
    if operation.kind == "trivialaugment":
        magnitudes = (first * (MAX_MAGNITUDE + 1)).floor()
    else:
        noise = (-2 * (1 - first).log()).sqrt() * (2 * math.pi * second).cos()  # Box-Muller
        magnitudes = (operation.magnitude + operation.spread * noise).clamp(0, MAX_MAGNITUDE)
    strengths = _strengths(operation.kind, kinds, magnitudes / MAX_MAGNITUDE, negative < 0.5)
    if side is not None:
        translates = (kinds == SPACE.index("translate_x")) | (kinds == SPACE.index("translate_y"))
        strengths = strengths.where(~translates, (strengths * side).trunc() / side)
    kinds = kinds.where(drawn < operation.p, torch.zeros_like(kinds))
    return kinds, strengths.where(kinds > 0, torch.zeros_like(strengths))


def _strengths(policy: str, kinds: Tensor, fractions: Tensor, negative: Tensor) -> Tensor:
    """Compute the strengths of kinds at fractions of the largest magnitude."""
    strongest = _STRONGEST[policy]
    largest = torch.tensor([strongest.get(kind, 0.0) for kind in SPACE], dtype=torch.float64)
    strengths = fractions * largest[kinds]
    signed = (kinds >= _SIGNED.start) & (kinds < _SIGNED.stop)
    strengths = strengths.where(~(signed & negative), -strengths)
    strengths = strengths.where(kinds != SPACE.index("posterize"), 8 - strengths.round())
    return strengths.where(kinds != SPACE.index("solarize"), 1 - fractions)


def policy_matrices(kinds: Tensor, strengths: Tensor, aspects: Tensor) -> Tensor:
    """Compute input_from_output of one operation of a policy for each record, the identity for one of color.

    Lengths are relative to the sides, and shears are about the upper left corner, as in torchvision. With v the
    strength, a the aspect ratio width / height of the image in pixels and X = a x, the input of (x, y) is
    X + v (y + 1) for shear_x, y + v (X + a) for shear_y, x - 2 v for translate_x, y - 2 v for translate_y, and
    (X, y) turned by v degrees for rotate.

    Args:
        kinds: i64 [n].
        strengths: f64 [n].
        aspects: f64 [n], width / height.

    Returns:
        f64 [n, 3, 3] in normalized coordinates.
    """
    matrices = torch.eye(3, dtype=torch.float64).repeat(len(kinds), 1, 1)

    def rows_of(kind: str) -> Tensor:
        return (kinds == SPACE.index(kind)).nonzero()[:, 0]

    for row, kind in ((0, "shear_x"), (1, "shear_y")):
        here = rows_of(kind)
        slope = strengths[here] / aspects[here] if row == 0 else strengths[here] * aspects[here]
        matrices[here, row, 1 - row] = slope
        matrices[here, row, 2] = slope
    for row, kind in ((0, "translate_x"), (1, "translate_y")):
        here = rows_of(kind)
        matrices[here, row, 2] = -2 * strengths[here]
    here = rows_of("rotate")
    angles, ratios = strengths[here].deg2rad(), aspects[here]
    cos, sin = angles.cos(), angles.sin()
    matrices[here, 0, 0] = matrices[here, 1, 1] = cos
    matrices[here, 0, 1], matrices[here, 1, 0] = -sin / ratios, sin * ratios
    return matrices


# ---- rows of numbers -----------------------------------------------------------------------------


class Recipe:
    """Operations that change pixels, and the columns of their values in a row."""

    def __init__(self, operations: Sequence[AnyOperation]) -> None:
        moving = moving_operations(operations)
        self._moving = moving[count_window_operations(moving) :]
        """Operations that move what the windows show."""
        self._crops = [
            number for number, operation in enumerate(moving) if operation.kind == "resized_crop"
        ]
        self._first_move = len(moving) - len(self._moving)
        self.operations = tuple(
            operation
            for operation in operations
            if isinstance(operation, (PixelOperationConfig, PolicyConfig))
        )
        stops = np.cumsum([0, *map(_width, self.operations)]).tolist()
        self._columns = [slice(*pair) for pair in pairwise(stops)]
        self.width: int = stops[-1]
        """Number C of columns."""

    @property
    def stored_steps(self) -> list[int]:
        """Numbers of the steps whose matrices a pass stores; those of policies follow from the rows of values."""
        numbers, position = [], 0
        for operation in self._moving:
            if isinstance(operation, PolicyConfig):
                position += operation.num_operations
            else:
                numbers.append(position)
                position += 1
        return numbers

    def steps(
        self,
        shape: Sequence[int],
        rows: Tensor | None,
        matrices: Tensor | None,
        sizes: Tensor,
        frame_size: tuple[int, int],
    ) -> Tensor | None:
        """Return the matrices of the operations that move what windows show, f32 [*shape, S, 3, 3], None for none.

        Args:
            shape: Number n of records, and of views of each, if there are several.
            rows: Values, [*shape, C], None for a recipe without them.
            matrices: Stored matrices, f32 [*shape, k, 3, 3]. With one more than the recipe has, the first one turns the
                window.
            sizes: (height, width) of the original images, [n, 2].
            frame_size: (height, width) of the canonical frame, whose proportions a view has after a resized crop.
        """
        stored = [] if matrices is None else list(matrices.flatten(0, -4).unbind(dim=1))
        extra = len(stored) - len(self.stored_steps)
        steps, rest = stored[:extra], iter(stored[extra:])
        height, width = sizes.double().unbind(dim=1)
        of_images = (width / height).repeat_interleave(math.prod(shape[1:]))
        for turn in steps:  # by 90 degrees, before the tool's operations
            of_images = of_images.where(turn[:, 0, 0] != 0, 1 / of_images)
        of_frames = torch.full_like(of_images, frame_size[1] / frame_size[0])
        policies = (
            columns
            for operation, columns in zip(self.operations, self._columns, strict=True)
            if isinstance(operation, PolicyConfig)
        )
        for number, operation in enumerate(self._moving, start=self._first_move):
            if not isinstance(operation, PolicyConfig):
                steps.append(next(rest))
                continue
            assert rows is not None
            values = rows.flatten(0, -2)[:, next(policies)].double()
            aspects = of_frames if any(crop < number for crop in self._crops) else of_images
            steps += [
                policy_matrices(kinds, strengths, aspects).float()
                for kinds, strengths in policy_turns(operation, values)
            ]
        return torch.stack(steps, dim=1).view(*shape, len(steps), 3, 3) if steps else None

    def changes(self, rows: Tensor, *, blanks_maps: bool = False) -> tuple[PixelChange, ...]:
        """Return the changes of rows of values, in order of application.

        Args:
            rows: [n, C], of any floating dtype.
            blanks_maps: True if every erasing blanks the maps, whatever the recipe says.
        """
        rows = rows.double()
        return tuple(
            replace(change, blanks_maps=True)
            if blanks_maps and change.name == "random_erasing"
            else change
            for operation, columns in zip(self.operations, self._columns, strict=True)
            for change in _changes(operation, rows[:, columns])
        )


def _width(operation: PixelOperationConfig | PolicyConfig) -> int:
    if isinstance(operation, PolicyConfig):
        return -(-operation.num_operations // 2) + operation.num_operations
    return {"color_jitter": 5, "random_erasing": 4}.get(operation.kind, 1)


def _changes(operation: PixelOperationConfig | PolicyConfig, rows: Tensor) -> list[PixelChange]:
    """Return the changes of one operation, from its columns f64 [n, c]."""
    if isinstance(operation, PolicyConfig):
        return _policy_changes(operation, rows)
    drawn = (rows[:, 0] >= 0).nonzero()[:, 0]
    if not len(drawn):
        return []
    values = rows[drawn]
    if operation.kind == "color_jitter":
        return _jitter_changes(operation, drawn, values)
    if operation.kind == "random_erasing":
        values = torch.cat([values, torch.full_like(values[:, :1], operation.value)], dim=1)
    return [
        PixelChange(
            name=operation.kind,
            rows=drawn,
            values=values.float(),
            largest=operation.sigma[1] if operation.kind == "gaussian_blur" else 0.0,
            blanks_maps=operation.kind == "random_erasing" and operation.maps == "blank",
        )
    ]


_COLORS: tuple[PixelChangeName, ...] = ("brightness", "contrast", "saturation", "hue")
_ORDERS = torch.tensor(list(permutations(range(len(_COLORS)))))
"""Orders of the four steps of color jitter, [24, 4], by their number."""


def _jitter_changes(
    operation: PixelOperationConfig, rows: Tensor, values: Tensor
) -> list[PixelChange]:
    """Return the changes of color jitter. Equal steps of the orders become one change."""
    ranges = (operation.brightness, operation.contrast, operation.saturation, operation.hue)
    orders = _ORDERS[values[:, 0].long()]
    changes = []
    for turn in range(len(_COLORS)):
        for index, (name, largest) in enumerate(zip(_COLORS, ranges, strict=True)):
            chosen = (orders[:, turn] == index).nonzero()[:, 0]
            if largest > 0 and len(chosen):
                factors = values[chosen, 1 + index, None].float()
                changes.append(PixelChange(name=name, rows=rows[chosen], values=factors))
    return changes


def policy_turns(operation: PolicyConfig, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over the kinds i64 [n] and strengths f64 [n] of a policy's operations, from its columns f64 [n, c]."""
    count = operation.num_operations
    for turn in range(count):
        code = rows[:, turn // 2].long()
        kinds = code % len(SPACE) if turn % 2 == 0 else code.div(len(SPACE), rounding_mode="floor")
        yield kinds, rows[:, turn - count]


def _policy_changes(operation: PolicyConfig, rows: Tensor) -> list[PixelChange]:
    """Return the changes of color that a policy has drawn, one turn after the other."""
    changes = []
    for kinds, strengths in policy_turns(operation, rows):
        for kind in _COLOR_KINDS:
            chosen = (kinds == kind).nonzero()[:, 0]
            if len(chosen):
                values = strengths[chosen, None]
                if kind in _SIGNED:
                    values = 1 + values
                name: Any = SPACE[kind]
                changes.append(PixelChange(name=name, rows=chosen, values=values.float()))
    return changes


def recipe_from(described: Sequence[dict[str, Any]]) -> Recipe:
    """Return the recipe of described operations.

    Raises:
        ConfigError: If there is no such operation.
    """
    return Recipe([operation_from(values) for values in described])


def recipe_of_pass(teacher: TeacherPass) -> Recipe | None:
    """Return the recipe of a pass of stored views, None if its manifest describes none.

    Raises:
        ManifestError: If the manifest describes no recipe of the stored values.
    """
    described: Any = teacher.manifest.views.get("operations")
    spec = next((spec for spec in teacher.manifest.fields if spec.name == PIXEL_FIELD), None)
    if spec is None and described is None:
        return None
    path = teacher.folder / MANIFEST_NAME
    require(
        isinstance(described, list) and all(isinstance(operation, dict) for operation in described),
        f"{path}: views.operations is not a list of operations",
        ManifestError,
    )
    try:
        recipe = recipe_from(described)
    except ConfigError as error:
        raise ManifestError(f"{path}: {error}") from error
    shape = (0,) if spec is None else spec.shape
    require(
        shape == (recipe.width,),
        f"{path}: {PIXEL_FIELD} has shape {shape}, and views.operations have {recipe.width} values",
        ManifestError,
    )
    return recipe


# ---- draws ---------------------------------------------------------------------------------------


Positions: TypeAlias = int | NDArray[np.int64]
"""Position in an epoch's order from which consecutive ones are meant, or the position of each."""


def rows_of_blocks(
    block_of: Callable[[int, int], Sequence[Tensor]], epoch: int, positions: Positions, count: int
) -> list[Tensor]:
    """Return a copy of rows of an epoch, whose blocks are functions of the epoch and their number.

    Args:
        block_of: Function of the epoch and a block that returns its parts, each [BLOCK_SIZE, ...].
        epoch: Number of the epoch.
        positions: Positions of the rows.
        count: Number of rows.

    Returns:
        The rows of each part, [count, ...].
    """
    at = positions + np.arange(count) if isinstance(positions, int) else positions
    blocks, number = np.unique(at // BLOCK_SIZE, return_inverse=True)
    drawn = [block_of(epoch, block) for block in blocks.tolist()]
    rows = torch.from_numpy(number * BLOCK_SIZE + at % BLOCK_SIZE)
    return [torch.cat(parts)[rows] for parts in zip(*drawn, strict=True)]


class PixelSchedule:
    """Rows of values of a recipe, as pure functions of (seed, epoch, position in the epoch's order)."""

    def __init__(
        self,
        operations: Sequence[AnyOperation],
        seed: int,
        side: int | None = None,
        *,
        kept_blocks: int = KEPT_BLOCKS,
    ) -> None:
        """Configure the schedule; `side` is that of `draw_policy`."""
        self.recipe = Recipe(operations)
        self.seed, self.side = seed, side
        self._block = MethodCache(self._draw_block, kept_blocks)

    def rows(self, epoch: int, positions: Positions, count: int) -> Tensor:
        """Draw the rows of positions in an epoch's order, f64 [count, C].

        Args:
            epoch: Number of the epoch.
            positions: First position, or each of them.
            count: Number of positions.
        """
        return rows_of_blocks(self._block, epoch, positions, count)[0]

    def draw(self, epoch: int, positions: Positions, count: int) -> tuple[PixelChange, ...]:
        """Draw the changes of positions in an epoch's order, in order of application.

        Args:
            epoch: Number of the epoch.
            positions: First position, or each of them.
            count: Number of positions.
        """
        return self.recipe.changes(self.rows(epoch, positions, count)) if self.recipe.width else ()

    def _draw_block(self, epoch: int, block: int) -> tuple[Tensor]:
        """Draw the rows of a block, f64 [BLOCK_SIZE, C]."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "pixels", epoch, block))
        on_pixels = [
            operation
            for operation in self.recipe.operations
            if not isinstance(operation, PolicyConfig)
        ]
        size = (len(on_pixels), BLOCK_SIZE, _NUMBERS)
        numbers = iter(torch.rand(size, generator=generator, dtype=torch.float64))
        columns, policies = [torch.empty(BLOCK_SIZE, 0, dtype=torch.float64)], 0
        for operation in self.recipe.operations:
            if isinstance(operation, PolicyConfig):
                kinds, strengths = draw_policy(
                    operation, policies, self.seed, epoch, block, self.side
                )
                columns.append(_policy_row(kinds, strengths))
                policies += 1
            else:
                uniform = next(numbers)
                values = _VALUES[operation.kind](operation, uniform[:, 1:])
                absent = torch.full_like(values, _NOT_DRAWN)
                columns.append(values.where(uniform[:, :1] < operation.p, absent))
        return (torch.cat(columns, dim=1),)


def _policy_row(kinds: Tensor, strengths: Tensor) -> Tensor:
    """Return the columns of a policy."""
    firsts, seconds = kinds[:, 0::2], kinds[:, 1::2]
    codes = firsts.clone()
    codes[:, : seconds.shape[1]] += len(SPACE) * seconds
    return torch.cat([codes.double(), strengths], dim=1)


def _jitter_values(operation: PixelOperationConfig, numbers: Tensor) -> Tensor:
    """Return the order of four steps and their factors."""
    order = numbers[:, 4:8].argsort(dim=1)
    number = (order[:, None] == _ORDERS).all(dim=2).long().argmax(dim=1)
    factors = [
        _between((max(0.0, 1 - largest), 1 + largest), numbers[:, index])
        for index, largest in enumerate(
            (operation.brightness, operation.contrast, operation.saturation)
        )
    ]
    hue = 2 * math.pi * operation.hue * (2 * numbers[:, 3] - 1)
    return torch.stack([number.double(), *factors, hue], dim=1)


def _erasing_values(operation: PixelOperationConfig, numbers: Tensor) -> Tensor:
    """Return rectangles x0, y0, x1, y1 in [0, 1] with exactly the drawn fraction of the area.

    A rectangle that is longer than a side is cut to it and widened.
    """
    low, high = operation.ratio
    fraction = _between(operation.scale, numbers[:, 0])
    ratio = _between((math.log(low), math.log(high)), numbers[:, 1]).exp()
    width = (fraction * ratio).sqrt().clamp(max=1).maximum(fraction)
    height = fraction / width
    x, y = numbers[:, 2] * (1 - width), numbers[:, 3] * (1 - height)
    return torch.stack([x, y, x + width, y + height], dim=1)


def _between(limits: tuple[float, float], numbers: Tensor) -> Tensor:
    return limits[0] + (limits[1] - limits[0]) * numbers


def _constant(value: float, numbers: Tensor) -> Tensor:
    return torch.full_like(numbers[:, :1], value)


_VALUES: dict[str, Callable[[PixelOperationConfig, Tensor], Tensor]] = {
    "color_jitter": _jitter_values,
    "random_erasing": _erasing_values,
    "gaussian_blur": lambda operation, numbers: _between(operation.sigma, numbers[:, :1]),
    "solarize": lambda operation, numbers: _constant(operation.threshold, numbers),
    "posterize": lambda operation, numbers: _constant(operation.bits, numbers),
    "sharpness": lambda operation, numbers: _constant(operation.factor, numbers),
    **dict.fromkeys(
        ("grayscale", "equalize", "autocontrast"), lambda operation, numbers: _constant(1, numbers)
    ),
}


class PixelAugmentSchedule:
    """Changes of pixels and mixtures of the rows of an epoch, independent of batches, ranks and processes.

    Those of a row are pure functions of (seed, epoch, position in the epoch's order).
    """

    def __init__(
        self, config: AugmentOptions, seed: int, *, kept_blocks: int = KEPT_BLOCKS
    ) -> None:
        self.config, self.seed = config, seed
        self.pixels = PixelSchedule(config.operations, seed, kept_blocks=kept_blocks)
        self._mixtures = MethodCache(self._draw_mixtures, kept_blocks)

    def draw(
        self, epoch: int, positions: Positions, count: int, per_step: int = 1
    ) -> PixelAugment | None:
        """Draw for `count` rows, or return None if nothing changes their pixels.

        Args:
            epoch: Number of the epoch.
            positions: Position of the first row in the epoch's order, or of each.
            count: Number of rows.
            per_step: Number of views of a record, which are in consecutive rows.
        """
        if not self.config.mixes and not self.pixels.recipe.width:
            return None
        changes = self.pixels.draw(epoch, positions, count)
        if not self.config.mixes:
            return PixelAugment(changes=changes)
        drawn = rows_of_blocks(self._mixtures, epoch, positions, count)[0].numpy()
        partners = paired_rows(count, per_step)
        drawn[partners.numpy() == np.arange(count)] = UNMIXED
        return PixelAugment(changes=changes, mixture=mixture_of(drawn, partners))

    def _draw_mixtures(self, epoch: int, block: int) -> tuple[Tensor]:
        """Draw the shares and boxes of a block, [BLOCK_SIZE, 5]."""
        generator = np.random.default_rng(derive_seed(self.seed, "mix", epoch, block))
        return (torch.from_numpy(draw_mixtures(self.config.mix, generator, BLOCK_SIZE)),)
