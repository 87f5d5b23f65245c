"""The units of each network that detect a concept best: the image that excites each most, and where it fires there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.report.evaluator_sections import Figure
from pipeline.report.pictures import PictureRow, draw_outline, picture_grid
from pipeline.report.results import StudentResult

EVALUATOR_NAME = "dissection"
_UNITS = 6


def dissection_figures(
    results: Sequence[StudentResult], teacher: StudentResult | None
) -> list[Figure]:
    """A row a network: the teacher where it was evaluated itself, and the first seed's students."""
    networks = [(teacher, "evaluate-teacher")] if teacher else []
    networks += [(result, "evaluate") for result in results if result.seed == results[0].seed]
    rows = []
    for result, folder in networks:
        for split, metrics in result.metrics.items():
            path = result.folder / folder / f"{EVALUATOR_NAME}-{split}.safetensors"
            if EVALUATOR_NAME in metrics and path.exists():
                rows.append(_row(result.label, path, metrics[EVALUATOR_NAME]["top_units"][:_UNITS]))
                break  # no split is looked at, so all say the same
    if not rows:
        return []
    return [
        Figure(
            picture_grid(rows, side=1.5),
            "For each network its best units: an image, where the unit fires there, and the concept it detects",
            "The best units of each network (first seed): the image that excites each most, green where it fires, "
            "and the concept that it overlaps most, with the IoU over the whole set.",
            is_picture=True,
        )
    ]


def _row(label: str, path: Path, units: Sequence[dict[str, object]]) -> PictureRow:
    from safetensors.torch import load_file

    tensors = load_file(path)
    frames = tensors["shown_frames"][: len(units), 0].permute(0, 2, 3, 1).numpy()
    masks = tensors["shown_masks"][: len(units), 0].numpy().astype(bool)
    return PictureRow(
        label,
        [draw_outline(frame, mask) for frame, mask in zip(frames, masks, strict=True)],
        [f"{unit['concept']} {unit['iou']:.2f}" for unit in units],
    )
