"""A small synthetic concept set, for tests and as the default if no Broden folder is given.

A picture shows two shapes. The categories are object (circle, square, triangle: pixels, one label image per shape),
color (pixels), texture (plain, striped, checkered: pixels) and scene (meadow, night, sand: the whole picture, by its
background color). Pictures depend only on (seed, number). Label images have half the pictures' side, as in Broden.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from permafrost.interpretability.concepts import ConceptImage, Labels

_OBJECTS = ("circle", "square", "triangle")
_COLORS = {
    "red": (0.85, 0.15, 0.15),
    "green": (0.15, 0.75, 0.2),
    "blue": (0.2, 0.25, 0.9),
    "yellow": (0.9, 0.85, 0.2),
}
_TEXTURES = ("plain", "striped", "checkered")
_SCENES = {"meadow": (0.35, 0.45, 0.3), "night": (0.1, 0.1, 0.2), "sand": (0.7, 0.65, 0.5)}
_BY_CATEGORY = {
    "color": tuple(_COLORS),
    "object": _OBJECTS,
    "scene": tuple(_SCENES),
    "texture": _TEXTURES,
}
_SHAPES = 2
_DARK = 0.45
"""Factor on the color in the dark parts of a texture."""


class DrawnConcepts:
    """A set of `count` pictures of `side` x `side` pixels."""

    def __init__(self, count: int, side: int, seed: int = 0) -> None:
        """Configure the set; `side` must be even."""
        self.count, self.side, self.seed = count, side, seed
        named = [(name, place) for place, c in enumerate(_BY_CATEGORY) for name in _BY_CATEGORY[c]]
        self.labels = Labels(
            names=("", *(name for name, _ in named)),
            categories=tuple(_BY_CATEGORY),
            category_of=(0, *(place for _, place in named)),
        )

    def __len__(self) -> int:
        return self.count

    def read(self, number: int, *, with_labels: bool = True) -> ConceptImage:
        """Draw one picture."""
        generator = np.random.default_rng([self.seed, number])
        scene = str(generator.choice(list(_SCENES)))
        picture = np.broadcast_to(np.array(_SCENES[scene]), (self.side, self.side, 3)).copy()
        layers = []
        for left in range(_SHAPES):
            layers += self._add_shape(picture, generator, (left + 0.5) / _SHAPES)
        picture += generator.normal(scale=0.03, size=picture.shape)
        pixels = np.round(picture.clip(0, 1) * 255).astype(np.uint8)
        return ConceptImage(
            image=torch.from_numpy(pixels).permute(2, 0, 1),
            layers=np.stack(layers),
            whole=(self._label(scene),),
        )

    def _add_shape(
        self, picture: NDArray[np.float64], generator: np.random.Generator, center: float
    ) -> list[NDArray[np.int32]]:
        """Paint one shape, and return its label images for color, object and texture, each [side / 2, side / 2]."""
        shape, texture = (str(generator.choice(names)) for names in (_OBJECTS, _TEXTURES))
        color = str(generator.choice(list(_COLORS)))
        radius = generator.uniform(0.13, 0.22)
        x, y = center + generator.uniform(-0.03, 0.03), generator.uniform(0.25, 0.75)
        at = (np.arange(self.side) + 0.5) / self.side
        across, down = np.meshgrid(at - x, at - y)
        inside = _inside(shape, across, down, radius)
        dark = _dark(texture, self.side)
        paint = np.array(_COLORS[color]) * np.where(dark, _DARK, 1.0)[:, :, None]
        picture[inside] = paint[inside]
        coarse = inside[::2, ::2]
        return [
            np.where(coarse, self._label(n), 0).astype(np.int32) for n in (color, shape, texture)
        ]

    def _label(self, name: str) -> int:
        return self.labels.names.index(name)


def _inside(
    shape: str, across: NDArray[np.float64], down: NDArray[np.float64], radius: float
) -> NDArray[np.bool_]:
    if shape == "circle":
        return np.asarray(np.hypot(across, down) <= radius)
    if shape == "square":
        return np.asarray(np.maximum(np.abs(across), np.abs(down)) <= 0.85 * radius)
    return np.asarray((np.abs(down) <= radius) & (np.abs(across) <= (down + radius) / 2))


def _dark(texture: str, side: int) -> NDArray[np.bool_]:
    """Mask of the dark parts of a texture, bool [side, side]."""
    width = max(1, side // 16)
    row, column = np.indices((side, side)) // width % 2
    if texture == "striped":
        return np.asarray(row == 1)
    return np.asarray(row != column) if texture == "checkered" else np.zeros((side, side), bool)
