"""Layouts of grids: which axes and which entries of a layer's output are the rows and columns of an image.

The output may be a grid, with its channels first or last, or a sequence of tokens with class tokens and registers
around the patches. It is measured: a corner of an image is replaced, and the cells that change most are those of the
corner in one layout only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from permafrost.core.errors import ConfigError, require
from permafrost.models.classifier import has_proportions
from permafrost.models.image_places import CORNERS, order_of_axes, replaced_parts

_ORDERS = ("bnc", "nbc", "bcn")
"""Orders of the axes of tokens: batch, tokens, channels."""
_MAX_OTHERS = 16
"""Maximum number of other tokens than patches, such as class tokens and registers."""
_CLEAR_FIT = 0.5
"""Minimum correlation between the tokens that change and those of the replaced corners."""
_SAME_FIT = 0.97
"""Correlation relative to the best layout's above which another one is as possible."""
_SAME_SUM = 1e-3
_PROJECTIONS = re.compile(r"(^|\.)([qkv]+|query|queries|keys?|values?)(_proj)?(\.|$)")
"""Names of the projections of an attention."""
_CELLS_OF_TOKENS = 0.5
"""Minimum fraction of the values of tokens with a gradient, if the logits depend on the patches."""
_MAX_STAGES = 4
_SHARE_OF_STAGES = 0.2
"""Minimum fraction of the parameters of a network in the layers whose outputs are its stages."""
_PARTS = len(CORNERS) + 2
"""Number of the images of `replaced_parts`."""


class Layout(NamedTuple):
    """Place of a grid in a layer's output.

    Its text is `b c h w`, `b h w c`, or of tokens `b 1+hw c` with the numbers of those before and after the patches.
    A part of the output, as of a tuple or a dict, comes first: `last_hidden_state: b 1+hw c`.
    """

    axes: str
    """Axes in their order: bchw, bhwc, bnc, nbc or bcn."""
    before: int = 0
    """Number of tokens before the patches."""
    after: int = 0
    part: str = ""
    """Place in a tuple, or key of a dict; empty for a tensor."""

    def __str__(self) -> str:
        tokens = "+".join(str(part) for part in (self.before, "hw", self.after) if part)
        axes = " ".join(tokens if axis == "n" else axis for axis in self.axes)
        return f"{self.part}: {axes}" if self.part else axes

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Return the layout of a text.

        Raises:
            ConfigError: If it names other axes.
        """
        part, _, axes = text.rpartition(":")
        tokens = re.search(r"(?:(\d+)\+)?hw(?:\+(\d+))?", axes)
        before, after = tokens.groups() if tokens else (None, None)
        names = re.sub(r"\S*hw\S*", "n", axes).replace(" ", "")
        layout = cls(names, int(before or 0), int(after or 0), part.strip())
        require(
            layout.axes in ("bchw", "bhwc", *_ORDERS) and str(layout).split() == text.split(),
            f"layout={text} names other axes; write those of the output, as in 'b c h w', 'b h w c', 'b 1+hw c'",
        )
        return layout

    def tensor(self, output: Any) -> Any:
        """Return the tensor of a layer's output that has the grid, None if there is no such part."""
        return tensors_of(output).get(self.part)

    def grid(self, output: Any, size: tuple[int, int]) -> Tensor:
        """Return the grid [B, C, h, w] of a layer's output.

        Args:
            output: Output of the layer.
            size: (height, width) of the images.

        Raises:
            ConfigError: If the output does not have this layout.
        """
        tensor = self.tensor(output)
        require(
            isinstance(tensor, Tensor) and tensor.ndim == len(self.axes),
            f"the layer returns {describe_output(output)}, which is not of layout={self}; leave the option out",
        )
        if "n" not in self.axes:
            return _ordered(tensor, self.axes, "bchw")
        tokens = _ordered(tensor, self.axes, "bcn")
        cells = tokens[..., self.before : tokens.shape[2] - self.after]
        shape = _cells_of(cells.shape[2], size)
        if shape is None:
            raise ConfigError(
                f"layout={self}: {cells.shape[2]} tokens do not fit {size[0]}x{size[1]} pixels; leave it out"
            )
        return cells.reshape(*cells.shape[:2], *shape)

    def with_grid(self, output: Any, grid: Tensor) -> Any:
        """Return a layer's output with another grid in its place, without changing it.

        Args:
            output: Output of the layer, whose other tokens and parts are kept.
            grid: [B, C, h, w].
        """
        tensor = self.tensor(output)
        if "n" not in self.axes:
            changed = _ordered(grid, "bchw", self.axes).to(tensor.dtype).clone()
        else:
            tokens, cells = _ordered(tensor, self.axes, "bcn"), grid.flatten(2).to(tensor.dtype)
            stop = tokens.shape[2] - self.after
            others = (tokens[..., : self.before], tokens[..., stop:])
            changed = _ordered(torch.cat([others[0], cells, others[1]], dim=2), "bcn", self.axes)
        if not self.part:
            return changed
        if isinstance(output, Mapping):
            return type(output)({**output, self.part: changed})  # type: ignore[call-arg]
        entries = list(output)
        entries[int(self.part)] = changed
        return type(output)(*entries) if hasattr(output, "_fields") else type(output)(entries)


