"""Recipes of views as apple/ml-dr and DataCompDR store them, as this project's views: windows, moves and values.

A compressed recipe is a list with the values of each random operation in the fixed order of that code: crops in pixels
of the image, a flip, (number, magnitude) of each operation of RandAugment in torchvision's order, and an erased box in
pixels of the view. An operation that was not drawn is None.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from permafrost.core.errors import require
from permafrost.core.records import PIXEL_FIELD
from permafrost.loading.recipes import SPACE
from permafrost_exchange.target_reader import Arrays, crop_views

_MAX_OPERATIONS = 4
RECIPE_REMARK = (
    "views have the recipes of the files, on the pixels of the original images if the store has them, and on those of "
    "the frames otherwise"
)


class RecipeLayout(NamedTuple):
    """Random operations of a compressed recipe, and the size of the view."""

    names: tuple[str, ...]
    """Those that have values, in their order; mixing ones are not among them."""
    crop: int | None = None
    """Side of the crop in pixels; None for views of the whole image."""
    resize: tuple[int, int] | int | None = None
    """Size of the image before the crop, (height, width) or that of its shorter side; None for its own."""
    padding: int = 0
    """Padding of a random crop on each side in pixels."""
    num_operations: int = 0
    """Number of operations of RandAugment, 0 without it."""
    num_mixing: int = 0
    """Number of operations that mix; with any, a recipe begins with the number of a second image."""
    ignored: tuple[str, ...] = ()
    """Names of the configuration that its own code ignores."""

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width of an image before the crop."""
        if self.resize is None:
            return height, width
        if isinstance(self.resize, tuple):
            return self.resize
        if width <= height:
            return int(self.resize * height / width), self.resize
        return self.resize, int(self.resize * width / height)

    def view_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width of the views of an image."""
        return self.resized(height, width) if self.crop is None else (self.crop, self.crop)

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


_CROPS = {
    "random_crop": {"size", "padding"},
    "random_resized_crop": {"size", "scale", "ratio", "interpolation", "antialias"},
}
"""Operations that crop, and those of their options that views of this project follow."""
_WITH_VALUES = ("resize", *_CROPS, "random_horizontal_flip", "rand_augment", "random_erase")
_WITHOUT_VALUES = ("uint8", "to_tensor", "normalize", "to_rgb")
_MIXING = ("mixup", "cutmix")
_OTHERS = ("center_crop",)
"""Operations of that code that views of this project cannot show."""
_NAMES = (
    *("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color"),
    *("Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize"),
)
"""Names of torchvision's operations, in the order of SPACE."""


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
    crops = [name for name in _CROPS if name in active]
    odd = [
        *(name for name in _OTHERS if name in active),
        *(
            f"{each}.{name}"
            for each in crops
            for name in active[each].keys() - _CROPS[each] - {"enable"}
        ),
    ]
    require(
        not odd,
        f"its views are made by {', '.join(odd)}, which views of this project cannot show",
        ValueError,
    )
    require(
        len(crops) <= 1 and all(isinstance(active[name].get("size"), int) for name in crops),
        "its views are not made by one crop of a size",
        ValueError,
    )
    count = int(active["rand_augment"].get("num_ops", 2)) if "rand_augment" in active else 0
    require(
        not count or bool(crops) or not isinstance(active.get("resize", {}).get("size"), list),
        "its RandAugment moves images that were resized to other proportions, which views of this project cannot "
        "show",
        ValueError,
    )
    require(
        count <= _MAX_OPERATIONS,
        f"its RandAugment has {count} operations, more than {_MAX_OPERATIONS}",
        ValueError,
    )
    crop = active[crops[0]] if crops else {}
    return RecipeLayout(
        names=tuple(name for name in _WITH_VALUES if name in active),
        crop=crop.get("size"),
        resize=_resize_of(active["resize"]) if "resize" in active else None,
        padding=int(crop.get("padding") or 0),
        num_operations=count,
        num_mixing=len(set(_MIXING) & active.keys()),
        ignored=tuple(sorted(active.keys() - {*_WITH_VALUES, *_WITHOUT_VALUES, *_MIXING})),
    )


def _resize_of(options: Mapping[str, Any]) -> tuple[int, int] | int:
    """Return the size that an image is resized to: (height, width), or that of its shorter side."""
    size, others = options.get("size"), options.keys() - {"size", "interpolation", "antialias"}
    if isinstance(size, list) and len(size) == 1:
        (size,) = size
    if isinstance(size, int) and not others:
        return size
    if isinstance(size, list) and len(size) == 2 and not others:
        return int(size[0]), int(size[1])
    raise ValueError(f"its views are resized by {dict(options)}; a size or two of them are read")


