"""Pictures of the best concept detectors of each network: the image that activates each unit most, with its mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from permafrost.evaluation.results import load_written
from permafrost.report.evaluator_sections import PictureFigure
from permafrost.report.pictures import draw_outline
from permafrost.report.results import StudentResult, of_first_seed
from permafrost.report.tiles import PictureRow, picture_grid
from permafrost.store.reader import Store

EVALUATOR_NAME = "dissection"
_UNITS = 6


def dissection_figures(
    results: Sequence[StudentResult], teacher: StudentResult | None, store: Store
) -> list[PictureFigure]:
    """Build a figure with one row per network: the teacher, if it was evaluated, and the first seed's students."""
    networks = [teacher] if teacher else []
    networks += of_first_seed(results)
    rows = []
    for result in networks:
        for split, metrics in result.metrics.items():
            name = f"{EVALUATOR_NAME}-{split}.safetensors"
            if EVALUATOR_NAME in metrics and (result.evaluation / name).exists():
                tensors = load_written(result.evaluation, name)
                units = metrics[EVALUATOR_NAME]["top_units"][:_UNITS]
                rows.append(_row(result.label, tensors, units))
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
