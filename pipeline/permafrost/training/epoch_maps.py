"""Pictures of maps during a training (`curve.maps`): image, teacher's map and student's map of the same records."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from permafrost.core.errors import ConfigError
from permafrost.core.generators import kept_generators
from permafrost.core.progress import log_once
from permafrost.evaluation.forward import EvaluatedModel
from permafrost.evaluation.map_colors import overlays
from permafrost.evaluation.saved_records import picture_maps
from permafrost.loading.dataset import StoreDataset
from permafrost.models.classifier import ModelOutput, eval_mode
from permafrost.models.explanations import Explainer
from permafrost.runs.trackers import Tracker
from permafrost.storage.files import file_at
from permafrost.store.image_decoding import png_of
from permafrost.training.state import Training

logger = logging.getLogger("permafrost.training")

_WIDTH = 112
"""Width in pixels up to which an image is enlarged."""


@dataclass(frozen=True, kw_only=True)
class _Student(EvaluatedModel):
    """Network in training, which is explained as its loss explains it."""

    explain: Explainer

    def maps(self, output: ModelOutput, target_class: Tensor) -> Tensor:
        try:
            return self.explain(self.network, output, target_class)
        except ConfigError:  # a training on labels has the default explainer, whatever its network
            return super().maps(output, target_class)


def draw_maps(
    dataset: StoreDataset,
    training: Training,
    input_size: tuple[int, int],
    tracker: Tracker,
    folder: Path,
) -> None:
    """Draw the maps of a network for its tracker and as maps/epoch-<n>.png, and leave the network as it was.

    Args:
        dataset: Records to draw.
        training: State after an epoch.
        input_size: (height, width) of the network's input.
        tracker: Tracker that shows the picture.
        folder: Folder of the training.
    """
    student = _Student(network=training.network, input_size=input_size, explain=training.explain)
    try:
        with eval_mode(training.network), kept_generators():
            tensors = picture_maps(student, dataset, list(range(len(dataset))))
    except ConfigError as error:  # the network has no maps
        log_once(logger, logging.WARNING, f"curve.maps draws nothing: {error}")
        return
    pixels = side_by_side({name: tensor.numpy() for name, tensor in tensors.items()})
    tracker.add_picture("maps", pixels, training.global_step)
    file_at(folder / "maps" / f"epoch-{training.epoch:04d}.png").write(
        png_of(Image.fromarray(pixels))
    )


def side_by_side(arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.uint8]:
    """Return one picture [H, W, 3] with a row for each record: its image, the teacher's map if there is one, its map.

    Args:
        arrays: Arrays of `explained_pictures`.
    """
    frames = arrays["frames"].transpose(0, 2, 3, 1)
    maps = [arrays[name] for name in ("teacher_maps", "maps") if name in arrays]
    columns = [list(frames / 255), *(overlays(frames, each) for each in maps)]
    table = np.concatenate([np.concatenate(column) for column in columns], axis=1)
    factor = max(1, _WIDTH // frames.shape[2])
    return (table * 255).round().astype(np.uint8).repeat(factor, axis=0).repeat(factor, axis=1)
