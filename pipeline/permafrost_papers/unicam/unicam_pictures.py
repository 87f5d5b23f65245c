"""UniCAM maps next to each other: the image, maps of teacher and students, and distilled and residual features.

They are read from the files of the evaluator `unicam` for the first seed's students. The students' own maps are
computed again. If maps of several depths exist, a second figure shows them depth by depth.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from permafrost.config.models import usual_picture
from permafrost.core.errors import first_line, require
from permafrost.evaluation.forward import EvaluatedModel, explained_as, open_split
from permafrost.evaluation.map_colors import overlays
from permafrost.evaluation.results import check_written
from permafrost.evaluation.saved_records import picture_maps
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.geometry import view_images
from permafrost.loading.subset import rows_of_split
from permafrost.models.saved import SavedNetwork
from permafrost.storage.signed_files import damaged
from permafrost.storage.untrusted import FormatError, load_tensors, tensor_metadata
from permafrost.store.reader import Store
from permafrost_papers.unicam.maps import REDUCTIONS
from permafrost_papers.unicam.residual_maps import NAME
from permafrost_report.evaluator_sections import PictureFigure
from permafrost_report.model_selection import read_evaluation
from permafrost_report.pictures import (
    PictureRow,
    class_names,
    picture_grid,
    readable_classes,
)
from permafrost_report.student_results import StudentResult, select_first_seed

_PAIRS = {
    "student_given_baseline": "distilled",
    "student_given_teacher": "beyond teacher",
    "teacher_given_student": "only teacher",
    "baseline_given_student": "lost",
}
_THROUGH_DEPTHS = ("student_given_baseline", "teacher_given_student")
"""Pairs whose maps are shown depth by depth: distilled and residual features."""


class _Maps(NamedTuple):
    """Maps of one student's file."""

    label: str
    tensors: dict[str, Tensor]
    explained: dict[str, Tensor]
    """The explained records, and the student's own maps of them; a given network has none."""

    @property
    def frames(self) -> NDArray[np.uint8]:
        """Frames u8 [n, H, W, 3]."""
        return self.explained["frames"].numpy().transpose(0, 2, 3, 1)

    def row(self, title: str, pair: str, depth: str) -> list[PictureRow]:
        """Return the row of a pair at a depth, with the first available reduction, or [] if there is none."""
        names = (f"{pair}/{depth}/{reduction}/map" for reduction in REDUCTIONS)
        maps = next((self.tensors[name] for name in names if name in self.tensors), None)
        return (
            [] if maps is None else [PictureRow(title, overlays(self.frames, maps.float().numpy()))]
        )


def unicam_figures(
    results: list[StudentResult], teacher: StudentResult | None, store: Store
) -> list[PictureFigure]:
    """Build the figures of each evaluated split, none if the students' files do not exist.

    A network whose maps are of other records than the first one's is left out.
    """
    figures = []
    for split in dict.fromkeys(split for result in results for split in result.metrics):
        students: list[_Maps] = []
        records = None
        for result in select_first_seed(results):
            name = f"{NAME}-{split}.safetensors"
            if not (result.evaluation / name).exists():
                continue
            tensors, header = _read(check_written(result.evaluation, name))
            records = records or header["keys"]
            if header["keys"] == records:
                explained = _explained(result, split, store, header)
                students.append(_Maps(result.label, tensors, explained))
        if students:
            figures.append(_figure(students, split, store))
            if len(_depths(students[0])) > 1:
                figures.append(_depth_figure(students, split, store))
    return figures


