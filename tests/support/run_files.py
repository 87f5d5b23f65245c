"""Files of runs as the stages write them, made by hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from permafrost.config.training import Logger
from permafrost.evaluation.saved_records import RECORDS_NAME, RECORDS_SCHEMA
from permafrost.runs.trackers import TrackedRun
from permafrost.storage.files import file_at
from permafrost.storage.signed_files import SIGNATURE, read_json, write_json, write_yaml
from permafrost.training.metric_log import METRIC_LOG_NAME, MetricWriter


def write_config(path: Path, text: str) -> None:
    """Write YAML text as a config."""
    write_yaml(path, text)


def write_metrics(folder: Path, splits: Mapping[str, Any]) -> None:
    """Write the metrics.json of an evaluation with these metrics by split."""
    write_json(folder / "metrics.json", {"evaluators": {}, "splits": splits, "written": {}})


def tracked_run(folder: Path, kind: Logger = "tensorboard") -> TrackedRun:
    """Return the tracker's run of a training in a folder."""
    return TrackedRun(kind, "demo/students/kd-seed0", folder)


def write_records(folder: Path, split: str, rows: Iterable[tuple[int, int, int | None]]) -> None:
    """Write the table of records of an evaluation from labels, predictions and those of the teacher."""
    columns: dict[str, list[Any]] = {name: [] for name in RECORDS_SCHEMA.names}
    for number, (label, predicted, taught) in enumerate(rows):
        row = {
            **{name: [] for name in RECORDS_SCHEMA.names},
            "split": split,
            "key": f"{number:06d}",
            "group": -1,
            "labels": [label],
            "predictions": [predicted],
            "correct": label == predicted if label >= 0 else None,
            "teacher_predictions": None if taught is None else [taught],
        }
        for name, values in columns.items():
            values.append(row[name])
    pq.write_table(pa.table(columns, schema=RECORDS_SCHEMA), folder / RECORDS_NAME)
    change_signed(
        folder / "metrics.json",
        {"written": {RECORDS_NAME: file_at(folder / RECORDS_NAME).sha256()}},
    )


def write_lines(folder: Path, lines: Iterable[Mapping[str, float]]) -> None:
    """Write the metrics.jsonl of a training."""
    (folder / METRIC_LOG_NAME).unlink(missing_ok=True)
    with MetricWriter(tracked_run(folder), 0) as writer:
        for line in lines:
            writer.write(dict(line))


def write_table(run: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the sweep.json of a sweep with these rows."""
    write_json(run / "sweep.json", {"runs": list(rows)})


def read_signed(path: Path) -> dict[str, Any]:
    """Read a JSON file that carries its digest, and check it."""
    return read_json(path, "")


def change_signed(path: Path, change: Mapping[str, Any]) -> None:
    """Replace entries of a JSON file that carries its digest, and sign it anew."""
    values = {**read_signed(path), **change}
    assert SIGNATURE not in values
    write_json(path, values)
