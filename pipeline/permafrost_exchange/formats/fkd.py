"""Reader of the soft labels of FKD and FerKD (szq0214/FKD).

    <split>/<class>/<stem>.tar    a torch file: [coordinates [V, 4], flips [V], labels]

Coordinates are top / H, left / W, height / H and width / W. Labels are [V, 2, k], classes and probabilities in one
array (marginal_smoothing), [V, 2] (smoothing) or classes [V] (hard).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from permafrost.core.errors import require
from permafrost_exchange.target_reader import (
    Arrays,
    FileReader,
    ReadRequest,
    TargetForm,
    crop_views,
    top_outcomes,
)

_EXACT_HALVES = 2048
"""Classes up to which float16 has every number."""


class FKDReader(FileReader):
    """Crops and flips as stored views, with the largest logits of each."""

    suffix = ".tar"

    def form(self) -> TargetForm:
        return TargetForm(
            frame="full",
            classes=self.config.classes,
            temperatures=(self.config.temperature,),
            operations=(
                {"kind": "resized_crop", "scale": [0.08, 1.0], "ratio": [0.75, 4 / 3]},
                {"kind": "horizontal_flip", "p": 0.5},
            ),
            remarks=(
                "a view shows the teacher's crop: the same pixels if the store has the original images, and a part of "
                "the frame otherwise",
            ),
        )

    def parse(self, content: Any, request: ReadRequest, row: int) -> Arrays:
        coordinates, flips, labels = (np.asarray(column) for column in content)
        require(
            coordinates.ndim == 2
            and coordinates.shape[1] == 4
            and flips.shape == coordinates.shape[:1],
            f"its coordinates are {list(coordinates.shape)} and its flips {list(flips.shape)}",
            ValueError,
        )
        count = self.config.views or len(coordinates)
        require(
            min(len(coordinates), len(labels)) >= count,
            f"it has {len(coordinates)} views and {len(labels)} labels, and format.views={count}",
            ValueError,
        )
        boxes = coordinates[:count].astype(np.float64)
        ends = boxes[:, :2] + boxes[:, 2:]
        require(
            not (boxes.min() < -1e-3 or boxes[:, 2:].min() <= 0 or ends.max() > 1.01),
            "a crop reaches beyond the image; these are not coordinates of FKD",
            ValueError,
        )
        probabilities, classes = self._outcomes(labels[:count])
        require(
            labels.dtype != np.float16 or self.config.classes <= _EXACT_HALVES,
            f"it has classes in float16, which does not tell {self.config.classes} classes apart; make it without "
            "use_fp16",
            ValueError,
        )
        rest = np.zeros(count) if self.config.renormalized else None
        if self.config.renormalized:
            probabilities = probabilities / probabilities.sum(axis=1, keepdims=True)
        top = top_outcomes(
            probabilities, classes, self.config.classes, self.config.temperature, rest
        )
        return {**crop_views(boxes, flips[:count].astype(bool)), **top}

    def _outcomes(self, labels: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return probabilities and classes, [V, k] each."""
        if labels.ndim == 1:
            return np.ones((len(labels), 1)), labels[:, None]
        if labels.ndim == 2 and labels.shape[1] == 2:
            return labels[:, 1:], labels[:, :1]
        if labels.ndim == 3 and labels.shape[1] == 2:
            return labels[:, 1], labels[:, 0]
        raise ValueError(
            f"its labels are {list(labels.shape)}, in place of [V], [V, 2] or [V, 2, k]"
        )