def _ordered(tensor: Tensor, axes: str, order: str) -> Tensor:
    return tensor if axes == order else tensor.permute([axes.index(axis) for axis in order])


def tensors_of(output: Any) -> dict[str, Tensor]:
    """Return the tensors of three or four axes in a layer's output, by their part (`Layout.part`)."""
    parts: dict[Any, Any] = {"": output}
    if isinstance(output, (Mapping, tuple, list)):
        parts = dict(output if isinstance(output, Mapping) else enumerate(output))
    return {
        str(part): value
        for part, value in parts.items()
        if isinstance(value, Tensor) and value.ndim in (3, 4)
    }


def describe_output(output: Any) -> str:
    """Return the shape of a batch's output, or its type."""
    if not isinstance(output, Tensor):
        return type(output).__name__
    return f"[{', '.join(['B', *map(str, output.shape[1:])])}]"


# ---- tokens ----------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _cells_of(count: int, size: tuple[int, int]) -> tuple[int, int] | None:
    """Return the (rows, columns) of `count` square patches of an image, None if they do not divide it."""
    height, width = size
    for rows in range(2, count // 2 + 1):
        columns = count // rows
        # The sides of patches that divide both sides of the image into these, rounded down or up.
        down = max(height / (rows + 1), width / (columns + 1)), min(height / rows, width / columns)
        up = (
            max(height / rows, width / columns),
            min(height / (rows - 1), width / (columns - 1 or 0.5)),
        )
        if count % rows == 0 and columns > 1 and (down[0] < down[1] or up[0] < up[1]):
            return rows, columns
    return None


@lru_cache(maxsize=64)
def _corners_of(count: int, size: tuple[int, int]) -> tuple[list[tuple[int, int]], Tensor]:
    """Return the layouts (before, after) of `count` tokens, and each token's part of the four corners.

    Returns:
        The layouts, and f32 [n, 4, tokens] with mean 0 and norm 1 along the tokens.
    """
    layouts, patterns = [], []
    for others in range(min(_MAX_OTHERS, count - 4) + 1):
        if (cells := _cells_of(count - others, size)) is None:
            continue
        # The part of each row and column of cells that a replaced corner of a quarter of the side covers.
        first = [(0.25 * side - torch.arange(side)).clamp(0, 1) for side in cells]
        corners = torch.stack(
            [
                torch.outer(
                    *(
                        part.flip(0) if end else part
                        for part, end in zip(first, corner, strict=True)
                    )
                )
                for corner in CORNERS
            ]
        ).flatten(1)
        for before in range(others + 1):
            padded = F.pad(corners, (before, others - before))
            centered = padded - padded.mean(dim=1, keepdim=True)
            layouts.append((before, others - before))
            patterns.append(centered / centered.norm(dim=1, keepdim=True))
    return layouts, torch.stack(patterns) if patterns else torch.zeros(0, 4, count)


def token_layouts(output: Tensor, size: tuple[int, int], batch: int) -> list[Layout]:
    """Return the layout of tokens, several if they are as possible, none if no order of them is that of an image.

    Args:
        output: Tokens [B, N, C], [N, B, C] or [B, C, N] of `replaced_parts` of images, and perhaps more.
        size: (height, width) of the images.
        batch: Number of images.
    """
    fits: dict[Layout, float] = {}
    for axes in _ORDERS:
        if output.shape[axes.index("b")] != batch:
            continue
        tokens = _ordered(output.detach(), axes, "bnc").double()
        changes = (tokens[1:5] - tokens[:1]).norm(dim=2).cpu()
        # The share of each corner does not depend on the size of the tokens, some of which are outliers.
        shares = (changes / changes.sum(dim=0).clamp(min=1e-30)).float()
        shares = shares - shares.mean(dim=1, keepdim=True)
        shares = shares / shares.norm(dim=1, keepdim=True).clamp(min=1e-30)
        layouts, patterns = _corners_of(tokens.shape[1], size)
        correlations = (patterns * shares).sum(dim=2).mean(dim=1)
        fits |= {
            Layout(axes, *layout): fit
            for layout, fit in zip(layouts, correlations.tolist(), strict=True)
            if fit > _CLEAR_FIT
        }
    best = max(fits.values(), default=0.0)
    return [layout for layout, fit in fits.items() if fit > _SAME_FIT * best]


# ---- grids -----------------------------------------------------------------------------------------

Shape = tuple[int, ...]


def grid_layout(
    output: Tensor,
    size: tuple[int, int],
    taller: Shape | None = None,
    wider: Shape | None = None,
) -> Layout | None:
    """Return the layout of a grid [6, C, h, w] or [6, h, w, C] of `replaced_parts` of images, None if it has none.

    The rows and columns are the axes that grow with the image. If the network takes images of one size only, or pools
    them to one, the proportions of the axes decide, and where the output changes if a corner is replaced.

    Args:
        output: Output of a layer.
        size: (height, width) of the images.
        taller: Shape of the output for images of twice the height, None if it is not known.
        wider: Shape of the output for images of twice the width.
    """
    layouts: dict[tuple[Shape, Shape], str] = {((2,), (3,)): "bchw", ((1,), (2,)): "bhwc"}
    if taller and wider and not taller[1:] == wider[1:] == output.shape[1:]:
        rows, columns = (
            tuple(axis for axis in (1, 2, 3) if shape[axis] != output.shape[axis])
            for shape in (taller, wider)
        )
        axes = layouts.get((rows, columns))
        return Layout(axes) if axes else None
    orders = {
        axes: order_of_axes(_ordered(output, axes, "bchw"))
        for (rows, columns), axes in layouts.items()
        if has_proportions((output.shape[rows[0]], output.shape[columns[0]]), size)
    }
    return Layout(max(orders, key=lambda axes: orders[axes])) if orders else None


def is_attention(output: Tensor) -> bool:
    """Return whether an output is weights of an attention: rows that are shares of as many tokens."""
    is_square = output.shape[-2] == output.shape[-1] > 1
    sums = output.detach().sum(dim=-1)
    return is_square and bool((output >= 0).all() and (sums - 1).abs().max() < _SAME_SUM)


# ---- the grids of a network ------------------------------------------------------------------------


class LayerGrid(NamedTuple):
    """Grid that a layer of a network returns."""

    name: str
    """Name of the layer."""
    kind: type[nn.Module]
    layout: Layout
    channels: int
    cells: tuple[int, int]
    """(rows, columns)."""
    share: float
    """Fraction of the parameters of the network that the layer has."""
    is_read: bool
    """True if the logits depend on its cells, and not on a few tokens only."""


def layer_grids(
    network: nn.Module, logits_of: Callable[[Tensor], Tensor], images: Tensor
) -> list[LayerGrid]:
    """Return the grids of more than one row and column of a network, in the order in which its layers finish.

    Layers that run more than once are left out, and of tokens linear ones and the projections of an attention.

    Args:
        network: The network in eval mode, or a copy of it.
        logits_of: Function that runs it.
        images: Two images [2, 3, H, W].
    """
    size = (images.shape[2], images.shape[3])
    total = max(1, _size_of(network))
    layers: dict[str, list[LayerGrid | None]] = {}
    reads: dict[str, bool] = {}

    def measure(name: str, module: nn.Module, output: Any) -> None:
        grids = layers.setdefault(name, [])
        grids.append(None)
        for part, tensor in tensors_of(output).items():
            is_projection = isinstance(module, nn.Linear) or _PROJECTIONS.search(name)
            if is_attention(tensor) or (is_projection and tensor.ndim == 3):
                continue
            if tensor.ndim == 3:
                layouts = token_layouts(tensor, size, _PARTS)
            else:
                layout = grid_layout(tensor, size) if len(tensor) == _PARTS else None
                layouts = [layout] if layout else []
            if len(layouts) != 1:
                continue
            grid = layouts[0].grid(tensor, size)
            _, channels, *cells = grid.shape
            if min(cells) > 1 and order_of_axes(grid) >= 0:
                layout = layouts[0]._replace(part=part)
                shape = channels, (cells[0], cells[1]), _size_of(module) / total
                grids[-1] = LayerGrid(name, type(module), layout, *shape, is_read=True)
                return

    def follow(name: str, module: nn.Module, output: Any) -> None:
        for tensor in tensors_of(output).values():
            if tensor.requires_grad:
                least = -1.0 if tensor.ndim == 4 else _CELLS_OF_TOKENS
                tensor.register_hook(partial(note, name, least))  # type: ignore[no-untyped-call]

    def note(name: str, least: float, gradient: Tensor) -> None:
        reads[name] = reads.get(name, False) or float((gradient != 0).double().mean()) > least

    with watched(network, measure), torch.no_grad():
        logits_of(replaced_parts(images))
    # Not every network can be differentiated.
    with suppress(Exception), watched(network, follow), torch.enable_grad():
        image = images[:1].clone().requires_grad_()
        logits = logits_of(image)
        # Weights that differ, because the sum of what a softmax returns has no gradient.
        weights = torch.linspace(0.5, 1.5, logits.numel()).reshape(logits.shape).to(logits)
        torch.autograd.grad(logits, image, weights)
    single = (grids[0] for grids in layers.values() if len(grids) == 1)
    return [
        grid._replace(is_read=reads.get(grid.name, not reads))
        for grid in single
        if grid is not None
    ]


def _size_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@contextmanager
def watched(network: nn.Module, watch: Callable[[str, nn.Module, Any], None]) -> Iterator[None]:
    """Call a function with the name, the module and the output of each layer that runs."""
    handles = [
        module.register_forward_hook(
            lambda module, inputs, output, name=name: watch(name, module, output)
        )
        for name, module in network.named_modules()
        if name
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def stage_blocks(depth: int) -> list[int]:
    """Return the numbers of the blocks that end a stage of a transformer: the last one of each quarter.

    >>> stage_blocks(12), stage_blocks(2)
    ([2, 5, 8, 11], [0, 1])
    """
    count = min(_MAX_STAGES, depth)
    return [math.ceil(depth * number / count) - 1 for number in range(1, count + 1)]


def stage_ends(grids: Sequence[LayerGrid]) -> list[LayerGrid]:
    """Return the layers that end the last four stages, from the finest to the coarsest, none if no layers repeat.

    They are the last ones of each resolution, among the parts of the module that has most resolutions. In a network of
    one resolution they are the blocks that end a quarter of its depth. In place of the last one stands the last layer
    after it of the same shape, such as a norm.

    Args:
        grids: Grids in the order in which the layers finish.
    """
    levels: dict[str, list[LayerGrid]] = {}
    for grid in grids:
        levels.setdefault(re.sub(r"(^|\.)[^.]+(\.\d+)*$", "", grid.name), []).append(grid)
    # A stem or a branch has resolutions of its own, and few parameters.
    large = [
        level for level in levels.values() if sum(grid.share for grid in level) > _SHARE_OF_STAGES
    ]
    level = max(
        sorted(large, key=lambda level: -level[0].name.count(".")),
        key=lambda level: len({grid.cells for grid in level}),
        default=[],
    )
    ends = list({grid.cells: grid for grid in level}.values())
    if len(ends) < 2:
        kinds = (
            [grid for grid in level if grid.kind is kind]
            for level in large
            for kind in {grid.kind for grid in level}
        )
        blocks = max(kinds, key=len, default=[])
        ends = [blocks[number] for number in stage_blocks(len(blocks))]
    if len(ends) < 2:
        return []
    same = [grid for grid in grids if grid[2:5] == ends[-1][2:5]]
    return [*ends[-_MAX_STAGES:-1], same[-1]]
