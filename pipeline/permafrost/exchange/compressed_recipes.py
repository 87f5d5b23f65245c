"""Recipes of views as apple/ml-dr and DataCompDR store them, as this project's views: a matrix and a row of values.

A compressed recipe is a list with the values of each random operation in the fixed order of that code: crops in pixels
of the image, a flip, (number, magnitude) of each operation of RandAugment in torchvision's order, and an erased box in
pixels of the view. An operation that was not drawn is None.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from permafrost.exchange.target_reader import crop_matrices
from permafrost.loading.recipes import SPACE, policy_matrices

_MOST_OPERATIONS = 4


class RecipeLayout(NamedTuple):
    """Random operations of a compressed recipe, and the size of the view."""

    names: tuple[str, ...]
    """Those that have values, in their order; mixing ones are not among them."""
    size: int
    """Side of the view in pixels."""
    padding: int = 0
    """Padding of a random crop on each side in pixels."""
    num_operations: int = 0
    """Number of operations of RandAugment, 0 without it."""
    mixes: bool = False
    """True if a recipe begins with the number of a second image."""

    @property
    def operations(self) -> tuple[dict[str, Any], ...]:
        """Description of the views in a manifest."""
        described: list[dict[str, Any]] = []
        if "random_crop" in self.names:
            described.append({"kind": "pad_crop", "padding": self.padding})
        if "random_resized_crop" in self.names:
            described.append({"kind": "resized_crop"})
        if "random_horizontal_flip" in self.names:
            described.append({"kind": "horizontal_flip", "p": 0.5})
        if self.num_operations:
            described.append({"kind": "randaugment", "count": self.num_operations})
        if "random_erase" in self.names:
            described.append({"kind": "random_erasing", "value": 0.0})
        return tuple(described)


_WITH_VALUES = (
    "random_crop",
    "random_resized_crop",
    "random_horizontal_flip",
    "rand_augment",
    "random_erase",
)
_WITHOUT_VALUES = ("uint8", "to_tensor", "normalize", "to_rgb")
_MIXING = ("mixup", "cutmix")


def layout_of(augmentation: Mapping[str, Any]) -> RecipeLayout:
    """Return the layout of the recipes of a configuration (`reinforce.image_augmentation`).

    Raises:
        ValueError: If it has an operation that views of this project cannot show.
    """
    active = {
        name: options if isinstance(options, dict) else {}
        for name, options in augmentation.items()
        if not isinstance(options, dict) or options.get("enable", True)
    }
    odd = sorted(active.keys() - {*_WITH_VALUES, *_WITHOUT_VALUES, *_MIXING})
    if odd:
        raise ValueError(
            f"its views are made by {', '.join(odd)}, which views of this project cannot show"
        )
    names = tuple(name for name in _WITH_VALUES if name in active)
    crops = [active[name] for name in names if name.endswith("crop")]
    if len(crops) != 1 or not isinstance(crops[0].get("size"), int):
        raise ValueError("its views are not made by one crop of a size")
    count = int(active["rand_augment"].get("num_ops", 2)) if "rand_augment" in active else 0
    if count > _MOST_OPERATIONS:
        raise ValueError(f"its RandAugment has {count} operations, more than {_MOST_OPERATIONS}")
    return RecipeLayout(
        names=names,
        size=crops[0]["size"],
        padding=int(crops[0].get("padding") or 0),
        num_operations=count,
        mixes=bool(set(_MIXING) & active.keys()),
    )


def convert_recipes(
    recipes: Sequence[Any], layout: RecipeLayout, height: int, width: int
) -> dict[str, NDArray[Any]]:
    """Return canonical_from_view f32 [V, 2 or 3, 3] and pixel_values f16 [V, C] of the recipes of an image.

    Args:
        recipes: V compressed recipes, or mappings from operations to pairs of values.
        layout: Layout of the recipes.
        height: Height of the original image in pixels.
        width: Its width.

    Raises:
        ValueError: If a recipe has other values, or mixes two images.
    """
    values = [_values_of(recipe, layout) for recipe in recipes]
    boxes = np.array([_box(each, layout, height, width) for each in values])
    flips = np.array([bool(each.get("random_horizontal_flip")) for each in values])
    matrices = crop_matrices(boxes, flips)
    if not layout.num_operations and "random_erase" not in layout.names:
        return {"canonical_from_view": matrices.astype(np.float32)}
    columns = []
    if layout.num_operations:
        kinds, strengths = _policy(values, layout)
        for turn in range(layout.num_operations):
            step = policy_matrices(
                torch.from_numpy(kinds[:, turn]),
                torch.from_numpy(strengths[:, turn]),
                torch.ones(len(values), dtype=torch.float64),
            )
            matrices = matrices @ step.numpy()
        codes = kinds[:, 0::2].astype(np.float64)
        codes[:, : kinds.shape[1] // 2] += len(SPACE) * kinds[:, 1::2]
        columns += [codes, strengths]
    if "random_erase" in layout.names:
        columns.append(np.array([_erased(each.get("random_erase"), layout) for each in values]))
    return {
        "canonical_from_view": matrices[:, :2].astype(np.float32),
        "pixel_values": np.concatenate(columns, axis=1).astype(np.float16),
    }


def _values_of(recipe: Any, layout: RecipeLayout) -> dict[str, Any]:
    """Return the values of each operation by name; one that was not drawn is None."""
    if isinstance(recipe, dict):
        if recipe.get("mixup") is not None or recipe.get("cutmix") is not None:
            raise ValueError(_MIXED)
        firsts = {name: recipe.get(name) for name in layout.names}
        return {name: each[0] if each is not None else None for name, each in firsts.items()}
    values = list(recipe)
    if layout.mixes:
        if values[0] is not None:
            raise ValueError(_MIXED)
        values = values[1:]
    if len(values) < len(layout.names):
        raise ValueError(f"a recipe has {len(values)} values for {', '.join(layout.names)}")
    return dict(zip(layout.names, values, strict=False))


_MIXED = (
    "a view mixes two images, which are of different shards here, so it cannot be replayed; take targets of views "
    "without MixUp and CutMix"
)


def _box(
    values: Mapping[str, Any], layout: RecipeLayout, height: int, width: int
) -> tuple[float, float, float, float]:
    """Return top, left, height and width of the crop as fractions of the image's sides."""
    if "random_resized_crop" in layout.names:
        top, left, rows, columns = map(float, values["random_resized_crop"])
    else:
        top, left = (float(each) - layout.padding for each in values["random_crop"][:2])
        rows = columns = float(layout.size)
    if (
        rows <= 0
        or columns <= 0
        or top + rows > height + layout.padding + 1
        or left + columns > width + layout.padding + 1
    ):
        raise ValueError(
            f"a crop of {rows:g}x{columns:g} pixels at ({top:g}, {left:g}) is outside of the image of {height}x{width} "
            "pixels; the recipes are of other images"
        )
    return top / height, left / width, rows / height, columns / width


