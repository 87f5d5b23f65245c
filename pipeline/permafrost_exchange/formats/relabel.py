"""Reader of the label maps of ReLabel (naver-ai/relabel_imagenet).

    <class>/<stem>.pt    [2, k, h, w]: scores before a softmax, and their classes, of each of 15x15 cells of the image

The label of a crop is the softmax of the scores that its box pools from the map, where a class that a cell does not
list has score 0: torchvision's roi_align with one cell, of as many points as the box has cells. So a pass has the label
of the whole image, or of crops. ReLabel's batch function passes (top, left, bottom, right) where roi_align expects
(x0, y0, x1, y1), so its students were trained with maps whose first axis runs along the width of the image.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.ops import roi_align

from permafrost.core.errors import require
from permafrost.core.records import MOVE_FIELD, WINDOW_FIELD
from permafrost.loading.windows import Views, complete_matrices
from permafrost_exchange.target_reader import (
    Arrays,
    FileReader,
    ReadRequest,
    TargetForm,
    TargetReader,
)

_ROUNDING = 1e-5
"""Rounding of the side of a box in cells, which decides about the number of points."""
_MAX_LOGITS = 100
"""Largest number of logits that are stored of a crop, of the classes that its cells list."""


class ReLabelReader(FileReader):
    """Labels of the whole image, or of the crops of `views=random`."""

    suffix = ".pt"
    crops_targets = True

    def form(self) -> TargetForm:
        return TargetForm(
            frame="full", classes=self.config.classes, temperatures=(self.config.temperature,)
        )

    def alternatives(self) -> dict[str, TargetReader]:
        other = not self.config.transposed
        config = replace(self.config, transposed=other)
        return {f"format.transposed={str(other).lower()}": type(self)(config, self.path)}

    def parse(self, content: Any, request: ReadRequest, row: int) -> Arrays:
        scores, classes = (np.asarray(column) for column in content)
        require(
            scores.ndim == 3
            and scores.shape == classes.shape
            and scores.shape[1] == scores.shape[2],
            f"its scores are {list(scores.shape)}, in place of [k, h, h]",
            ValueError,
        )
        is_class = (classes >= 0) & (classes < self.config.classes) & (classes == np.rint(classes))
        if not is_class.all():
            raise ValueError(
                f"it has class {classes[~is_class][0]:g} of {self.config.classes}; format.classes= is their number"
            )
        numbers = classes.astype(np.int64)
        if self.config.transposed:
            scores, numbers = scores.swapaxes(1, 2), numbers.swapaxes(1, 2)
        listed, indices = np.unique(numbers, return_inverse=True)
        maps = np.zeros((len(listed), *scores.shape[1:]), np.float32)
        y, x = np.indices(scores.shape[1:])
        for rank, index in zip(scores, indices.reshape(numbers.shape), strict=True):
            maps[index, y, x] = rank
        views = {name: values[row] for name, values in (request.views or {}).items()}
        pooled = _pool(maps, _matrices_of(views))
        return {**views, **_largest(pooled, listed, self.config.classes, self.config.temperature)}


def _matrices_of(views: Arrays) -> NDArray[np.float32]:
    """Return canonical_from_view [V, 3, 3] of the fields of views; the identity for the whole image."""
    if not views:
        return np.eye(3, dtype=np.float32)[None]
    windows, turns = (torch.from_numpy(views[field.name]) for field in (WINDOW_FIELD, MOVE_FIELD))
    return Views.of(windows, complete_matrices(turns)).canonical_from_view.numpy()


def _pool(maps: NDArray[np.float32], matrices: NDArray[np.float32]) -> NDArray[np.float64]:
    """Pool maps [C, h, h] in the boxes of views, f64 [V, C].

    Args:
        maps: Maps of the whole image.
        matrices: canonical_from_view [V, 3, 3] of crops, flips and quarter turns.
    """
    side = maps.shape[-1]
    half = np.abs(matrices[:, :2, :2].astype(np.float64)).sum(axis=2)
    center = matrices[:, :2, 2].astype(np.float64)
    low, high = (((edge + 1) / 2 * side) - 0.5 for edge in (center - half, center + half))
    # A box of whole cells, as crops of whole pixels may be, has as many points, whatever its rounding.
    high = high - _ROUNDING
    boxes = np.concatenate([np.zeros((len(low), 1)), low, high], axis=1)
    pooled = roi_align(
        torch.from_numpy(maps)[None].double(),
        torch.from_numpy(boxes).double(),
        output_size=1,
        sampling_ratio=-1,
        aligned=False,  # a box has at least the size of a cell
    )
    return np.asarray(pooled[:, :, 0, 0])


def _largest(
    pooled: NDArray[np.float64], listed: NDArray[np.int64], num_classes: int, temperature: float
) -> Arrays:
    """Return a fixed number of the largest logits of scores, with 0 for classes that are not listed."""
    count = min(_MAX_LOGITS, num_classes)
    others = np.setdiff1d(np.arange(min(num_classes, count + len(listed))), listed)
    others = others[: max(0, count - len(listed))]
    classes = np.concatenate([listed, others])
    scores = np.concatenate([pooled, np.zeros((len(pooled), len(others)))], axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")
    ranked = np.take_along_axis(scores, order, 1) / temperature
    beyond = np.exp(ranked[:, count:]).sum(axis=1) + (num_classes - len(classes))
    rest = np.log(beyond) if num_classes > count else np.zeros(len(pooled))
    return {
        "top_logits": (ranked[:, :count] * temperature).astype(np.float32),
        "top_class": classes[order[:, :count]].astype(np.int32),
        "rest_logits": rest[:, None].astype(np.float32),
    }
