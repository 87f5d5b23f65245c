"""Train a teacher on a store's labels.

    permafrost teach experiment=demo
    permafrost teach store.path=stores/demo run=my-teacher teacher=cifar teacher.name=resnet20 \\
        teaching.split=train teaching.trainer.epochs=30

Reads   <store.path> (packed, without a teacher pass)
Writes  runs/<run>/teach/: model.safetensors, model.json, checkpoint.pt, metrics.jsonl, metrics.json, config.yaml,
        tensorboard/; a teaching with a preparation also writes its result here, and as an artifact of the store
Rerun   the same command resumes from the last checkpoint, and does not change a finished run
"""

from __future__ import annotations

import logging
import shlex
from dataclasses import dataclass
from pathlib import Path

from permafrost.config.teaching import TeachConfig
from permafrost.core.progress import show_epochs
from permafrost.evaluation.evaluator import numbers_of
from permafrost.evaluation.results import METRICS_NAME, PICTURE, read_metrics_file
from permafrost.models.saved import SavedNetwork
from permafrost.models.trained_weights import MODEL_NAME
from permafrost.storage.signed_files import write_json
from permafrost.store.reader import Store
from permafrost.training.job import TrainingProgress
from permafrost.training.teach_job import TeacherPlan, check_splits, plan_teacher

logger = logging.getLogger("permafrost.teach")


@dataclass(frozen=True, kw_only=True)
class TeachResult:
    """The trained teacher and its metrics."""

    weights: str
    accuracy: dict[str, float]
    """Accuracy by split of evaluate.splits, empty if records have many labels."""
    f1: dict[str, float]
    """F1 by split of evaluate.splits, empty if records have one label."""
    last_epoch: str = ""
    """Mean loss and training accuracy of the last epoch, if this call trained."""
    picture: str = ""
    """Picture of an image on which they were measured (evaluate.frame), empty for a table."""
    records_per_second: str = ""
    next: str = ""


def teach_network(config: TeachConfig) -> TeachResult:
    """Train, export and evaluate the teacher."""
    plan = plan_teacher(config)
    with plan.open_folder():
        return _train(plan)


def _train(plan: TeacherPlan) -> TeachResult:
    """Train and evaluate the teacher in its folder, as far as it is not done."""
    config, store, folder = plan.options, plan.store, plan.folder
    check_splits(config, store)
    progress = TrainingProgress()
    metrics_path = folder / METRICS_NAME
    advice = "delete it, and the same command evaluates the teacher again"
    measured = read_metrics_file(metrics_path, advice) if metrics_path.exists() else {}
    if plan.is_finished:
        logger.info("%s is finished", folder)
    else:
        logger.info(
            "teacher %(teacher)s, teaching=%(teaching)s, from %(weights)s weights: %(records)s, "
            "trainer.epochs=%(epochs)s, into %(folder)s",
            plan.describe_work(),
        )
        with show_epochs("teach", plan.trainer.epochs, plan.records) as show:
            progress = plan.finish(show)
    trained = SavedNetwork(folder).describe().in_frame(config.evaluate.frame, store)
    picture = str(trained.picture or "")
    if measured.get(PICTURE) != picture:
        from permafrost.evaluation.forward import evaluate_model  # imports torch

        splits = evaluate_model(folder, store, config.evaluate)
        measured = {"splits": splits, PICTURE: picture}
        write_json(metrics_path, measured)
        numbers = {split: numbers_of(metrics) for split, metrics in splits.items()}
        plan.tracked.add_results("evaluate", numbers)
    splits = measured["splits"]
    accuracy, f1 = (
        {split: metrics[name] for split, metrics in splits.items() if name in metrics}
        for name in ("accuracy", "f1")
    )
    for split, value in accuracy.items():
        chance = splits[split].get("majority_accuracy", 0)
        if value <= chance < 1:
            logger.warning(
                "accuracy on %s is %.3f, and that of the most frequent class alone would be %.3f: the teacher has "
                "hardly learned; train it longer (teaching.trainer.epochs=) or with another teaching.optimizer.lr=, or "
                "look at the labels",
                split,
                value,
                chance,
            )
    weights = str(folder / MODEL_NAME)
    return TeachResult(
        weights=weights,
        accuracy=accuracy,
        f1=f1,
        picture=picture,
        last_epoch=progress.last_line,
        records_per_second=progress.rate(folder),
        next=_next_command(config, store, weights),
    )


def _next_command(config: TeachConfig, store: Store, weights: str) -> str:
    arguments = [f"store.path={config.store.path}", f"run={config.run}", "teacher=saved"]
    arguments.append(f"teacher.weights={Path(weights).parent}")
    if not store.form.has_places:
        arguments.append(f"annotate.payloads=[{','.join(config.teacher.table_payloads)}]")
    return " ".join(["permafrost precompute", *map(shlex.quote, arguments)])
