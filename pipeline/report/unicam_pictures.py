"""UniCAM maps next to each other: the image, maps of teacher and students, and distilled and residual features.

They are read from the files of the evaluator `unicam` for the first seed's students. The students' own maps are
computed again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline.evaluation.forward import EvaluatedModel, open_split
from pipeline.evaluation.pictures import picture_maps
from pipeline.models.saved import load_model
from pipeline.report.evaluator_sections import PictureFigure
from pipeline.report.pictures import class_names, overlays
from pipeline.report.results import StudentResult
from pipeline.report.tiles import PictureRow, picture_grid
from pipeline.store.reader import Store

EVALUATOR_NAME = "unicam"
_PAIRS = {
    "student_given_baseline": "distilled",
    "student_given_teacher": "beyond teacher",
    "teacher_given_student": "only teacher",
    "baseline_given_student": "lost",
}
_REDUCTIONS = ("cam", "hirescam")


def unicam_figures(results: list[StudentResult], store: Store) -> list[PictureFigure]:
    """Build one figure per evaluated split, none if the students' files do not exist."""
    if not results:
        return []
    seed = results[0].seed
    figures = []
    for split in results[0].metrics:
        files = [
            (result, path)
            for result in results
            if result.seed == seed
            and (path := result.evaluation / f"{EVALUATOR_NAME}-{split}.safetensors").exists()
        ]
        if files:
            figures.append(_figure(files, split, store))
    return figures


def _figure(files: list[tuple[StudentResult, Path]], split: str, store: Store) -> PictureFigure:
    rows: list[PictureRow] = []
    for result, path in files:
        tensors, header = _read(path)
        shown = _explained(result, split, store, header)
        frames = shown["frames"].numpy().transpose(0, 2, 3, 1)
        if not rows:
            labels = shown["labels"].numpy()
            rows.append(
                PictureRow("image", list(frames), class_names(labels, store.manifest.classes))
            )
            if "teacher_maps" in shown:
                rows.append(PictureRow("teacher", overlays(frames, shown["teacher_maps"].numpy())))
        rows.append(PictureRow(result.label, overlays(frames, shown["maps"].numpy())))
        rows += _residual_rows(tensors, frames)
    return PictureFigure(
        picture_grid(rows),
        f"Split {split}: each student's own map of the true class, and below it the features it has beyond the "
        "baseline (distilled), beyond the teacher, and those that only the teacher has. Red increases the relevance "
        "to the labels.",
    )


def _residual_rows(tensors: dict[str, Tensor], frames: NDArray[np.uint8]) -> list[PictureRow]:
    """Build one row per pair, at its shallowest depth and with the first available reduction."""
    rows = []
    for pair, title in _PAIRS.items():
        maps = sorted(
            (name for name in tensors if name.startswith(f"{pair}/") and name.endswith("/map")),
            key=lambda name: (name.split("/")[1], _REDUCTIONS.index(name.split("/")[2])),
        )
        if maps:
            rows.append(
                PictureRow(f"  {title}", overlays(frames, tensors[maps[0]].float().numpy()))
            )
    return rows


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        header = {name: json.loads(value) for name, value in file.metadata().items()}
        return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118


def _explained(
    result: StudentResult, split: str, store: Store, header: dict[str, Any]
) -> dict[str, Tensor]:
    network, trained = load_model(result.folder / "distill")
    names = trained.teachers or tuple(folder.name for folder in store.pass_folders()[:1])
    dataset = open_split(store, store.open_passes(names), split, trained)
    place = dataset.positions_of(header["keys"])
    positions = [place[key] for key in header["keys"]]
    model = EvaluatedModel(network=network, input_size=trained.input_size)
    return picture_maps(model, dataset, positions, header["frame"])