def convert_recipes(
    recipes: Sequence[Any], layout: RecipeLayout, height: int, width: int
) -> Arrays:
    """Return windows f32 [V, 4], moves f32 [V, 1, 2, 3] and pixel_values f16 [V, C] of the recipes of an image.

    Args:
        recipes: V compressed recipes, or mappings from operations to pairs of values.
        layout: Layout of the recipes.
        height: Height of the original image in pixels.
        width: Its width.

    Raises:
        ValueError: If a recipe has other values, or mixes two images.
    """
    rows, columns = layout.view_size(height, width)
    values = [_values_of(recipe, layout) for recipe in recipes]
    boxes = np.array([_box(recipe, layout, height, width) for recipe in values])
    flips = np.array([bool(recipe.get("random_horizontal_flip")) for recipe in values])
    numbers = []
    if layout.num_operations:
        kinds, strengths = _policy(values, layout, rows, columns)
        codes = kinds[:, 0::2].astype(np.float64)
        codes[:, : kinds.shape[1] // 2] += len(SPACE) * kinds[:, 1::2]
        numbers += [codes, strengths]
    if "random_erase" in layout.names:
        erased = np.array([_erased(recipe.get("random_erase"), rows, columns) for recipe in values])
        numbers.append(erased)
    views = crop_views(boxes, flips)
    if numbers:
        views[PIXEL_FIELD] = np.concatenate(numbers, axis=1).astype(np.float16)
    return views


def _values_of(recipe: Any, layout: RecipeLayout) -> dict[str, Any]:
    """Return the values of each operation by name; one that was not drawn is None."""
    if isinstance(recipe, dict):
        require(recipe.get("mixup") is None and recipe.get("cutmix") is None, _MIXED, ValueError)
        firsts = {name: recipe.get(name) for name in layout.names}
        return {name: each[0] if each is not None else None for name, each in firsts.items()}
    values = list(recipe)
    if layout.num_mixing:
        require(values[0] is None, _MIXED, ValueError)
        values = values[1 : len(values) - layout.num_mixing]
    require(
        len(values) == len(layout.names),
        f"a recipe has {len(values)} values, and its configuration lists {', '.join(layout.names)}",
        ValueError,
    )
    return dict(zip(layout.names, values, strict=True))


_MIXED = (
    "a view mixes two images, which are of different shards here, so it cannot be replayed; take targets of views "
    "without MixUp and CutMix"
)


def _box(
    values: Mapping[str, Any], layout: RecipeLayout, height: int, width: int
) -> tuple[float, float, float, float]:
    """Return top, left, height and width of the crop as fractions of the image's sides."""
    height, width = layout.resized(height, width)
    if layout.crop is None:
        return 0.0, 0.0, 1.0, 1.0
    if "random_resized_crop" in layout.names:
        top, left, rows, columns = map(float, values["random_resized_crop"])
    else:
        top, left = (float(offset) - layout.padding for offset in values["random_crop"][:2])
        rows = columns = float(layout.crop)
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
    values: Sequence[Mapping[str, Any]], layout: RecipeLayout, height: int, width: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the kinds i64 [V, n] and strengths f64 [V, n] of RandAugment on views of this size."""
    kinds = np.zeros((len(values), layout.num_operations), np.int64)
    strengths = np.zeros((len(values), layout.num_operations))
    for row, each in enumerate(values):
        if (drawn := each.get("rand_augment")) is None:
            continue
        require(
            len(drawn) == layout.num_operations,
            f"a recipe has {len(drawn)} operations of RandAugment in place of {layout.num_operations}",
            ValueError,
        )
        for turn, (kind, magnitude) in enumerate(drawn):
            number = _NAMES.index(kind) if kind in _NAMES else kind
            require(
                not isinstance(number, str) and 0 <= int(number) < len(SPACE),
                f"there is no operation {kind} of RandAugment",
                ValueError,
            )
            kinds[row, turn] = int(number)
            strengths[row, turn] = _strength(SPACE[int(number)], float(magnitude), height, width)
    return kinds, strengths


def _strength(kind: str, magnitude: float, height: int, width: int) -> float:
    """Return a magnitude of torchvision in this project's units (loading/recipes.py)."""
    if kind in ("identity", "autocontrast", "equalize"):
        return 0.0
    if kind.startswith("translate"):
        return int(magnitude) / (width if kind == "translate_x" else height)
    return magnitude / 255 if kind == "solarize" else magnitude


def _erased(box: Any, height: int, width: int) -> tuple[float, float, float, float]:
    """Return x0, y0, x1, y1 of an erased box in [0, 1], -1 for none. Its first value counts rows."""
    if box is None or box == -1 or box[0] == -1:
        return (-1.0, -1.0, -1.0, -1.0)
    top, left, rows, columns = map(float, box[:4])
    return (left / width, top / height, (left + columns) / width, (top + rows) / height)
