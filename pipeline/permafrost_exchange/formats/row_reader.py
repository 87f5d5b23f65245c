"""Base of readers of files with a row per record: what their arrays or columns mean, and what is wrong with them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from inspect import getdoc
from typing import Any

import numpy as np

from permafrost.annotation.pass_identity import describe_explainer
from permafrost.config.explainers import EXPLAINERS, explainer_of_line
from permafrost.core.errors import require
from permafrost_exchange.encoding import require_axes
from permafrost_exchange.map_forms import OTHER
from permafrost_exchange.target_reader import (
    Arrays,
    ReadRequest,
    TargetError,
    TargetForm,
    TargetReader,
)


def _as_stored(kind: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a record's targets as they are stored, with the axes of one explained class."""
    if kind == "map" and len(shape) in (2, 3):
        return (1,) * (4 - len(shape)) + shape
    return (1,) if kind == "target_class" and not shape else shape


class RowReader(TargetReader):
    """Rows of targets, among them maps with the option format.explainer."""

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of a record's targets of each kind, as the files have it."""

    @abstractmethod
    def rows(self, request: ReadRequest) -> Arrays:
        """Read rows [n, 1, *shape] of each kind."""

    def form(self) -> TargetForm:
        shapes, line = self.shapes(), self.config.explainer
        if "map" not in shapes:
            return TargetForm()
        known = "; ".join(
            f"{name}: {(getdoc(cls) or '').partition(chr(10))[0].rstrip('.')}"
            for name, cls in EXPLAINERS.items()
        )
        require(
            str(line).partition(" ")[0] in EXPLAINERS,
            f"format.explainer={line} must say what made the maps, among ({known}), or an explainer of yours with "
            "'plugins=[<its file>.py]'",
        )
        options = explainer_of_line(str(line))
        has_scores = bool({"logits", "probabilities"} & shapes.keys())
        says_class = has_scores or "target_class" in shapes
        require(
            says_class or options.kind == OTHER,
            f"{self.path} has maps, and neither target_class nor logits, which say what they explain",
        )
        stored = list(_as_stored("map", shapes["map"]))
        remark = f"map {list(shapes['map'])} is read as {stored} of a record (class, channel, y, x)"
        return TargetForm(
            explainer=describe_explainer(options)
            | {"target_classes": "top1" if says_class else "sample_gt"},
            has_classes_of_data=not has_scores,
            remarks=(remark + ", whose label it explains" * (not says_class),),
        )

    def checks(self) -> list[Callable[[], Any]]:
        return [self._require_axes]

    def _require_axes(self) -> None:
        shapes = {kind: _as_stored(kind, shape) for kind, shape in self.shapes().items()}
        require_axes(shapes, str(self.path))

    def read(self, request: ReadRequest) -> Arrays:
        arrays = {
            kind: rows.reshape(*rows.shape[:2], *_as_stored(kind, rows.shape[2:]))
            for kind, rows in self.rows(request).items()
        }
        if "map" in arrays and "target_class" not in arrays:
            scores = arrays.get("logits", arrays.get("probabilities"))
            classes = request.labels if scores is None else scores[:, 0].argmax(axis=1)
            require(
                classes is not None and classes.min() >= 0,
                f"{self.path} has maps without target_class and logits, which explain the label of their record, and "
                f"{request.names[0]} or a record near it has not one label; add an array target_class",
                TargetError,
            )
            arrays["target_class"] = np.asarray(classes, np.int32)[:, None, None]
        return arrays
