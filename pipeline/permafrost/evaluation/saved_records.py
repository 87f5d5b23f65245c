"""Files of an evaluation about single records: a table of all, and the maps of a few.

`labels`, `epg` and `iou` of a row have one entry for each of the record's own classes: one entry (-1 if unknown) for
records with one label, all its labels for records with many. `explained`, `teacher_epg` and `map_cosine` have one
entry for each class that the teacher's stored maps explain. In pandas: `table.groupby("group").correct.mean()`,
`table.explode(["labels", "epg", "iou"])`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from permafrost.core.batches import Batch, StoredTargets, require_logits
from permafrost.core.label_forms import classes_of, has_many, known_mask, predict_labels
from permafrost.evaluation.forward import (
    EvaluatedModel,
    Predictions,
    attribution_of,
    images_at,
    maps_of,
)
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.geometry import evaluation_view, view_images, view_maps
from permafrost.loading.transfer import move_batch
from permafrost.models.explanations import forward_to_explain, picture_of

RECORDS_NAME = "records.parquet"
"""File with a row for each evaluated record."""

RECORDS_SCHEMA = pa.schema(
    {
        "split": pa.string(),
        "key": pa.string(),
        "group": pa.int32(),  # -1 where unknown
        "labels": pa.list_(pa.int32()),
        "predictions": pa.list_(pa.int32()),  # the top-1 class, or all positive classes
        "correct": pa.bool_(),  # predictions equal the labels; null where they are unknown
        "epg": pa.list_(pa.float32()),  # null without a region
        "iou": pa.list_(pa.float32()),
        "teacher_predictions": pa.list_(pa.int32()),  # null without a teacher
        "explained": pa.list_(pa.int32()),
        "teacher_epg": pa.list_(pa.float32()),
        "map_cosine": pa.list_(pa.float32()),  # null where either map is zero
    }
)
"""Columns of that file."""


def record_table(split: str, predictions: Predictions) -> pa.Table:
    """Build a table of RECORDS_SCHEMA in the order of the records."""
    many = has_many(predictions.labels)
    label_classes = classes_of(predictions.labels)
    present = label_classes >= 0 if many else label_classes == label_classes
    predicted = predict_labels(predictions.logits, many=many)
    right = (
        (predicted == predictions.labels).all(dim=1) if many else predicted == predictions.labels
    ).tolist()
    columns: dict[str, list[Any]] = {
        "split": [split] * len(predictions.keys),
        "key": list(predictions.keys),
        "group": predictions.groups.tolist(),
        "labels": _lists(label_classes, present),
        "predictions": _classes(classes_of(predicted)),
        "correct": [
            value if told else None
            for value, told in zip(right, known_mask(predictions.labels).tolist(), strict=True)
        ],
        "epg": _lists(predictions.epg, present),
        "iou": _lists(predictions.iou, present),
    }
    nothing: list[Any] = [None] * len(predictions.keys)
    columns["teacher_predictions"] = nothing
    if predictions.teacher_logits is not None:
        teacher_said = predict_labels(predictions.teacher_logits, many=many)
        columns["teacher_predictions"] = _classes(classes_of(teacher_said))
    for name in ("explained", "teacher_epg", "map_cosine"):
        columns[name] = [[] for _ in predictions.keys]
    if predictions.explained_class is not None:
        explained = predictions.explained_class >= 0
        columns["explained"] = _classes(predictions.explained_class)
        for name, values in (
            ("teacher_epg", predictions.teacher_epg),
            ("map_cosine", predictions.map_cosine),
        ):
            if values is None:
                columns[name] = [[None] * int(count) for count in explained.sum(dim=1)]
            else:
                columns[name] = _lists(values, explained)
    return pa.table(columns, schema=RECORDS_SCHEMA)


def _classes(classes: Tensor) -> list[list[Any]]:
    """Rows of classes [n, E] without padding."""
    return _lists(classes, classes >= 0)


def _lists(values: Tensor, valid: Tensor) -> list[list[Any]]:
    """Values of each row of [n, E] where `valid` is true, with nan as None."""
    return [
        [None if value != value else value for value, has in zip(row, has_row, strict=True) if has]
        for row, has_row in zip(values.tolist(), valid.tolist(), strict=True)
    ]


# ---- pictures --------------------------------------------------------------------------------------


PICTURES_NAME = "pictures.safetensors"
"""File of the images and maps that an evaluation keeps for a report."""


@torch.no_grad()
def picture_maps(
    model: EvaluatedModel, dataset: StoreDataset, positions: list[int], frame: str = "auto"
) -> dict[str, Tensor]:
    """Run `explained_pictures` for the label of each record, in the evaluation view.

    If a record has many labels, the class is the first that the teacher explains, or the lowest if it explains none.

    Args:
        model: Evaluated model.
        dataset: Records of the split.
        positions: Positions of the records.
        frame: Value of evaluate.frame.
    """
    batch = move_batch(dataset.__getitems__(positions), model.device)
    batch = evaluation_view(batch, frame, model.input_size)
    return explained_pictures(model, batch, _pictured_classes(batch))


@torch.no_grad()
def explained_pictures(model: EvaluatedModel, batch: Batch, classes: Tensor) -> dict[str, Tensor]:
    """Compute images of the batch with the model's and the teacher's predictions and maps, on the CPU.

    The tensors by name are:

    - frames: u8 [n, 3, H, W], in the batch's view;
    - labels and predictions: in the form of the labels;
    - maps: f32 [n, h, w], for a B-cos network its contributions;
    - colors: for B-cos networks only, the weights as RGBA, u8 [n, h, w, 4];
    - teacher_predictions, teacher_maps and teacher_colors: the same for the stored targets, if there are maps: those of
      the class, or of the class that the teacher explains first;
    - teacher_classes: i64 [n], the class of each stored map.

    Args:
        model: Evaluated model.
        batch: Batch in its view, on the model's device.
        classes: i64 [n], classes that the model explains. A negative value selects the predicted class.
    """
    images = view_images(batch, model.input_size)
    output = forward_to_explain(model.network, images)
    many = has_many(batch.labels)
    pictures = {
        "frames": (images * 255).round().to(torch.uint8),
        "labels": batch.labels,
        "predictions": predict_labels(output.logits, many=many),
        **_picture_maps(maps_of(model, output, classes), batch),
    }
    if batch.targets and batch.targets[0].maps is not None:
        chosen, explained = select_class_maps(batch.targets[0], classes)
        shown = _picture_maps(stored_maps(batch, chosen), batch)
        pictures |= {f"teacher_{name}": tensor for name, tensor in shown.items()}
        pictures["teacher_classes"] = explained
        pictures["teacher_predictions"] = predict_labels(require_logits(chosen.logits), many=many)
    return {name: tensor.cpu().contiguous() for name, tensor in pictures.items()}


def select_class_maps(stored: StoredTargets, classes: Tensor) -> tuple[StoredTargets, Tensor]:
    """Return the stored targets reduced to one map per record, and the class [n] of that map.

    Args:
        stored: Targets with the maps of E classes per record.
        classes: i64 [n]. The map explains the record's class if the teacher has it; otherwise it is the first one.
    """
    explained, maps = stored.require_maps()
    place = (explained == classes[:, None]).int().argmax(dim=1, keepdim=True)
    one = replace(
        stored,
        maps=maps.take_along_dim(place[:, :, None, None, None], dim=1),
        explained_class=explained.gather(1, place),
    )
    return one, explained.gather(1, place)[:, 0]


def stored_maps(batch: Batch, stored: StoredTargets) -> Tensor:
    """Warp the stored maps to the batch's view, on their own grid: f32 [B, E, A, h, w]."""
    _, maps = stored.require_maps()
    return view_maps(batch, stored, (maps.shape[-2], maps.shape[-1]))


def _picture_maps(maps: Tensor, batch: Batch) -> dict[str, Tensor]:
    shown = {"maps": attribution_of(maps, batch)}
    colors = picture_of(maps, images_at(maps, batch))
    return shown if colors is None else shown | {"colors": colors}


def _pictured_classes(batch: Batch) -> Tensor:
    """Classes [n] to explain, negative where unknown."""
    label_classes = classes_of(batch.labels)[:, 0]
    explained = batch.targets[0].explained_class if batch.targets else None
    if explained is None or not has_many(batch.labels):
        return label_classes
    return torch.where(explained[:, 0] >= 0, explained[:, 0], label_classes)
