"""Synthetic cell images: ten classes that differ in one part each, with ground-truth masks of that part.

Based on the synthetic data of Tjoa and Guan (five-band scores). A cell is a disk with a dark rim on one of three
backgrounds (flat, shaded, grained), at any position and rotated by up to 60 degrees. Its class is its additional
part: none, a bar across, a pole (a spot inside the rim), a red, green or blue rectangle, one, three or eight tails. The
class `empty` has no cell at all. Colors of cell, rim and background are drawn for every record, so they do not reveal
the class.

Masks have two levels: 1 is the cell, 2 the part that defines its class. The mask of a plain cell has no 2, because
other classes have all of its parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from permafrost.core.records import Box, Content, ImageSource, Record
from permafrost_papers.interpretability.options import CellsDataConfig
from permafrost_sources.demo import box_around, encode_png

CLASSES = (
    "plain",
    "bar",
    "pole",
    "red",
    "green",
    "blue",
    "tail_1",
    "tail_3",
    "tail_8",
    "empty",
)
BODY, PART = 1, 2
"""Values of a mask."""
SERIES = {"train": 1, "test": 2}
"""Part of the random seed for each split."""
_BACKGROUNDS = 3
_TAILS = {"tail_1": 1, "tail_3": 3, "tail_8": 8}
_CHANNELS = {"red": 0, "green": 1, "blue": 2}
_MAX_TURN = np.pi / 3
_NOISE = 0.02
_GRAINS = 12
"""Number of grains of the grained background along a side."""


@dataclass(frozen=True)
class Cell:
    """Position and composition of a cell. Lengths are fractions of the frame's side."""

    radius: float
    rim: float
    x: float
    y: float
    turn: float
    """Rotation in radians."""
    colors: NDArray[np.float64]
    """[4, 3] in [0, 1]: background, its second color, body and rim."""


