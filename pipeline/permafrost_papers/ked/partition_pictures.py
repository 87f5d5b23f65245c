"""Pictures of superfeatures: the features of each group, and the dependency matrix ordered by groups.

A store has one partition for every black box and every set of options with which superfeatures were searched.
Shape letters: d features, H W a picture, h w the features' grid.
"""

from __future__ import annotations

import colorsys

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from permafrost.storage.files import file_at
from permafrost.storage.rooted_paths import RootedPath
from permafrost.store.artifacts import ARTIFACTS_FOLDER
from permafrost.store.manifest import MANIFEST_NAME
from permafrost.store.reader import Store
from permafrost_papers.ked.dependency import symmetric
from permafrost_papers.ked.partition import Partition
from permafrost_papers.ked.search import load_partition
from permafrost_report.page import SectionPart, StoreSection
from permafrost_report.pictures import PictureRow, TileRow, picture_grid

_GOLDEN = 0.618034
"""Fraction of the color circle between consecutive groups, so that few groups have distinct colors."""
_STRONG_QUANTILE = 0.995
"""Quantile of the dependencies at and above which a pixel is black."""
_BORDER = (0.85, 0.05, 0.1)
_MATRIX_PIXELS = 256
"""Minimum side of the matrix picture in pixels. Features are squares, and lines between groups do not hide any."""
_SHOWN = (2, 4, 8, 16)


def partition_section(store: Store) -> StoreSection | None:
    """Build the section of a store's partitions, None if it has none."""
    parts = [
        _partition_part(folder)
        for folder in file_at(store.folder / ARTIFACTS_FOLDER).paths("partition-*")
        if file_at(folder / MANIFEST_NAME).exists()
    ]
    introduction = (
        "Features of the same color depend on each other in the black box's logits. Below each picture is the "
        "dependency matrix in the order of the groups, with red lines between groups. Black is strong."
    )
    return StoreSection("superfeatures", "Superfeatures", introduction, parts) if parts else None


def _partition_part(folder: RootedPath) -> SectionPart:
    """Describe a search and show its partition."""
    saved = load_partition(folder)
    facts, partition = saved.facts, saved.partition
    halves = f" (rank correlation of two halves {facts.split_half:.3f})" if facts.split_half else ""
    return SectionPart(
        folder.name,
        f"{partition.assignments.shape[1]} features of {saved.made_from['black_box']['architecture']['name']} in "
        f"{facts.records:,} records{halves}; {facts.communities} communities, modularity {facts.modularity[-1]:.3f} "
        f"with {partition.most} superfeatures; {len(facts.null_features)} features without dependencies.",
        superfeature_figure(partition, saved.dependency),
        f"Groups of {folder.name} and its dependency matrix",
    )


def superfeature_figure(partition: Partition, dependency: Tensor) -> list[TileRow]:
    """Show groups, and below them the matrix in their order, for some numbers of superfeatures.

    These are 2, 4, 8 and 16 below the finest level, and the finest level.

    Args:
        partition: Partition of the features.
        dependency: [d, d].
    """
    numbers = sorted({number for number in _SHOWN if number < partition.most} | {partition.most})
    assignments = [partition.assignment(number).numpy() for number in numbers]
    groups = [group_picture(assignment, partition.grid) for assignment in assignments]
    matrices = [dependency_picture(dependency, assignment) for assignment in assignments]
    captions = [f"{number} superfeature{'s' if number > 1 else ''}" for number in numbers]
    aspect = 4.0 if partition.grid is None else groups[0].shape[1] / groups[0].shape[0]
    return picture_grid(
        [
            PictureRow("groups", groups, captions, aspects=[aspect] * len(groups)),
            PictureRow("dependency", matrices),
        ]
    )


def group_picture(
    assignment: NDArray[np.int64], grid: tuple[int, int] | None
) -> NDArray[np.float64]:
    """Draw each feature in the color of its group.

    Args:
        assignment: Group of each feature, i64 [d].
        grid: (rows, columns) of the features, None for a table.

    Returns:
        [h, w, 3], or [1, d, 3] for a table.
    """
    palette = [
        colorsys.hsv_to_rgb(group * _GOLDEN % 1, 0.75, 0.95 - 0.3 * (group // 2 % 2))
        for group in range(int(assignment.max()) + 1)
    ]
    colors = np.array(palette)[assignment]
    return colors.reshape(*(grid or (1, len(assignment))), 3)


def dependency_picture(dependency: Tensor, assignment: NDArray[np.int64]) -> NDArray[np.float64]:
    """Draw the matrix in the order of groups, with lines between them, where black is strong.

    Args:
        dependency: [d, d].
        assignment: Group of each feature, i64 [d].

    Returns:
        [side, side, 3] in [0, 1].
    """
    order = assignment.argsort(kind="stable")
    weights = symmetric(dependency).numpy()[np.ix_(order, order)]
    strong = np.quantile(weights, _STRONG_QUANTILE)
    gray = 1 - (weights / max(float(strong), np.finfo(np.float64).tiny)).clip(0, 1)
    pixels = -(-_MATRIX_PIXELS // len(order))
    picture = gray.repeat(pixels, axis=0).repeat(pixels, axis=1)[..., None].repeat(3, axis=2)
    lines = (np.flatnonzero(np.diff(assignment[order])) + 1) * pixels
    picture = np.insert(picture, lines, _BORDER, axis=0)
    return np.insert(picture, lines, _BORDER, axis=1)
