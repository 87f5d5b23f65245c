"""Train a teacher on a store's labels.

    python -m stages.teach experiment=demo
    python -m stages.teach store.path=stores/demo run=my-teacher teacher=cifar teacher.name=resnet20 \\
        teaching.split=train teaching.trainer.epochs=30

Reads   <store.path> (packed; no teacher pass is needed)
Writes  runs/<run>/teach/: model.safetensors, model.json, checkpoint.pt, metrics.jsonl, metrics.json, config.yaml
Again   the same command goes on from the last checkpoint; a finished run is left as it is
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.commandline import main
from pipeline.progress import progress
from pipeline.runs import TrainedModel, is_finished, open_run, save_model
from pipeline.store.files import write_atomically
from pipeline.store.reader import Store

if TYPE_CHECKING:
    from pipeline.config import TeachConfig


@dataclass(frozen=True, kw_only=True)
class TeachResult:
    """The trained teacher and how good it is."""

    weights: str
    accuracy: dict[str, float]
    """By split of evaluate.splits."""


def run(config: TeachConfig) -> TeachResult:
    """Train, export, judge."""
    store = Store(Path(config.store.path))
    # Weights are what this stage makes; naming a file for a later precompute starts nothing from it.
    config = replace(config, teacher=replace(config.teacher, weights=None))
    folder = open_run("teach", config.run, config, {"dataset": store.manifest.dataset.fingerprint})
    metrics_path = folder / "metrics.json"
    if not (is_finished(folder) and metrics_path.exists()):
        _train_and_judge(config, store, folder, metrics_path)
    metrics = json.loads(metrics_path.read_text())
    return TeachResult(
        weights=str(folder / "model.safetensors"),
        accuracy={split: judged["accuracy"] for split, judged in metrics["splits"].items()},
    )


def _train_and_judge(config: TeachConfig, store: Store, folder: Path, metrics_path: Path) -> None:
    from pipeline.evaluation.judge import Subject, judge_split
    from pipeline.losses import TEACHINGS
    from pipeline.models import freeze
    from pipeline.selection import rows_of_split
    from pipeline.stream import StoreDataset
    from pipeline.training_run import TrainingPlan, train_to_end

    teaching = config.teaching
    num_classes = len(store.manifest.classes)
    rows = rows_of_split(store.index, teaching.split)
    plan = TrainingPlan(
        dataset=StoreDataset(store, rows),
        model=config.teacher,
        num_classes=num_classes,
        loss=TEACHINGS[teaching.kind](teaching),
        augment=teaching.augment,
        optimizer=teaching.optimizer,
        trainer=teaching.trainer,
        seed=config.seed,
    )
    with progress("teach", total=teaching.trainer.epochs, unit="epoch") as bar:

        def on_epoch(epoch: int, line: str) -> None:
            bar.update(1)
            bar.set_postfix_str(line)

        model = train_to_end(plan, folder, on_epoch)
    subject = Subject(model=freeze(model), input_size=plan.input_size)
    splits = {
        split: judge_split(
            subject,
            StoreDataset(store, rows_of_split(store.index, split), with_regions=True),
            config.evaluate,
        )
        for split in config.evaluate.splits
    }
    write_atomically(metrics_path, json.dumps({"splits": splits}, indent=1).encode())
    trained = TrainedModel(
        config=config.teacher, num_classes=num_classes, input_size=plan.input_size, teacher=None
    )
    save_model(folder, model, trained)


if __name__ == "__main__":
    main("teach", run, __doc__)
