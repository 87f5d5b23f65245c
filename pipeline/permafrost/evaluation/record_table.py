"""Table of an evaluation's results with one row per record, over which the metrics are means.

`labels`, `epg` and `iou` of a row have one entry for each of the record's own classes: one entry (-1 if unknown) for
records with one label, all its labels for records with many. `explained`, `teacher_epg` and `map_cosine` have one
entry for each class that the teacher's stored maps explain. In pandas: `table.groupby("group").correct.mean()`,
`table.explode(["labels", "epg", "iou"])`.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
from torch import Tensor

from permafrost.evaluation.predictions import Predictions

RECORDS_NAME = "records.parquet"

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


def record_table(split: str, predictions: Predictions) -> pa.Table:
    """Build a table of RECORDS_SCHEMA in the order of the records."""
    from permafrost.core.labels import (
        classes_of,
        has_many,
        known,
        predict_labels,
    )  # imports torch, which readers of the schema do not need

    many = has_many(predictions.labels)
    own = classes_of(predictions.labels)
    present = own >= 0 if many else own == own
    said = predict_labels(predictions.logits, many=many)
    right = (
        (said == predictions.labels).all(dim=1) if many else said == predictions.labels
    ).tolist()
    columns: dict[str, list[Any]] = {
        "split": [split] * len(predictions.keys),
        "key": list(predictions.keys),
        "group": predictions.groups.tolist(),
        "labels": _lists(own, present),
        "predictions": _classes(classes_of(said)),
        "correct": [
            value if told else None
            for value, told in zip(right, known(predictions.labels).tolist(), strict=True)
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


def _lists(values: Tensor, there: Tensor) -> list[list[Any]]:
    """Values of each row of [n, E] where `there` is true, with nan as None."""
    return [
        [None if value != value else value for value, has in zip(row, has_row, strict=True) if has]
        for row, has_row in zip(values.tolist(), there.tolist(), strict=True)
    ]
