"""Judge a finished student: accuracy (of many labels F1), agreement with its teacher, and where it looks.

    python -m stages.evaluate experiment=demo
    python -m stages.evaluate store.path=stores/demo run=my-student evaluate.splits=[test]
    python -m stages.evaluate store.path=stores/other-images run=transferred evaluate.store=stores/teachers-own

Reads   runs/<run>/distill/ and <store.path>; the teacher's side comes from the store
Writes  runs/<run>/evaluate/: metrics.json, records.parquet, pictures.safetensors, config.yaml
Again   a finished evaluation is left as it is
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.commandline import main
from pipeline.config import require
from pipeline.runs import RUNS, load_model, open_run, read_description
from pipeline.selection import HOLDOUT
from pipeline.store.files import sha256_file, write_atomically
from pipeline.store.manifest import StoreMismatchError
from pipeline.store.reader import Store
from pipeline.tables import fit_network, require_images

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.config import EvaluateConfig
    from pipeline.store.reader import TeacherPass

METRICS_NAME = "metrics.json"
PICTURES_NAME = "pictures.safetensors"


@dataclass(frozen=True, kw_only=True)
class EvaluateResult:
    """Metrics by split; fractions in [0, 1]."""

    metrics: str
    splits: dict[str, dict[str, Any]]


def run(config: EvaluateConfig, name: str = "evaluate") -> EvaluateResult:
    """Judge the student on each split.

    name  of the folder to write in the run's: evaluations of other splits lie side by side
    """
    student = RUNS / config.run / "distill"
    trained = read_description(student)
    store, passes = open_judged(config, config.store.teacher or trained.teachers)
    if not (config.store.teacher or trained.teachers):
        passes = [teacher for teacher in passes if teacher.num_classes == trained.num_classes]
    inputs = {
        "student": sha256_file(student / "model.safetensors"),
        "store": store.manifest.fingerprint,
        **{f"teacher {teacher.name}": teacher.manifest.fingerprint for teacher in passes},
    }
    folder = open_run(name, config.run, config, inputs)
    path = folder / METRICS_NAME
    if not path.exists():
        splits = _judge(config, store, passes, student, folder)
        write_atomically(path, json.dumps({"splits": splits}, indent=1).encode())
    return EvaluateResult(metrics=str(path), splits=json.loads(path.read_text())["splits"])


def open_judged(config: EvaluateConfig, names: Sequence[str]) -> tuple[Store, list[TeacherPass]]:
    """The store that students are judged on, and what its teachers say there.

    names  of the passes in store.path that the student learned from; for a student of labels the store's
           only pass, if it has just one. In evaluate.store it is the passes of the same teachers.
    """
    taught = Store(Path(config.store.path))
    passes = []
    if names or len(taught.pass_folders()) == 1:
        passes = taught.open_passes(names)
    if config.evaluate.store is None:
        return taught, passes
    require(
        HOLDOUT not in config.evaluate.splits,
        f"evaluate.splits={HOLDOUT} are records of the store that the student learned from, and "
        f"evaluate.store={config.evaluate.store} is another; name a split of that one",
    )
    judged = Store(Path(config.evaluate.store))
    return judged, [judged.canonical_of(teacher) for teacher in passes]


def _judge(
    config: EvaluateConfig, store: Store, passes: list[TeacherPass], student: Path, folder: Path
) -> dict[str, dict[str, Any]]:
    import pyarrow as pa
    import torch
    from safetensors.torch import save

    from pipeline.evaluation.judge import Subject, judge_records, open_split
    from pipeline.evaluation.judged import metrics_of
    from pipeline.evaluation.pictures import picture_maps
    from pipeline.evaluation.record_table import RECORDS_NAME, record_table
    from pipeline.evaluation.shift import shift_curves
    from pipeline.store.index import write_table
    from pipeline.training import resolve_device

    model, trained = load_model(student)
    if passes and passes[0].num_classes != trained.num_classes:
        raise StoreMismatchError(
            f"{student} has {trained.num_classes} classes, {passes[0].folder} has {passes[0].num_classes}; "
            "set store.teacher to the pass it learned from"
        )
    fit_network(trained.config, store, "student")
    options = config.evaluate
    if options.max_shift is not None:
        require_images(store, f"evaluate.max_shift={options.max_shift}", "set it to null")
    subject = Subject(
        model=model.to(resolve_device("evaluate.device", options.device)),
        input_size=trained.input_size,
    )
    splits, tables, shown = {}, [], []
    per_split = 0 if store.is_table else -(-options.num_pictures // len(options.splits))
    for split in options.splits:
        dataset = open_split(store, passes, split, trained)
        judged = judge_records(subject, dataset, options)
        splits[split] = metrics_of(judged, options.group_sets)
        tables.append(record_table(split, judged))
        if options.max_shift is not None:
            splits[split]["shift"] = shift_curves(
                subject, dataset, max_shift=options.max_shift, records=options.shift_records
            )
        positions = list(range(min(per_split, len(dataset))))
        if positions:
            shown.append(picture_maps(subject, dataset, positions, options.frame))
    if shown:
        tensors = {name: torch.cat([part[name] for part in shown]) for name in shown[0]}
        write_atomically(folder / PICTURES_NAME, save(tensors))
    write_table(folder / RECORDS_NAME, pa.concat_tables(tables))
    return splits


if __name__ == "__main__":
    main("evaluate", run, __doc__)
