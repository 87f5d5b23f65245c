"""Train one student from a store; no teacher runs.

    python -m stages.distill experiment=demo
    python -m stages.distill store.path=stores/demo run=my-student student=cifar student.name=resnet8 \\
        method=e2kd method.tau=4 method.lambda_map=3

Reads   <store.path> and one teacher pass in it (`store.teacher=` where there are several)
Writes  runs/<run>/distill/: model.safetensors, model.json, checkpoint.pt, metrics.jsonl, tensorboard/, config.yaml
Again   the same command goes on from the last checkpoint; a finished run is left as it is
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.commandline import main
from pipeline.config import ConfigError, LabelsConfig, require
from pipeline.progress import progress
from pipeline.runs import TrainedModel, is_finished, open_run, save_cost, save_model
from pipeline.store.files import sha256_file
from pipeline.store.manifest import StoreMismatchError
from pipeline.store.reader import Store

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipeline.config import DistillConfig
    from pipeline.store.reader import TeacherPass


@dataclass(frozen=True, kw_only=True)
class DistillResult:
    """Where the student is; 0 epochs where it was finished already."""

    student: str
    trained_epochs: int


def run(config: DistillConfig, on_epoch: Callable[[int, str], None] | None = None) -> DistillResult:
    """Train and export the student; `on_epoch` replaces the progress bar."""
    store = Store(Path(config.store.path))
    passes = open_passes(config, store)
    folder = open_run("distill", config.run, config, fingerprint_inputs(config, store, passes))
    if is_finished(folder):
        return DistillResult(student=str(folder), trained_epochs=0)
    if on_epoch is not None:
        return _train(config, store, passes, folder, on_epoch)
    with progress("distill", total=config.trainer.epochs, unit="epoch") as bar:

        def update_bar(epoch: int, line: str) -> None:
            bar.update(1)
            bar.set_postfix_str(line)

        return _train(config, store, passes, folder, update_bar)


def fingerprint_inputs(
    config: DistillConfig, store: Store, passes: list[TeacherPass]
) -> dict[str, str]:
    """Of all that a student is made from, beside its config."""
    inputs = {"store": store.manifest.fingerprint}
    inputs |= {f"teacher {teacher.name}": teacher.manifest.fingerprint for teacher in passes}
    weights = config.student.weights
    if weights == "pretrained":
        inputs["student.weights"] = weights  # the network's name says which
    elif weights is not None:
        require(
            Path(weights).is_file(), f"student.weights={weights} does not exist; correct the path"
        )
        inputs["student.weights"] = sha256_file(Path(weights))
    return inputs


def open_passes(config: DistillConfig, store: Store) -> list[TeacherPass]:
    """None for labels only, where a store without a teacher will do."""
    if isinstance(config.method, LabelsConfig):
        return []
    return store.open_passes(config.store.teacher)


def _check_passes(config: DistillConfig, passes: list[TeacherPass], needs_maps: bool) -> None:
    """StoreMismatchError unless one student can learn from all of them."""
    for teacher in passes:
        if needs_maps and teacher.explainer is None:
            raise StoreMismatchError(
                f"{teacher.folder} holds no maps, method={config.method.kind} needs them; "
                "run stages.precompute with annotate.payloads=[logits,map]"
            )
        for what in ("num_classes", "explainer"):
            if getattr(teacher, what) != getattr(passes[0], what):
                raise StoreMismatchError(
                    f"the teachers of one student differ in {what}: {passes[0].name} has "
                    f"{getattr(passes[0], what)}, {teacher.name} has {getattr(teacher, what)}; choose other passes"
                )
    weights = _teacher_weights(config)
    if len(weights) not in (0, len(passes)):
        raise ConfigError(
            f"method.teacher_weights={list(weights)} must name one weight for each of the {len(passes)} "
            f"passes of store.teacher: {', '.join(teacher.name for teacher in passes)}"
        )


def _teacher_weights(config: DistillConfig) -> tuple[float, ...]:
    return () if isinstance(config.method, LabelsConfig) else config.method.teacher_weights


def _train(
    config: DistillConfig,
    store: Store,
    passes: list[TeacherPass],
    folder: Path,
    on_epoch: Callable[[int, str], None],
) -> DistillResult:
    from pipeline.explainers import DEFAULT_EXPLAINER
    from pipeline.losses import build_loss
    from pipeline.selection import select_training_rows
    from pipeline.stream import StoreDataset
    from pipeline.training_run import TrainingPlan, train_to_end

    rows = select_training_rows(store.index, config.split, config.subset)
    loss = build_loss(config.method)
    if passes:
        _check_passes(config, passes, needs_maps=loss.needs_maps(0))
    explainer = passes[0].explainer if passes else None
    plan = TrainingPlan(
        dataset=StoreDataset(store, rows, passes),
        model=config.student,
        num_classes=passes[0].num_classes if passes else len(store.manifest.classes),
        loss=loss,
        augment=config.augment,
        optimizer=config.optimizer,
        trainer=config.trainer,
        seed=config.seed,
        explainer=explainer or DEFAULT_EXPLAINER,
        teacher_weights=_teacher_weights(config),
    )
    batch_size = config.trainer.batch_size
    records = len(rows) // batch_size * batch_size
    epochs = 0
    started = time.monotonic()

    def count(epoch: int, line: str) -> None:
        nonlocal epochs, started
        now = time.monotonic()
        save_cost(folder, now - started, records)
        epochs, started = epochs + 1, now
        on_epoch(epoch, line)

    model = train_to_end(plan, folder, count)
    trained = TrainedModel(
        config=config.student,
        num_classes=plan.num_classes,
        input_size=plan.input_size,
        teachers=tuple(teacher.name for teacher in passes),
        split=config.split,
        subset=config.subset,
    )
    save_model(folder, model, trained)
    return DistillResult(student=str(folder), trained_epochs=epochs)


if __name__ == "__main__":
    main("distill", run, __doc__)
