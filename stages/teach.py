"""Train a teacher on a store's labels.

    python -m stages.teach experiment=demo
    python -m stages.teach store.path=stores/demo run=my-teacher teacher=cifar teacher.name=resnet20 \\
        teaching.split=train teaching.trainer.epochs=30
    python -m stages.teach store.path=stores/digits run=explaining teaching=ked teacher=additive \\
        black_box=cifar black_box.name=resnet8 black_box.weights=runs/black-box/teach/model.safetensors

teaching=ked finds the superfeatures of a trained network first (KED, Algorithm 1) and trains a network that
explains by them.

Reads   <store.path> (packed; no teacher pass is needed)
Writes  runs/<run>/teach/: model.safetensors, model.json, checkpoint.pt, metrics.jsonl, metrics.json, config.yaml;
        with teaching=ked also partition.safetensors there, and <store.path>/artifacts/partition-<fp8>/
Again   the same command goes on from the last checkpoint; a finished run is left as it is
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.cli import main
from pipeline.cluster.executors import run_training
from pipeline.config.models import AdditiveModelConfig, NoModelConfig, is_published
from pipeline.config.paths import with_absolute_paths
from pipeline.config.runs import open_run
from pipeline.core.errors import require
from pipeline.core.files import sha256_file, sha256_json, write_atomically
from pipeline.core.progress import show_epochs
from pipeline.models.resolve import fit_teach
from pipeline.models.saved import MODEL_NAME, is_finished, load_model
from pipeline.store.reader import Store
from pipeline.training.teach_job import Teaching

if TYPE_CHECKING:
    from pipeline.config.models import ModelConfig
    from pipeline.config.verbs import TeachConfig


@dataclass(frozen=True, kw_only=True)
class TeachResult:
    """The trained teacher and how good it is."""

    weights: str
    accuracy: dict[str, float]
    """By split of evaluate.splits; empty where a record has many labels."""
    f1: dict[str, float]
    """The same of many labels a record; empty where it has one."""


def run(config: TeachConfig) -> TeachResult:
    """Train, export, judge."""
    store = Store(Path(config.store.path))
    # Weights are what this stage makes: a file is named for a later precompute. Published ones are a start.
    if not is_published(config.teacher.weights):
        config = replace(config, teacher=replace(config.teacher, weights=None))
    config = fit_teach(config, store)
    inputs = {"store": store.manifest.fingerprint}
    start = config.teaching.start
    if start is not None and is_published(start):
        inputs["start"] = _exact_name(config.teacher, start)
    elif start is not None:
        require(Path(start).is_file(), f"teaching.start={start} does not exist; correct the path")
        inputs["start"] = sha256_file(Path(start))
    if isinstance(config.teacher, AdditiveModelConfig) and config.teacher.partition is not None:
        from pipeline.models.additive.partition import build_partition

        inputs["teacher.partition"] = build_partition(config.teacher).sha256
    if config.asks_black_box and not isinstance(config.black_box, NoModelConfig):
        from pipeline.models.fingerprint import describe_teacher

        asked = describe_teacher(config.black_box, len(store.manifest.classes), section="black_box")
        inputs["black_box"] = sha256_json(asked)
    folder = open_run("teach", config.run, config, inputs)
    _check_splits(config, store)
    if not is_finished(folder):
        job = Teaching(config=with_absolute_paths(config), folder=folder.absolute())
        with show_epochs("teach", config.teaching.trainer.epochs) as show:
            run_training(job, config.cluster, show)
    metrics_path = folder / "metrics.json"
    if not metrics_path.exists():
        splits = _judge(config, store, folder)
        write_atomically(metrics_path, json.dumps({"splits": splits}, indent=1).encode())
    judged = json.loads(metrics_path.read_text())["splits"]
    accuracy, f1 = (
        {split: metrics[name] for split, metrics in judged.items() if name in metrics}
        for name in ("accuracy", "f1")
    )
    return TeachResult(weights=str(folder / MODEL_NAME), accuracy=accuracy, f1=f1)


def _exact_name(teacher: ModelConfig, start: str) -> str:
    """Published weights by the name that their provider gives them."""
    from pipeline.models.providers import name_weights

    return name_weights(replace(teacher, weights=start)).weights or start


def _check_splits(config: TeachConfig, store: Store) -> None:
    known = list(dict.fromkeys(shard.split for shard in store.manifest.shards))
    for split in (config.teaching.split, *config.evaluate.splits):
        require(split in known, f"the store has no split {split!r}; it has: {', '.join(known)}")


def _judge(config: TeachConfig, store: Store, folder: Path) -> dict[str, dict[str, Any]]:
    from pipeline.core.devices import resolve_device
    from pipeline.evaluation.forward import Subject, judge_split
    from pipeline.loading.dataset import StoreDataset
    from pipeline.loading.selection import rows_of_split

    model, trained = load_model(folder)
    device = resolve_device("evaluate.device", config.evaluate.device)
    subject = Subject(model=model.to(device), input_size=trained.input_size)
    return {
        split: judge_split(
            subject,
            StoreDataset(store, rows_of_split(store.index, split), with_regions=True),
            config.evaluate,
        )
        for split in config.evaluate.splits
    }


if __name__ == "__main__":
    main("teach", run, __doc__)
