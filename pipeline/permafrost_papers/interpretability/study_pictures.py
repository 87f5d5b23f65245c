"""Pictures of the study: units with their concepts, and gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from permafrost.evaluation.results import load_written
from permafrost.store.reader import Store
from permafrost_papers.interpretability import dissection, gradient_alignment
from permafrost_report.evaluator_sections import PictureFigure
from permafrost_report.pictures import (
    PictureRow,
    class_names,
    draw_outline,
    picture_grid,
    readable_classes,
)
from permafrost_report.student_results import StudentResult, select_first_seed

_UNITS = 6


def dissection_figures(
    results: Sequence[StudentResult], teacher: StudentResult | None, store: Store
) -> list[PictureFigure]:
    """Build a figure with one row per network: the teacher, if it was evaluated, and the first seed's students."""
    networks = [*([teacher] if teacher else []), *select_first_seed(results)]
    rows = []
    for result in networks:
        for split, metrics in result.metrics.items():
            name = f"{dissection.NAME}-{split}.safetensors"
            if dissection.NAME in metrics and (result.evaluation / name).exists():
                tensors = load_written(result.evaluation, name)
                rows.append(
                    _row(result.label, tensors, metrics[dissection.NAME]["top_units"][:_UNITS])
                )
                break  # results do not depend on the split
    if not rows:
        return []
    return [
        PictureFigure(
            picture_grid(rows),
            "The best units of each network (first seed): the image that activates each unit most, with the active "
            "region outlined in green, and the concept with the largest overlap, with its IoU over the whole set.",
        )
    ]


def _row(
    label: str, tensors: Mapping[str, Tensor], units: Sequence[dict[str, object]]
) -> PictureRow:
    frames = tensors["shown_frames"][: len(units), 0].permute(0, 2, 3, 1).numpy()
    masks = tensors["shown_masks"][: len(units), 0].numpy().astype(bool)
    return PictureRow(
        label,
        [draw_outline(frame, mask) for frame, mask in zip(frames, masks, strict=True)],
        [f"{unit['concept']} {unit['iou']:.2f}" for unit in units],
    )


# ---- gradient pictures -----------------------------------------------------------------------------


_DEVIATIONS = 3.0
"""Standard deviations from 0 at which a value of a gradient is black or full."""


def gradient_figures(
    results: Sequence[StudentResult], teacher: StudentResult | None, store: Store
) -> list[PictureFigure]:
    """Build a figure for each split, with the images and a row per network: the teacher and the first seed's students.

    A network whose pictures are of other records than the first one's is left out.
    """
    networks = [*([teacher] if teacher else []), *select_first_seed(results)]
    figures = []
    for split in dict.fromkeys(split for result in networks for split in result.metrics):
        rows: list[PictureRow] = []
        records = None
        for result in networks:
            name = f"{gradient_alignment.NAME}-{split}.safetensors"
            is_there = (result.evaluation / name).exists()
            if gradient_alignment.NAME not in result.metrics.get(split, {}) or not is_there:
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
