"""Gradients of the loss with respect to a few images, network by network (Han et al. 2023, section 5)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from permafrost.evaluation.results import load_written
from permafrost.report.evaluator_sections import PictureFigure
from permafrost.report.pictures import class_names, readable_classes
from permafrost.report.results import StudentResult, of_first_seed
from permafrost.report.tiles import PictureRow, picture_grid
from permafrost.store.reader import Store

EVALUATOR_NAME = "gradient_alignment"
_DEVIATIONS = 3.0
"""Standard deviations from 0 at which a value of a gradient is black or full."""


def gradient_figures(
    results: Sequence[StudentResult], teacher: StudentResult | None, store: Store
) -> list[PictureFigure]:
    """Build a figure for each split, with the images and a row per network: the teacher and the first seed's students.

    A network whose pictures are of other records than the first one's is left out.
    """
    networks = [teacher] if teacher else []
    networks += of_first_seed(results)
    figures = []
    for split in dict.fromkeys(split for result in networks for split in result.metrics):
        rows: list[PictureRow] = []
        records = None
        for result in networks:
            name = f"{EVALUATOR_NAME}-{split}.safetensors"
            is_there = (result.evaluation / name).exists()
            if EVALUATOR_NAME not in result.metrics.get(split, {}) or not is_there:
                continue
            tensors = load_written(result.evaluation, name)
            if records is None:
                records = tensors["rows"]
                frames = tensors["frames"].permute(0, 2, 3, 1).numpy()
                classes = readable_classes(store.manifest.classes)
                names = class_names(tensors["labels"].numpy(), classes)
                rows.append(PictureRow("image", list(frames), names))
            if torch.equal(tensors["rows"], records):
                rows.append(PictureRow(result.label, gradient_images(tensors["gradients"])))
        if rows:
            figures.append(
                PictureFigure(
                    picture_grid(rows),
                    f"Split {split}: gradients of the loss with respect to the image, of each network (first seed). "
                    "Gray is 0, and each image is scaled by itself: black and full color are three standard "
                    "deviations.",
                )
            )
    return figures


def gradient_images(gradients: Tensor) -> list[NDArray[np.float64]]:
    """Draw gradients [n, 3, H, W] as colors, 0.5 where the gradient is 0, each scaled by its standard deviation."""
    values = gradients.double()
    spread = values.flatten(1).std(dim=1).clamp(min=torch.finfo(torch.float64).tiny)
    scaled = (values / (_DEVIATIONS * spread.view(-1, 1, 1, 1))).clamp(-1, 1)
    return list(((1 + scaled) / 2).permute(0, 2, 3, 1).numpy())