def _figure(students: list[_Maps], split: str, store: Store) -> PictureFigure:
    """Build the figure of all pairs, with the mean over depths if there are several."""
    rows = [_image_row(students[0], store)]
    if "teacher_maps" in students[0].explained:
        maps = students[0].explained["teacher_maps"].numpy()
        rows.append(PictureRow("teacher", overlays(students[0].frames, maps)))
    for student in students:
        depths = _depths(student)
        opening = f"{student.label}: "
        if "maps" in student.explained:
            maps = student.explained["maps"].numpy()
            rows.append(PictureRow(student.label, overlays(student.frames, maps)))
            opening = "  "
        for pair, title in _PAIRS.items():
            rows += student.row(opening + title, pair, "mean" if len(depths) > 1 else depths[0])
    several = any(len(_depths(student)) > 1 for student in students)
    mean = ", each as the mean over depths" if several else ""
    has_own = any("maps" in student.explained for student in students)
    intro = "each student's own map of the true class, and below it " if has_own else ""
    return PictureFigure(
        picture_grid(rows),
        f"Split {split}: {intro}the features that a network has beyond its baseline (distilled), beyond the teacher, "
        f"and those that only the teacher has{mean}. Red increases the relevance to the labels.",
    )


def _depth_figure(students: list[_Maps], split: str, store: Store) -> PictureFigure:
    """Build the figure of distilled and residual features, depth by depth."""
    rows = [_image_row(students[0], store)]
    for student in students:
        for pair in _THROUGH_DEPTHS:
            for depth in _depths(student):
                title = f"{student.label}: {_PAIRS[pair]}, depth {depth.removeprefix('depth')}"
                rows += student.row(title, pair, depth)
    return PictureFigure(
        picture_grid(rows),
        f"Split {split}, by depth: features that each network has beyond the baseline (distilled), and those that "
        "only the teacher has. Depth 1 is the average of the last stage, depth 2 the last stage at every position, "
        "and larger depths are earlier stages. Red increases the relevance to the labels.",
    )


def _image_row(student: _Maps, store: Store) -> PictureRow:
    labels = student.explained["labels"].numpy()
    names = class_names(labels, readable_classes(store.manifest.classes))
    return PictureRow("image", list(student.frames), names)


def _depths(student: _Maps) -> list[str]:
    """Depths of the maps, from the shallowest number."""
    depths = {name.split("/")[1] for name in student.tensors} - {"mean"}
    return sorted(depths, key=lambda depth: int(depth.removeprefix("depth")))


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the maps of an evaluation, and the facts about them. Raises DamagedFileError."""
    try:
        header = {name: json.loads(value) for name, value in tensor_metadata(path).items()}
        require(
            {"keys", "frame"} <= header.keys(),
            "it does not say which records its maps are of",
            FormatError,
        )
        return load_tensors(path), header
    except ValueError as error:
        raise damaged(path, first_line(error), "evaluate again") from error


def _explained(
    result: StudentResult, split: str, store: Store, header: dict[str, Any]
) -> dict[str, Tensor]:
    evaluation = read_evaluation(result)
    store = evaluation.open_store(store.folder)
    if result.seed is None:
        return _frames(split, store, header)
    network, trained = SavedNetwork(result.folder / "distill").load(store.manifest.classes)
    trained = trained.in_frame(header["frame"], store)
    dataset = open_split(store, evaluation.open_passes(store), split, trained)
    place = dataset.positions_of(header["keys"])
    positions = [place[key] for key in header["keys"]]
    model = EvaluatedModel(network=network, input_size=trained.input_size)
    return picture_maps(explained_as(model, dataset.passes), dataset, positions)


def _frames(split: str, store: Store, header: dict[str, Any]) -> dict[str, Tensor]:
    """Images and labels of the explained records in the evaluation view, at the size of the store's frames."""
    picture = usual_picture(store.size, store.size).on(header["frame"])
    dataset = StoreDataset(store, rows_of_split(store.index, split), []).in_picture(picture)
    place = dataset.positions_of(header["keys"])
    batch = dataset.__getitems__([place[key] for key in header["keys"]])
    images = view_images(batch, store.size)
    return {"frames": (images * 255).round().to(torch.uint8), "labels": batch.labels}
