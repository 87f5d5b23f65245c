"""Files of an evaluation about single records: a table of all, and the maps of a few.

Lists of classes ascend. `epg`, `iou`, `teacher_epg` and `map_cosine` of a row have one entry for each of its `classes`.
In pandas: `table.groupby("group").correct.mean()`, `table.explode(["classes", "epg", "iou", "teacher_epg"])`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from permafrost.core.batches import Batch, StoredTargets
from permafrost.core.label_forms import (
    classes_of,
    has_many,
    known_cells,
    known_mask,
    predict_labels,
)
from permafrost.evaluation.forward import (
    EvaluatedModel,
    Predictions,
    attribution_of,
    images_at,
    maps_of,
)
from permafrost.evaluation.map_colors import deepest_features, stored_features
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.geometry import view_images, view_maps
from permafrost.loading.transfer import move_batch
from permafrost.models.explanations import forward_to_explain, picture_of

RECORDS_NAME = "records.parquet"
"""File with a row for each evaluated record."""

RECORDS_SCHEMA = pa.schema(
    {
        "split": pa.string(),
        "key": pa.string(),
        "group": pa.int32(),  # -1 where unknown
        "labels": pa.list_(pa.int32()),  # -1 for an unknown single label
        "unknown": pa.list_(pa.int32()),  # of many labels those of which nothing is known
        "predictions": pa.list_(pa.int32()),  # the top-1 class, or all from their thresholds on
        "correct": pa.bool_(),  # predictions equal the known labels; null if nothing is known
        "logits": pa.list_(pa.float32()),  # of all classes; null with one label per record
        "teacher_predictions": pa.list_(pa.int32()),  # null without a teacher
        "target_classes": pa.list_(pa.int32()),  # classes of the teacher's stored maps
        "classes": pa.list_(pa.int32()),  # the labels and the target classes
        "epg": pa.list_(pa.float32()),  # of each of `classes`; null without a region, or no label
        "iou": pa.list_(pa.float32()),
        "teacher_epg": pa.list_(pa.float32()),
        "map_cosine": pa.list_(pa.float32()),  # null where either map is zero
    }
)
"""Columns of that file."""


def record_table(split: str, predictions: Predictions) -> pa.Table:
    """Build a table of RECORDS_SCHEMA in the order of the records."""
    labels = predictions.labels
    many, count = has_many(labels), len(predictions.keys)
    known = known_cells(labels, predictions.logits.shape[1])
    predicted = predict_labels(
        predictions.logits, many=many, threshold=predictions.thresholds.model
    )
    right = ((predicted == labels) | ~known).all(dim=1) if many else predicted == labels
    label_classes = classes_of(labels)
    explained = (
        label_classes[:, :0] if predictions.target_class is None else predictions.target_class
    )
    columns: dict[str, Any] = {
        "split": [split] * count,
        "key": list(predictions.keys),
        "group": predictions.groups.tolist(),
        "labels": _classes(label_classes, padding=many),
        "unknown": _classes(classes_of((~known).float())) if many else [[]] * count,
        "predictions": _classes(classes_of(predicted)),
        "correct": [
            value if told else None
            for value, told in zip(right.tolist(), known_mask(labels).tolist(), strict=True)
        ],
        "logits": predictions.logits.tolist() if many else [None] * count,
        "teacher_predictions": [None] * count,
        "target_classes": _classes(explained),
    }
    if predictions.teacher_logits is not None:
        of_teacher = predict_labels(
            predictions.teacher_logits, many=many, threshold=predictions.thresholds.teacher
        )
        lacking = [None] * (count - len(of_teacher))
        columns["teacher_predictions"] = [*_classes(classes_of(of_teacher)), *lacking]
    columns["classes"] = [
        sorted({*of_label, *of_teacher})
        for of_label, of_teacher in zip(columns["labels"], columns["target_classes"], strict=True)
    ]
    columns |= {
        name: _aligned(columns["classes"], classes, values)
        for name, classes, values in (
            ("epg", label_classes, predictions.epg),
            ("iou", label_classes, predictions.iou),
            ("teacher_epg", explained, predictions.teacher_epg),
            ("map_cosine", explained, predictions.map_cosine),
        )
    }
    return pa.table(columns, schema=RECORDS_SCHEMA)


def _classes(classes: Tensor, *, padding: bool = True) -> list[list[int]]:
    """Return rows of classes [n, E] in ascending order, without their padding."""
    return [sorted(label for label in row if label >= 0 or not padding) for row in classes.tolist()]


def _aligned(
    orders: list[list[int]], classes: Tensor, values: Tensor | None
) -> list[list[float | None]]:
    """Return the values [n, E] of classes [n, E] in the given order of each record, None for nan or none."""
    if values is None:
        return [[None] * len(row) for row in orders]
    rows = zip(orders, classes.tolist(), values.tolist(), strict=True)
    tables = ((names, dict(zip(labels, numbers, strict=True))) for names, labels, numbers in rows)
    return [
        [None if (value := table.get(name)) != value else value for name in names]
        for names, table in tables
    ]


# ---- pictures --------------------------------------------------------------------------------------


PICTURES_NAME = "pictures.safetensors"
"""File of the images and maps that an evaluation keeps for a report."""


@torch.no_grad()
def picture_maps(
    model: EvaluatedModel, dataset: StoreDataset, positions: list[int]
) -> dict[str, Tensor]:
    """Run `explained_pictures` for the label of each record, in the picture of the data set.

    If a record has many labels, the class is the first that the teacher explains, or the lowest if it explains none.

    Args:
        model: Evaluated model.
        dataset: Records of the split.
        positions: Positions of the records.
    """
    batch = move_batch(dataset.__getitems__(positions), model.device)
    return explained_pictures(model, batch, _pictured_classes(batch))


@torch.no_grad()
def picture_features(
    model: EvaluatedModel, dataset: StoreDataset, positions: list[int]
) -> dict[str, Tensor]:
    """Compute the model's features, and read those of the deepest stage that its teacher's pass stores.

    Args:
        model: Evaluated model.
        dataset: Records of the split.
        positions: Positions of the records.

    Returns:
        Tensors [n, C, h, w] on the CPU, `features` and `teacher_features`, each on its own grid; empty if either
        has none.
    """
    field = next(map(deepest_features, dataset.passes), None)
    if field is None or model.network.no_grid:
        return {}
    rows = dataset.rows_at(np.asarray(positions))
    records = StoreDataset(dataset.store, rows, dataset.passes[:1], output=field)
    batch = move_batch(
        records.in_picture(dataset.picture).__getitems__(range(len(rows))), model.device
    )
    return {
        "features": model.network(view_images(batch, model.input_size)).features.cpu(),
        "teacher_features": stored_features(batch, field).cpu(),
    }


@torch.no_grad()
def explained_pictures(model: EvaluatedModel, batch: Batch, classes: Tensor) -> dict[str, Tensor]:
    """Compute images of the batch with the model's and the teacher's predictions and maps, on the CPU.

    The tensors by name are:

    - frames: u8 [n, 3, H, W], in the batch's view;
    - labels and predictions: in the form of the labels;
    - maps: f32 [n, h, w], for a B-cos network its contributions, and a single zero for one without a grid;
    - classes: i64 [n], the class of each map;
    - colors: for B-cos networks only, the weights as RGBA, u8 [n, h, w, 4];
    - teacher_predictions, teacher_maps and teacher_colors: the same for the stored targets, if there are maps: those of
      the class, or of the class that the teacher explains first, which a pass without logits says to predict;
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
        "predictions": predict_labels(
            output.logits.cpu(), many=many, threshold=model.thresholds.model
        ),
        **_picture_maps(
            output.features.new_zeros(len(images), 1, 1, 1, 1)
            if model.network.no_grid
            else maps_of(model, output, classes),
            batch,
        ),
        "classes": torch.where(classes < 0, output.logits.argmax(dim=1), classes),
    }
    if batch.targets and batch.targets[0].maps is not None:
        chosen, explained = select_class_maps(batch.targets[0], classes)
        _, maps = chosen.require_maps()  # on their own grid
        shown = _picture_maps(view_maps(batch, chosen, (maps.shape[-2], maps.shape[-1])), batch)
        pictures |= {f"teacher_{name}": tensor for name, tensor in shown.items()}
        pictures["teacher_classes"] = explained
        pictures["teacher_predictions"] = (
            explained
            if chosen.logits is None
            else predict_labels(chosen.logits, many=many, threshold=model.thresholds.teacher)
        )
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
        target_class=explained.gather(1, place),
    )
    return one, explained.gather(1, place)[:, 0]


def _picture_maps(maps: Tensor, batch: Batch) -> dict[str, Tensor]:
    shown = {"maps": attribution_of(maps, batch)}
    colors = picture_of(maps, images_at(maps, batch))
    return shown if colors is None else shown | {"colors": colors}


def _pictured_classes(batch: Batch) -> Tensor:
    """Classes [n] to explain, negative where unknown."""
    label_classes = classes_of(batch.labels)[:, 0]
    explained = batch.targets[0].target_class if batch.targets else None
    if explained is None or not has_many(batch.labels):
        return label_classes
    return torch.where(explained[:, 0] >= 0, explained[:, 0], label_classes)