def _policy(
    values: Sequence[Mapping[str, Any]], layout: RecipeLayout
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the kinds i64 [V, n] and strengths f64 [V, n] of RandAugment."""
    kinds = np.zeros((len(values), layout.num_operations), np.int64)
    strengths = np.zeros((len(values), layout.num_operations))
    for row, each in enumerate(values):
        drawn = each.get("rand_augment")
        if drawn is None:
            continue
        if len(drawn) != layout.num_operations:
            raise ValueError(
                f"a recipe has {len(drawn)} operations of RandAugment in place of {layout.num_operations}"
            )
        for turn, (kind, magnitude) in enumerate(drawn):
            if not 0 <= int(kind) < len(SPACE):
                raise ValueError(f"there is no operation {kind} of RandAugment")
            kinds[row, turn] = int(kind)
            strengths[row, turn] = _strength(SPACE[int(kind)], float(magnitude), layout.size)
    return kinds, strengths


def _strength(kind: str, magnitude: float, size: int) -> float:
    """Return a magnitude of torchvision in this project's units (loading/recipes.py)."""
    if kind in ("identity", "autocontrast", "equalize"):
        return 0.0
    if kind.startswith("translate"):
        return int(magnitude) / size
    return magnitude / 255 if kind == "solarize" else magnitude


def _erased(box: Any, layout: RecipeLayout) -> tuple[float, float, float, float]:
    """Return x0, y0, x1, y1 of an erased box in [0, 1], -1 for none. Its first value counts rows."""
    if box is None or box == -1 or box[0] == -1:
        return (-1.0, -1.0, -1.0, -1.0)
    top, left, rows, columns = (float(each) / layout.size for each in box[:4])
    return (left, top, left + columns, top + rows)