class CellsSource(ImageSource):
    """Source of drawn cells; every record is drawn from (seed, series, number) only."""

    name = "cells"
    classes = CLASSES

    def __init__(self, config: CellsDataConfig) -> None:
        self.config = config
        self.frame_size: tuple[int, int] | None = (config.image_size, config.image_size)

    def records(self) -> Iterator[Record]:
        """Yield all records; groups are the backgrounds, and boxes bound the whole cell."""
        counts = {"train": self.config.train_records, "test": self.config.test_records}
        return (self._record(split, number) for split in SERIES for number in range(counts[split]))

    def read(self, record: Record) -> Content:
        """Return frame and mask, both as PNG of `data.image_size` squared."""
        series, number = record.content
        frame, levels = self._draw(series, number)
        return Content(image=encode_png(frame), suffix="png", mask=encode_png(levels))

    def where(self, record: Record) -> str:
        """Return a fixed phrase, because cells are drawn and not read."""
        return "of the drawn cells"

    def _record(self, split: str, number: int) -> Record:
        label = number % len(CLASSES)
        return Record(
            key=f"{split}_{number:06d}",
            split=split,
            label=label,
            group=_background_of(number),
            boxes=self._boxes(split, number, label),
            content=(SERIES[split], number),
        )

    def _boxes(self, split: str, number: int, label: int) -> tuple[Box, ...]:
        cell = draw_cell(np.random.default_rng([self.config.seed, SERIES[split], number]))
        levels = cell_levels(cell, CLASSES[label], self.config.image_size)
        return (box_around(levels > 0, label),) if levels.any() else ()

    def _draw(self, series: int, number: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        generator = np.random.default_rng([self.config.seed, series, number])
        cell = draw_cell(generator)
        name, side = CLASSES[number % len(CLASSES)], self.config.image_size
        frame = _background(cell, _background_of(number), side, generator)
        levels = cell_levels(cell, name, side)
        if name != "empty":
            along, across = _own_coordinates(cell, side)
            distance = np.hypot(along, across)
            frame[distance <= cell.radius] = cell.colors[2]
            frame[(distance <= cell.radius) & (distance > cell.radius - cell.rim)] = cell.colors[3]
            part = cell.colors[3].copy()
            if name in _CHANNELS:
                part = np.full(3, 0.1)
                part[_CHANNELS[name]] = 0.9
            frame[levels == PART] = part
        frame += generator.normal(scale=_NOISE, size=frame.shape)
        return np.round(frame.clip(0, 1) * 255).astype(np.uint8), levels


def draw_cell(generator: np.random.Generator) -> Cell:
    """Draw a cell that fits into the frame with its tails."""
    radius = generator.uniform(0.2, 0.25)
    reach = 1.5 * radius
    x, y = generator.uniform(reach, 1 - reach, 2)
    colors = generator.uniform(
        [[0.45], [0.45], [0.7], [0.1]], [[0.65], [0.65], [0.9], [0.3]], (4, 3)
    )
    return Cell(
        radius=radius,
        rim=radius * generator.uniform(0.12, 0.2),
        x=x,
        y=y,
        turn=generator.uniform(-_MAX_TURN, _MAX_TURN),
        colors=colors,
    )


def cell_levels(cell: Cell, name: str, side: int) -> NDArray[np.uint8]:
    """Return the mask of a cell of that class.

    Args:
        cell: The cell.
        name: Name of its class.
        side: Side of the frame in pixels.

    Returns:
        u8 [side, side]: 1 on the cell, 2 on the part that defines its class, 0 elsewhere.
    """
    levels = np.zeros((side, side), np.uint8)
    if name == "empty":
        return levels
    along, across = _own_coordinates(cell, side)
    levels[np.hypot(along, across) <= cell.radius] = BODY
    levels[_part(cell, name, along, across)] = PART
    return levels


def _part(
    cell: Cell, name: str, along: NDArray[np.float64], across: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Return the part that defines the class, bool [side, side]."""
    radius, inner = cell.radius, cell.radius - cell.rim
    if name == "bar":
        return (np.abs(across) <= 0.15 * radius) & (np.hypot(along, across) <= inner)
    if name == "pole":
        return np.asarray(np.hypot(along - 0.6 * inner, across) <= 0.25 * radius)
    if name in _CHANNELS:
        return (np.abs(along) <= 0.45 * radius) & (np.abs(across) <= 0.3 * radius)
    there = np.zeros(along.shape, bool)
    tails = _TAILS.get(name, 0)
    for angle in np.arange(tails) * (2 * np.pi / max(tails, 1)):
        out = along * np.cos(angle) + across * np.sin(angle)
        aside = across * np.cos(angle) - along * np.sin(angle)
        there |= (out > radius) & (out <= 1.5 * radius) & (np.abs(aside) <= 0.12 * radius)
    return there


def _own_coordinates(cell: Cell, side: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the coordinates of every pixel's center along and across the cell's own axis: [side, side] each."""
    centers = (np.arange(side) + 0.5) / side
    x, y = np.meshgrid(centers - cell.x, centers - cell.y)
    cos, sin = np.cos(cell.turn), np.sin(cell.turn)
    return x * cos + y * sin, y * cos - x * sin


def _background(
    cell: Cell, kind: int, side: int, generator: np.random.Generator
) -> NDArray[np.float64]:
    """Return a flat background, one shaded from left to right, or a grained one: f64 [side, side, 3]."""
    first, second = cell.colors[:2]
    share = np.zeros((side, side, 1))
    if kind == 1:
        share = np.broadcast_to(np.linspace(0, 1, side)[None, :, None], (side, side, 1))
    if kind == 2:
        grains = generator.random((_GRAINS, _GRAINS))
        at = np.arange(side) * _GRAINS // side
        share = grains[at][:, at, None]
    return np.asarray(first * (1 - share) + second * share)


def _background_of(number: int) -> int:
    """Return the background, equal for each ten consecutive records, so that it is independent of the class."""
    return number // len(CLASSES) % _BACKGROUNDS
