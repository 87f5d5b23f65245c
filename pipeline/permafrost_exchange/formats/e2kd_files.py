"""Reader of the frozen explanations of e2KD's published code (m-parchami/GoodTeachersExplain).

    <number>.pt     {"output" or "ouptut": logits [K], "weight": B-cos weights [6, h, w]}
                    {"output": logits [B, K], "grad_cam": maps [B, 1, h, w]} of B teachers

The number counts the images of the original training set.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from permafrost.config.explainers import EXPLAINERS
from permafrost.core.errors import require
from permafrost.storage.files import iter_lines
from permafrost_exchange.target_reader import (
    Arrays,
    FileReader,
    ListedTargets,
    ReadRequest,
    TargetError,
    TargetForm,
    load_pickled,
)

_LOGITS = ("output", "ouptut")
_EXPLAINERS = {"weight": "bcos_weights", "grad_cam": "gradcam"}


class E2KDReader(FileReader):
    """Logits, and the map of the class with the largest one."""

    suffix = ".pt"

    def files(self) -> Iterator[Path]:
        yield from super().files()
        if self.config.index_map is not None:
            yield Path(self.config.index_map)

    def record_files(self) -> Iterator[Path]:
        return super().files()

    def listing(self) -> Iterator[ListedTargets]:
        index_map = self.config.index_map
        lines = (
            []
            if index_map is None
            else iter_lines(Path(index_map), f"format.index_map={index_map}")
        )
        positions = [position for line in lines for position in line.split()]
        for part in super().listing():
            if odd := [
                name
                for name in part.names
                if not name.isdigit() or (positions and int(name) >= len(positions))
            ]:
                raise TargetError(
                    f"{self.path}: {odd[0]}{self.suffix} is not the number of an image; name the folder of one split, "
                    "such as fit"
                )
            names = [positions[int(name)] for name in part.names] if positions else part.names
            yield ListedTargets(names, part.places)

    def form(self) -> TargetForm:
        first = next(self.record_files())
        content = load_pickled(first)
        kind = next(
            (key for key in _EXPLAINERS if isinstance(content, dict) and key in content), None
        )
        if kind is None:
            return TargetForm()
        if (name := _EXPLAINERS[kind]) not in EXPLAINERS:
            raise TargetError(
                f"{first} has maps of explainer={name}, which needs the part of this project for B-cos networks"
            )
        return TargetForm(explainer={"kind": name, "target_classes": "top1"})

    def parse(self, content: Any, request: ReadRequest, row: int) -> Arrays:
        require(isinstance(content, dict), "it has no mapping", ValueError)
        if (name := next((name for name in _LOGITS if name in content), None)) is None:
            raise ValueError(f"it has {', '.join(content)}, and no output")
        logits = self._one_teacher(np.atleast_2d(content[name]))
        arrays = {"logits": logits[None]}
        if (kind := next((kind for kind in _EXPLAINERS if kind in content), None)) is not None:
            maps = np.asarray(content[kind])
            maps = maps if maps.ndim == 3 else self._one_teacher(maps)
            arrays["map"] = maps[None, None]
            arrays["target_class"] = np.array([[logits.argmax()]], np.int32)
        return arrays

    def _one_teacher(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return the values of one teacher."""
        member = self.config.member
        require(
            len(values) <= 1 or member is not None,
            f"it has those of {len(values)} teachers; set format.member= to the number of one, from 0",
            ValueError,
        )
        require(
            (member or 0) < len(values),
            f"format.member={member}: it has those of {len(values)} teachers",
            ValueError,
        )
        one: NDArray[Any] = values[member or 0]
        return one
